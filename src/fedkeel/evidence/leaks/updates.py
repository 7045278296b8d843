"""Updates of a finished run made anew, protected in one way and another, and what the attacks of `inversion` find in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.data.batches import Batch, collate
from fedkeel.data.format import Example, Formatter
from fedkeel.evidence.leaks.inversion import Entry, answers_of, entry_of, words_told
from fedkeel.evidence.leaks.ranks import attacked, auc, ranks
from fedkeel.evidence.report.leaks import Told
from fedkeel.exchange.channel import channel_of
from fedkeel.exchange.messages import difference, names_of
from fedkeel.federation.train import Round, learning_rate, steps_a_round, train_round
from fedkeel.model.lora import Model
from fedkeel.recipe.load import plain
from fedkeel.recipe.schema import Privacy, Recipe
from fedkeel.rng import derive, numpy_generator
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.privacy import epsilon, row_epsilon
from fedkeel.types import Adapter, Global

SITES = 4  # whose updates are attacked, at most
STEPS = 16  # of a round as the run had it, at most: so many take a bounded time, and fewer tell more
OWN = 400  # rows that the coordinator has: test rows
ASKED = 32  # of them that it asks the model with
RESAMPLES = 200
COMMON = 0.9  # a token in more of these rows is a frame's, and no secret


@dataclass(frozen=True)
class Guard:
    """What stands between a site's training and the coordinator. summed: it sees the mean over the sites alone."""

    codec: str = "fp32"
    privacy: Privacy = field(default_factory=Privacy)
    summed: bool = False

    def recipe(self, recipe: Recipe) -> Recipe:
        """As a run would have it; under DP-SGD plain LoRA, which is what that trains."""
        base = plain(recipe) if self.privacy.unit == "row" else recipe
        return replace(base, federation=replace(base.federation, codec_up=self.codec), privacy=self.privacy)

    def epsilon(self, steps: int) -> float | None:
        """ε of one update of `steps` steps, at a site that has no other rows; None where nothing is promised."""
        privacy = self.privacy
        if privacy.unit == "none" or not privacy.noise:
            return None
        if privacy.unit == "site":
            return epsilon(privacy, 1)
        return row_epsilon(privacy.noise, 1 / steps, steps, privacy.delta)


def _noise(unit: str, noise: float) -> Privacy:
    return Privacy(unit=unit, clip=0.1, noise=noise)


GUARDS = {
    "none": Guard(),
    "int8": Guard("int8"),
    "int4": Guard("int4"),
    "topk=0.1": Guard("topk=0.1"),
    "secure aggregation": Guard(summed=True),
    "site noise 1": Guard(privacy=_noise("site", 1.0)),
    "row noise 1": Guard(privacy=_noise("row", 1.0)),
}


def own_guard(recipe: Recipe) -> Guard:
    """What the run itself did."""
    return Guard(recipe.federation.codec_up, recipe.privacy, recipe.privacy.masks)


@dataclass(frozen=True)
class Coordinator:
    """What the attacker has. own: its rows. usual: the tokens in them, by how many hold each; frame: those in nearly all."""

    model: Model
    recipe: Recipe
    entry: Entry
    own: Sequence[Example]
    usual: Mapping[int, int]
    frame: frozenset[int]

    def batch_of(self, rows: Sequence[Example]) -> Batch:
        """Of the model's kind."""
        return collate(rows, self.model.kind, self.model.tokenizer.pad_token_id, len(self.model.classes))

    @cached_property
    def batch(self) -> Batch:
        """What it asks a model with."""
        return self.batch_of(self.own[:ASKED])

    @cached_property
    def answers(self) -> Counter[int]:
        """The answers of its rows, by how many have each."""
        return Counter(self.batch_of(self.own).targets.tolist())


def coordinator(model: Model, recipe: Recipe, own: Sequence[Example]) -> Coordinator:
    """own: rows of the same kind as the sites'. It tries all tokens where words enter as themselves, else those of its rows."""
    usual = Counter(token for e in own for token in {*e.ids, *e.decoder})
    frame = frozenset(token for token, count in usual.items() if count > COMMON * len(own))
    common = sorted(set(usual) - frame)
    words = common if model.first else range(model.net.get_input_embeddings().weight.shape[0])
    return Coordinator(model, recipe, entry_of(model, list(words), common), own, usual, frame)


def change_of(model: Model, recipe: Recipe, state: Global, site: str, rows: Sequence[Example]) -> dict[str, Tensor]:
    """What a site that holds `rows` would hand to its channel after a round from `state`."""
    rule = tables.RULES[recipe.federation.rule]
    model.write(state.adapter)
    trained = names_of(state.adapter, rule.trained(state.round))
    with model.training_only(trained):
        train_round(model, rows, Round(site, recipe.federation.rounds, recipe, state))
    change = difference(model.read(), state.adapter)
    return {name: change[name] for name in sorted(trained & names_of(state.adapter, rule.shared))}


