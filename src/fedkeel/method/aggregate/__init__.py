"""Aggregation rules: from the sites' adapters to the next global one, each with its measured error.

A rule is a pure function `(reference, updates, weights, options) -> Aggregate` in a frame that says what it trains, sends and
takes (`Rule`). It adds in a fixed order (site names, sorted) and in float64, so the order in which replies arrive changes
nothing. `updates` may be any re-iterable, see `updates.Checked`: `mean`, `freeze_a`, `alternate`, `share_a`, `share_b` and
`drift` go through it once and hold one update at a time (and see `exact.measure`); the others hold all sites' factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedkeel.method.aggregate.common import Aggregate, blend
from fedkeel.method.aggregate.drift import drift
from fedkeel.method.aggregate.gauge import gauge
from fedkeel.method.aggregate.krum import krum
from fedkeel.method.aggregate.layouts import first_rows, folded, truncated
from fedkeel.method.aggregate.mean import mean
from fedkeel.method.aggregate.one_factor import alternate, by_turns, freeze_a, only_b, share_a, share_b
from fedkeel.method.aggregate.optimise import OPTIMISERS, Rates, step
from fedkeel.method.aggregate.residual import residual
from fedkeel.method.aggregate.robust import median, trimmed
from fedkeel.method.aggregate.rule import Options, Rule
from fedkeel.method.aggregate.stack import stack
from fedkeel.method.aggregate.svd import svd
from fedkeel.types import Update

AGGREGATORS: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("mean", mean, keeps_basis=True),
        Rule("freeze_a", freeze_a, trained=only_b, exact=True, keeps_basis=True),
        Rule("alternate", alternate, trained=by_turns, exact=True),
        Rule("svd", svd, mixed=True),
        Rule("stack", stack, mixed=True, shifts=True, exact=True),
        Rule("residual", residual, shifts=True, exact=True, keeps_basis=True),
        Rule("share_a", share_a, personal="b", keeps_basis=True),
        Rule("share_b", share_b, personal="a", keeps_basis=True),
        Rule("median", median, mixed=True),
        Rule("trimmed", trimmed, mixed=True, least=lambda hostile: 2 * hostile + 1),
        Rule("krum", krum, mixed=True, keeps_basis=True, least=lambda hostile: 2 * hostile + 3),
    )
}

WEIGHTINGS: dict[str, Callable[[int], float]] = {
    "positions": float,
    "sqrt_positions": lambda n: float(n) ** 0.5,
    "uniform": lambda n: 1.0,
}


def weights(updates: Iterable[Update], weighting: str) -> dict[str, float]:
    """Each site's weight p_k, by site name; they sum to 1. `weighting` is a key of WEIGHTINGS. One pass over `updates`."""
    raw = dict(sorted((u.site, WEIGHTINGS[weighting](u.positions)) for u in updates))
    total = sum(raw.values())
    return {site: value / total for site, value in raw.items()}


__all__ = [
    "AGGREGATORS", "OPTIMISERS", "WEIGHTINGS", "Aggregate", "Options", "Rates", "Rule", "blend", "drift", "first_rows",
    "folded", "gauge", "step", "truncated", "weights",
]  # fmt: skip
