"""A loss term of one's own: a price on being sure, so that a site with few rows does not talk itself into them.

    python examples/own_term.py

A term is a function from what a site sees in a step (`fedkeel.types.Forward`: logits and targets at supervised positions) to a
mean per position. How much it counts is a key of the recipe, and what it came to is a row of the run.
"""

from __future__ import annotations

import torch
from own_rows import RECIPE, SEEN, rows_of

import fedkeel
from fedkeel.types import Forward


def sureness(forward: Forward) -> torch.Tensor:
    """Mean of log V − H(p) over positions, ≥ 0: the confidence penalty of Pereyra et al. 2017 (arXiv:1701.06548)."""
    logs = forward.logits.log_softmax(-1)
    return (logs.exp() * logs).sum(-1).mean() + torch.log(torch.tensor(float(logs.shape[-1])))


def main() -> None:
    sites = {name: rows_of(name) for name in SEEN}
    recipe = {**RECIPE, "evaluation.baselines": []}
    plain = fedkeel.run({**recipe, "name": "sure"}, sites=sites, existing="replace")
    weighed = {**recipe, "name": "less-sure", "term.sureness.weight": 0.1}
    priced = fedkeel.run(weighed, sites=sites, terms=[sureness], existing="replace")
    told = [row.value for row in priced.measured if row.name == "sureness_loss"]
    print(f"sureness: {told[0]:.2f} nats in the first round, {told[-1]:.2f} in the last")
    for name, result in (("without", plain), ("with", priced)):
        print(f"{name:<8} {result.scores['federated']:.1%}")


if __name__ == "__main__":
    main()
