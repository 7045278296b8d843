"""How sure a difference between two methods is: a paired bootstrap over the held-out test rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from fedkeel.rng import numpy_generator

RESAMPLES = 2000
COVERAGE = 0.95
CHUNK = 4_000_000  # row numbers drawn at a time, for the sake of memory

Scores = Mapping[str, Mapping[str, float]]  # task -> id of a test row -> score in [0, 1]


@dataclass(frozen=True)
class Interval:
    """A difference of scores and its percentile interval, as shares; of how many seeds and different test rows."""

    mean: float
    low: float
    high: float
    seeds: int
    rows: int


def paired_difference(
    mine: Mapping[int, Scores], other: Mapping[int, Scores], *key: str, resamples: int = RESAMPLES
) -> Interval | None:
    """The mean over tasks of `mine` − `other` on the same test rows, with its 95 % interval; None if no row is shared.

    mine, other: seed -> scores of every test row; only seeds, tasks and rows that both have are used. A task's rows are drawn
    with replacement, as many as there are, and a row brings its differences under every seed along: two seeds' scores of one
    row are not two independent rows. Tasks are never drawn: each counts the same in every resample. The interval tells how
    far the choice of test rows could have moved the difference, and nothing of other seeds or other data.
    key: what is compared, so that each comparison has random numbers of its own.
    Source: percentile bootstrap, Efron & Tibshirani 1993, ch. 13; pairing by test row as in Koehn 2004 (W04-3250).
    """
    import numpy as np

    seeds = sorted(set(mine) & set(other))
    pairs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        for task in set(mine[seed]) & set(other[seed]):
            for row in set(mine[seed][task]) & set(other[seed][task]):
                pairs[task][row].append(mine[seed][task][row] - other[seed][task][row])
    if not pairs:
        return None
    generator = numpy_generator(0, "report-interval", *key)
    means = np.zeros(resamples)
    middle = 0.0
    for task in sorted(pairs):
        rows = sorted(pairs[task])
        sums = np.array([sum(pairs[task][row]) for row in rows])
        counts = np.array([len(pairs[task][row]) for row in rows])
        middle += float(sums.sum() / counts.sum()) / len(pairs)
        at_once = max(1, CHUNK // len(rows))
        for begin in range(0, resamples, at_once):
            drawn = generator.integers(len(rows), size=(min(at_once, resamples - begin), len(rows)))
            means[begin : begin + len(drawn)] += sums[drawn].sum(1) / counts[drawn].sum(1) / len(pairs)
    tail = 50.0 * (1.0 - COVERAGE)
    low, high = np.percentile(means, [tail, 100.0 - tail])
    return Interval(middle, float(low), float(high), len(seeds), sum(len(rows) for rows in pairs.values()))
