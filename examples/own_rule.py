"""An aggregation rule of one's own: no site may pull further than the median site does.

    python examples/own_rule.py

A rule is a function of what the sites started from, what they sent and what each counts; it returns the next adapter and by how
much that misses the exact sum of the products B·A (0 where it does not, or where there is no such claim).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median

import torch
from own_rows import RECIPE, SEEN, rows_of

import fedkeel
from fedkeel.method.aggregate.common import Aggregate
from fedkeel.types import Adapter, Update


def even_pull(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float]) -> Aggregate:
    """The mean of changes, each cut to the median of their lengths: norm clipping at a bound that nobody has to choose."""
    old = reference.tensors()
    changes = {u.site: {name: t - old[name] for name, t in u.adapter.tensors().items()} for u in updates}
    lengths = {site: float(torch.cat([t.flatten() for t in change.values()]).norm()) for site, change in changes.items()}
    bound = median(lengths.values())
    shares = {site: weights[site] * min(1.0, bound / lengths[site]) for site in changes}
    new = {name: tensor + sum(shares[site] * changes[site][name] for site in changes) for name, tensor in old.items()}
    return Aggregate(reference.with_tensors(new), 0.0)


def main() -> None:
    sites = {name: rows_of(name) for name in SEEN}
    recipe = {**RECIPE, "evaluation.baselines": []}
    for name, rule in (("mean", None), ("even-pull", even_pull)):
        result = fedkeel.run({**recipe, "name": name}, sites=sites, rule=rule, existing="replace")
        print(f"{name:<10} {result.scores['federated']:.1%}")


if __name__ == "__main__":
    main()
