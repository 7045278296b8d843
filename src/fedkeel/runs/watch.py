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

    def skip(self, work: float) -> None:
        """Some work needs not be done: it was before, or never will be."""

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        """A round is done."""

    def note(self, text: str) -> None:
        """Something the user should know."""


def about(seconds: float) -> str:
    """`about 12 min left`, or in seconds where they are few."""
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"


class Left:
    """The time left, at the mean speed since the work began: legs differ in speed, so a short window would mislead."""

    FIRST = 20.0  # seconds after which a reader without a bar wants to know

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.begin(0.0)

    def begin(self, total: float) -> None:
        """Nothing is done yet of `total` work."""
        self._total, self._done, self._since, self._told = total, 0.0, self._clock(), False

    def advance(self, work: float) -> None:
        """Some work is done."""
        self._done += work

    def skip(self, work: float) -> None:
        """Some work needs not be done; it says nothing about speed."""
        self._total -= work

    @property
    def seconds(self) -> float | None:
        """None before there is anything to go by."""
        if self._done <= 0:
            return None
        return (self._clock() - self._since) * max(0.0, self._total - self._done) / self._done

    def told(self) -> str:
        """`about 12 min left`; empty before there is anything to go by, and at the end."""
        seconds = self.seconds
        if not seconds or seconds < 0.5:
            return ""
        self._told = True
        return about(seconds)

    def first(self) -> str:
        """`told`, if it has not been yet and it is time to."""
        return "" if self._told or self._clock() - self._since < self.FIRST else self.told()


class Lines:
    """A `Watch` that tells lines: a round, a leg's scoring, a note, the time left; with the seconds since its beginning."""

    def __init__(self, tell: Callable[[str], object]) -> None:
        self._tell, self._begin, self._left = tell, time.perf_counter(), Left()

    def _line(self, text: str) -> None:
        self._tell(f"[{time.perf_counter() - self._begin:7.1f} s] {text}")

    def begin(self, total_work: float) -> None:
        """See `Watch`."""
        self._left.begin(total_work)

    def leg(self, name: str, detail: str) -> None:
        """See `Watch`."""
        if not detail.startswith("round "):
            self._line(f"{name}: {detail}")

    def advance(self, work: float) -> None:
        """See `Watch`."""
        self._left.advance(work)
        if first := self._left.first():
            self._line(first)

    def skip(self, work: float) -> None:
        """See `Watch`."""
        self._left.skip(work)

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        """See `Watch`."""
        sent = sum(result.bytes_down.values()) + sum(result.bytes_up.values())
        losses = [u.stats["loss"] for u in result.updates if "loss" in u.stats]  # private sites do not tell it
        sites = f"{len(result.updates)} site{'s' * (len(result.updates) != 1)}"
        loss = f", loss {sum(losses) / len(losses):.3f} nats" if losses else ""
        left = self._left.told()
        self._line(
            f"{leg} round {done} of {rounds}: {sites}{loss}, {result.seconds:.1f} s, {sent:,} bytes{left and f', {left}'}"
        )

    def note(self, text: str) -> None:
        """See `Watch`."""
        self._tell(f"note: {text}")


def tell_failures(watch: Watch, result: RoundResult) -> None:
    """A note for each site that a round went on without."""
    for site, text in sorted(result.failures.items()):
        told = f"site {site} failed and was left out (the quorum holds): {text.strip()}"
        watch.note(f"round {result.state.round}: {told}")
