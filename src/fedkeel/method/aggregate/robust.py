"""Coordinate-wise median and trimmed mean of the sites' products (Yin et al. 2018, arXiv:1803.01498)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedkeel.method.aggregate.common import Aggregate
from fedkeel.method.aggregate.exact import measured_error, stack_of
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.svd import fitted
from fedkeel.types import Adapter, Lora, Update

BLOCK = 2**23  # numbers of the sites' products formed at once: 64 MiB, and about three times that more to stack and sort them


def median(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """The median over sites of every entry of scale_k B_k A_k and of every dense parameter; see `_coordinates`.

    Holds for fewer than half of the sites hostile, f < K/2: each entry lies between two honest ones (of an even K it is the
    mean of the middle two, which holds too). `hostile` is not read. Source: definition 1 of the paper.
    """
    return _coordinates(reference, list(updates), weights, middle)


def trimmed(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """The mean over sites of every entry without its `hostile` largest and smallest values; see `_coordinates`.

    Holds for up to f = `hostile` hostile sites, f < K/2, so K ≥ 2 f + 1 are needed: what is left of an entry lies between two
    honest ones. With hostile = 0 it is the unweighted mean. Source: definition 2 of the paper, with β = f / K.
    """
    f = options.hostile
    return _coordinates(reference, list(updates), weights, lambda v: v.sort(dim=0).values[f : len(v) - f].mean(dim=0))


def middle(values: Tensor) -> Tensor:
    """(K, …) -> (…), the mean of the middle two of an even K; `torch.median` would take the lower."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def _coordinates(
    reference: Adapter, updates: Sequence[Update], weights: Mapping[str, float], pick: Callable[[Tensor], Tensor]
) -> Aggregate:
    """`pick` ((K, …) float64 -> (…)) over the sites' products and dense parameters, then the best rank-r approximation.

    Every site counts the same, whatever `weights` says: positions are what a site reports of itself, and a hostile one could
    report any number. `error` is still measured against the weighted exact sum, so it is no small number where sites differ;
    a hostile site moves it. Sites may differ in rank and scale. If W is what `pick` makes of honest sites and hostile ones,
    the approximation W_r is no further than 2 ‖W − X‖ from any X of rank r. Entries of W_r itself may leave the honest range.
    Each product is formed by blocks of rows, so beside one dense matrix a module K · block · d_in numbers are held; an
    eigendecomposition costs O(min(d_out, d_in)³) a module.
    """
    exact = stack_of(updates, weights)
    lora = {path: _module(old, [u.adapter.lora[path] for u in updates], pick) for path, old in reference.lora.items()}
    dense = {
        path: pick(torch.stack([u.adapter.dense[path].double() for u in updates])).to(old.dtype)
        for path, old in reference.dense.items()
    }
    adapter = Adapter(lora, dense)
    return Aggregate(adapter, measured_error(exact, adapter, {}))


def _module(old: Lora, sites: Sequence[Lora], pick: Callable[[Tensor], Tensor]) -> Lora:
    pairs = [(f.scale * f.b.double(), f.a.double()) for f in sites]
    d_out, d_in = len(old.b), old.a.shape[1]
    rows = max(1, BLOCK // (len(sites) * d_in))
    picked = [pick(torch.stack([b[i : i + rows] @ a for b, a in pairs])) for i in range(0, d_out, rows)]
    return fitted(*leading(torch.cat(picked), old.a.shape[0]), old)


def leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """u (d_out, k), s (k,) falling, vt (k, d_in), k = min(rank, d_out, d_in), of the best rank-k approximation. float64.

    The space of u (or of vt) is that of the leading eigenvectors of the Gram matrix of the smaller side, so a direction with
    a singular value under 1e-8 of the largest may be missed; the values themselves come from an SVD inside that space.
    """
    if len(matrix) > matrix.shape[1]:
        u, s, vt = leading(matrix.T, rank)
        return vt.T, s, u.T
    basis = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vt
