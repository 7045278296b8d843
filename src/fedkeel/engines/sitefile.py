"""What a site is: site.toml, which says it of itself and stays there, and `members`, by which a coordinator knows it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkeel.recipe.settings import ConfigError, build, needed, number, read_toml
from fedkeel.types import FedKeelError

MEMBERS = "members"  # in the coordinator's state: a line "NODE_ID NAME" for each key that was registered
LONGEST_SOCKET = 100  # bytes; the system allows 107


EXTRA = re.compile(r"pip install 'fedkeel\[([^\]']+)\]'")


class SiteFileError(FedKeelError):
    """A site.toml that cannot be used; the text names the file and the key."""


@dataclass(frozen=True)
class SiteFile:
    """What a site's own site.toml says; none of it leaves the site but the name.

    data: keys of the recipe's [data] that say where rows are. state: the folder of what the site keeps. socket, key: of the
    warm worker; warm: whether there is one. idle: seconds after which a worker that nobody asks ends. recipe_sha256: of the
    recipe.toml that the site agreed to; empty: it agrees to any.
    """

    path: Path
    name: str
    state: Path
    device: str = "cpu"
    threads: int = 1
    base: str = ""
    data: Mapping[str, Any] = field(default_factory=dict, hash=False)
    warm: bool = True
    socket: Path = Path()
    key: Path = Path()
    idle: float = 3600.0
    recipe_sha256: str = ""


@dataclass(frozen=True)
class _Model:
    base: str = ""


@dataclass(frozen=True)
class _Data:
    """The keys of a recipe's [data] that say where rows are."""

    root: str = ""
    files: tuple[str, ...] = ()
    tasks_file: str = ""
    site_column: str = ""
    dataset: str = ""
    subset: str = ""


@dataclass(frozen=True)
class _Worker:
    warm: bool = True
    socket: str = ""
    key: str = ""
    idle: float = number(3600.0, 0, above=True, infinite=True)


@dataclass(frozen=True)
class _Told:
    """The keys of site.toml; what they mean stands at `SiteFile`."""

    name: str = needed("the site's name in the federation")
    state: str = "state"
    device: str = "cpu"
    threads: int = number(1, 1)
    recipe_sha256: str = ""
    model: _Model = field(default_factory=_Model)
    data: _Data = field(default_factory=_Data)
    worker: _Worker = field(default_factory=_Worker)


def read_site(path: Path) -> SiteFile:
    """The site's file, with every path absolute. Raises SiteFileError naming the file and the key."""
    try:
        tree = read_toml(path, "site file")
        told = build(_Told, tree, str(path))
    except ConfigError as error:
        raise SiteFileError(str(error)) from None

    def absolute(key: str, value: str | Path) -> Path:
        try:
            return (path.absolute().parent / Path(value).expanduser()).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of a user that there is not
            raise SiteFileError(f"{path}: {key} = {str(value)!r} is no path: {error}") from error

    state, base, worker = absolute("state", told.state), told.model.base, told.worker
    data = {key: getattr(told.data, key) for key in tree.get("data", {})}  # a key that is not given is the recipe's
    if "root" in data:
        data["root"] = str(absolute("data.root", data["root"]))
    socket = absolute("worker.socket", worker.socket or state / "worker.sock")
    if len(os.fsencode(socket)) > LONGEST_SOCKET:
        raise SiteFileError(
            f"{path}: worker.socket = {socket}: at most {LONGEST_SOCKET} bytes are possible; choose a shorter path"
        )
    return SiteFile(
        path=path.absolute(),
        name=told.name,
        state=state,
        device=told.device,
        threads=told.threads,
        base=str(absolute("model.base", base)) if base.startswith((".", "~", "/")) else base,
        data=data,
        warm=worker.warm,
        socket=socket,
        key=absolute("worker.key", worker.key or state / "worker.key"),
        idle=worker.idle,
        recipe_sha256=told.recipe_sha256,
    )


def read_members(path: Path) -> dict[str, int] | None:
    """site -> the node that its key was registered as, from the lines "NODE_ID NAME" that `register.sh` writes; of a name that
    stands there twice, the last. None where there is no such file. Raises SiteFileError naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise SiteFileError(
            f"{path.absolute()} cannot be read: {error}; register.sh writes it, run as SuperLink's user"
        ) from error
    found = {}
    for count, line in enumerate(lines, 1):
        node, _, name = line.partition(" ")
        if not (node.isascii() and node.isdigit() and len(node) <= 20 and name):
            raise SiteFileError(
                f"{path.absolute()}, line {count}: a node's number and a site's name belong there, not {line!r}"
            )
        found[name] = int(node)
    return found


def for_a_part(text: str) -> str:
    """What goes wrong, where FedKeel is on no index: an extra comes from the wheels of the deployment's part."""
    how = "pip install --no-index --find-links wheelhouse -r requirements.txt, in the site's part, whose line fedkeel[…] names"
    return EXTRA.sub(rf"{how} \1", text)
