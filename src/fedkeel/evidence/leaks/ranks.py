"""How well an attack's numbers tell those that were there from others."""

from __future__ import annotations

import numpy as np

from fedkeel.evidence.report.leaks import FALSE_ALARMS, Found
from fedkeel.rng import numpy_generator

RESAMPLES = 1000


def ranks(numbers: np.ndarray) -> np.ndarray:
    """The place of each among all, from 1; of equal ones the mean of theirs."""
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member's number is above another's, ties counting half: Mann & Whitney 1947."""
    count = len(members)
    return float((ranks(np.concatenate([members, others]))[:count].sum() - count * (count + 1) / 2) / (count * len(others)))


def hits(members: np.ndarray, others: np.ndarray, alarms: float = FALSE_ALARMS) -> float:
    """The share of members above a bound that at most `alarms` of the others pass."""
    bound = np.sort(others)[::-1][int(alarms * len(others))]
    return float((members > bound).mean())


def attacked(attack: str, members: np.ndarray, others: np.ndarray, seed: int, resamples: int = RESAMPLES) -> Found:
    """An attack's numbers, judged. resamples: of the interval's bootstrap."""
    draw = numpy_generator(seed, "audit", attack)
    found = [auc(draw.choice(members, len(members)), draw.choice(others, len(others))) for _ in range(resamples)]
    low, high = np.quantile(found, (0.025, 0.975))
    counts = len(members), len(others)
    return Found(attack, auc(members, others), float(low), float(high), hits(members, others), *counts)