def sent_by(change: Mapping[str, Tensor], guard: Guard, recipe: Recipe, key: int) -> dict[str, Tensor]:
    """The change as the coordinator decodes it."""
    channel = channel_of(guard.recipe(recipe))
    encoded, _ = channel.send(change, {}, key)
    return channel.codec.decode(encoded, {name: tuple(t.shape) for name, t in change.items()})


def updates(
    attacker: Coordinator,
    state: Global,
    drawn: Mapping[str, Sequence[Example]],
    size: tuple[int, int],
    guards: Mapping[str, Guard],
) -> Iterator[tuple[str, str, dict[str, Tensor]]]:
    """(guard, site, its update), of size[1] steps of size[0] rows. Each site trains once, and once more for DP-SGD."""
    train = replace(attacker.recipe.train, batch_size=size[0], micro_batch_size=0, local_steps=size[1], local_epochs=0)
    recipe = replace(attacker.recipe, train=train)
    plainly = {s: change_of(attacker.model, Guard().recipe(recipe), state, s, rows) for s, rows in drawn.items()}
    for name, guard in guards.items():
        seen = {}
        for site, rows in drawn.items():
            privately = guard.privacy.unit == "row"
            change = change_of(attacker.model, guard.recipe(recipe), state, site, rows) if privately else plainly[site]
            seen[site] = sent_by(change, guard, recipe, derive(recipe.seed, "up", site, state.round))
        if guard.summed:
            mean = {name: torch.stack([u[name] for u in seen.values()]).mean(0) for name in next(iter(seen.values()))}
            seen = dict.fromkeys(seen, mean)
        for site, update in seen.items():
            yield name, site, update


@dataclass
class _Tally:
    """Of one attack under one guard, over updates: how many were there, how many of them the attack's and the baseline's best
    guesses name, and where those there and the others stand among each other."""

    there: int = 0
    updates: int = 0
    hits: int = 0
    usual_hits: int = 0
    told: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    usual: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, scores: np.ndarray, usual: np.ndarray, there: Sequence[int], others: Sequence[int]) -> None:
        """scores, usual: of every candidate, −∞ where it is none. there, others: candidates."""
        self.updates += 1
        self.there += len(there)
        self.hits += _best(scores, there)
        self.usual_hits += _best(usual, there)
        self.told.append(_places(scores, there, others))
        self.usual.append(_places(usual, there, others))


def _best(scores: np.ndarray, there: Sequence[int]) -> int:
    """How many of those there are among as many of the highest scores; none where nothing tells candidates apart."""
    finite = scores[np.isfinite(scores)]
    if not len(finite) or finite.max() == finite.min():
        return 0
    return len(set(np.argsort(-scores, kind="stable")[: len(there)].tolist()) & set(there))


