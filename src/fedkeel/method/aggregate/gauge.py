"""The gauge of an adapter: B A = (B G)(G⁻¹ A) for every invertible G, and one G makes rounds comparable."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkeel.method.aggregate.svd import ROW_NORM
from fedkeel.rng import counter_normal, derive
from fedkeel.types import Adapter, Lora


def gauge(adapter: Adapter, trained: str) -> Adapter:
    """The same products with the factor that rests made orthogonal, before a round that trains `trained` ("a" or "b").

    Before a round of B: A Aᵀ = c² I; before one of A: Bᵀ B = c² I, with c = ROW_NORM, the norm of a row of A as LoRA starts,
    in both. The gradient of the factor that is trained is that of the product times the one that rests, so with one c a
    learning rate, a clip norm and a quantisation step mean the same in rounds of A and of B, and with this c the same as
    under the other rules, whose A has that norm; with c = 1 gradients would be √3 times as long. (Adam moves every number by
    about the rate, so there the steps of the product are alike but for √(d_in / d_out).)

    Through a QR with a positive diagonal, which is unique and continuous where the factor has full rank; applied twice it
    changes nothing but rounding. Where a column of B (row of A) depends on those before it, as all do while B = 0, its place
    is taken by a direction at right angles to the whole factor, from fixed random numbers by module, and its partner becomes
    exactly 0: the product stays, and the pair can be trained, where a zero column would give its partner no gradient. Beyond
    d_out columns (d_in rows) no such direction is left; both of such a pair are 0 in this round.

    In float64, rounded to the types of the factors; dense parameters stay. Raises ValueError for another `trained`.
    """
    if trained not in ("a", "b"):
        raise ValueError(f"gauge: {trained!r} is trained, where 'a' or 'b' belongs")
    lora = {}
    for path, f in adapter.lora.items():
        key = derive(0, "aggregate", "gauge", path, trained)
        if trained == "b":
            a, b = _fix(f.a.T, f.b.T, key)
            lora[path] = Lora(a.T.contiguous(), b.T.contiguous(), f.scale)
        else:
            b, a = _fix(f.b, f.a, key)
            lora[path] = Lora(a, b, f.scale)
    return Adapter(lora, adapter.dense)


def _fix(rests: Tensor, moves: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """rests (n, r) and moves (r, m) with the same product, the columns of `rests` orthogonal and of norm ROW_NORM."""
    old = rests.double()
    basis, fresh = _orthonormal(old, key)
    triangle = basis.T @ old  # R of the QR
    triangle[fresh] = 0.0  # at right angles to all of `old` but for rounding
    return (ROW_NORM * basis).to(rests.dtype), (triangle @ moves.double() / ROW_NORM).to(moves.dtype)


def _orthonormal(columns: Tensor, key: int) -> tuple[Tensor, list[int]]:
    """(n, r) orthonormal columns whose span holds that of `columns` (n, r), by Gram and Schmidt, and which of them are not
    from there. Column by column, as a library's QR fills dependent places before it has seen the columns that follow."""
    basis = torch.zeros_like(columns)
    dependent = [j for j in range(columns.shape[1]) if not _append(basis, j, columns[:, j])]
    if dependent:
        random = counter_normal(key, torch.arange(columns.numel()).view(columns.shape)).double()
        for j in dependent:
            _append(basis, j, random[:, j])
    return basis, dependent


def _append(basis: Tensor, j: int, column: Tensor) -> bool:
    """Make basis[:, j] of what of `column` is at right angles to `basis`; False, and nothing done, if that is rounding."""
    rest = column
    for _ in range(2):  # once leaves rounding of `column` itself; twice is enough (Giraud et al. 2005)
        rest = rest - basis @ (basis.T @ rest)
    length = float(rest.norm())
    if length <= len(column) * torch.finfo(column.dtype).eps * float(column.norm()):
        return False
    basis[:, j] = rest / length
    return True
