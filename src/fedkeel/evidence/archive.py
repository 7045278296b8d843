"""What the runs of a suite left: in a folder for each, or of all runs in one compressed archive beside suite.json.

The archive is a tar inside xz, as `tar -xJf runs.tar.xz` unpacks it: NAME/rows.jsonl, NAME/scores.jsonl, NAME/measures.jsonl,
NAME/recipe.toml and NAME/env.json of a finished run, NAME.failed of a failed one. Nothing of it is ever unpacked to disk here.
Of the forms that the standard library reads, measured on the 44 MB of the main suite: 3.6 MB with every file gzipped, 3.4 MB as
a zip, 2.2 MB as a zip with LZMA, 0.91 MB as this one, within 1 % of an xz file for each kind of file.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from fedkeel.types import FedKeelError

ARCHIVE = "runs.tar.xz"
KEPT = ("rows.jsonl", "scores.jsonl", "measures.jsonl", "recipe.toml", "env.json")  # of a finished run
FAILED = ".failed"  # after a run's name: why it failed
PRESET = 6 | lzma.PRESET_EXTREME  # a window of 8 MiB: 64 MiB save 0.1 % and take seven times the memory
UNPACKED = 1 << 29  # bytes of an archive's content that are read at most
MEMORY = 1 << 27  # bytes that unpacking may take beside the content; PRESET needs 9 MiB

RUN = r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*"  # a name of a run: one step of a path, and no hidden one
_MEMBER = re.compile(rf"{RUN}/(?:{'|'.join(map(re.escape, KEPT))})|{RUN}{re.escape(FAILED)}")


def to_archive(files: Mapping[str, bytes]) -> bytes:
    """path -> content as an archive; the same files give the same bytes, as no time, owner or order of theirs goes in.

    Files of one kind lie beside each other, which compresses best. Raises ValueError on a path that `from_archive` refuses.
    """
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(files, key=lambda path: (path.rpartition("/")[2], path)):
            if not _MEMBER.fullmatch(path):
                raise ValueError(f"{path!r} is no file of a run")
            member = tarfile.TarInfo(path)
            member.size = len(files[path])
            tar.addfile(member, io.BytesIO(files[path]))
    return lzma.compress(raw.getvalue(), preset=PRESET)


def from_archive(path: Path, unpacked: int = UNPACKED) -> dict[str, bytes]:
    """path -> content of the archive in the file `path`, in memory.

    Raises FedKeelError, naming the file, if it cannot be read, is torn or damaged, holds more than `unpacked` bytes, or holds
    anything that `to_archive` does not write: another path, a link, a folder, a device, a file twice.
    """
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY)
        raw = decompressor.decompress(path.read_bytes(), unpacked + 1)
        if len(raw) > unpacked:
            raise FedKeelError(f"{path} holds more than {unpacked:,} bytes, and is not read")
        if not decompressor.eof or decompressor.unused_data:
            raise FedKeelError(f"{path} is torn: {'it ends too early' if not decompressor.eof else 'more follows its end'}")
        return _members(path, raw)
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, ValueError) as error:
        raise FedKeelError(f"{path} cannot be read as an archive of runs: {error}") from error


def _members(path: Path, raw: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    end = 0
    with tarfile.open(fileobj=io.BytesIO(raw), mode="r:") as tar:
        for member in tar:
            content = tar.extractfile(member) if member.type == tarfile.REGTYPE and not member.issparse() else None
            if content is None or not _MEMBER.fullmatch(member.name):
                raise FedKeelError(f"{path} holds {member.name!r}, which is no file of a run")
            if member.name in found:
                raise FedKeelError(f"{path} holds {member.name!r} twice")
            found[member.name] = content.read()
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if raw[end:].strip(b"\0"):  # tarfile takes a damaged header for the end
        raise FedKeelError(f"{path} is damaged after {len(found)} files")
    return found


class RunFiles:
    """The files of a suite's runs, wherever they lie.

    A run that has a folder, or a NAME.failed, of its own is read from there, as it was made after the archive; any other from
    the archive, if there is one. Raises FedKeelError as `from_archive` does.
    """

    def __init__(self, suite: Path) -> None:
        self._suite = suite
        archive = suite / ARCHIVE
        self._packed = from_archive(archive) if archive.exists() else {}

    def _own(self, run: str) -> bool:
        return (self._suite / run).is_dir() or (self._suite / (run + FAILED)).exists()

    def where(self, run: str, name: str) -> str:
        """The place of a run's file, for messages."""
        return str(self._suite / run / name) if self._own(run) else f"{self._suite / ARCHIVE}: {run}/{name}"

    def holds(self, run: str, name: str) -> bool:
        return (self._suite / run / name).exists() if self._own(run) else f"{run}/{name}" in self._packed

    def text(self, run: str, name: str) -> str:
        """A run's file. Raises FedKeelError, naming it, if it is missing or no text."""
        try:
            held = (self._suite / run / name).read_bytes() if self._own(run) else self._packed[f"{run}/{name}"]
            return held.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FedKeelError(f"{self.where(run, name)} cannot be read: {error}") from error
        except KeyError:
            raise FedKeelError(f"{self.where(run, name)} is missing") from None

    def state(self, run: str) -> str:
        """finished, failed, unfinished, or not begun. Rows without a state.json are a kept result, and finished."""
        if self.holds(run, "state.json"):
            try:
                if json.loads(self.text(run, "state.json"))["finished"]:
                    return "finished"
            except (ValueError, KeyError, TypeError) as error:
                raise FedKeelError(f"{self.where(run, 'state.json')} is not what a run writes: {error!r}") from error
        elif self.holds(run, "rows.jsonl"):
            return "finished"
        if self.reason(run) is not None:
            return "failed"
        return "unfinished" if self.holds(run, "rows.jsonl") else "not begun"

    def reason(self, run: str) -> str | None:
        """Why a run failed, as it was told; None if it did not."""
        if not self._own(run):
            told = self._packed.get(run + FAILED)
            return None if told is None else told.decode("utf-8", "replace")
        failure = self._suite / (run + FAILED)
        return failure.read_text(encoding="utf-8", errors="replace") if failure.exists() else None
