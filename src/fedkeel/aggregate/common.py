"""What aggregation rules share: the exact sum in low-rank form, and norms of low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.types import Adapter, Lora, Update


@dataclass(frozen=True)
class Aggregate:
    """The next global adapter and what the rule lost.

    error: ‖W_rule − W_exact‖ / ‖W_exact‖, Frobenius over all low-rank modules together, with
    W_exact = Σ_k p_k scale_k B_k A_k; 0 where W_exact is 0. Dense parameters are averaged exactly and not part of it.
    """

    adapter: Adapter
    error: float


def exact_factors(updates: Sequence[Update], weights: Mapping[str, float], path: str) -> tuple[Tensor, Tensor]:
    """Σ_k p_k scale_k B_k A_k of one module as (left, right) with left @ right equal to it.

    left: (d_out, Σ r_k). right: (Σ r_k, d_in). float64, sites in the order of their names.
    """
    ordered = sorted(updates, key=lambda u: u.site)
    factors = [(weights[u.site], u.adapter.lora[path]) for u in ordered]
    left = torch.cat([p * f.scale * f.b.double() for p, f in factors], dim=1)
    right = torch.cat([f.a.double() for _, f in factors], dim=0)
    return left, right


def product_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖ (Frobenius) without forming the product: the norm of the small core between two QRs."""
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return float(torch.linalg.matrix_norm(core))


def measured_error(adapter: Mapping[str, Lora], updates: Sequence[Update], weights: Mapping[str, float]) -> float:
    """The `error` of Aggregate for the low-rank part of `adapter`."""
    lost = total = 0.0
    for path, got in adapter.items():
        left, right = exact_factors(updates, weights, path)
        total += product_norm(left, right) ** 2
        difference = torch.cat([left, -got.scale * got.b.double()], 1), torch.cat([right, got.a.double()], 0)
        lost += product_norm(*difference) ** 2
    return (lost / total) ** 0.5 if total else 0.0


def mean_tensors(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum in float64, in the order given, returned in the dtype of the first."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total.to(tensors[0].dtype)


def mean_dense(updates: Sequence[Update], weights: Mapping[str, float], path: str) -> Tensor:
    """The weighted mean of one dense parameter."""
    ordered = sorted(updates, key=lambda u: u.site)
    return mean_tensors([u.adapter.dense[path] for u in ordered], [weights[u.site] for u in ordered])


def blend(older: Adapter, newer: Adapter, share: float) -> Adapter:
    """share · older + (1 − share) · newer, factor by factor in float64; both of one layout. share: in [0, 1].

    Weight averaging along one training trajectory: the served model of a task stream, which forgets less than its last
    stage. Source: Wortsman et al. 2022 (WiSE-FT), arXiv:2109.01903, along stages instead of between two models. Of products
    B A it is not the exact mean; that one has not been compared with it.
    """
    before, after = older.tensors(), newer.tensors()
    return newer.with_tensors({name: mean_tensors([before[name], t], [share, 1.0 - share]) for name, t in after.items()})


def block_of(path: str) -> str:
    """The block that a module path lies in, `model.layers.3` of `model.layers.3.mlp.up_proj`; without a number, itself."""
    parts = path.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: index + 1])
    return path


def drift(reference: Adapter, updates: Sequence[Update], weights: Mapping[str, float]) -> dict[str, float]:
    """D of each block: (Σ_k p_k ‖Δ_k‖² − ‖Δ̄‖²) / ‖Δ̄‖², with Δ_k what site k changed there and Δ̄ = Σ_k p_k Δ_k.

    0 where all sites moved alike; K − 1 where K equally weighted sites moved at right angles by equal lengths; capped at
    1e6, which also stands for Δ̄ = 0 with sites that did move. Factors are compared as they are, not their products: they
    start from the same point. Source: METHOD §2 (π); it is Γ − 1 of METHOD §6, block by block.
    """
    ordered = sorted(updates, key=lambda u: u.site)
    spread: dict[str, float] = {}
    common: dict[str, float] = {}
    for path, old in reference.lora.items():
        block = block_of(path)
        for name in ("a", "b"):
            before = getattr(old, name).double()
            mean = torch.zeros_like(before)
            for update in ordered:
                change = getattr(update.adapter.lora[path], name).double() - before
                mean += weights[update.site] * change
                spread[block] = spread.get(block, 0.0) + weights[update.site] * float(change.square().sum())
            common[block] = common.get(block, 0.0) + float(mean.square().sum())
    found = {}
    for block, total in spread.items():
        ratio = (total - common[block]) / common[block] if common[block] else (math.inf if total else 0.0)
        found[block] = min(1e6, max(0.0, ratio))
    return found
