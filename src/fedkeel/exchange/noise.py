"""A step of the channel: Gaussian noise from secret entropy, added at the sites."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedkeel.recipe.schema import Privacy, Recipe
from fedkeel.rng import secret_normal

Tensors = Mapping[str, Tensor]


def noised(tensors: Tensors, deviation: float) -> dict[str, Tensor]:
    """Every number with its own N(0, deviation²), drawn anew at each call."""
    return {name: (t.double() + deviation * secret_normal(tuple(t.shape)).to(t.device)).float() for name, t in tensors.items()}


def deviation(privacy: Privacy) -> float:
    """Of one site's noise: z · C / √together, so that the sum over `together` sites has z · C."""
    return privacy.noise * privacy.clip / math.sqrt(privacy.together)


@dataclass(frozen=True)
class Noise:
    """To bytes it does nothing; its error is itself, Σ d · σ² over the d numbers; what it hides: docs/privacy.md.

    Source: distributed noise, Kairouz et al. 2021, arXiv:2102.06387 (there discrete, for secure aggregation).
    """

    sigma: float

    def leaves(self, tensors: Tensors, memory: Tensors) -> Tensors:
        """See `channel.Step`."""
        return noised(tensors, self.sigma)

    def arrived(self, left: Tensors, got: Tensors, memory: Tensors) -> Tensors:
        """See `channel.Step`: nothing is remembered."""
        return {}


def noise(recipe: Recipe) -> Noise | None:
    """Where a site's contribution is private, and the sites add the noise."""
    privacy = recipe.privacy
    return Noise(deviation(privacy)) if privacy.unit == "site" and privacy.noise_at == "sites" else None
