"""Noise on frozen weights without a copy of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw
from fedkeel.model.places import Branch, Places
from fedkeel.rng import counter_normal, derive

_COLUMNS = 256  # of an identity matrix pushed through a map at a time


@torch.no_grad()
def row_norms(branch: Branch) -> Tensor:
    """‖W_i‖ of every output of the frozen map, (d_out,), float32.

    Of a map that does not hold W as it is (transposed as in GPT-2, or quantised): from its answers to unit vectors, less its
    bias, which costs as much as d_in rows of a forward pass.
    """
    if type(branch.base) is nn.Linear:
        return torch.linalg.vector_norm(branch.base.weight.float(), dim=1)
    linear, d_in, device = branch.base, branch.shape[2], next(branch.a.parameters()).device
    dtype = next((p.dtype for p in linear.parameters() if p.is_floating_point()), torch.float32)
    bias = linear(torch.zeros(1, d_in, dtype=dtype, device=device)).float()
    total = torch.zeros_like(bias)
    for start in range(0, d_in, _COLUMNS):
        unit = torch.zeros(min(_COLUMNS, d_in - start), d_in, dtype=dtype, device=device)
        unit.diagonal(start).fill_(1.0)
        total += (linear(unit).float() - bias).square().sum(0)
    return total[0].sqrt()


def weights(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Add to y = W x + …, (rows, time, d_out), of every map with a branch: σ · (‖x‖/√d_in) · ‖W_i‖ · n_i, n ~ N(0, 1).

    amount: σ ≥ 0. n is drawn for each row, time and output; its mean is 0, so the mean of y is y. At one position this is
    what ΔW_ij ~ N(0, σ²‖W_i‖²/d_in) would add, but with noise of its own at every position instead of one ΔW for all.
    Gradient flows through ‖x‖. W is the frozen base's. Memory O(d_out) a map; the cost is that of d_out normal numbers a
    position and map. Raises StructureError if there is no branch.
    Source: local reparameterisation (Kingma et al. 2015, arXiv:1506.02557) of Flat-LoRA's noise (arXiv:2409.14396).
    """
    places.need(places.branches, "weights")
    return [
        b.whole.register_forward_hook(_Noise(draw, amount / math.sqrt(b.shape[2]), row_norms(b), b.path))
        for b in places.branches
    ]


@dataclass(frozen=True)
class _Noise:
    """The hook of one map. amount: σ/√d_in. norms: ‖W_i‖, (d_out,). path: of the map, a key of what is drawn."""

    draw: Draw
    amount: float
    norms: Tensor
    path: str

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        draw = self.draw
        if not draw.active:
            return None
        first, rows, _ = draw.rows_of(output)
        times = output.shape[:-1].numel() // rows
        row = torch.arange(first, first + rows, device=output.device)[:, None, None] << 40
        time = torch.arange(times, device=output.device)[:, None] << 20
        counters = row + time + torch.arange(output.shape[-1], device=output.device)
        noise = counter_normal(derive(draw.key, "weights", self.path), counters).view(output.shape)
        length = torch.linalg.vector_norm(inputs[0].float(), dim=-1, keepdim=True)
        return output + (self.amount * draw.strength * length * (self.norms * noise)).to(output.dtype)
