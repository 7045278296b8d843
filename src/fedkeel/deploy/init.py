"""What a coordinator and each site of a deployment need, written once: `fedkeel deploy init`. docs/deploy.md walks through it.

The folder holds one part a machine, and a part never holds another machine's private key:

    app/            the Flower app: two names, the recipe, the manifest. No data, no weights, no key
    ca/             the private authority's key and certificate: stays offline
    coordinator/    TLS key and certificate, the sites' public keys, the gate, how to start, what to install
    site-NAME/      the site's private key, site.toml, how to start, what to install
    image/          a Dockerfile, for those who use the Compose files
    CHECKLIST.md    what to copy where, what must never leave, in which order to start

Flower 1.41 answers three interfaces on one port: Fleet (sites), Control (start a run, register a key) and Runtime (apps). Only
Fleet knows who is asking. Whoever reaches the port can therefore start an app of their own, at every site. So SuperLink listens
on the coordinator's loopback address only, and the gate, an nginx of one page, lets nothing but Fleet through.

Imports neither torch nor Flower; `cryptography` comes with Flower.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from fedkeel.deploy.keys import AUTHORITY_DAYS, SERVER_DAYS, certificate, is_ip, new_key, pem, ssh_pair
from fedkeel.deploy.manifest import DeployError, make_manifest
from fedkeel.deploy.parts import Plan, app_files, check_list, coordinator_files, image_files, joined, site_files
from fedkeel.files import filled_folder
from fedkeel.model.bases import folder_of
from fedkeel.recipe.checks import check_deployed, check_enough
from fedkeel.recipe.load import make_recipe, read_tree
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError, to_toml
from fedkeel.tables import BASELINES, BASES, SOURCES

SITE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
DNS_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
PRIVATE = ("ca.key", "tls.key", "node.key", "worker.key", "site.toml")  # files that only their owner may read


def check_sites(names: Sequence[str]) -> tuple[str, ...]:
    """The sites' names. They become folders, file names and words of shell scripts. Raises DeployError."""
    if not names:
        raise DeployError("--sites is empty: name the sites, joined by commas, as in --sites clinic-a,clinic-b")
    for name in names:
        if not SITE_NAME.fullmatch(name):
            raise DeployError(
                f"site {name!r}: 1 to 64 letters, digits, '.', '_' and '-' belong here, the first and the last a letter or "
                f"digit"
            )
    folded = [name.lower() for name in names]  # some file systems do not tell A from a
    twice = sorted({name for name in names if folded.count(name.lower()) > 1})
    if twice:
        raise DeployError(f"--sites names {' and '.join(twice)}: names must differ, in more than capitals")
    return tuple(names)


