"""The adapter of one site, the one nearest to its neighbours (Krum: Blanchard et al. 2017, arXiv:1703.02757)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedkeel.method.aggregate.common import Aggregate, singular
from fedkeel.method.aggregate.exact import measured_error, stack_of
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.svd import fitted
from fedkeel.types import Adapter, Update


def krum(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """The site whose K − f − 2 nearest others are nearest, in the sum of squared distances; its whole adapter.

    Distances are between products scale_k B_k A_k and dense parameters together, so a hostile site cannot hide in factors
    that multiply to the same. A tie goes to the first site by name. f = `hostile`, and K ≥ 2 f + 3 is needed; see
    proposition 1 of the paper for what it means in training. In any one round the choice lies within
    √((K − f − 2) / (K − 2 f − 1)) times the widest distance of two honest sites from an honest one, whatever the others send:
    it need not be honest, only as near. Every site counts the same, whatever `weights` says; `error` is still measured
    against the weighted exact sum. Sites may differ in rank and scale: a choice of another rank or scale than the reference's
    is brought to them by SVD.
    """
    held = list(updates)
    exact = stack_of(held, weights)
    near = distances([u.adapter for u in held]).sort(dim=1).values
    scores = near[:, : len(held) - options.hostile - 1].sum(dim=1).tolist()  # the site itself, at 0, and its K − f − 2 nearest
    chosen = held[scores.index(min(scores))].adapter
    lora = {}
    for path, old in reference.lora.items():
        f = chosen.lora[path]
        alike = f.a.shape == old.a.shape and f.scale == old.scale
        lora[path] = f if alike else fitted(*singular(f.scale * f.b.double(), f.a.double()), old)
    adapter = Adapter(lora, chosen.dense)
    return Aggregate(adapter, measured_error(exact, adapter, {}))


def distances(adapters: Sequence[Adapter]) -> Tensor:
    """(K, K) squared distances ‖W_i − W_j‖² over all modules and dense parameters, float64; ranks and scales may differ. Right
    to about 1e-15 of the larger ‖W‖²."""
    inner = inner_products(adapters)
    own = inner.diagonal()
    return (own[:, None] + own[None, :] - 2 * inner).clamp(min=0.0)


def inner_products(adapters: Sequence[Adapter]) -> Tensor:
    """(K, K) ⟨W_i, W_j⟩ = scale_i scale_j tr(B_iᵀ B_j A_j A_iᵀ) over all modules, the sum of an elementwise product of two
    small matrices, and of dense parameters, float64: no dense matrix is formed."""
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for path in adapters[0].lora:
        sites = [adapter.lora[path] for adapter in adapters]
        left, right = torch.cat([f.scale * f.b.double() for f in sites], 1), torch.cat([f.a.double() for f in sites])
        owner = torch.block_diag(*(torch.ones(len(f.a), 1, dtype=torch.float64) for f in sites))  # (Σ r_k, K)
        inner += owner.T @ ((left.T @ left) * (right @ right.T)) @ owner
    for path in adapters[0].dense:
        flat = torch.stack([adapter.dense[path].double().flatten() for adapter in adapters])
        inner += flat @ flat.T
    return (inner + inner.T) / 2  # a product of floats need not be symmetric to the bit, and a tie must be one
