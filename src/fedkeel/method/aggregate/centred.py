"""Clipping of whole changes at the median length, of the sites' products: once, or about a centre that moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedkeel.method.aggregate.common import Aggregate, singular, stacked
from fedkeel.method.aggregate.exact import measured_error, stack_of
from fedkeel.method.aggregate.krum import inner_products
from fedkeel.method.aggregate.robust import middle
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.svd import fitted
from fedkeel.types import Adapter, Update

STEPS = 5  # of the centre towards the sites


def clipped(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """The mean of the sites' changes, each shortened to the median of their lengths where it is longer:

        W₀ + (1/K) Σ_k (W_k − W₀) · min(1, τ / ‖W_k − W₀‖),  τ the median of the ‖W_k − W₀‖,

    one step of `centred`; else as that. It bounds what a site can do by length, and lets the direction be.
    Source: norm bounding, Sun et al. 2019, arXiv:1911.07963, whose bound is given.
    """
    return _towards(reference, updates, weights, 1)


def centred(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """Five steps of a centre v, from what the sites started from, W₀,

        v ← v + (1/K) Σ_k (W_k − v) · min(1, τ / ‖W_k − v‖),  τ the median of the ‖W_k − v‖ over the sites,

    then the best rank-r approximation, module by module. W_k are products scale_k B_k A_k and dense parameters together.
    Whatever a site sends, it moves the centre by no more than τ / K in a step, and τ is no more than the farthest honest site's
    distance while fewer than half are hostile; `hostile` is not read. Unlike median and trimmed mean it looks at whole changes,
    and loses little where sites differ in many directions. The paper's v begins at the last round's momentum and its τ is
    given; sites here keep no momentum. Every site counts the same, whatever `weights` says; `error` is measured against the
    weighted exact sum. Sites may differ in rank and scale. Source: Karimireddy, He & Jaggi 2021, arXiv:2012.10333, algorithm 2.
    """
    return _towards(reference, updates, weights, STEPS)


def _towards(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], steps: int) -> Aggregate:
    held = list(updates)
    exact = stack_of(held, weights)
    points = [reference, *(u.adapter for u in held)]
    inner = inner_products(points)
    changes = inner - inner[:1] - inner[:, :1] + inner[0, 0]  # ⟨W_i − W₀, W_j − W₀⟩
    shares = centre(changes[1:, 1:], steps)
    counts = [1 - float(shares.sum()), *shares.tolist()]
    lora = {}
    for path, old in reference.lora.items():
        parts = ((count * p.lora[path].scale, p.lora[path]) for count, p in zip(counts, points, strict=True))
        lora[path] = fitted(*singular(*stacked(parts)), old)
    dense = {}
    for path, before in reference.dense.items():
        parts_of = [count * p.dense[path].double() for count, p in zip(counts, points, strict=True)]
        dense[path] = torch.stack(parts_of).sum(0).to(before.dtype)
    adapter = Adapter(lora, dense)
    return Aggregate(adapter, measured_error(exact, adapter, {}))


def centre(changes: Tensor, steps: int) -> Tensor:
    """(K,) shares c of the centre v = W₀ + Σ_k c_k (W_k − W₀), after so many steps from W₀. changes: (K, K) inner products G of
    the W_k − W₀, float64.

    No matrix is formed: ‖W_k − v‖² = G_kk − 2 (G c)_k + cᵀ G c.
    """
    sites = len(changes)
    shares = torch.zeros(sites, dtype=torch.float64)
    for _ in range(steps):
        far = (changes.diagonal() - 2 * changes @ shares + shares @ changes @ shares).clamp_min(0).sqrt()
        reach = middle(far)
        pull = torch.where(far > reach, reach / far, 1.0) / sites
        shares = shares * (1 - pull.sum()) + pull
    return shares
