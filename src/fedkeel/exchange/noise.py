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


def deviation(privacy: Privacy, asked: int = 0) -> float:
    """Of one site's noise: z_Δ · C / √together, so that the sum over `together` sites has z_Δ · C. asked: as of `of_count`."""
    return of_change(privacy, asked) * privacy.clip / math.sqrt(privacy.together)


def of_count(privacy: Privacy, asked: int) -> float:
    """σ_b of the sum over the sites of whether each was within the bound. asked: sites of the round, whom the coordinator
    counts; where the sites add the noise, it is that of `together`. By itself a twentieth of them, and at least z, by which the
    change is noised 15 % more (Andrew et al. 2021, arXiv:1905.03871, §3.1, say n/20 for many sites)."""
    counted = asked if privacy.noise_at == "coordinator" else privacy.together
    return privacy.count_noise or max(counted / 20, privacy.noise)


def of_change(privacy: Privacy, asked: int) -> float:
    """z_Δ = (z⁻² − (2 σ_b)⁻²)^(−½): with the count, to which a site adds ±½, the two are one Gaussian of z (there, theorem 1).
    z where nothing is counted."""
    if not privacy.quantile:
        return privacy.noise
    return (privacy.noise**-2 - (2 * of_count(privacy, asked)) ** -2) ** -0.5


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
