"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from fedkeel.types import FedKeelError


class DiskError(FedKeelError):
    """A file that could not be written; nothing half-written is left under its name."""


def _told(path: Path, error: OSError) -> DiskError:
    return DiskError(f"{path} could not be written: {error.strerror or error}. What was there before is untouched")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `path` through a temporary file beside it and a rename. Raises DiskError, say on a full disk."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise _told(path, error) from error


def append_lines(path: Path, lines: Iterable[str]) -> int:
    """Append whole lines, all or none; returns the file's size in bytes after it. Raises DiskError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise _told(path, error) from error
    return path.stat().st_size
