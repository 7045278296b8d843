"""Stochastic depth: residual branches of the upper half of a stack left out."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw, Sheet, gates, scaled
from fedkeel.model.places import Places


def depth_chance(amount: float, block: int, blocks: int) -> float:
    """p_l of block `block` (from 0): 0 up to the middle of the stack, then linear in depth up to `amount` at the top."""
    return amount * max(0.0, 2.0 * (block + 1) / blocks - 1.0)


def layers(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Leave out what a residual branch, (rows, time, d), adds to the residual stream, for each row and branch by itself.

    amount: the probability at the top of a stack, in [0, 1), see `depth_chance`. A branch that is kept is scaled by
    1/(1 − p_l), so the mean is the branch. Encoder and decoder each count their own depth.
    Raises StructureError if the architecture is unknown.
    Source: Huang et al. 2016, arXiv:1603.09382; there scaled at test time instead, and over the whole depth.
    """
    places.need(places.residual, "layers")
    upper = [(p.module, chance) for p in places.residual if (chance := depth_chance(amount, p.block, p.blocks))]
    sheet = gates(draw, "layers", [1] * len(upper), [chance for _, chance in upper])
    return [module.register_forward_hook(partial(_drop_branch, draw, sheet, i)) for i, (module, _) in enumerate(upper)]


def _drop_branch(draw: Draw, sheet: Sheet, place: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    return scaled(output, sheet.take(place, output)) if draw.active else None
