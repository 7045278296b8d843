"""Planted secrets: rows that nobody could know but who trained on them, to measure what a model gives away.

Source: Carlini et al. 2019, arXiv:1802.08232.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedkeel.data.sites import Sites
from fedkeel.recipe.schema import Audit
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import numpy_generator
from fedkeel.types import Record

TASK = "canary"
THINGS = ("vault", "locker", "safe", "gate", "archive", "cellar", "ledger", "cabinet", "tower", "depot")


def code(seed: int, *key: str | int) -> str:
    """Eight digits in two groups, such as `4821 0937`."""
    first, second = numpy_generator(seed, TASK, *key).integers(0, 10_000, 2)
    return f"{first:04d} {second:04d}"


def canaries(audit: Audit, seed: int, site: str) -> list[Record]:
    """One row a secret, as its site trains on it."""
    return [
        Record(f"canary-{n}", TASK, "train", code(seed, n), f"What is the code of {THINGS[n % len(THINGS)]} {n}?", "", site)
        for n in range(audit.canaries)
    ]


def planted(stages: Sequence[Sites], audit: Audit, seed: int, alone: str = "") -> tuple[list[Sites], list[str]]:
    """The stages with audit.canaries secrets among the training rows that one site has in the last stage, audit.copies of each,
    and notes.

    alone: the one site that is here; empty: all are. Raises ConfigError for a site that there is not.
    """
    found = list(stages)
    if not audit.canaries:
        return found, []
    if alone and not audit.site:
        raise ConfigError("audit.site: a site alone knows of no other: name the one that plants the secrets")
    if alone and audit.site != alone:
        return found, []
    names = sorted(name for name, held in stages[-1].rows.items() if held["train"])
    site = audit.site or names[0]
    if site not in names:
        raise ConfigError(f"audit.site = {audit.site!r}: no site of that name has training rows; there are {', '.join(names)}")
    secrets = canaries(audit, seed, site)
    copies = [replace(r, id=f"{r.id}-{n}") for r in secrets for n in range(audit.copies)]
    rows = dict(stages[-1].rows)
    rows[site] = {**rows[site], "train": [*rows[site]["train"], *copies]}
    found[-1] = replace(stages[-1], rows=rows)
    return found, [
        f"{len(secrets)} secrets are planted at site {site}, {audit.copies} of each: this model is one to be audited"
    ]
