"""Noise on the rank directions of a LoRA branch: B (I + diag ζ) A."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw, Sheet, scaled
from fedkeel.model.places import Places
from fedkeel.rng import counter_normal


def rank(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Multiply a(x), (rows, time, r), of every branch by 1 + ζ, ζ ~ N(0, σ²) for each row and rank direction.

    amount: σ ≥ 0. The mean is a(x). Raises StructureError if there is no branch.
    Source: Gaussian dropout (Srivastava et al. 2014, §10) on the rank; method.md §3.
    """
    places.need(places.branches, "rank")

    def fill(key: int, counters: Tensor) -> Tensor:
        return 1.0 + amount * draw.strength * counter_normal(key, counters)

    sheet = Sheet(draw, "rank", [branch.shape[1] for branch in places.branches], fill)
    return [branch.a.register_forward_hook(partial(_shake, draw, sheet, i)) for i, branch in enumerate(places.branches)]


def _shake(draw: Draw, sheet: Sheet, place: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    return scaled(output, sheet.take(place, output)) if draw.active else None
