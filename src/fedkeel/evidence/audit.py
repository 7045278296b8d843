"""What a finished run's model tells of the rows that it was trained on: membership inference, measured.

An attacker has a text and asks whether it was among the training rows. Members are training rows of the run, others are test
rows, as many of each task. An attack gives each a number, higher for "it was": AUC is the chance that it ranks a member above
another, 0.5 where it knows nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from fedkeel.data.canaries import TASK, canaries, code
from fedkeel.data.format import Example, Formatter
from fedkeel.evidence.report.leaks import ATTACKS, FALSE_ALARMS, KEPT, Audited, Exposed, Found
from fedkeel.files import write_atomic
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.rng import numpy_generator
from fedkeel.runs.here import formatter_of
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import row_nats
from fedkeel.types import FedKeelError, Record

ROWS = 500  # members, and as many others, at most
RESAMPLES = 1000
CODES = 500  # that a planted secret is told from


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """The chance that a member's number is above another's, ties counting half: Mann & Whitney 1947."""
    both = np.concatenate([members, others])
    _, place, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # of equal numbers the mean
    count = len(members)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(others)))


def hits(members: np.ndarray, others: np.ndarray, alarms: float = FALSE_ALARMS) -> float:
    """The share of members above a bound that at most `alarms` of the others pass."""
    bound = np.sort(others)[::-1][int(alarms * len(others))]
    return float((members > bound).mean())


def attacked(attack: str, members: np.ndarray, others: np.ndarray, seed: int) -> Found:
    """An attack's numbers, judged."""
    draw = numpy_generator(seed, "audit", attack)
    found = [auc(draw.choice(members, len(members)), draw.choice(others, len(others))) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, (0.025, 0.975))
    counts = len(members), len(others)
    return Found(attack, auc(members, others), float(low), float(high), hits(members, others), *counts)


def pairs(prepared: Prepared) -> tuple[list[Record], list[Record]]:
    """(members, others): by the hashes that are their ids, as many of each task, ROWS at most."""
    split: dict[str, dict[str, list[Record]]] = defaultdict(lambda: {"train": [], "test": []})
    for name in ("train", "test"):
        for record in {r.id: r for stage in prepared.stages for r in stage.all(name)}.values():
            if record.task != TASK:
                split[record.task][name].append(record)
    members: list[Record] = []
    others: list[Record] = []
    most = max(1, ROWS // max(1, len(split)))
    for held in split.values():
        count = min(most, *map(len, held.values()))
        members += sorted(held["train"], key=lambda r: r.id)[:count]
        others += sorted(held["test"], key=lambda r: r.id)[:count]
    return members, others


def exposed(model: Model, formatter: Formatter, recipe: Recipe) -> list[Exposed]:
    """Of each planted secret, where the true code stands among CODES by the loss of the federated model, and of the base."""
    found = []
    for number, record in enumerate(canaries(recipe.audit, recipe.seed, "")):
        drawn = (code(recipe.seed, number, "other", n) for n in range(2 * CODES))
        others = [one for one in dict.fromkeys(drawn) if one != record.output][: CODES - 1]
        rows = [e for answer in (record.output, *others) for e in formatter.encode_all([replace(record, output=answer)])]
        mine = row_nats(model, rows, recipe.evaluation.batch_size)
        with model.net.disable_adapter():
            base = row_nats(model, rows, recipe.evaluation.batch_size)
        rank, base_rank = (1 + int((nats[1:] <= nats[0]).sum()) for nats in (mine, base))
        found.append(Exposed(record.instruction, rank, base_rank, len(rows)))
    return found


def audit(prepared: Prepared, run: Path) -> Audited:
    """Attack a finished run's federated adapter; what was found is kept in the run's folder. Raises FedKeelError."""
    model = trained_model(prepared.recipe, run)
    if model.shifts:
        raise FedKeelError(f"{run}: its rule moved the base itself, so there is no base beside it to compare with")
    formatter = formatter_of(model, prepared)
    members, others = ([e for r in rows for e in formatter.encode_all([r])] for rows in pairs(prepared))
    if min(len(members), len(others)) < 20:
        raise FedKeelError(
            f"{run}: {len(members)} training and {len(others)} test rows are too few to attack; 20 of each, at least"
        )
    told = {
        name: _numbers(model, rows, prepared.recipe.evaluation.batch_size) for name, rows in (("in", members), ("out", others))
    }
    found = tuple(attacked(attack, told["in"][attack], told["out"][attack], prepared.recipe.seed) for attack in ATTACKS)
    all_of = Audited(found, tuple(exposed(model, formatter, prepared.recipe)))
    write_atomic(run / KEPT, json.dumps(asdict(all_of), indent=1) + "\n")
    return all_of


def _numbers(model: Model, rows: Sequence[Example], size: int) -> Mapping[str, np.ndarray]:
    """Of each row, by attack; a row's loss is the mean over its positions."""
    positions = torch.tensor([e.positions for e in rows], dtype=torch.float64)
    mine = row_nats(model, rows, size) / positions
    with model.net.disable_adapter():
        base = row_nats(model, rows, size) / positions
    return {"loss": -mine.numpy(), "reference": (base - mine).numpy()}
