"""A site's training for one round: a plain loop that can be read from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.batches import Batch, batch_indices, batches_per_epoch, collate
from fedkeel.data.format import Example
from fedkeel.federation.evidence import Anchor, Calibration, Prototypes, calibration_of
from fedkeel.federation.private import drawn, private_gradient
from fedkeel.federation.teacher import Guide
from fedkeel.method.objective.ascent import backward_at_worst
from fedkeel.method.objective.exits import exit_block
from fedkeel.method.objective.terms import Active, Moment, terms_of
from fedkeel.method.structure.draw import Draw
from fedkeel.method.structure.inject import Injection, strength
from fedkeel.method.structure.shares import shared, trained_ranks
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe, Train
from fedkeel.rng import derive, seed_torch
from fedkeel.tables import HELD
from fedkeel.types import FedKeelError, Forward, Global, Parameters


class SiteError(FedKeelError):
    """A site's round that cannot be finished; the text names the site."""


def steps_a_round(train: Train, rows: int) -> int:
    """Optimiser steps of one round at a site with `rows` training rows."""
    return train.local_steps or train.local_epochs * batches_per_epoch(rows, train.batch_size)


def learning_rate(train: Train, step: int, total: int) -> float:
    """At optimiser step `step` of `total` in the stage: linear warm-up, then linear decay to final_lr · lr."""
    warmup = max(1, round(train.warmup * total))
    if step < warmup:
        return train.lr * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return train.lr * (train.final_lr + (1 - train.final_lr) * left)


@dataclass(frozen=True)
class Round:
    """What a site's training in round `state.round` (from 0) goes by. rounds: of one stage. state: as it came down.

    total: supervised positions of each task held by all sites, as far as the server knows.
    """

    site: str
    rounds: int
    recipe: Recipe
    state: Global
    total: Mapping[str, int] = field(default_factory=dict)

    @property
    def stage(self) -> int:
        """Of the stream, from 0."""
        return self.state.round // self.rounds

    @property
    def ranks(self) -> range:
        """Those of the adapter that are trained."""
        return trained_ranks(self.recipe, self.stage)

    def schedule(self, rows: int) -> range:
        """The round's optimiser steps, counted from the start of the stage, at a site with `rows` training rows."""
        steps = steps_a_round(self.recipe.train, rows)
        done = self.state.round % self.rounds
        return range(done * steps, (done + 1) * steps)

    def batches(self, examples: Sequence[Example]) -> list[list[int]]:
        """Indices of the rows of each step of `schedule`; a stage draws its own."""
        key = f"{self.site}/{self.stage}" if self.stage else self.site
        lengths = [e.length for e in examples]
        return batch_indices(lengths, self.recipe.train.batch_size, self.recipe.seed, key, self.schedule(len(examples)))

    def progress(self, step: int, steps: int) -> float:
        """The share of the run that is done at `step` of the stage. steps: of a round."""
        stages, stage = max(1, len(self.recipe.stream.stages)), self.rounds * steps
        return (self.stage * stage + step) / (stages * stage)


@dataclass
class Log:
    """What a round tells about itself: sums over positions, and the gates of every position."""

    nats: dict[str, float] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    gates: dict[str, list[Tensor]] = field(default_factory=dict)
    strength: list[float] = field(default_factory=list)

    def add(self, name: str, mean: Tensor, positions: int) -> None:
        """A term's mean over the positions of a micro-batch."""
        self.nats[name] = self.nats.get(name, 0.0) + float(mean.detach()) * positions
        self.positions[name] = self.positions.get(name, 0) + positions

    def gate(self, name: str, values: Tensor) -> None:
        """A gate at the positions of a micro-batch."""
        self.gates.setdefault(name, []).append(values.detach().float().cpu())

    def stats(self, injection: Injection | None) -> dict[str, float]:
        """Mean nats a position of each term, over the positions it was taken at; mean and quartiles of each gate, so that a
        collapsed one is seen; mean strength, and the share of units dropped."""
        stats = {name: value / self.positions[name] for name, value in self.nats.items()}
        for name, parts in self.gates.items():
            values = torch.cat(parts)
            stats[f"gate_{name}_mean"] = float(values.mean())
            for quarter, value in enumerate(np.quantile(values.numpy(), (0.25, 0.5, 0.75)), 1):  # torch's ends at 2^24 values
                stats[f"gate_{name}_q{quarter}"] = float(value)
        if injection is not None:
            stats["strength"] = sum(self.strength) / len(self.strength)
            draw = injection.draw
            stats["dropped"] = float(draw.dropped) / draw.units if draw.units else 0.0
        return stats


def injection_of(model: Model, recipe: Recipe) -> Injection | None:
    """The recipe's structures, not yet attached; None if it asks for none."""
    held = HELD if recipe.structure.hold else ()  # drawn once a round, see `client.answer`
    amounts = {name: amount for name, amount in recipe.structure.amounts.items() if name not in held}
    return Injection(model.places.above(model.first), amounts) if amounts else None