def _places(scores: np.ndarray, there: Sequence[int], others: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of those there and of the others, the share of both together that each stands above, ties counting half."""
    above = (ranks(scores[[*there, *others]]) - 1) / (len(there) + len(others))
    return above[: len(there)], above[len(there) :]


def _words(attacker: Coordinator, rows: Sequence[Example], told: Tensor) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """For `_Tally.add`: tokens of the rows against those of the coordinator's rows that are not in them."""
    there = {token for e in rows for token in {*e.ids, *e.decoder}} - attacker.frame
    size = 1 + max(int(attacker.entry.words.max()), max(there, default=0), max(attacker.usual, default=0))
    scores, usual = np.full(size, -np.inf), np.zeros(size)
    scores[attacker.entry.words.numpy()] = told.numpy()
    usual[list(attacker.usual)] = list(attacker.usual.values())
    scores[list(attacker.frame)] = usual[list(attacker.frame)] = -np.inf
    return scores, usual, sorted(there), sorted(set(attacker.usual) - attacker.frame - there)


def _answers(
    attacker: Coordinator, rows: Sequence[Example], told: Tensor
) -> tuple[np.ndarray, np.ndarray, list[int], list[int]]:
    """For `_Tally.add`: answers of the rows, of a classifier against other classes, else against tokens of other answers."""
    frame = frozenset() if attacker.model.kind == "classifier" else attacker.frame
    counts, there = attacker.answers, set(attacker.batch_of(rows).targets.tolist()) - frame
    scores, usual = told.double().numpy().copy(), np.zeros(len(told))
    usual[list(counts)] = list(counts.values())
    scores[list(frame)] = usual[list(frame)] = -np.inf
    known = set(range(len(told))) if attacker.model.kind == "classifier" else set(counts)
    return scores, usual, sorted(there), sorted(known - frame - there)


def attack(
    attacker: Coordinator,
    state: Global,
    held: Mapping[str, Sequence[Example]],
    size: tuple[int, int],
    guards: Mapping[str, Guard],
) -> list[Told]:
    """What is told by a round from `state` of size[1] steps of size[0] rows at each site of `held`, under each of `guards`."""
    recipe = attacker.recipe
    drawn = {site: _drawn(rows, size[0] * size[1], recipe.seed, site) for site, rows in held.items()}
    tallies = {(guard, what): _Tally() for guard in guards for what in ("words", "answers")}
    before, seen = answers_of(attacker.model, state.adapter, attacker.batch), None
    for name, site, update in updates(attacker, state, drawn, size, guards):
        rate = _rate(recipe, state.round) if size[1] == 1 and guards[name] == Guard() else 0.0
        if update is not seen:  # of a sum there is one for all sites
            seen, words = update, words_told(update, state.adapter, attacker.entry, rate)
            answers = answers_of(attacker.model, _moved(state.adapter, update), attacker.batch) - before
        for what, judged in (
            ("words", _words(attacker, drawn[site], words)),
            ("answers", _answers(attacker, drawn[site], answers)),
        ):
            if judged[2] and judged[3]:  # something that was there, and something to tell it from
                tallies[name, what].add(*judged)
    where = (state.round + 1, *size)
    return [
        _judged(tally, what, (name, guards[name]), where, recipe.seed)
        for (name, what), tally in tallies.items()
        if tally.updates
    ]


def _moved(adapter: Adapter, change: Mapping[str, Tensor]) -> Adapter:
    return adapter.with_tensors({name: t + change[name] if name in change else t for name, t in adapter.tensors().items()})


def _judged(tally: _Tally, what: str, guard: tuple[str, Guard], where: tuple[int, int, int], seed: int) -> Told:
    members, others = (np.concatenate(part) for part in zip(*tally.told, strict=True))
    found = attacked(what, members, others, seed, RESAMPLES)
    usual = auc(*(np.concatenate(part) for part in zip(*tally.usual, strict=True)))
    shares = tally.hits / tally.there, tally.usual_hits / tally.there
    spent = guard[1].epsilon(where[2])
    return Told(what, guard[0], spent, *where, tally.updates, tally.there, *shares, found.auc, found.low, found.high, usual)


def _rate(recipe: Recipe, round: int) -> float:
    """Learning rate of the one step of round `round`."""
    rounds = recipe.federation.rounds
    return learning_rate(recipe.train, round % rounds, rounds) if not recipe.train.weight_decay else 0.0


def _drawn(rows: Sequence[Example], count: int, seed: int, site: str) -> list[Example]:
    chosen = numpy_generator(seed, "inversion", site).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(chosen)]


def inverted(prepared: Prepared, model: Model, formatter: Formatter, run: Path) -> tuple[Told, ...]:
    """Attacks on updates of SITES sites, in the run's first round and its last: one step of one row under every guard, and a
    round as the run had it, of STEPS steps at most, as it was sent, without guard, and summed. It leaves the model with another
    adapter."""
    assert model.initial is not None
    recipe, found = prepared.recipe, []
    stages = prepared.stages
    tests = sorted({r.id: r for stage in stages for r in stage.all("test")}.values(), key=lambda r: r.id)[:OWN]
    attacker = coordinator(model, recipe, formatter.encode_all(tests))
    folder, end = RunFolder(run), len(stages) * recipe.federation.rounds
    last = max((round for round in folder.rounds("federated") if round < end), default=0)  # a stage may have ended early
    for round in sorted({0, last}):
        state = folder.read_checkpoint("federated", round, model.initial) if round else Global(0, model.initial)
        rows = {name: formatter.encode_all(of["train"]) for name, of in stages[round // recipe.federation.rounds].rows.items()}
        held = {name: rows[name] for name in [n for n in sorted(rows) if rows[n]][:SITES]}
        own = own_guard(recipe)
        guards = {**GUARDS, **({} if own in GUARDS.values() else {"the run's own": own})}
        found += attack(attacker, state, held, (1, 1), guards)
        steps = min(STEPS, max(steps_a_round(recipe.train, len(e)) for e in held.values()))
        size = recipe.train.batch_size, steps
        few = {name: guard for name, guard in guards.items() if guard == own or name in ("none", "secure aggregation")}
        found += attack(attacker, state, held, size, few)
    return tuple(found)
