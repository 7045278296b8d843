"""How much a site counts."""

from __future__ import annotations

from collections.abc import Iterable

from fedkeel import tables
from fedkeel.types import Update


def positions(count: int) -> float:
    """As much as it has trained on."""
    return float(count)


def sqrt_positions(count: int) -> float:
    """Between `positions` and `uniform`."""
    return float(count) ** 0.5


def uniform(count: int) -> float:
    """As much as any other."""
    return 1.0


def weights(updates: Iterable[Update], weighting: str) -> dict[str, float]:
    """Each site's weight p_k, by site name; they sum to 1. weighting: of `tables.WEIGHTINGS`. One pass over `updates`."""
    weigh = tables.WEIGHTINGS[weighting].load()
    raw = dict(sorted((u.site, weigh(u.positions)) for u in updates))
    total = sum(raw.values())
    return {site: value / total for site, value in raw.items()}