@dataclass(frozen=True)
class Lesson:
    """A round's training in progress at one site: what all its steps share."""

    model: Model
    examples: Sequence[Example]
    round: Round
    terms: Sequence[Active]
    guide: Guide | None
    injection: Injection | None
    draw: Draw
    parameters: Parameters
    calibration: Calibration | None
    anchor: Anchor | None
    prototypes: Prototypes | None

    def moment(self, step: int) -> Moment:
        """Where `step` of the stage is, with the strength of structures there."""
        recipe, steps = self.round.recipe, steps_a_round(self.round.recipe.train, len(self.examples))
        progress = self.round.progress(step, steps)
        if self.injection is None:
            return Moment(step, progress, dropout=recipe.lora.dropout > 0)
        return Moment(step, progress, strength(progress, recipe.structure.ramp, recipe.structure.anneal))

    def backward(self, indices: Sequence[int], moment: Moment, log: Log) -> float:
        """Gradients of one optimiser step, added up over its micro-batches; the task's nats, summed over positions."""
        weights = {term.entry.name: weight for term in self.terms if (weight := term.weight(moment))}
        taken = [term for term in self.terms if term.entry.name in weights]
        n_step = sum(self.examples[i].positions for i in indices)
        micro = self.round.recipe.train.at_once
        nats = 0.0
        for start in range(0, len(indices), micro):
            chosen = [self.examples[i] for i in indices[start : start + micro]]
            batch = collate(chosen, self.model.kind, self.model.tokenizer.pad_token_id, len(self.model.classes))
            n_micro = len(batch.targets)
            self.draw.row, self.draw.rows = start, len(chosen)
            seen = self.see(batch, chosen, moment, {need for term in taken for need in term.entry.needs})
            loss: Tensor | float = 0.0
            for term in (term for term in taken if not term.entry.once):
                found = term(seen)
                told = found.value if found.told is None else found.told
                if term.entry.always:
                    nats += float(told.detach()) * n_micro
                loss = loss + (found.value if term.entry.always else weights[term.entry.name] * found.value)
                if term.entry.row:
                    log.add(term.entry.row, told, n_micro)
                for name in term.entry.gates:
                    log.gate(name, found.gates[name])
            (loss * (n_micro / n_step)).backward()  # type: ignore[union-attr]
        for term in (term for term in taken if term.entry.once):  # a function of the parameters, not of rows
            value = term(self.parameters).value
            (weights[term.entry.name] * value).backward()
            if term.entry.row:
                log.add(term.entry.row, value, 1)
        return nats

    def of_rows(self, moment: Moment, log: Log, indices: Sequence[int]) -> float:
        """`backward`, for a `private.Backward`."""
        return self.backward(indices, moment, log)

    def gradient(self, indices: Sequence[int], moment: Moment, log: Log) -> tuple[float, float]:
        """The gradient of one optimiser step, clipped: the task's nats, summed over positions, and its norm before."""
        train, parameters = self.round.recipe.train, self.parameters.now
        nats = self.backward(indices, moment, log)
        if train.sam:
            backward_at_worst(parameters, train.sam, partial(self.backward, indices, moment, Log()))
        return nats, float(torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm))

    def see(self, batch: Batch, examples: Sequence[Example], moment: Moment, needs: set[str]) -> Forward:
        """What the terms look at: the student's disturbed pass, and what else they need."""
        model, guide = self.model, self.guide
        teacher = guide(batch, examples) if guide is not None and "teacher" in needs else None
        states = teacher is not None and guide is not None and guide.states
        pooled = self.prototypes is not None and "prototypes" in needs
        forward = self.disturbed(batch, moment.step, 0, states, self.exit(moment) if "exit" in needs else -1, pooled)
        if self.prototypes is not None and forward.pooled is not None:
            forward = replace(forward, prototypes=self.prototypes(forward.pooled, examples))
        if self.calibration is not None:
            forward = replace(forward, offsets=self.calibration(batch, examples))
        if teacher is not None:
            forward = replace(forward, teacher=teacher)
        if "anchor" in needs and self.anchor is not None:
            forward = replace(forward, anchor=self.anchor(batch, examples))
        if "again" in needs:
            forward = replace(forward, again=self.disturbed(batch, moment.step, 1).logits)
        if "clean" in needs:
            model.train(False)
            with torch.no_grad(), model.autocast():
                forward = replace(forward, clean=model.forward(batch).logits)
            model.train()
        return forward

    def exit(self, moment: Moment) -> int:
        """The block at which this step has its early exit."""
        recipe, round = self.round.recipe, self.round
        uniform = derive(recipe.seed, "exit", round.site, round.state.round, moment.step) / 2**63
        blocks = len(self.model.places.stack)
        return exit_block(recipe.exit, blocks, self.model.first, uniform, moment.progress)

    def disturbed(
        self, batch: Batch, step: int, number: int, states: bool = False, exit: int = -1, pooled: bool = False
    ) -> Forward:
        """Pass `number` of a step, with structures on; all micro-batches of the step share what they draw."""
        if self.injection is not None:
            self.draw.key = derive(self.round.recipe.seed, "structure", self.round.site, self.round.state.round, step, number)
            self.draw.on = True
        with self.model.autocast():
            forward = self.model.forward(batch, states, exit, pooled)
        self.draw.on = False
        return forward


