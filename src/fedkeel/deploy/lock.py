"""What a machine installs, held to the byte: `fedkeel deploy lock`.

pip chooses the wheels as it would install them, and tells the SHA-256 of each; nothing is installed. Beside requirements.txt in
each part come `requirements.lock`, for `pip install --require-hashes`, and `sbom.cdx.json`, the same list for scanners. Wheels
alone count: what is built from source at each machine is not the same file twice, and building runs its code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from packaging.utils import canonicalize_name  # of transformers

from fedkeel import __version__
from fedkeel.deploy.manifest import DeployError
from fedkeel.deploy.requirements import PYTHON, needed
from fedkeel.files import write_atomic

LOCK, BOM = "requirements.lock", "sbom.cdx.json"
HELD = re.compile(r"^([a-z0-9.-]+)==(\S+) \\\n    --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)
LICENSE = "License :: "


@dataclass(frozen=True)
class Release:
    """A wheel that pip chose. name: canonical. source: its file name, as a URL, or its URL on an index. asked: whether
    requirements.txt names it, and extras: those named there. about: its core metadata, by the keys of pip's report."""

    name: str
    version: str
    sha256: str
    source: str
    asked: bool
    extras: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def purl(self) -> str:
        """Its package URL. FedKeel is on no index, and who takes its name on one is somebody else."""
        kind = "generic" if self.name == "fedkeel" else "pypi"
        return f"pkg:{kind}/{self.name}@{quote(self.version, safe='')}"


def lock(folder: Path, wheels: Path | None = None, indexes: Sequence[str] = ()) -> list[str]:
    """Write requirements.lock and sbom.cdx.json into every part of a deployment, or into `folder` if it is one; a line each.

    A part's wheels are those of its own `wheelhouse`, else of `wheels`, else of the folder's `wheelhouse`; without `indexes`,
    URLs of package indexes, nothing else is looked at and no network is used. Raises DeployError, with nothing written, if a
    part cannot be installed from them.
    """
    parts = sorted(path.parent for path in (*folder.glob("requirements.txt"), *folder.glob("*/requirements.txt")))
    if not parts:
        raise DeployError(f"{folder} holds no requirements.txt: a folder that `fedkeel deploy init` wrote belongs here")
    known: dict[tuple[object, ...], list[Release]] = {}
    found = {}
    for part in parts:
        house = next((path for path in (part / "wheelhouse", wheels or folder / "wheelhouse") if path.is_dir()), None)
        if house is None:
            raise DeployError(
                f"{wheels or folder / 'wheelhouse'} is no folder: wheels belong there (CHECKLIST.md), or give --wheels"
            )
        texts = (part / "requirements.txt", part / "constraints.txt")
        same = (house, *(path.read_bytes() for path in texts if path.is_file()))
        if same not in known:
            known[same] = _chosen(part / "requirements.txt", house, indexes)
        found[part] = known[same]
    for part, releases in found.items():
        write_atomic(part / LOCK, lock_text(releases))
        write_atomic(part / BOM, json.dumps(bill(part.resolve().name, releases), indent=1) + "\n")
    return [f"{part / LOCK}: {len(releases)} wheels" for part, releases in found.items()]


def held(path: Path) -> dict[str, str]:
    """name -> release, of a requirements.lock as `lock` writes it. Raises DeployError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeployError(f"{path} cannot be read: {error}; copy it from the part as it was handed over") from error
    found = {name: release for name, release, _ in HELD.findall(text)}
    if odd := [line for line in HELD.sub("", text).splitlines() if line and not line.startswith("#")]:
        raise DeployError(f"{path}: {odd[0]!r} is not as fedkeel deploy lock writes it; copy the file from the part as it was")
    return found


def lock_text(releases: Sequence[Release]) -> str:
    """A requirements file in which every wheel has its SHA-256."""
    head = (
        f"# Written by fedkeel deploy lock, for Python {PYTHON} on a system like the one where it ran:\n"
        f"# pip install --no-index --find-links wheelhouse --require-hashes -r {LOCK}\n"
    )
    return head + "".join(f"{one.name}=={one.version} \\\n    --hash=sha256:{one.sha256}\n" for one in releases)


def bill(part: str, releases: Sequence[Release]) -> dict[str, Any]:
    """The same as a bill of materials: CycloneDX 1.5, https://cyclonedx.org/docs/1.5/json/. It says of itself that it is not
    complete: the system below Python's packages is not in it."""
    by_name = {one.name: one for one in releases}
    start = [(one.name, extra) for one in releases if one.asked for extra in ("", *one.extras)]
    needs = needed(start, lambda name: by_name[name].about.get("requires_dist", []) if name in by_name else None)
    root = f"part:{part}"
    graph = {root: {one.name for one in releases if one.asked}} | {by_name[name].purl: names for name, names in needs.items()}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid4()}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "tools": {"components": [{"type": "application", "name": "fedkeel", "version": __version__}]},
            "component": {"type": "application", "bom-ref": root, "name": part, "version": __version__},
        },
        "components": [_component(one) for one in releases],
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(by_name[name].purl for name in names if name in by_name)}
            for ref, names in sorted(graph.items())
        ],
        "compositions": [{"aggregate": "incomplete", "assemblies": [root]}],
    }


