"""Aggregation rules: from the sites' adapters to the next global one, each with its measured error.

A rule is a pure function `(reference, updates, weights) -> Aggregate`. It adds in a fixed order (site names, sorted) and
in float64, so the order in which replies arrive changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from fedkeel.aggregate.common import Aggregate, blend, drift
from fedkeel.aggregate.mean import mean
from fedkeel.aggregate.svd import svd
from fedkeel.types import Adapter, Update

Rule = Callable[[Adapter, Sequence[Update], Mapping[str, float]], Aggregate]

AGGREGATORS: dict[str, Rule] = {"mean": mean, "svd": svd}

WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "positions": float,
    "sqrt_positions": lambda n: float(n) ** 0.5,
    "uniform": lambda n: 1.0,
}


def weights(updates: Sequence[Update], weighting: str) -> dict[str, float]:
    """Each site's weight p_k, by site name; they sum to 1. `weighting` is a key of WEIGHTINGS."""
    raw = {u.site: WEIGHTINGS[weighting](u.positions) for u in sorted(updates, key=lambda u: u.site)}
    total = sum(raw.values())
    return {site: value / total for site, value in raw.items()}


__all__ = ["AGGREGATORS", "WEIGHTINGS", "Aggregate", "Rule", "blend", "drift", "weights"]
