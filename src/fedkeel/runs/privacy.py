"""What a run comes to in differential privacy: ε at δ, by how often each site was asked.

Of a site: the mechanism of a round is Gaussian, sums of changes clipped to C with noise z · C. Hidden is whether a site's
change was there or zeros in its place (Kairouz et al. 2021, arXiv:1912.04977 §4.2), for one site at a time. That sites are
drawn is no help: the recipe's seed says who is. Gaussians compose exactly, and ε of one is that of Balle & Wang 2018
(arXiv:1805.06530), by `dp-accounting`. Of a row: DP-SGD with Poisson sampling, each step a mechanism; hidden is whether the
row was there. How many rows a site has is taken to be known.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from fedkeel.federation.train import steps_a_round
from fedkeel.recipe.schema import Privacy, Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.legs import Cast

WISHED = (8.0, 3.0, 1.0)  # ε whose noise is told before a run
DIGITS = 4e-4  # of the logarithm of a noise that is looked for


def _accounting() -> Any:
    try:
        import dp_accounting
    except ImportError as error:
        raise ConfigError("privacy.unit: accounting needs dp-accounting: pip install 'fedkeel[privacy]'") from error
    return dp_accounting


def epsilon(privacy: Privacy, rounds: int) -> float:
    """ε at privacy.delta after a site was asked in `rounds` rounds: n Gaussians of z are one of z / √n. 0 after none."""
    return float(_accounting().get_epsilon_gaussian(privacy.noise / math.sqrt(rounds), privacy.delta)) if rounds else 0.0


@lru_cache(maxsize=4096)
def row_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """ε of a row after `steps` steps, in each of which it was drawn with probability `rate`; by Rényi divergences (Mironov et
    al. 2019, arXiv:1908.10530). 0 after none."""
    if not steps:
        return 0.0
    dp = _accounting()
    from dp_accounting import rdp

    accountant, log = rdp.RdpAccountant(), logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)  # of each order that it leaves out there is a warning, and that makes ε no less
    try:
        accountant.compose(dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps))
    finally:
        log.setLevel(before)
    return float(accountant.get_epsilon(delta))


def noise_for(wished: float, of: Callable[[float], float]) -> float:
    """The least noise z, to three digits, for which `of`, an ε that falls with z, is at most `wished`; 0.01 if that is enough.

    Brent's method on log ε over log z, which is nearly a line: an ε of rows takes a quarter of a second.
    """

    def over(log_noise: float) -> float:
        return math.log(min(of(math.exp(log_noise)), 1e300) / wished)

    low, high = math.log(1e-2), 0.0
    while over(high) > 0:
        low, high = high, high + math.log(2)
    if over(low) <= 0:
        return math.exp(low)
    from scipy.optimize import brentq  # comes with dp-accounting

    return math.exp(brentq(over, low, high, xtol=DIGITS) + DIGITS)


@dataclass(frozen=True)
class Spending:
    """What a run spends. rows: by site, the fewest and the most training rows that it has in a stage: a row is drawn the
    oftener the fewer there are, and by epochs in the more steps the more there are."""

    recipe: Recipe
    rows: Mapping[str, Sequence[int]]

    def after(self, asked: Mapping[str, int], noise: float = 0.0) -> float:
        """ε of the site, or the row, that has spent most. asked: site -> rounds. noise: in place of the recipe's."""
        privacy, train = self.recipe.privacy, self.recipe.train
        noise = noise or privacy.noise
        if privacy.unit == "site":
            return epsilon(replace(privacy, noise=noise), max(asked.values(), default=0))
        sites = {
            (min(1.0, train.batch_size / self.rows[site][0]), rounds * steps_a_round(train, self.rows[site][1]))
            for site, rounds in asked.items()
            if site in self.rows
        }
        # a row that is drawn as likely and in as many steps as another's has spent as much
        most = [(r, s) for r, s in sites if not any(r <= q and s <= t for q, t in sites - {(r, s)})]
        return max((row_epsilon(noise, rate, steps, privacy.delta) for rate, steps in most), default=0.0)


def spending(cast: Cast, before: Mapping[str, Sequence[int]] | None = None) -> Spending:
    """Of a run. before: `Spending.rows` of rounds that it was asked for with other rows, as a deployment's sites may change."""
    rows = {name: list(counts) for name, counts in (before or {}).items()}
    for stage in cast.rows:
        for name, count in stage.items():
            if count:
                fewest, most = rows.get(name, (count, count))
                rows[name] = [min(fewest, count), max(most, count)]
    return Spending(cast.recipe, rows)


def planned(cast: Cast) -> Counter[str]:
    """site -> in how many rounds of the whole run it is asked."""
    return sum((cast.asked(stage) for stage in range(len(cast.rows))), Counter[str]())


def check_budget(cast: Cast) -> str:
    """What the run will come to, in words; empty where it promises nothing. Raises ConfigError over privacy.epsilon."""
    privacy = cast.recipe.privacy
    if privacy.unit == "none":
        return ""
    asked, spends = planned(cast), spending(cast)
    comes, rounds = spends.after(asked), max(asked.values(), default=0)

    def needs(wished: float) -> float:
        return noise_for(wished, lambda noise: spends.after(asked, noise))

    if privacy.epsilon and comes > privacy.epsilon:
        raise ConfigError(
            f"privacy.epsilon = {privacy.epsilon:g}: {rounds} rounds with privacy.noise = {privacy.noise:g} come to ε = "
            f"{comes:.3g} at δ = {privacy.delta:g}; set fewer rounds, or privacy.noise = {needs(privacy.epsilon):.4g}"
        )
    wished = ", ".join(f"ε = {e:g} asks {needs(e):.3g}" for e in WISHED)
    return (
        f"ε = {comes:.3g} at δ = {privacy.delta:g} for each {privacy.unit}, by noise {privacy.noise:g} in {rounds} rounds "
        f"({wished}); not repeatable, as the noise follows no seed"
    )
