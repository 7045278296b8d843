"""What a display is told of a run."""

from __future__ import annotations

from typing import Protocol

from fedkeel.federation.server import RoundResult


class Watch(Protocol):
    """What a display is told. `work` is in row-equivalents (one scored row = 1), see TRAIN_COST."""

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


def tell_failures(watch: Watch, result: RoundResult) -> None:
    """A note for each site that a round went on without."""
    for site, text in sorted(result.failures.items()):
        told = f"site {site} failed and was left out (the quorum holds): {text.strip()}"
        watch.note(f"round {result.state.round}: {told}")
