"""The time that a run still takes, as it is told on the way."""

from __future__ import annotations

import re

import pytest
from test_run import Silent, go
from tiny import BASELINES

from fedkeel.runs.watch import Left, Lines


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_time_left_by_hand() -> None:
    clock = Clock()
    left = Left(clock)
    left.begin(1000.0)
    assert left.seconds is None
    assert left.told() == ""
    clock.now += 30
    left.skip(400)  # done by a process before this one: it says nothing about speed, and needs no time
    assert left.told() == ""
    left.advance(60)
    assert left.seconds == pytest.approx(30 * 540 / 60)
    assert left.told() == "about 4 min left"
    left.advance(480)
    assert left.told() == "about 3 s left"
    left.advance(60)
    assert left.told() == ""
    left.advance(1)  # an estimate of the work that was too low
    assert left.seconds == 0


def test_the_first_minute_has_a_word_of_it_once() -> None:
    clock = Clock()
    left = Left(clock)
    left.begin(100.0)
    clock.now += Left.FIRST - 1
    left.advance(1)
    assert left.first() == ""
    clock.now += 2
    assert left.first() == "about 35 min left"
    assert left.first() == ""


class Steps(Silent):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[float] = []

    def advance(self, work: float) -> None:
        self.parts.append(work)
        super().advance(work)


def test_every_step_of_a_site_is_heard_of(tiny_overrides: list[str]) -> None:
    """One site of 3 rounds × 2 steps of 4 rows, a training row as three scored ones; the bar ends where it should."""
    watch = Steps()
    one = ["partition.scheme=iid", "partition.sites=1", "evaluation.baselines=[]", "train.batch_size=4"]
    go([*tiny_overrides, *one], watch)
    steps = [part for part in watch.parts if part == pytest.approx(3.0 * 4)]
    assert len(steps) == 6
    assert watch.work == pytest.approx(watch.total)


def test_a_resumed_run_skips_what_was_done(tiny_overrides: list[str]) -> None:
    class Stop(Steps):
        def round(self, leg: str, done: int, rounds: int, result: object) -> None:
            if leg == "federated" and done == 2:
                raise KeyboardInterrupt

    first = Stop()
    with pytest.raises(KeyboardInterrupt):
        go(tiny_overrides, first)
    again = Steps()
    go(tiny_overrides, again, resume=True)
    assert again.work == pytest.approx(again.total)
    assert sum(again.parts) < again.total - 0.9 * sum(first.parts)


def test_lines_tell_it_with_each_round(tiny_overrides: list[str]) -> None:
    told: list[str] = []
    go([*tiny_overrides, BASELINES], Lines(told.append))  # type: ignore[arg-type]
    rounds = [line for line in told if "federated round" in line]
    assert len(rounds) == 3
    assert all(re.search(r"bytes, about \d+ s left$", line) for line in rounds), rounds
