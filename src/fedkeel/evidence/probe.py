"""What a round at the sites says of a recipe: how far their data make them disagree, whether the rate fits, which codec is
harmless. A few rounds are trained and thrown away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.evidence.report.verdicts import BAD, GOOD, LOOK, Verdict
from fedkeel.exchange.codecs import make_codec
from fedkeel.exchange.messages import difference, names_of
from fedkeel.federation.train import Round, SiteError, steps_a_round, train_round
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.traffic import payload_bytes
from fedkeel.scores.evaluate import choose, row_nats
from fedkeel.types import Global

ROWS = 64  # validation rows a task that a rate is judged by
LADDER = ("fp32", "bf16", "int8", "int4", "topk=0.25+int4", "topk=0.1+int4", "topk=0.03+int4")
RATES = (0.5, 1.0, 2.0)

Change = Mapping[str, Tensor]
Changes = Mapping[str, Change]  # by site


@dataclass(frozen=True)
class Disagreement:
    """Γ = Σ p_k ‖Δ_k‖² / ‖Δ̄‖² of a round: 1 where all sites move alike. whole: as it is. noise: what the noise of batches alone
    would make of sites that mean the same. skew: with the noise taken out, infinite where nothing common is left. most: of
    sites that have nothing in common. spread: length of the noise in the average, √(Σ p_k² σ_k²)."""

    whole: float
    noise: float
    skew: float
    most: float
    spread: float


def disagreement(first: Changes, second: Changes, shares: Mapping[str, float]) -> Disagreement:
    """From two trainings of each site on batches of their own. shares: p_k, which sum to 1.

    With Δ = μ + noise, ⟨Δ¹, Δ²⟩ estimates ‖μ‖² and ½‖Δ¹ − Δ²‖² estimates σ², each without bias; the same for the average.
    """
    lengths = _over(shares, lambda k: (_dot(first[k], first[k]) + _dot(second[k], second[k])) / 2)
    meant = _over(shares, lambda k: _dot(first[k], second[k]))
    noise = {k: max(0.0, lengths[k] - meant[k]) for k in shares}  # ½‖Δ¹ − Δ²‖²
    means = [_mean(changes, shares) for changes in (first, second)]
    moved, common = (_dot(means[0], means[0]) + _dot(means[1], means[1])) / 2, _dot(*means)
    of_all, of_noise = (sum(shares[k] * value[k] for k in shares) for value in (meant, noise))
    averaged = sum(shares[k] ** 2 * noise[k] for k in shares)
    alike = max(0.0, of_all)
    return Disagreement(
        _ratio(sum(shares[k] * lengths[k] for k in shares), moved),
        _ratio(alike + of_noise, alike + averaged),
        _ratio(alike, common),
        1 / sum(share**2 for share in shares.values()),
        math.sqrt(averaged),
    )


def _over(shares: Mapping[str, float], of: Callable[[str], float]) -> dict[str, float]:
    return {site: of(site) for site in shares}


def _dot(a: Change, b: Change) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _mean(changes: Changes, shares: Mapping[str, float]) -> dict[str, Tensor]:
    names = next(iter(changes.values()))
    return {name: sum((shares[k] * changes[k][name].double() for k in shares), torch.zeros(())) for name in names}


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


class Probe:
    """The sites of a recipe at one moment: of a run, the middle of its last stage, if that is kept; else the beginning.

    tick: called with (trainings done, trainings in all). Raises ConfigError where the sites' changes cannot be compared.
    """

    def __init__(self, prepared: Prepared, run: Path | None, tick: Callable[[int, int], None] = lambda done, of: None) -> None:
        recipe = prepared.recipe
        if not recipe.lora.one_rank:
            raise ConfigError("lora.site_ranks: sites of several ranks have no factors that a probe could compare")
        self.recipe, self.stage = recipe, len(prepared.stages) - 1
        self.model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes)
        assert self.model.initial is not None
        formatter, last = formatter_of(self.model, prepared), prepared.stages[-1]
        encoded = {name: formatter.encode_all(held["train"]) for name, held in sorted(last.rows.items())}
        self.sites = {name: rows for name, rows in encoded.items() if rows}
        self.judged = formatter.encode_all(choose(last.all("validation"), "validation", ROWS))
        rounds = recipe.federation.rounds
        at = self.stage * rounds + rounds // 2
        self.state = Global(self.stage * rounds, self.model.initial)
        if run and at and RunFolder(run).checkpoint("federated", at).exists():
            self.state = RunFolder(run).read_checkpoint("federated", at, self.model.initial)
        self.model.replay(self.state.shifts, 0)
        self.shares = self._shares()
        self._tick, self._done, self._all = tick, 0, len(self.sites) * (2 + len(RATES) - 1)

    def _shares(self) -> dict[str, float]:
        """As federation.weighting has it, by rows where it counts positions."""
        train, weigh = self.recipe.train, tables.WEIGHTINGS[self.recipe.federation.weighting].load()
        per_row = {name: sum(e.positions for e in rows) / len(rows) for name, rows in self.sites.items()}
        seen = {name: train.batch_size * steps_a_round(train, len(rows)) for name, rows in self.sites.items()}
        raw = {name: weigh(round(seen[name] * per_row[name])) for name in self.sites}
        return {name: value / sum(raw.values()) for name, value in raw.items()}

    def changes(self, draw: int, rate: float = 1.0) -> dict[str, Change]:
        """What each site changes in a round. draw: of its batches. rate: times train.lr."""
        recipe, rule = self.recipe, tables.RULES[self.recipe.federation.rule]
        train = replace(recipe.train, lr=rate * recipe.train.lr)
        drawn = replace(recipe, train=train, seed=derive(recipe.seed, "probe", draw) % 2**31)
        trained = names_of(self.state.adapter, rule.trained(self.state.round))
        found: dict[str, Change] = {}
        for name, rows in self.sites.items():
            self.model.write(self.state.adapter)
            with self.model.training_only(trained):
                train_round(self.model, rows, Round(name, recipe.federation.rounds, drawn, self.state))
            change = difference(self.model.read(), self.state.adapter)
            found[name] = {key: change[key] for key in sorted(trained)}
            self._done += 1
            self._tick(self._done, self._all)
        return found

    def nats(self, change: Change) -> Tensor:
        """`row_nats` of the validation rows once the adapter has changed so."""
        now = self.state.adapter.tensors()
        moved = {name: tensor + change[name].float() if name in change else tensor for name, tensor in now.items()}
        self.model.write(self.state.adapter.with_tensors(moved))
        return row_nats(self.model, self.judged, self.recipe.evaluation.batch_size)

    def verdicts(self) -> Iterator[Verdict]:
        """All that a probe finds."""
        try:
            first, second = self.changes(0), self.changes(1)
        except SiteError as error:
            yield Verdict(BAD, str(error), f"a lower train.lr, such as {self.recipe.train.lr / 4:g}")
            return
        found = disagreement(first, second, self.shares)
        yield told_disagreement(found, len(self.sites))
        yield told_codec(self._codecs(first), found.spread, self.recipe.federation.codec_up)
        if self.judged:
            nats = {0.0: self.nats({}), 1.0: self.nats(_mean(first, self.shares))}
            nats |= {rate: self._after(rate) for rate in RATES if rate != 1.0}
            yield told_rate(nats, sum(e.positions for e in self.judged), self.recipe)

    def _after(self, rate: float) -> Tensor:
        """`nats` after a round at a multiple of train.lr; not a number where a site's loss breaks at it."""
        try:
            return self.nats(_mean(self.changes(0, rate), self.shares))
        except SiteError:
            return torch.full((len(self.judged),), math.nan, dtype=torch.float64)

    def _codecs(self, changes: Changes) -> dict[str, tuple[int, float]]:
        """Codec -> (bytes of a message up, how far it moves the average), the present one among them."""
        shapes = {name: tuple(t.shape) for name, t in self.state.adapter.tensors().items()}
        exact, found = _mean(changes, self.shares), {}
        for spec in dict.fromkeys((*LADDER, self.recipe.federation.codec_up)):
            codec = make_codec(spec)
            got = {}
            for site, change in changes.items():
                sizes = {name: tuple(t.shape) for name, t in change.items()}
                got[site] = codec.decode(codec.encode(change, derive(self.recipe.seed, "probe", site)), sizes)
            off = _mean(got, self.shares)
            moved = {name: off[name] - exact[name] for name in exact}
            federation = replace(self.recipe.federation, codec_up=spec)
            found[spec] = payload_bytes(shapes, replace(self.recipe, federation=federation))[1], math.sqrt(_dot(moved, moved))
        return found


