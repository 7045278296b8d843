"""A step of the channel: a site's change is no longer than it may be, whatever its rows are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.recipe.schema import Recipe

Tensors = Mapping[str, Tensor]
MARGIN = 1e-6  # so that rounding to float32 does not pass the bound


def length(tensors: Tensors) -> float:
    """‖Δ‖, Euclidean, over all tensors together."""
    # in float64 no square of a float32 is too large or vanishes
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


@dataclass(frozen=True)
class Clip:
    """most: C > 0. Δ becomes Δ · min(1, C / ‖Δ‖), over all tensors together; zeros where Δ is not finite.

    To bytes it does nothing; its error is what a long change loses; alone it is private in nothing, and it bounds what one
    site can do to a sum: the sensitivity of `noise`. Source: McMahan et al. 2018, arXiv:1710.06963.
    """

    most: float

    def leaves(self, tensors: Tensors, memory: Tensors) -> Tensors:
        """See `channel.Step`."""
        long = length(tensors)
        if not math.isfinite(long):
            return {name: torch.zeros_like(t, dtype=torch.float32) for name, t in tensors.items()}
        bound = self.most * (1 - MARGIN)
        if long <= bound:
            return {name: t.float() for name, t in tensors.items()}
        return {name: (t.double() * (bound / long)).float() for name, t in tensors.items()}

    def arrived(self, left: Tensors, got: Tensors, memory: Tensors) -> Tensors:
        """See `channel.Step`: nothing is remembered."""
        return {}


def clip(recipe: Recipe) -> Clip | None:
    """Where a site's contribution is private."""
    return Clip(recipe.privacy.clip) if recipe.privacy.unit == "site" else None
