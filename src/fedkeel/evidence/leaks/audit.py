"""What a finished run tells of the rows that it was trained on, measured: membership inference on its model, and attacks on
single updates (`updates`).

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
from fedkeel.evidence.leaks.ranks import attacked
from fedkeel.evidence.leaks.updates import inverted
from fedkeel.evidence.report.leaks import ATTACKS, KEPT, Audited, Exposed
from fedkeel.files import write_atomic
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import row_nats
from fedkeel.types import FedKeelError, Record

ROWS = 500  # members, and as many others, at most
CODES = 500  # that a planted secret is told from


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
    """Attack a finished run's federated adapter, and updates of its first and last round, which are made anew; what was found
    is kept in the run's folder. Raises FedKeelError."""
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
    secrets = tuple(exposed(model, formatter, prepared.recipe))
    all_of = Audited(found, secrets, inverted(prepared, model, formatter, run))
    write_atomic(run / KEPT, json.dumps(asdict(all_of), indent=1) + "\n")
    return all_of


def _numbers(model: Model, rows: Sequence[Example], size: int) -> Mapping[str, np.ndarray]:
    """Of each row, by attack; a row's loss is the mean over its positions."""
    positions = torch.tensor([e.positions for e in rows], dtype=torch.float64)
    mine = row_nats(model, rows, size) / positions
    with model.net.disable_adapter():
        base = row_nats(model, rows, size) / positions
    return {"loss": -mine.numpy(), "reference": (base - mine).numpy()}
