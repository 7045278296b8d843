"""A site's training for one round: a plain loop that can be read from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from fedkeel.data.batches import batch_indices, batches_per_epoch, collate
from fedkeel.data.format import Example
from fedkeel.federation.teacher import Guide
from fedkeel.method.objective.consistency import self_consistency, symmetric_kl
from fedkeel.method.objective.distill import Guidance, distill
from fedkeel.method.objective.proximal import proximal
from fedkeel.method.objective.task import task_loss
from fedkeel.method.structure import Draw, Injection, strength
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import STRUCTURES, Recipe, Train
from fedkeel.rng import derive, seed_torch
from fedkeel.types import FedKeelError, Global


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


def guidance_weight(weight: float, ramp: float, progress: float) -> float:
    """λ_d at `progress` in [0, 1) of the run: rises linearly from 0 over the first `ramp` of it."""
    return weight * min(1.0, progress / ramp) if ramp else weight


@dataclass
class _Log:
    """What a round tells about itself: sums over positions, and the gates of every position."""

    nats: dict[str, float] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    gates: dict[str, list[Tensor]] = field(default_factory=dict)
    strength: list[float] = field(default_factory=list)

    def add(self, name: str, mean: Tensor, positions: int) -> None:
        self.nats[name] = self.nats.get(name, 0.0) + float(mean.detach()) * positions
        self.positions[name] = self.positions.get(name, 0) + positions

    def gate(self, name: str, values: Tensor) -> None:
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
    held = {"branch"} if recipe.structure.hold else set()  # drawn once a round, see `answer`
    amounts = {name: getattr(recipe.structure, name) for name in STRUCTURES}
    amounts = {name: amount for name, amount in amounts.items() if amount and name not in held}
    return Injection(model.places, amounts) if amounts else None


def train_round(
    model: Model, examples: Sequence[Example], site: str, rounds: int, recipe: Recipe, state: Global,
    total: Mapping[str, int],
) -> tuple[int, dict[str, float]]:  # fmt: skip
    """Train the model's adapter, which is `state.adapter` when this begins, in place for round `state.round` (from 0).

    rounds: of one stage. total: supervised positions of each task held by all sites, as far as the server knows.
    Returns the supervised positions trained on and numbers by name: `loss` (task, mean nats a position) and what `_Log`
    says. The optimiser starts afresh each round, so a site keeps no state between rounds. Raises SiteError on a loss that
    is not finite.
    """
    injection = injection_of(model, recipe)
    try:
        with injection or nullcontext():
            if injection is not None and injection.adversary is not None:
                injection.adversary.reset(derive(recipe.seed, "adversary", site, state.round))
            return _train_round(model, examples, site, rounds, recipe, state, total, injection)
    finally:  # whatever went wrong here, the next site finds the model without gradients and at rest
        for parameter in model.parameters():
            parameter.grad = None
        model.train(False)


def _train_round(
    model: Model, examples: Sequence[Example], site: str, rounds: int, recipe: Recipe, state: Global,
    total: Mapping[str, int], injection: Injection | None,
) -> tuple[int, dict[str, float]]:  # fmt: skip
    train, distilling, structure = recipe.train, recipe.distill, recipe.structure
    steps = steps_a_round(train, len(examples))
    micro = train.micro_batch_size or train.batch_size
    pad = model.tokenizer.pad_token_id
    parameters = model.parameters()
    begin = [p.detach().clone() for p in parameters] if train.proximal else []
    guide = None
    if distilling.weight:
        repeats = steps > batches_per_epoch(len(examples), train.batch_size)
        guide = Guide(model, state, examples, total, distilling, keep=repeats)
    guidance = Guidance(
        distilling.temperature, distilling.gold, distilling.kappa, distilling.rest, distilling.beta, distilling.align,
        distilling.align_weight,
    )  # fmt: skip
    # fused=False: one code path on every device, so that a seed means the same everywhere
    optimiser = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=False)
    stage, in_stage = divmod(state.round, rounds)
    stages = max(1, len(recipe.stream.stages))
    schedule = range(in_stage * steps, (in_stage + 1) * steps)
    key = f"{site}/{stage}" if stage else site
    batches = batch_indices([e.length for e in examples], train.batch_size, recipe.seed, key, schedule)
    seed_torch(recipe.seed, "train", site, state.round)
    model.train()
    log = _Log()

    draw = injection.draw if injection is not None else Draw()
    dropout = injection is None and recipe.lora.dropout > 0  # R-Drop as published, on dropout alone

    def perturbed(step: int, pass_: int) -> None:
        """Structures on, with the draws of this step and pass; all its micro-batches share the key."""
        if injection is not None:
            draw.key = derive(recipe.seed, "structure", site, state.round, step, pass_)
            draw.on = True

    def backward(indices: Sequence[int], step: int, progress: float, log: _Log) -> float:
        """Gradients of one optimiser step, added up over its micro-batches; the task's nats, summed over positions."""
        n_step = sum(examples[i].positions for i in indices)
        # the steps with a teacher carry the weight of those without, so that the strength of the whole stays
        weight = (
            0.0 if step % distilling.every else distilling.every * guidance_weight(distilling.weight, distilling.ramp, progress)
        )
        step_nats = 0.0

        for start in range(0, len(indices), micro):
            chosen = [examples[i] for i in indices[start : start + micro]]
            batch = collate(chosen, model.kind, pad, len(model.classes))
            n_micro = len(batch.targets)
            draw.row, draw.rows = start, len(chosen)
            teacher = guide(batch, chosen) if guide is not None and weight else None
            perturbed(step, 0)
            with model.autocast():
                forward = model.forward(batch, guide is not None and teacher is not None and guide.states)
            draw.on = False
            task = task_loss(forward)
            log.add("loss", task, n_micro)
            step_nats += float(task.detach()) * n_micro
            loss = task
            if structure.mode == "rdrop" and structure.weight and (draw.strength or dropout):
                perturbed(step, 1)
                with model.autocast():
                    second = model.forward(batch)
                draw.on = False
                consistency = symmetric_kl(forward.logits, second.logits)
                log.add("structure_loss", consistency, n_micro)
                loss = (loss + task_loss(second)) / 2 + structure.weight * consistency
            elif draw.strength and structure.weight and structure.mode == "self" and step % structure.every == 0:
                model.train(False)
                with torch.no_grad(), model.autocast():
                    clean = model.forward(batch)
                model.train()
                consistency = self_consistency(clean.logits, forward.logits)
                log.add("structure_loss", consistency, n_micro)
                loss = loss + structure.weight * consistency
            if teacher is not None:
                found = distill(replace(forward, teacher=teacher), guidance)
                loss = loss + weight * found.loss
                log.add("distill_loss", found.loss, n_micro)
                log.gate("a", found.gold_gate)
                log.gate("b", found.rest_gate)
                log.gate("w_gold", teacher.gold_trust)
                log.gate("w_rest", teacher.rest_trust)
            (loss * (n_micro / n_step)).backward()
        if train.proximal:  # once a step: it is a function of the parameters, not of rows
            (train.proximal * proximal(parameters, begin)).backward()
        return step_nats

    positions = 0
    for step, indices in zip(schedule, batches, strict=True):
        rate = learning_rate(train, step, rounds * steps)
        for group in optimiser.param_groups:
            group["lr"] = rate
        progress = (stage * rounds * steps + step) / (stages * rounds * steps)
        if injection is not None:
            draw.strength = strength(progress, structure.ramp, structure.anneal)
            log.strength.append(draw.strength)
        step_nats = backward(indices, step, progress, log)
        if train.sam:
            backward_at_worst(parameters, train.sam, lambda: backward(indices, step, progress, _Log()))  # noqa: B023
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm))
        if not (math.isfinite(step_nats) and math.isfinite(norm)):
            n_step = sum(examples[i].positions for i in indices)
            raise SiteError(
                f"site {site}: the loss became {step_nats / n_step} (gradient norm {norm}) at step {step + 1 - schedule.start} "
                f"of {steps} in round {state.round + 1}; nothing of this round was sent. A lower train.lr (now {train.lr:g}) "
                f"or a longer train.warmup is the usual cure; also look for rows of odd text at this site"
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if injection is not None and injection.adversary is not None:
            injection.adversary.ascend(structure.adversary)
        positions += sum(examples[i].positions for i in indices)
    return positions, log.stats(injection)


def backward_at_worst(parameters: Sequence[Tensor], radius: float, backward: Callable[[], object]) -> None:
    """Replace the gradients in `parameters` by those at w + radius · g/‖g‖, g the gradients there now; w is restored exactly.

    backward: adds gradients at the present w. Where g = 0 nothing changes.
    Source: sharpness-aware minimisation at the sites, FedSAM (Qu et al. 2022, arXiv:2206.02618, eq. 5).
    """
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
    if not float(norm) or not math.isfinite(float(norm)):
        return
    with torch.no_grad():
        here = [p.detach().clone() for p in parameters]
        for p in parameters:
            if p.grad is not None:
                p.add_(p.grad, alpha=radius / float(norm))
            p.grad = None
    backward()
    with torch.no_grad():
        for p, old in zip(parameters, here, strict=True):
            p.copy_(old)
