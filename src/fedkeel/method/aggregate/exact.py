"""The exact sum Σ_k p_k scale_k B_k A_k of every module, and how far from it a result is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkeel.method.aggregate.common import product_norm, stacked
from fedkeel.rng import counter_normal, derive
from fedkeel.types import Adapter, Lora, Shift, Update

STACKED = 512  # Σ r_k up to which a rule that keeps no update still stacks all factors to measure its error exactly
PROBES = 64


class Stack:
    """The sum as stacked factors. Holds the factors of every site that was added, as they are."""

    def __init__(self) -> None:
        self._parts: defaultdict[str, list[tuple[float, Lora]]] = defaultdict(list)

    def add(self, share: float, adapter: Adapter) -> None:
        """One site more, of weight `share`. The order of sites is that of the calls."""
        for path, factors in adapter.lora.items():
            self._parts[path].append((share * factors.scale, factors))

    def factors(self, path: str) -> tuple[Tensor, Tensor]:
        """The sum of one module as `common.stacked` gives it."""
        return stacked(self._parts[path])

    def squares(self, path: str, got: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """‖got − sum‖² and ‖sum‖² of one module. got: (left, right) of a product, float64."""
        left, right = self.factors(path)
        lost = product_norm(torch.cat([left, -got[0]], 1), torch.cat([right, got[1]], 0))
        return lost**2, product_norm(left, right) ** 2


def stack_of(updates: Sequence[Update], weights: Mapping[str, float]) -> Stack:
    """The sum over updates that are held anyway."""
    exact = Stack()
    for update in updates:
        exact.add(weights[update.site], update.adapter)
    return exact


class Sketch:
    """The sum seen through random probes: Y = Σ_k p_k scale_k B_k (A_k Ω), of one size however many sites there are.

    Ω: (d_in, 64) standard normal numbers, a function of d_in. E ‖M Ω‖² / 64 = ‖M‖², with a relative standard
    deviation of √(2 / 64) ‖MᵀM‖ / ‖M‖² (Frobenius), at most 0.177, which only a matrix of rank one reaches. An error
    √(lost / sum) then has one of at most 0.125 to first order: both squares come from the same probes, so their
    correlation is never negative.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Tensor] = {}  # path -> Y (d_out, 64)
        self._probes: dict[int, Tensor] = {}

    def _probe(self, d_in: int) -> Tensor:
        if d_in not in self._probes:
            counters = torch.arange(d_in * PROBES).view(d_in, PROBES)
            self._probes[d_in] = counter_normal(derive(0, "aggregate", "probes", d_in), counters).double()
        return self._probes[d_in]

    def add(self, share: float, adapter: Adapter) -> None:
        """One site more, of weight `share`; nothing of `adapter` is kept."""
        for path, f in adapter.lora.items():
            seen = share * f.scale * (f.b.double() @ (f.a.double() @ self._probe(f.a.shape[1])))
            self._seen[path] = self._seen[path] + seen if path in self._seen else seen

    def squares(self, path: str, got: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Estimates of ‖got − sum‖² and ‖sum‖² of one module. got: (left, right) of a product, float64."""
        left, right = got
        lost = self._seen[path] - left @ (right @ self._probe(right.shape[1]))
        return float(lost.square().sum()) / PROBES, float(self._seen[path].square().sum()) / PROBES


def measure(reference: Adapter, weights: Mapping[str, float]) -> Stack | Sketch:
    """What a rule measures itself with that keeps no update: exact while Σ r_k ≤ 512, an estimate beyond (see `Sketch`).

    So at most 512 rows and columns of factors a module are held, and beyond that 64 numbers an output, for any number of sites.
    """
    rank = max((f.a.shape[0] for f in reference.lora.values()), default=0)
    return Stack() if rank * len(weights) <= STACKED else Sketch()


def measured_error(exact: Stack | Sketch, adapter: Adapter, shift: Shift) -> float:
    """The `error` of an Aggregate of `adapter` and `shift`."""
    lost = total = 0.0
    for path, f in adapter.lora.items():
        left, right = f.scale * f.b.double(), f.a.double()
        if path in shift:
            left = torch.cat([left, shift[path][0].double()], 1)
            right = torch.cat([right, shift[path][1].double()], 0)
        squares = exact.squares(path, (left, right))
        lost, total = lost + squares[0], total + squares[1]
    return math.sqrt(lost / total) if total else 0.0
