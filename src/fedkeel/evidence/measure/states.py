"""Hidden states: how far stages and sites are from the final model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedkeel.data.batches import collate
from fedkeel.evidence.measure.run import MeasureError, _Run, _state_rows
from fedkeel.federation.kept import Kept, layout_of, modules_left_out
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.server import run_round
from fedkeel.run.folder import RunFolder
from fedkeel.run.served import served
from fedkeel.scores.evaluate import choose
from fedkeel.scores.metrics import linear_cka
from fedkeel.types import Reply, Row


@dataclass(frozen=True)
class _States:
    """Hidden states of fixed prompts at the tapped blocks, at the positions that `Model.forward` gives them for."""

    run: _Run
    found: list[Any] = field(default_factory=list)  # batches

    def __post_init__(self) -> None:
        run, model = self.run, self.run.model
        prompts = choose(run.prepared.stages[-1].all("test"), "test", _state_rows(run.settings.rows))
        examples = sorted(run.formatter.encode_all(prompts), key=lambda e: (e.length, e.record))
        if sum(e.positions for e in examples) < 4:
            raise MeasureError(f"{run.folder}: {len(examples)} test rows are too few to compare hidden states of; leave it out")
        size = run.recipe.evaluation.batch_size
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            self.found.append(collate(chunk, model.kind, model.tokenizer.pad_token_id, len(model.classes)))

    @torch.no_grad()
    def __call__(self) -> list[np.ndarray]:
        """By tap, (N, d) float32, of the model as it is now."""
        model = self.run.model
        model.train(False)
        with model.autocast():
            batches = [model.forward(batch, states=True).states for batch in self.found]
        return [torch.cat([s.float().cpu() for s in tap]).numpy() for tap in zip(*batches, strict=True)]


def _compared(run: _Run) -> list[Row]:
    """CKA with the final model, by tapped block: of what was served after each stage, and of each site after one more round."""
    recipe, model, folder = run.recipe, run.model, RunFolder(run.folder)
    assert model.initial is not None
    rounds, stages = recipe.federation.rounds, len(run.prepared.stages)
    sites = {name: held["train"] for name, held in run.prepared.stages[-1].rows.items()}
    examples = {name: encoded for name, rows in sites.items() if (encoded := run.formatter.encode_all(rows))}
    states, total = _States(run), stages + len(examples)
    ends = []
    model.rewind()
    for stage in range(stages):  # the log of base shifts only grows, so each stage adds what is its own
        state = folder.read_checkpoint("federated", rounds * (stage + 1), model.initial)
        model.replay(state.shifts, 0)
        final = served(folder, "federated", rounds, stage, recipe.stream.average, model.initial)
        model.write(final)
        ends.append(states())
        run.watch("states", len(ends), total)
    rows = [
        run.row(f"state_cka/{tap}", linear_cka(x, y), "ratio", stage=stage)
        for stage, end in enumerate(ends)
        for tap, x, y in zip(model.taps, end, ends[-1], strict=True)
    ]

    def look(reply: Reply) -> None:  # the model still holds what this site has trained
        if not reply.error:
            for tap, x, y in zip(model.taps, states(), ends[-1], strict=True):
                rows.append(run.row(f"site_cka/{tap}", linear_cka(x, y), "ratio", site=reply.site))
        run.watch("states", stages + 1 + sorted(examples).index(reply.site), total)

    # The last round once more, with its learning rate, now from the final model; what the server makes of it is not used.
    kept = {name: Kept(rank=rank) for name, rank in recipe.lora.ranks(run.prepared.sites.rows).items()}
    layouts = {name: layout_of(model.initial, recipe.lora, k.rank) for name, k in kept.items() if name in examples}
    out = modules_left_out(recipe, model.initial.lora)
    by_stage = {name: [()] * (stages - 1) + [encoded] for name, encoded in examples.items()}
    transport = LocalTransport(model, by_stage, recipe, rounds, look, kept)
    everyone = replace(recipe.federation, sites_per_round=0, quorum=1.0, deadline=math.inf, max_update_norm=math.inf)
    state = replace(state, round=state.round - 1, adapter=final)
    run_round(state, transport, list(examples), everyone, recipe.seed, layouts=layouts, hold=out)
    return rows