def check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """DNS names or IP addresses of the coordinator; the first is what sites dial. Raises DeployError."""
    if not hosts:
        raise DeployError("--host is empty: name the coordinator as sites reach it, as in --host coordinator.example")
    for host in hosts:
        labels = host.split(".")
        dns = len(host) <= 253 and all(DNS_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
        if not (is_ip(host) or dns):
            raise DeployError(f"host {host!r}: a DNS name or an IP address belongs here, without scheme, port or wildcard")
    return tuple(hosts)


class AppRecipe(NamedTuple):
    """recipe: as it travels. base: the folder of its base if that is here. notes: what differs from the recipe as written."""

    recipe: Recipe
    base: Path | None
    notes: tuple[str, ...]


def app_recipe(path: Path, overrides: Sequence[str] = ()) -> AppRecipe:
    """The recipe as it travels: every key, no path of this machine, an order of tasks and a chat template's file written out,
    and no baseline on pooled rows.

    Rows are not looked for; data.tasks_file is, if stream.order names an order of it. Raises ConfigError, or DeployError for a
    recipe that a deployment does not run.
    """
    recipe = make_recipe(read_tree(path, overrides), data=False, order=True)
    evaluation = recipe.evaluation
    try:
        check_deployed(recipe, 0)
    except ConfigError as error:
        raise DeployError(f"{path}: {error}") from error
    if recipe.partition.scheme != "natural":
        raise DeployError(
            f"{path}: partition.scheme = {recipe.partition.scheme!r} deals rows that lie in one place; in a deployment a site "
            f"holds its own rows: set it to 'natural'"
        )
    pooling = [name for name in evaluation.baselines if BASELINES[name].pools]
    notes = [f"evaluation.baselines: {name!r} is left out, as rows never come together in a deployment" for name in pooling]
    if SOURCES[recipe.data.source].everywhere:
        notes.append(
            f"data.source = {recipe.data.source!r} is found anew at each site; for rows of a site's own write "
            f"data.source = 'files', and where they are into its site.toml"
        )
    if SOURCES[recipe.data.source].files and not recipe.data.tasks_file:
        notes.append(
            "data.tasks_file is not set: where rows have labels, sites that do not all hold the same ones disagree, and "
            'nothing is trained. Write {"TASK": {"labels": [...]}}, TASK being "default" where rows name none, and give every '
            "site that file"
        )
    base = Path(recipe.model.base).expanduser()
    here = base.resolve() if base.is_dir() else None
    if recipe.model.base in BASES:
        base, folder = Path(recipe.model.base), folder_of(recipe.model.base)
        here = folder if folder.is_dir() else None
    elif base.suffix == ".gguf" and base.is_file():
        from fedkeel.model.gguf import dequantised  # heavy

        here = dequantised(base.resolve())
    named = base.name if here or base.is_absolute() else recipe.model.base
    travels = replace(
        recipe,
        out="runs",
        threads=0,
        model=replace(recipe.model, base=named, device="cpu"),
        data=replace(recipe.data, root=""),
        # the coordinator has no tasks file to look an order up in
        stream=replace(recipe.stream, order="", tasks_a_stage=1),
        evaluation=replace(evaluation, baselines=tuple(name for name in evaluation.baselines if name not in pooling)),
    )
    return AppRecipe(travels, here, tuple(notes))


def init(
    folder: Path, recipe: Recipe, sites: Sequence[str], hosts: Sequence[str], port: int = 9443, base: Path | None = None
) -> str:
    """Write the folder of a deployment, whole or not at all; returns the check list.

    recipe: of `app_recipe`. hosts: names of the coordinator, the first is what sites dial. base: a folder to take the base's
    hashes from; None: the manifest holds none. Raises DeployError on a bad name or address, or if `folder` exists or cannot be
    written.
    """
    sites, hosts = check_sites(sites), check_hosts(hosts)
    if not 1024 <= port <= 65534:
        raise DeployError(
            f"--port {port}: 1024 to 65534 belongs here; the gate runs as a plain user, who may not open one below, and the "
            f"number after it is SuperLink's, on the loopback address"
        )
    if os.path.lexists(folder):
        raise DeployError(f"{folder} exists; name a folder that does not, as its keys may be in use")
    check_enough(recipe, len(sites))
    text = to_toml(recipe)
    manifest = make_manifest(recipe, text, sites, joined(hosts[0], port), base)
    plan = Plan(recipe, text, manifest, sites, hosts, port)
    todo = check_list(plan, SERVER_DAYS)
    secret = _secrets(plan)
    with _whole(folder) as partial:
        _write(partial, {"CHECKLIST.md": todo})
        _write(partial / "app", app_files(plan))
        _write(partial / "ca", secret["ca"])
        _write(partial / "image", image_files(plan))
        _write(partial / "coordinator", coordinator_files(plan) | secret["coordinator"], state=True)
        for name in sites:
            _write(partial / f"site-{name}", site_files(plan, name) | secret[f"site-{name}"], state=True)
    return todo


def _secrets(plan: Plan) -> dict[str, dict[str, str | bytes]]:
    """part -> its keys and certificates, all fresh."""
    authority_key, server_key = new_key(), new_key()
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = certificate(f"FedKeel authority {secrets.token_hex(4)}", authority_key, AUTHORITY_DAYS)
    names = tuple(dict.fromkeys([*plan.hosts, "localhost", "127.0.0.1", "::1"]))  # Flower's own processes dial the loopback
    server = certificate("FedKeel coordinator", server_key, SERVER_DAYS, names, (authority, authority_key))
    ca = authority.public_bytes(Encoding.PEM)
    coordinator: dict[str, str | bytes] = {
        "ca.pem": ca,
        "tls.key": pem(server_key),
        "tls.pem": server.public_bytes(Encoding.PEM),
    }
    found: dict[str, dict[str, str | bytes]] = {"ca": {"ca.key": pem(authority_key), "ca.pem": ca}}
    found["coordinator"] = coordinator
    for name in plan.sites:
        private, public = ssh_pair(new_key(), name)
        coordinator[f"keys/{name}.pub"] = public
        worker = secrets.token_hex(32) + "\n"
        found[f"site-{name}"] = {"ca.pem": ca, "node.key": private, "node.pub": public, "worker.key": worker}
    return found


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """See `filled_folder`. Raises DeployError."""
    folder = folder.absolute()
    try:
        with filled_folder(folder) as partial:
            yield partial
    except OSError as error:
        raise DeployError(f"{folder} could not be written: {error.strerror or error}. Nothing of it is left") from error


def _write(root: Path, files: Mapping[str, str | bytes], state: bool = False) -> None:
    """The files of a part, in folders of mode 0700. state: with the folder state/, which its unit wants to be there."""
    folders = {root, *((root / name).parent for name in files)} | ({root / "state"} if state else set())
    for path in sorted(folders):
        path.mkdir(exist_ok=True, mode=0o700)
    for name, content in files.items():
        path = root / name
        # with its mode from the start: at no time can another user read a key
        mode = 0o600 if path.name in PRIVATE else 0o700 if path.suffix == ".sh" else 0o644
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        path.chmod(mode)  # whatever the umask was