@contextmanager
def lesson_of(model: Model, examples: Sequence[Example], round: Round) -> Iterator[Lesson]:
    """The lesson of this round, with the recipe's structures in the model; whatever goes wrong within it, the next site finds
    the model without gradients and at rest."""
    recipe, terms = round.recipe, terms_of(round.recipe)
    injection = injection_of(model, recipe)
    try:
        with injection or nullcontext(), shared(model.places, round.ranks) if recipe.stream.slices else nullcontext():
            if injection is not None:
                injection.begin(recipe.seed, round.site, round.state.round)
            now = model.parameters()
            remembers = any(term.entry.once for term in terms)
            guide = None
            if any("teacher" in term.entry.needs for term in terms):
                again = len(round.schedule(len(examples))) > batches_per_epoch(len(examples), recipe.train.batch_size)
                keep = again and not any(term.entry.tail for term in terms)
                guide = Guide(model, round.state, examples, round.total, recipe.distill, keep=keep)
            start = [p.detach().clone() for p in now] if remembers else []
            draw = injection.draw if injection is not None else Draw()
            calibration = calibration_of(examples, recipe.evidence)
            anchor = Anchor(model.features, round.state.heads, recipe.evidence) if recipe.evidence.anchor else None
            prototypes = Prototypes(round.state.heads) if recipe.evidence.prototype else None
            downs = [branch.a.get_parameter("weight") for branch in model.places.branches] if remembers else []
            weights = Parameters(now, start, downs, round.ranks)
            yield Lesson(model, examples, round, terms, guide, injection, draw, weights, calibration, anchor, prototypes)
    finally:
        for parameter in model.parameters():
            parameter.grad = None
        model.train(False)


def untold(share: float) -> None:
    """Nobody hears of progress."""


def train_round(
    model: Model, examples: Sequence[Example], round: Round, tick: Callable[[float], None] = untold
) -> tuple[int, dict[str, float]]:
    """Train the model's adapter, which is `round.state.adapter` when this begins, in place.

    tick: called after each step with its share of the round.
    Returns the supervised positions trained on and numbers by name: `loss` (task, mean nats a position) and what `Log` says.
    The optimiser starts afresh each round, so a site keeps no state between rounds. Raises SiteError on a loss that is not
    finite.
    """
    train, log, positions = round.recipe.train, Log(), 0
    with model.remembering(), lesson_of(model, examples, round) as lesson:
        parameters = lesson.parameters.now
        # fused=False: one code path on every device, so that a seed means the same everywhere
        optimiser = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=False)
        schedule = round.schedule(len(examples))
        seed_torch(round.recipe.seed, "train", round.site, round.state.round)
        model.train()
        private = round.recipe.privacy.unit == "row"
        batches = [drawn(len(examples), round.recipe) for _ in schedule] if private else round.batches(examples)
        for step, indices in zip(schedule, batches, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(train, step, round.rounds * len(schedule))
            moment = lesson.moment(step)
            if lesson.injection is not None:
                lesson.draw.strength = moment.strength
                log.strength.append(moment.strength)
            n_step = sum(examples[i].positions for i in indices)
            if private:
                drawn_rows = {i: examples[i].positions for i in indices}
                private_gradient(model.net, partial(lesson.of_rows, moment, log), drawn_rows, round.recipe)
            else:
                nats, norm = lesson.gradient(indices, moment, log)
                if not (math.isfinite(nats) and math.isfinite(norm)):
                    raise _diverged(model, round, nats / n_step, norm, step - schedule.start, log)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            if lesson.injection is not None:
                lesson.injection.ascend()
            positions += n_step
            tick(1 / len(schedule))
        return positions, log.stats(lesson.injection)


def _diverged(model: Model, round: Round, loss: float, norm: float, step: int, log: Log) -> SiteError:
    """step: of the round, from 0."""
    broken, odd = model.not_finite(), [name for name, nats in log.nats.items() if not math.isfinite(nats) and name != "loss"]
    what = (
        f"site {round.site}: the loss became {loss} (gradient norm {norm}) at step {step + 1} in round {round.state.round + 1}"
    )
    if broken:
        return SiteError(
            f"{what}, as {broken[0]} of the base {round.recipe.model.base!r} holds numbers that are not finite; nothing of "
            f"this round was sent. Get its weights anew, or use another base"
        )
    if odd and math.isfinite(loss):
        return SiteError(f"{what}, as {' and '.join(odd)} is not finite; nothing of this round was sent. Look at that term")
    return SiteError(
        f"{what}; nothing of this round was sent. A lower train.lr (now {round.recipe.train.lr:g}) or a longer train.warmup "
        f"is the usual cure; also look for rows of odd text at this site"
    )
