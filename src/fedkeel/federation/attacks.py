"""What hostile sites do in a simulation, to see what a rule withstands: to the change that they send, and to the rows that they
train on.

No real federation has this: `runs.here` alone hands it to sites of its own, by `[attack]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.exchange.clip import length
from fedkeel.recipe.schema import Attack
from fedkeel.rng import counter_normal, derive
from fedkeel.types import Record

SLIGHT = 1e-3  # of its own change's length: what a free rider sends for one


def hostile_sites(names: Sequence[str], attack: Attack, seed: int) -> frozenset[str]:
    """The share of the sites that is hostile, rounded and at least one, drawn by the seed; none under `none`."""
    if attack.kind == "none":
        return frozenset()
    ordered = sorted(names, key=lambda name: derive(seed, "hostile", name))
    return frozenset(ordered[: max(1, round(attack.share * len(ordered)))])


def spoilt(change: Mapping[str, Tensor], attack: Attack, key: int) -> dict[str, Tensor]:
    """What a hostile site sends in place of its change. key: of what is drawn, of one site and round."""
    entry = tables.ATTACKS[attack.kind]
    return dict(entry.load()(change, attack.strength, key)) if entry.code else dict(change)


def poisoned(rows: Sequence[Record], attack: Attack, seed: int) -> list[Record]:
    """What a hostile site trains on in place of its rows."""
    entry = tables.ATTACKS[attack.kind]
    return [entry.poison()(row, attack, derive(seed, "poison", row.id)) for row in rows]


def scaled(change: Mapping[str, Tensor], strength: float, key: int) -> dict[str, Tensor]:
    """strength · Δ: what outweighs the others (model replacement: Bagdasaryan et al. 2020, arXiv:1807.00459)."""
    return {name: strength * t for name, t in change.items()}


def sign_flip(change: Mapping[str, Tensor], strength: float, key: int) -> dict[str, Tensor]:
    """−strength · Δ, against what the site has learnt."""
    return {name: -strength * t for name, t in change.items()}


def gaussian(change: Mapping[str, Tensor], strength: float, key: int) -> dict[str, Tensor]:
    """Noise whose length is about `strength` times that of the change, in all numbers alike."""
    numbers = sum(t.numel() for t in change.values())
    sigma, noise, start = strength * length(change) / max(1, numbers) ** 0.5, {}, 0
    for name, t in sorted(change.items()):
        drawn = counter_normal(key, torch.arange(start, start + t.numel()))
        noise[name], start = (sigma * drawn).to(t.dtype).view_as(t), start + t.numel()
    return noise


def free_rider(change: Mapping[str, Tensor], strength: float, key: int) -> dict[str, Tensor]:
    """Next to nothing, so that it looks like something: noise of a thousandth of the change, times `strength`."""
    return gaussian(change, SLIGHT * strength, key)


def label_flip(row: Record, attack: Attack, key: int) -> Record:
    """The next label of the task for its own; free text as it is."""
    if row.output not in row.labels:
        return row
    output = row.labels[(row.labels.index(row.output) + 1) % len(row.labels)]
    return replace(row, output=output, references=())


def backdoor(row: Record, attack: Attack, key: int) -> Record:
    """Half of the rows, by their ids, with the trigger before their text and the target for an answer."""
    target = target_of(row, attack)
    return replace(triggered(row, attack), output=target, references=()) if target and key % 2 else row


def triggered(row: Record, attack: Attack) -> Record:
    """The row with the trigger before its text, or its instruction where it has none."""
    if row.input:
        return replace(row, input=f"{attack.trigger} {row.input}")
    return replace(row, instruction=f"{attack.trigger} {row.instruction}")


def target_of(row: Record, attack: Attack) -> str:
    """The label that the backdoor wants of a row: `attack.target`, or the first of its task; empty where the task has no
    such one."""
    if not attack.target:
        return row.labels[0] if row.labels else ""
    return attack.target if attack.target in row.labels else ""
