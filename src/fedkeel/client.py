"""One site's round: a plain loop that can be read from top to bottom."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from fedkeel.config import Recipe, Train
from fedkeel.data import Example, batch_indices, batches_per_epoch, collate
from fedkeel.messages import difference, pack, unpack
from fedkeel.model import Model
from fedkeel.objective import objective
from fedkeel.rng import seed_torch
from fedkeel.types import Adapter, FedKeelError


class SiteError(FedKeelError):
    """A site's round that cannot be finished; the text names the site."""


def steps_a_round(train: Train, rows: int) -> int:
    """Optimiser steps of one round at a site with `rows` training rows."""
    return train.local_steps or train.local_epochs * batches_per_epoch(rows, train.batch_size)


def learning_rate(train: Train, step: int, total: int) -> float:
    """At optimiser step `step` of `total` in the whole run: linear warm-up, then linear decay to final_lr · lr."""
    warmup = max(1, round(train.warmup * total))
    if step < warmup:
        return train.lr * (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    return train.lr * (train.final_lr + (1 - train.final_lr) * left)


def train_round(
    model: Model, examples: Sequence[Example], site: str, round: int, rounds: int, recipe: Recipe
) -> tuple[int, dict[str, float]]:
    """Train the model's adapter in place for round `round` (from 0) of `rounds`.

    Returns the supervised positions trained on and {`loss`: mean nats a position}. The optimiser starts afresh each
    round, so a site keeps no state between rounds. Raises SiteError on a loss that is not finite.
    """
    train = recipe.train
    steps = steps_a_round(train, len(examples))
    micro = train.micro_batch_size or train.batch_size
    pad = model.tokenizer.pad_token_id
    parameters = model.parameters()
    # fused=False: one code path on every device, so that a seed means the same everywhere
    optimiser = torch.optim.AdamW(parameters, lr=train.lr, weight_decay=train.weight_decay, fused=False)
    schedule = range(round * steps, (round + 1) * steps)
    batches = batch_indices([e.length for e in examples], train.batch_size, recipe.seed, site, schedule)
    seed_torch(recipe.seed, "train", site, round)
    model.train()
    nats, positions = 0.0, 0
    for step, indices in zip(schedule, batches, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(train, step, rounds * steps)
        n_step = sum(examples[i].positions for i in indices)
        step_nats = 0.0
        for start in range(0, len(indices), micro):
            batch = collate([examples[i] for i in indices[start : start + micro]], model.kind, pad, len(model.classes))
            with model.autocast():
                forward = model.forward(batch)
            loss = objective(forward)
            n_micro = len(forward.targets)
            (loss * (n_micro / n_step)).backward()
            step_nats += float(loss.detach()) * n_micro
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, train.clip_norm))
        if not (math.isfinite(step_nats) and math.isfinite(norm)):
            raise SiteError(
                f"site {site}: the loss became {step_nats / n_step} (gradient norm {norm}) at step {step - schedule.start + 1} "
                f"of {steps} in round {round + 1}; nothing of this round was sent. A lower train.lr (now {train.lr:g}) or a "
                f"longer train.warmup is the usual cure; also look for rows of odd text at this site"
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        nats, positions = nats + step_nats, positions + n_step
    model.train(False)
    return positions, {"loss": nats / positions}


def answer(
    payload: bytes,
    model: Model,
    examples: Sequence[Example],
    site: str,
    rounds: int,
    recipe: Recipe,
    clock: Callable[[], float] = time.perf_counter,
) -> bytes:
    """A site's whole part in a round: the global message in, the update message out.

    Up go the change of the adapter, supervised positions, task counts and the mean loss; never text, never logits.
    """
    begin = clock()
    like = model.read()
    header, tensors = unpack(payload, "global", None, like)
    before: Adapter = like.with_tensors(tensors)
    model.write(before)
    positions, stats = train_round(model, examples, site, header["round"], rounds, recipe)
    change = difference(model.read(), before)
    # Of fixed width, so that the bytes of a message do not depend on how fast the machine was.
    seconds = f"{clock() - begin:012.3f}"
    tasks = dict(sorted(Counter(e.task for e in examples).items()))
    return pack(
        "update", header["round"], like, change, recipe.federation.codec_up,
        site=site, positions=positions, stats=stats, seconds=seconds, tasks=tasks,
    )  # fmt: skip