def told_disagreement(found: Disagreement, sites: int) -> Verdict:
    """Whether it is the data that make sites disagree."""
    told = (
        f"{sites} sites disagree by Γ = {found.whole:.2f} in a round (1: they agree, {found.most:.2f}: nothing in common); the "
        f"noise of batches alone would make it {found.noise:.2f}, and without it Γ would be {found.skew:.2f}"
    )
    if found.skew > 2:
        change = (
            "less than half of what sites learn is common: try evidence.task = 'restricted', fewer train.local_steps a round, "
            "guidance (docs/method.md), or rule share_a"
        )
        return Verdict(LOOK, told, change)
    return Verdict(GOOD, told)


def told_codec(found: Mapping[str, tuple[int, float]], noise: float, present: str) -> Verdict:
    """The smallest codec whose error is at most half the noise of batches in the average. found: of `Probe._codecs`."""
    size, off = found[present]
    harmless = {spec: told for spec, told in found.items() if told[1] <= noise / 2}
    least = min(harmless, key=lambda spec: harmless[spec][0], default="fp32")
    part = f"federation.codec_up = {present!r} moves the average by {_ratio(off, noise):.2f} of the noise of batches"
    if off > noise:
        return Verdict(LOOK, part, f"set {least!r}, or federation.error_feedback = true where the rule allows it")
    if found[least][0] < 0.5 * size:
        times = size / found[least][0]
        other = f"{least!r} by {_ratio(found[least][1], noise):.2f}, in {times:.1f} times fewer bytes"
        return Verdict(LOOK, f"{part}, {other}", f"set federation.codec_up = {least!r}")
    return Verdict(GOOD, part)


