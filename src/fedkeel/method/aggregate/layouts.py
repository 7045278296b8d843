"""One adapter as another of the same maps: of a lower rank, or with base shifts folded in."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedkeel.method.aggregate.common import compress
from fedkeel.method.aggregate.rule import PLAIN
from fedkeel.method.aggregate.svd import svd
from fedkeel.types import Adapter, Lora, Shift, Update


def first_rows(adapter: Adapter, rank: int, scale: float) -> Adapter:
    """The first `rank` directions of every map, with another scale: what a fresh adapter of that rank looks like."""
    lora = {p: Lora(m.a[:rank].clone(), m.b[:, :rank].clone(), scale) for p, m in adapter.lora.items()}
    return Adapter(lora, adapter.dense)


def truncated(adapter: Adapter, like: Adapter) -> Adapter:
    """The best approximation of every product by one of the rank and scale of `like`; dense parameters as they are."""
    return svd(like, [Update("", adapter, 1)], {"": 1.0}, PLAIN).adapter


def folded(adapter: Adapter, shifts: Sequence[Shift]) -> Adapter:
    """scale · B A + Σ left @ right of every map as one product, exact: of the rank that it needs, with scale 1.

    That is at most the sum of all ranks, and at most min(d_out, d_in); see `compress`. Raises ValueError if a shift is of
    a map that the adapter does not have.
    """
    lora = {}
    for path, factors in adapter.lora.items():
        pairs = [(factors.scale * factors.b.double(), factors.a.double())]
        pairs += [(e[path][0].double(), e[path][1].double()) for e in shifts if path in e]
        left, right = compress(torch.cat([p for p, _ in pairs], 1), torch.cat([q for _, q in pairs], 0))
        lora[path] = Lora(right, left, 1.0)
    odd = {path for entry in shifts for path in entry} - set(lora)
    if odd:
        raise ValueError(f"a base shift of {min(odd)}, which is no map of this adapter")
    return Adapter(lora, adapter.dense)
