"""How far the sites of a round disagreed, by block of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from fedkeel.method.aggregate.common import block_of
from fedkeel.method.aggregate.updates import Checked
from fedkeel.types import Adapter, Update


def drift(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float]) -> dict[str, float]:
    """D of each block: (Σ_k p_k ‖Δ_k‖² − ‖Δ̄‖²) / ‖Δ̄‖², with Δ_k what site k changed there and Δ̄ = Σ_k p_k Δ_k.

    0 where all sites moved alike; K − 1 where K equally weighted sites moved at right angles by equal lengths; capped at
    1e6, which also stands for Δ̄ = 0 with sites that did move. Factors are compared as they are, not their products: they
    start from the same point. One pass over `updates` (see `Checked`), one held at a time. Raises ValueError, with the
    site, where sites differ in rank or scale: their factors cannot be compared.
    Source: method.md §2 (π); it is Γ − 1 of method.md §6, block by block.
    """
    blocks = {f"{path}.{factor}": block_of(path) for path in reference.lora for factor in "ab"}
    before = reference.tensors()
    means = {name: torch.zeros_like(before[name], dtype=torch.float64) for name in blocks}
    spread = dict.fromkeys(blocks.values(), 0.0)
    for update in Checked("drift", False, reference, updates, weights):
        share, tensors = weights[update.site], update.adapter.tensors()
        for name, mean in means.items():
            change = tensors[name].double() - before[name].double()
            mean += share * change
            spread[blocks[name]] += share * float(change.square().sum())
        del update, tensors  # before the next is decoded
    common = dict.fromkeys(spread, 0.0)
    for name, mean in means.items():
        common[blocks[name]] += float(mean.square().sum())
    found = {}
    for block, total in spread.items():
        ratio = (total - common[block]) / common[block] if common[block] else (math.inf if total else 0.0)
        found[block] = min(1e6, max(0.0, ratio))
    return found
