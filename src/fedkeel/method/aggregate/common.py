"""What aggregation rules share: their result, algebra of products of small inner dimension, means, blocks.

Of a product left @ right no (d_out, d_in) matrix is formed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkeel.types import Adapter, Lora, Shift, Update


@dataclass(frozen=True)
class Aggregate:
    """The next global adapter and what the rule lost.

    error: ‖W_rule − W_exact‖ / ‖W_exact‖, Frobenius over all low-rank modules together, with
    W_exact = Σ_k p_k scale_k B_k A_k and W_rule = adapter + shift; 0 where W_exact is 0. Dense parameters are not part of it.
    shift: what is to be added to the frozen maps, for good: module path -> (left (d_out, R), right (R, d_in)), float32, the
    addition being left @ right. A module that is not named is not shifted; most rules shift none.
    """

    adapter: Adapter
    error: float
    shift: Shift = field(default_factory=dict)


def stacked(parts: Iterable[tuple[float, Lora]]) -> tuple[Tensor, Tensor]:
    """Σ weight · B A as (left, right) with left @ right equal to it: (d_out, Σ r), (Σ r, d_in), float64."""
    pairs = [(weight * f.b.double(), f.a.double()) for weight, f in parts]
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs], dim=0)


def exact_factors(updates: Sequence[Update], weights: Mapping[str, float], path: str) -> tuple[Tensor, Tensor]:
    """Σ_k p_k scale_k B_k A_k of one module as `stacked` gives it, sites in the order of their names."""
    ordered = [(weights[u.site], u.adapter.lora[path]) for u in sorted(updates, key=lambda u: u.site)]
    return stacked((weight * f.scale, f) for weight, f in ordered)


def product_norm(left: Tensor, right: Tensor) -> float:
    """‖left @ right‖ (Frobenius): the norm of the small core between two QRs."""
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return float(torch.linalg.matrix_norm(core))


def singular(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """u (d_out, k), s (k,) falling, vt (k, d_in) with u · diag(s) · vt = left @ right, of left (d_out, R), right (R, d_in).

    k = min(d_out, R, d_in). u has orthonormal columns, vt orthonormal rows. Through QR of both and an SVD of the core.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, vt @ q_right.T


def compress(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the fewest columns: float32 (d_out, R'), (R', d_in), R' its numerical rank, at most both sides.

    left, right: float64. Singular values are dropped where they are rounding of float64 (n ε Σ_j ‖left_j‖ ‖right_j‖, which
    does not change if a pair of column and row is scaled against each other), so that nothing is lost beyond the rounding
    to float32. They are split evenly, √s to each side: both then need the same range in a narrow type.
    """
    u, s, vt = singular(left, right)
    size = float((left.norm(dim=0) * right.norm(dim=1)).sum())
    kept = int((s > size * max(len(left), right.shape[1]) * torch.finfo(s.dtype).eps).sum())
    root = s[:kept].sqrt()
    return (u[:, :kept] * root).float().contiguous(), (root[:, None] * vt[:kept]).float().contiguous()


def mean_tensors(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum in float64, in the order given, returned in the dtype of the first."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * tensor.double()
    return total.to(tensors[0].dtype)


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
