"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedkeel.types import FedKeelError


class DiskError(FedKeelError):
    """A file that could not be written; nothing half-written is left under its name."""


def _told(path: Path, error: OSError) -> DiskError:
    return DiskError(f"{path} could not be written: {error.strerror or error}. What was there before is untouched")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `path` through a temporary file beside it and a rename. Raises DiskError, say on a full disk."""
    with replaced(path) as partial, partial.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


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


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path beside `path`, for a library to write; it takes its name at the end, or is removed if anything is raised.

    Raises DiskError for what the system refuses.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _told(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """As `replaced`, of a folder: what stood at `folder` before steps aside when the new one is whole, and goes when that has
    its place; after a kill in between it is back with the next call.

    Raises DiskError for what the system refuses.
    """
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".old"))
    try:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for left in (partial, old):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _synced(partial)
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            with contextlib.suppress(OSError):
                old.rename(folder)
            raise
    except OSError as error:
        raise _told(folder, error) from error
    finally:
        for left in (partial, old) if folder.exists() else (partial,):
            shutil.rmtree(left, ignore_errors=True)


def _synced(folder: Path) -> None:
    """Have the disk hold all that is in a folder."""
    for path in (*folder.rglob("*"), folder):
        try:
            handle = os.open(path, os.O_RDONLY)
        except PermissionError:  # a folder, where the system opens none
            continue
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def filled_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, of mode 0700, that takes its name at the end, or is removed if anything is raised.

    Raises OSError if it cannot be made, or `folder` is there by then and not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def as_others(folder: Path) -> None:
    """Give every file in a folder the mode that the system gives a new one: safetensors lets nobody else read its own."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """As `filled_folder`, for all to read; of two processes that fill the same at once, what the first made is kept.

    Raises DiskError.
    """
    try:
        with filled_folder(folder) as partial:
            yield partial
            as_others(partial)
            partial.chmod(0o755)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise _told(folder, error) from error


def cache_folder() -> Path:
    """What can be made or fetched again: $FEDKEEL_CACHE, else `fedkeel` in the user's cache folder. It may not be there yet."""
    own = os.environ.get("FEDKEEL_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedkeel"
