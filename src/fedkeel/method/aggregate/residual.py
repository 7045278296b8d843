"""The mean of the factors, and what it loses as a shift (FedEx-LoRA: Singhal et al. 2024, arXiv:2410.09432)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from fedkeel.method.aggregate.common import Aggregate, compress
from fedkeel.method.aggregate.exact import Stack, measured_error
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.updates import gather
from fedkeel.types import Adapter, Update


def residual(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """`mean`, of equal ranks and scales, with Σ p_k scale B_k A_k − scale B̄ Ā as a shift, compressed without loss (`compress`).

    The residual is taken from the mean as rounded to its type, so the two add up to the exact sum. Its rank is at most
    Σ r_k. The factors of all sites are held. A server optimiser moves the adapter further and leaves the shift as it is.
    """
    exact = Stack()
    adapter = reference.with_tensors(gather(reference, updates, weights, reference.tensors(), exact))
    shift = {}
    for path, f in adapter.lora.items():
        left, right = exact.factors(path)
        pair = compress(torch.cat([left, -f.scale * f.b.double()], 1), torch.cat([right, f.a.double()], 0))
        if pair[0].numel():  # one site, or sites that agree in A or B: nothing is lost
            shift[path] = pair
    return Aggregate(adapter, measured_error(exact, adapter, shift), shift)
