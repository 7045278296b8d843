"""What a site keeps on its disk between rounds."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fedkeel.exchange.codecs import open_envelope
from fedkeel.exchange.messages import (
    pack_shift,
    pack_tensors,
    unpack_shift,
)
from fedkeel.files import write_atomic
from fedkeel.types import FedKeelError, Shift

NAME = re.compile(r"[0-9a-z-]{1,64}")  # of a run or a request: they become names of files


class WorkError(FedKeelError):
    """A request that a site refuses, or cannot answer; the text says why."""


class LostStateError(WorkError):
    """The disk does not hold the state that a request names."""


class Store:
    """What one site keeps of one run. folder: of the run; several sites of one machine may share it."""

    def __init__(self, folder: Path, site: str) -> None:
        self._folder = folder
        # a name may hold any letter; folders are named by its hash
        self._own = folder / hashlib.sha256(site.encode()).hexdigest()[:16]
        self._site = site

    def _file(self, token: str) -> Path:
        return self._own / f"kept-{checked_name(token)}.fkl"

    def read(self, token: str) -> dict[str, Tensor]:
        """The tensors written under `token`; nothing under the empty one. Raises LostStateError."""
        if not token:
            return {}
        try:
            header, tensors = open_envelope(self._file(token).read_bytes())
        except (OSError, ValueError) as error:
            raise LostStateError(
                f"site {self._site}: {self._file(token)}, what it kept after its last accepted round, cannot be read: {error}. "
                f"It starts from nothing in the next round"
            ) from error
        if header.get("site") != self._site:
            raise LostStateError(f"site {self._site}: {self._file(token)} is of site {header.get('site')!r}")
        return tensors

    def write(self, token: str, tensors: Mapping[str, Tensor], before: str = "") -> str:
        """Keep `tensors` under `token`, and of the others those since `before`: a request that was given up may still be at
        work in another process. Returns the token, empty if there is nothing to keep."""
        if tensors:
            write_atomic(self._file(token), pack_tensors(tensors, kind="kept", site=self._site))
        if before:
            accepted = self._file(before).stat().st_mtime_ns
            for path in self._own.glob("kept-*.fkl"):
                with contextlib.suppress(FileNotFoundError):
                    if path.stat().st_mtime_ns < accepted:
                        path.unlink()
        return token if tensors else ""

    @property
    def _masks(self) -> Path:
        return self._own / "masks.json"

    def read_masks(self) -> bytes:
        """What `write_masks` wrote last; empty where there is nothing."""
        return self._masks.read_bytes() if self._masks.exists() else b""

    def write_masks(self, secrets: bytes) -> None:
        """Keep the secrets of the present round's masks, of no token: whatever state is asked for, those of the round are
        one, and gone once they are used. Empty: forget them."""
        if secrets:
            write_atomic(self._masks, secrets)
        else:
            self._masks.unlink(missing_ok=True)

    def _shift(self, number: int) -> Path:
        return self._folder / f"shift-{number:04d}.fkl"

    def write_shifts(self, entries: Sequence[Shift], first: int) -> None:
        """Keep entries `first`, `first` + 1, … of the log; those that are there already are the same."""
        for number, entry in enumerate(entries, first):
            if not self._shift(number).exists():
                write_shared(self._shift(number), pack_shift(entry))

    def read_shifts(self, first: int, end: int) -> list[Shift]:
        """Entries `first` up to, and not with, `end`. Raises LostStateError."""
        try:
            return [unpack_shift(self._shift(number).read_bytes()) for number in range(first, end)]
        except (OSError, ValueError) as error:
            raise LostStateError(f"site {self._site}: the log of base shifts cannot be read: {error}") from error


def write_shared(path: Path, content: bytes | str) -> None:
    """Write a file that another process may be writing too, with the same content."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    write_atomic(own, content)
    own.replace(path)


def checked_name(name: str) -> str:
    """The name, which becomes that of a file. Raises WorkError for one that could lead elsewhere."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise WorkError(f"a run or request called {name!r}: small letters, digits and - belong here")
    return name
