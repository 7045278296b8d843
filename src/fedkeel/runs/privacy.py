"""What a run comes to in differential privacy: ε at δ, by how often each site was asked.

The mechanism of a round is Gaussian: sums of changes clipped to C with noise z · C. Hidden is whether a site's change was there
or zeros in its place (Kairouz et al. 2021, arXiv:1912.04977 §4.2), for one site at a time. That sites are drawn is no help:
the recipe's seed says who is. Gaussians compose exactly, and ε of one is that of Balle & Wang 2018 (arXiv:1805.06530), by
`dp-accounting`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fedkeel.federation.server import sample_sites
from fedkeel.recipe.schema import Privacy, Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.legs import Cast

WISHED = (8.0, 3.0, 1.0)  # ε whose noise is told before a run


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError("privacy.unit: accounting needs dp-accounting: pip install 'fedkeel[privacy]'") from error
    return dp_accounting


def epsilon(privacy: Privacy, rounds: int) -> float:
    """ε at privacy.delta after a site was asked in `rounds` rounds: n Gaussians of z are one of z / √n. 0 after none."""
    return float(_accounting().get_epsilon_gaussian(privacy.noise / math.sqrt(rounds), privacy.delta)) if rounds else 0.0


def noise_for(wished: float, rounds: int, delta: float) -> float:
    """The noise z whose ε after `rounds` rounds is `wished`."""
    return float(_accounting().get_sigma_gaussian(wished, delta)) * math.sqrt(rounds)


def most_asked(recipe: Recipe, sites: Sequence[Sequence[str]]) -> int:
    """In how many rounds of the whole run the site that is asked most often is asked. sites: of each stage, those with rows."""
    asked: Counter[str] = Counter()
    federation = recipe.federation
    for stage, names in enumerate(sites):
        for round in range(stage * federation.rounds, (stage + 1) * federation.rounds):
            asked.update(sample_sites(names, federation.sites_per_round, recipe.seed, round))
    return max(asked.values(), default=0)


def check_budget(cast: Cast) -> str:
    """What the run will come to, in words; empty where it promises nothing. Raises ConfigError over privacy.epsilon."""
    privacy = cast.recipe.privacy
    if privacy.unit == "none":
        return ""
    rounds = most_asked(cast.recipe, [[name for name, count in stage.items() if count] for stage in cast.rows])
    comes = epsilon(privacy, rounds)
    if privacy.epsilon and comes > privacy.epsilon:
        raise ConfigError(
            f"privacy.epsilon = {privacy.epsilon:g}: {rounds} rounds with privacy.noise = {privacy.noise:g} come to ε = "
            f"{comes:.3g} at δ = {privacy.delta:g}; set fewer rounds, or privacy.noise = "
            f"{noise_for(privacy.epsilon, rounds, privacy.delta):.4g}"
        )
    wished = ", ".join(f"ε = {e:g} asks {noise_for(e, rounds, privacy.delta):.3g}" for e in WISHED)
    return (
        f"ε = {comes:.3g} at δ = {privacy.delta:g} for each site, by noise {privacy.noise:g} in {rounds} rounds ({wished}); "
        f"not repeatable, as the noise follows no seed"
    )