def _component(one: Release) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": one.purl,
        "name": one.name,
        "version": one.version,
        "hashes": [{"alg": "SHA-256", "content": one.sha256}],
        "purl": one.purl,
        "externalReferences": [{"type": "distribution", "url": one.source}],
    }
    if author := one.about.get("author") or one.about.get("author_email"):
        found["author"] = author
    if licenses := _licenses(one.about):
        found["licenses"] = licenses
    return found


def _licenses(about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """As the metadata tell them: an SPDX expression, or else the classifiers, or else a name; a whole text is none of these."""
    if expression := about.get("license_expression"):
        return [{"expression": expression}]
    names = [one.rpartition(" :: ")[2] for one in about.get("classifier", ()) if one.startswith(LICENSE)]
    free = (about.get("license") or "").strip()
    if not names and free and "\n" not in free:
        names = [free]
    return [{"license": {"name": name}} for name in names]


def _chosen(requirements: Path, wheels: Path, indexes: Sequence[str]) -> list[Release]:
    """The wheels that pip would install for a requirements file, by name. Raises DeployError."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command, environment = _pip(requirements, wheels, indexes, report)
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not report.is_file():
            said = _words(done.stdout, done.stderr)
            also = "".join(f" and {_open(url)}" for url in indexes)
            raise DeployError(
                f"{requirements} cannot be installed from the wheels of {wheels}{also}: {said}. What is missing belongs there: "
                f"pip wheel --no-deps -w {wheels} NAME==RELEASE"
            )
        found = list(_releases(json.loads(report.read_text(encoding="utf-8"))))
    for one in found:
        if one.name == "fedkeel" and urlsplit(one.source).scheme:
            raise DeployError(f"fedkeel is on no index, and {one.source} is somebody else's: put its wheel into {wheels}")
    return sorted(found, key=lambda one: one.name)


def _words(out: str, errors: str) -> str:
    """pip's own: what it could not bring together, where that is it, or else its errors."""
    conflict = re.search(r"The conflict is caused by:\n((?: +.+\n)+)", out)
    lines = conflict[1].splitlines() if conflict else [line for line in errors.splitlines() if line.startswith("ERROR: ")]
    return "; ".join(line.removeprefix("ERROR: ").strip() for line in lines) or errors.strip()


def _pip(requirements: Path, wheels: Path, indexes: Sequence[str], report: Path) -> tuple[list[str], dict[str, str]]:
    """(pip's command line, its environment). Without an index it is alone with the wheels, whatever it is configured to."""
    alone = [] if indexes else ["--isolated"]
    environment = dict(os.environ) if indexes else os.environ | {"PIP_CONFIG_FILE": os.devnull}
    asked = ["--index-url", indexes[0]] if indexes else ["--no-index"]
    asked += [word for url in indexes[1:] for word in ("--extra-index-url", url)]
    command = [
        *(sys.executable, "-m", "pip", *alone, "install", "--no-input", "--disable-pip-version-check"),
        *("--dry-run", "--ignore-installed", "--only-binary", ":all:", "--report", str(report), *asked),
        *("--find-links", str(wheels), "-r", str(requirements)),
    ]
    return command, environment


def _releases(report: Mapping[str, Any]) -> Iterator[Release]:
    """Of pip's installation report (its version 1: pip 22.2 and later)."""
    for item in report["install"]:
        about, url = dict(item["metadata"]), item["download_info"]["url"]
        parted = urlsplit(url)
        if parted.scheme == "file":
            path = Path(unquote(parted.path))
            about["license_expression"] = _expression(path)
            source = quote(path.name)
        else:
            source = _open(url)
        digest = item["download_info"]["archive_info"].get("hashes", {}).get("sha256")
        if digest is None:
            raise DeployError(f"pip tells no SHA-256 of {source}: it must be pip 23 or later, and the index one that has them")
        name, extras = canonicalize_name(about["name"]), tuple(item.get("requested_extras", ()))
        yield Release(name, about["version"], digest, source, item["requested"], extras, about)


def _open(url: str) -> str:
    """Without a name and a password that an index was given."""
    return re.sub("//[^/@]*@", "//", url)


def _expression(wheel: Path) -> str:
    """A wheel's licence in SPDX's terms, if it says one; older releases of pip leave it out of their report."""
    with zipfile.ZipFile(wheel) as packed:
        inside = next(name for name in packed.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return str(message_from_bytes(packed.read(inside)).get("License-Expression", ""))
