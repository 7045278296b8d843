"""The training curve of keel-nano, as its card reads it."""

from __future__ import annotations

import card


def row(step: int, seconds: float) -> dict:
    return {"step": step, "seconds": seconds}


def test_last_row_of_a_step_wins_and_the_clock_survives_a_resume() -> None:
    held = {"step": 50, "heldout": {}}
    aborted = [row(25, 9.0), row(50, 18.0), {"step": 50, "heldout": {"of": "the aborted start"}}]
    first = [row(25, 10.0), row(50, 20.0), held, row(75, 32.0)]  # cut off after its checkpoint at 50
    resumed = [row(75, 11.0), row(100, 21.0)]
    rows = card.clean(aborted + first + resumed)
    assert rows == [row(25, 10.0), row(50, 20.0), held, row(75, 11.0), row(100, 21.0)]
    assert card.seconds([r for r in rows if "heldout" not in r]) == 20.0 + 21.0
