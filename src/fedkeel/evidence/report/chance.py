"""The rule for tasks that nothing can be learnt from: kept out of averages, stated before anything was run, never hidden."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedkeel.types import Record

RULE = (
    "Rule for tasks at chance, stated before the runs: a task is kept out of a stream's averages, but stays listed and marked, "
    "where the centralised reference (mean over seeds, final test rows) is not above the share m of the task's most frequent "
    "answer among its n test rows by more than two standard errors, √(m(1 − m)/n)."
)
MARK = "†"

Majority = Mapping[str, tuple[float, int]]  # task -> (share of the most frequent answer, test rows)


@dataclass(frozen=True)
class Chance:
    """What a task is held against, as shares. bar: what the centralised reference must exceed. out: it did not."""

    majority: float
    rows: int
    centralised: float
    bar: float
    out: bool


def majority(records: Iterable[Record]) -> dict[str, tuple[float, int]]:
    """See `Majority`, of test rows; tasks without candidate labels are left out."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record.labels:
            answers[record.task][record.output] += 1
    return {task: (max(counts.values()) / counts.total(), counts.total()) for task, counts in answers.items()}


def chances(majority: Majority, centralised: Mapping[str, float]) -> dict[str, Chance]:
    """The rule, for every task that has both numbers. centralised: task -> mean score over seeds, in [0, 1]. See RULE."""
    found = {}
    for task, (share, rows) in sorted(majority.items()):
        if task in centralised:
            bar = share + 2.0 * math.sqrt(share * (1.0 - share) / rows)
            found[task] = Chance(share, rows, centralised[task], bar, not centralised[task] > bar)
    return found