def told_rate(nats: Mapping[float, Tensor], positions: int, recipe: Recipe) -> Verdict:
    """Whether half or twice the rate would have ended lower. nats: share of the rate, 0 for no training -> nats by row."""
    means = {rate: float(of.sum()) / positions for rate, of in nats.items()}
    told = (
        f"a round at half, once and twice train.lr = {recipe.train.lr:g} ends at {means[0.5]:.3f}, {means[1.0]:.3f} and "
        f"{means[2.0]:.3f} nats a token on {len(nats[1.0])} validation rows, from {means[0.0]:.3f}"
    )
    if _surely_less(nats[0.0], nats[1.0]):
        return Verdict(BAD, told, f"a lower train.lr, such as {recipe.train.lr / 4:g}: the round makes the model worse")
    if _surely_less(nats[0.5], nats[1.0]):
        return Verdict(LOOK, told, f"a lower train.lr, such as {recipe.train.lr / 2:g}")
    if _surely_less(nats[2.0], nats[1.0]):
        return Verdict(
            LOOK, told, f"a higher train.lr, such as {2 * recipe.train.lr:g}, is faster at least now; it may forget more"
        )
    return Verdict(GOOD, told)


def _surely_less(a: Tensor, b: Tensor) -> bool:
    """Whether a is below b by more than two standard errors of their paired difference, which a model that broke never is."""
    gap = b - a
    if not torch.isfinite(gap).all():
        return bool(torch.isfinite(a).all())
    return len(gap) > 1 and float(gap.mean()) > 2 * float(gap.std()) / math.sqrt(len(gap))
