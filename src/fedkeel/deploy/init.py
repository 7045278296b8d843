"""What a coordinator and each site of a deployment need, written once: `fedkeel deploy init`. docs/deploy.md walks through it.

The folder holds one part a machine, and a part never holds another machine's private key:

    app/            the Flower app: two names, the recipe, the manifest. No data, no weights, no key
    ca/             the private authority's key and certificate: stays offline
    coordinator/    TLS key and certificate, the sites' public keys, the gate, how to start
    site-NAME/      the site's private key, site.toml, how to start
    image/          a Dockerfile, for those who use the Compose files
    CHECKLIST.md    what to copy where, what must never leave, in which order to start

Flower 1.41 answers three interfaces on one port: Fleet (sites), Control (start a run, register a key) and Runtime (apps). Only
Fleet knows who is asking. Whoever reaches the port can therefore start an app of their own, at every site. So SuperLink listens
on the coordinator's loopback address only, and the gate, an nginx of one page, lets nothing but Fleet through.

Imports neither torch nor Flower; `cryptography` comes with Flower.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fedkeel.recipe.load import make_recipe, read_tree
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import to_toml

if TYPE_CHECKING:
    pass

from fedkeel.deploy.keys import AUTHORITY_DAYS, SERVER_DAYS, _is_ip, certificate, new_key, pem, ssh_pair
from fedkeel.deploy.manifest import DeployError, _manifest
from fedkeel.deploy.parts import DOCKERFILE, EMBEDDED, _app, _check_list, _coordinator, _site, joined

SITE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
DNS_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")


# Names and addresses


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
        if not (_is_ip(host) or dns):
            raise DeployError(f"host {host!r}: a DNS name or an IP address belongs here, without scheme, port or wildcard")
    return tuple(hosts)


# The recipe and the manifest


def app_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path | None]:
    """(the recipe as it travels, the folder of its base if it is here): every key, and no path of this machine.

    Rows are not looked for. Raises ConfigError, or DeployError for a recipe that a deployment does not run.
    """
    recipe = make_recipe(read_tree(path, overrides), data=False)
    if recipe.stream.order or recipe.stream.stages:
        raise DeployError(
            f"{path}: a task stream runs in one process or in the simulation, not in a deployment: leave [stream] out"
        )
    if recipe.partition.scheme != "natural":
        raise DeployError(
            f"{path}: partition.scheme = {recipe.partition.scheme!r} deals rows that lie in one place; in a deployment a site "
            f"holds its own rows: set it to 'natural'"
        )
    base = Path(recipe.model.base).expanduser()
    here = base.resolve() if base.is_dir() else None
    if recipe.model.base == EMBEDDED:
        base, here = Path(EMBEDDED), Path(__file__).parents[1] / "keel_nano"
    named = base.name if here or base.is_absolute() else recipe.model.base
    travels = replace(
        recipe,
        out="runs",
        threads=0,
        model=replace(recipe.model, base=named, device="cpu"),
        data=replace(recipe.data, root=""),
    )
    return travels, here


def _write(root: Path, files: Mapping[str, str | bytes], private: Sequence[str] = ()) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # with its mode from the start: at no time can another user read a key
        mode = 0o600 if name in private else 0o700 if name.endswith(".sh") else 0o644
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        path.chmod(mode)  # whatever the umask was


def init(
    folder: Path, recipe: Recipe, sites: Sequence[str], hosts: Sequence[str], port: int = 9443, base: Path | None = None
) -> str:
    """Write the folder of a deployment, whole or not at all; returns the check list.

    recipe: of `app_recipe`. hosts: names of the coordinator, the first is what sites dial. base: a folder to take the base's
    hashes from; None: the manifest holds none. Raises DeployError on a bad name or address, or if `folder` exists.
    """
    sites, hosts = check_sites(sites), check_hosts(hosts)
    if not 1 <= port <= 65534:
        raise DeployError(
            f"--port {port}: 1 to 65534 belongs here; the number after it is SuperLink's, on the loopback address"
        )
    if os.path.lexists(folder):
        raise DeployError(f"{folder} exists; name a folder that does not, as its keys may be in use")
    address = joined(hosts[0], port)
    text = to_toml(recipe)
    manifest = json.dumps(_manifest(recipe, text, sites, address, base), indent=1) + "\n"
    authority_key, server_key = new_key(), new_key()
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = certificate(f"FedKeel authority {secrets.token_hex(4)}", authority_key, AUTHORITY_DAYS)
    names = tuple(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))  # Flower's own processes dial the loopback
    server = certificate("FedKeel coordinator", server_key, SERVER_DAYS, names, (authority, authority_key))
    ca = authority.public_bytes(Encoding.PEM)
    check_list = _check_list(hosts, port, sites, SERVER_DAYS, base is not None)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))  # mode 0700
    try:
        _write(partial / "app", _app(recipe, text, manifest, sites))
        _write(partial / "ca", {"ca.key": pem(authority_key), "ca.pem": ca}, ["ca.key"])
        coordinator: dict[str, str | bytes] = {**_coordinator(hosts, port), "ca.pem": ca}
        coordinator |= {"tls.key": pem(server_key), "tls.pem": server.public_bytes(Encoding.PEM)}
        for number, name in enumerate(sites):
            private, public = ssh_pair(new_key(), name)
            coordinator[f"keys/{name}.pub"] = public
            files: dict[str, str | bytes] = {**_site(name, number, recipe, address)}
            files |= {"ca.pem": ca, "recipe.toml": text, "manifest.json": manifest, "node.key": private, "node.pub": public}
            files["worker.key"] = secrets.token_hex(32) + "\n"
            _write(partial / f"site-{name}", files, ["node.key", "worker.key", "site.toml"])
        _write(partial / "coordinator", coordinator, ["tls.key"])
        _write(partial / "image", {"Dockerfile": DOCKERFILE})
        _write(partial, {"CHECKLIST.md": check_list})
        partial.rename(folder.absolute())
    except OSError as error:
        raise DeployError(f"{folder} could not be written: {error.strerror or error}. Nothing of it is left") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return check_list
