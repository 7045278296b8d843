"""What a site is: site.toml, which says it of itself and stays there, and `members`, by which a coordinator knows it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkeel.types import FedKeelError

MEMBERS = "members"  # in the coordinator's state: a line "NODE_ID NAME" for each key that was registered
LONGEST_SOCKET = 100  # bytes; the system allows 107
PLACES = ("root", "files", "tasks_file", "site_column", "dataset", "subset")  # keys of [data] that say where rows are


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


def read_site(path: Path) -> SiteFile:
    """The site's file, with every path absolute. Raises SiteFileError naming the file and the key."""

    def wrong(what: str) -> SiteFileError:
        return SiteFileError(f"{path}: {what}")

    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise wrong(f"cannot be read: {error}") from error
    known = {"": {"name", "state", "device", "threads", "recipe_sha256"}, "model": {"base"}, "data": set(PLACES),
             "worker": {"warm", "socket", "key", "idle"}}  # fmt: skip
    tables = {table: told.get(table, {}) for table in ("model", "data", "worker")}
    for table, keys in (("", {k: v for k, v in told.items() if k not in tables}), *tables.items()):
        if not isinstance(keys, dict):
            raise wrong(f"{table} is a table of keys")
        for odd in set(keys) - known[table]:
            place = f"{table}.{odd}" if table else odd
            raise wrong(f"unknown key {place!r}; a site may set {', '.join(sorted(known[table]))} there")

    def text(table: Mapping[str, Any], key: str, default: str = "") -> str:
        value = table.get(key, default)
        if not isinstance(value, str):
            raise wrong(f"{key} = {value!r}: text belongs here")
        return value

    def number(table: Mapping[str, Any], key: str, default: float) -> float:
        value = table.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise wrong(f"{key} = {value!r}: a number above 0 belongs here")
        return float(value)

    def absolute(value: str) -> Path:
        return (path.absolute().parent / Path(value).expanduser()).resolve()

    name = text(told, "name")
    if not name:
        raise wrong("name is not set: the site's name in the federation")
    state = absolute(text(told, "state", "state"))
    base = text(tables["model"], "base")
    data = dict(tables["data"])
    if "root" in data:
        data["root"] = str(absolute(text(data, "root")))
    worker = tables["worker"]
    where = absolute(text(worker, "socket", str(state / "worker.sock")))
    if len(os.fsencode(where)) > LONGEST_SOCKET:
        raise wrong(f"worker.socket = {where}: at most {LONGEST_SOCKET} bytes are possible; choose a shorter path")
    return SiteFile(
        path.absolute(), name, state, text(told, "device", "cpu"), int(number(told, "threads", 1)),
        str(absolute(base)) if base.startswith((".", "~", "/")) else base, data, worker.get("warm", True) is True, where,
        absolute(text(worker, "key", str(state / "worker.key"))), number(worker, "idle", 3600.0),
        text(told, "recipe_sha256"),
    )  # fmt: skip


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
    for number, line in enumerate(lines, 1):
        node, _, name = line.partition(" ")
        if not (node.isascii() and node.isdigit() and name):
            raise SiteFileError(
                f"{path.absolute()}, line {number}: a node's number and a site's name belong there, not {line!r}"
            )
        found[name] = int(node)
    return found
