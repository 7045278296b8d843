"""What aggregation rules share: the exact sum in low-rank form, and norms of low-rank matrices."""

from __future__ import annotations

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
