"""Who holds which rows. Every partition is a pure function that returns each site's indices, each index exactly once.

`strata` names the group within which proportions are kept (the split of a row), so that a site's validation and test rows
follow the same law as its training rows.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkeel.recipe.schema import Partition
from fedkeel.recipe.settings import ConfigError
from fedkeel.types import Record

Indices = list[list[int]]


def _groups(keys: Sequence[Hashable]) -> dict[Hashable, list[int]]:
    """Indices by key, keys in sorted order of their text."""
    found: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return {key: found[key] for key in sorted(found, key=str)}


def _deal(indices: Sequence[int], shares: np.ndarray) -> list[list[int]]:
    """Cut `indices` into len(shares) consecutive pieces of about those shares; sizes by rounded cumulative share."""
    bounds = np.rint(np.cumsum(shares) / shares.sum() * len(indices)).astype(int)[:-1]
    return [list(map(int, piece)) for piece in np.split(np.asarray(indices, dtype=int), bounds)]


def iid(strata: Sequence[Hashable], sites: int, rng: np.random.Generator) -> Indices:
    """Rows dealt at random, in equal numbers within every stratum."""
    return quantity(strata, np.ones(sites), rng)


def quantity(strata: Sequence[Hashable], shares: np.ndarray, rng: np.random.Generator) -> Indices:
    """Rows dealt at random, site k getting a share ∝ shares[k] of every stratum. shares: (sites,), > 0."""
    held: Indices = [[] for _ in shares]
    for indices in _groups(strata).values():
        for site, piece in enumerate(_deal(rng.permutation(indices).tolist(), np.asarray(shares, dtype=float))):
            held[site] += piece
    return [sorted(h) for h in held]


def quantity_skew(strata: Sequence[Hashable], sites: int, alpha: float, rng: np.random.Generator) -> Indices:
    """IID content, unequal amounts: shares drawn from a symmetric Dirichlet(alpha)."""
    return quantity(strata, rng.dirichlet(np.full(sites, alpha)) + 1e-9, rng)


def dirichlet(
    keys: Sequence[Hashable], strata: Sequence[Hashable], sites: int, alpha: float, rng: np.random.Generator
) -> Indices:
    """Label (or task) skew: for each key, site shares drawn from Dirichlet(alpha) (Hsu et al. 2019, arXiv:1909.06335).

    One draw a key serves all strata. Small alpha: each key lives at few sites; large alpha: nearly IID.
    """
    held: Indices = [[] for _ in range(sites)]
    shares = {key: rng.dirichlet(np.full(sites, alpha)) for key in _groups(keys)}
    for key, indices in _groups(keys).items():
        for within in _groups([strata[i] for i in indices]).values():
            dealt = rng.permutation([indices[w] for w in within]).tolist()
            for site, piece in enumerate(_deal(dealt, shares[key])):
                held[site] += piece
    return [sorted(h) for h in held]


def by_task(tasks: Sequence[Hashable], sites: int, rng: np.random.Generator) -> Indices:
    """Whole tasks to sites, in turn through a shuffled list; every row of a task at one site.

    Raises ValueError if there are more sites than tasks, which would leave a site empty.
    """
    groups = _groups(tasks)
    if sites > len(groups):
        raise ValueError(f"{sites} sites but only {len(groups)} tasks: some site would be empty")
    order = rng.permutation(len(groups))
    held: Indices = [[] for _ in range(sites)]
    for turn, which in enumerate(order):
        held[turn % sites] += list(groups.values())[which]
    return [sorted(h) for h in held]


def natural(keys: Sequence[str]) -> dict[str, list[int]]:
    """One site a key, as the data came: site name -> indices."""
    return {str(key): indices for key, indices in _groups(keys).items()}


# What a recipe's partition.scheme names: Deal -> indices of site 0, 1, …, or by name


@dataclass(frozen=True)
class Deal:
    """What there is to deal, and how. records: all rows, in order. spec: a recipe's [partition]. rng: what is drawn from.

    own: options of the scheme's own, where its entry names some.
    """

    records: Sequence[Record]
    spec: Partition
    rng: np.random.Generator
    own: Any = None

    @property
    def strata(self) -> list[str]:
        """The split of each row."""
        return [r.split for r in self.records]


def by_name(deal: Deal) -> dict[str, list[int]]:
    """`natural`. Raises ConfigError where rows have no site's name to go by."""
    if not all(r.site for r in deal.records):
        raise ConfigError(
            "partition.scheme = 'natural' needs a site for every row: set data.site_column to the column that names it, or "
            "choose partition.scheme = 'dirichlet', 'iid', 'by-task' or 'quantity'"
        )
    return natural([r.site for r in deal.records])


def in_equal_parts(deal: Deal) -> Indices:
    """`iid`."""
    return iid(deal.strata, deal.spec.sites, deal.rng)


def in_unequal_parts(deal: Deal) -> Indices:
    """`quantity`."""
    return quantity_skew(deal.strata, deal.spec.sites, deal.spec.alpha, deal.rng)


def whole_tasks(deal: Deal) -> Indices:
    """`by-task`. Raises ConfigError where there are more sites than tasks."""
    try:
        return by_task([r.task for r in deal.records], deal.spec.sites, deal.rng)
    except ValueError as error:
        raise ConfigError(f"partition.scheme = 'by-task': {error}") from error


def by_label_or_task(deal: Deal) -> Indices:
    """`dirichlet`, over what partition.over says."""
    spec = deal.spec
    keys = [(r.task, r.output if spec.over == "labels" and r.labels else "") for r in deal.records]
    return dirichlet(keys, deal.strata, spec.sites, spec.alpha, deal.rng)
