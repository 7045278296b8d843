"""The exact sum as a shift of the frozen maps (FLoRA: Wang et al. 2024, arXiv:2409.05976)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fedkeel.method.aggregate.common import Aggregate, compress
from fedkeel.method.aggregate.exact import Stack, measured_error
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.updates import gather
from fedkeel.types import Adapter, Lora, Update


def stack(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """Σ p_k scale_k B_k A_k as a shift of rank Σ r_k, compressed without loss (`compress`); sites may differ in rank and scale.

    The next adapter has B = 0, so the model is base and shift and nothing is counted twice, and the A of the reference.
    The paper draws a new A; any A of full rank will do under B = 0, since A is trained too, and the one that every site
    holds already needs no seed, is the same in every engine and after a resume, and has the norm that LoRA starts from.
    The factors of all sites are held.
    """
    exact = Stack()
    dense = gather(reference, updates, weights, reference.dense, exact)
    lora = {path: Lora(old.a, torch.zeros_like(old.b), old.scale) for path, old in reference.lora.items()}
    adapter = Adapter(lora, dense)
    shift = {path: compress(*exact.factors(path)) for path in lora}
    shift = {path: pair for path, pair in shift.items() if pair[0].numel()}  # a sum of 0 shifts nothing
    return Aggregate(adapter, measured_error(exact, adapter, shift), shift)
