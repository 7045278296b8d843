"""What a display is told of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from fedkeel.federation.server import RoundResult


class Watch(Protocol):
    """What a display is told. `work` is in row-equivalents (one scored row = 1), see `rounds.TRAIN_COST`."""

    def begin(self, total_work: float) -> None:
        """Before anything runs."""

    def leg(self, name: str, detail: str) -> None:
        """A leg, or its scoring, begins."""

    def advance(self, work: float) -> None:
        """Some work is done."""

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        """A round is done."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Lines:
    """A `Watch` that tells lines: a round, a leg's scoring, a note; with the seconds since its beginning."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell, self._begin = tell, time.perf_counter()

    def _line(self, text: str) -> None:
        self._tell(f"[{time.perf_counter() - self._begin:7.1f} s] {text}")

    def begin(self, total_work: float) -> None:
        """See `Watch`."""

    def leg(self, name: str, detail: str) -> None:
        """See `Watch`."""
        if not detail.startswith("round "):
            self._line(f"{name}: {detail}")

    def advance(self, work: float) -> None:
        """See `Watch`."""

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        """See `Watch`."""
        sent = sum(result.bytes_down.values()) + sum(result.bytes_up.values())
        losses = [u.stats["loss"] for u in result.updates]
        sites = f"{len(losses)} site{'s' * (len(losses) != 1)}"
        self._line(
            f"{leg} round {done} of {rounds}: {sites}, loss {sum(losses) / len(losses):.3f} nats, "
            f"{result.seconds:.1f} s, {sent:,} bytes"
        )

    def note(self, text: str) -> None:
        """See `Watch`."""
        self._tell(f"note: {text}")


def tell_failures(watch: Watch, result: RoundResult) -> None:
    """A note for each site that a round went on without."""
    for site, text in sorted(result.failures.items()):
        told = f"site {site} failed and was left out (the quorum holds): {text.strip()}"
        watch.note(f"round {result.state.round}: {told}")
