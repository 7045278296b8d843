"""Hidden states: how far stages and sites are from the final model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedkeel.data.batches import collate
from fedkeel.data.format import Example
from fedkeel.evidence.measure.run import Finished, MeasureError, Settings, UnmeasuredError
from fedkeel.federation.client import Site
from fedkeel.federation.kept import Kept
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.server import run_round
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.rounds import roster_of
from fedkeel.runs.served import served
from fedkeel.scores.evaluate import choose
from fedkeel.scores.metrics import linear_cka
from fedkeel.types import Global, Reply, Row

STATE_ROWS = 128  # most test rows a task whose hidden states are compared


def state_rows(settings: Settings) -> int:
    """Test rows a task whose hidden states are compared."""
    return min(settings.rows or STATE_ROWS, STATE_ROWS)


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    return {"rows": state_rows(settings)} if settings.states else None


@dataclass(frozen=True)
class _States:
    """Hidden states of fixed prompts at the tapped blocks, at the positions that `Model.forward` gives them for."""

    run: Finished
    found: list[Any] = field(default_factory=list)  # batches

    def __post_init__(self) -> None:
        run, model = self.run, self.run.model
        prompts = choose(run.prepared.stages[-1].all("test"), "test", state_rows(run.settings))
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


def states(run: Finished) -> list[Row]:
    """CKA with the final model, by tapped block: of what was served after each stage, and of each site after one more round."""
    recipe, model = run.recipe, run.model
    if not model.taps:
        raise UnmeasuredError(f"not measured, as the blocks of {recipe.model.base!r} are not known")
    sites = {name: held["train"] for name, held in run.prepared.stages[-1].rows.items()}
    examples = {name: encoded for name, rows in sites.items() if (encoded := run.formatter.encode_all(rows))}
    seen, total = _States(run), len(run.prepared.stages) + len(examples)
    ends, state = _ends(run, seen, total)
    rows = [
        run.row(f"state_cka/{tap}", linear_cka(x, y), "ratio", stage=stage)
        for stage, end in enumerate(ends)
        for tap, x, y in zip(model.taps, end, ends[-1], strict=True)
    ]
    look = _Look(run, seen, ends[-1], sorted(examples), total, rows)
    _once_more(run, state, examples, look)
    return rows


def _ends(run: Finished, seen: _States, total: int) -> tuple[list[list[np.ndarray]], Global]:
    """The states after each stage, by tap, with what was served then in the model; and the final state of the federation."""
    recipe, model, folder = run.recipe, run.model, RunFolder(run.folder)
    assert model.initial is not None
    ends = []
    model.rewind()
    for stage in range(len(run.prepared.stages)):  # the log of base shifts only grows, so each stage adds what is its own
        state = folder.read_checkpoint("federated", recipe.federation.rounds * (stage + 1), model.initial)
        model.replay(state.shifts, 0)
        final = served(folder, "federated", recipe.federation.rounds, stage, recipe.stream, model.initial)
        model.write(final)
        ends.append(seen())
        run.watch("states", len(ends), total)
    return ends, replace(state, adapter=final)


@dataclass(frozen=True)
class _Look:
    """Looks at the model after each site's round, while it still holds what that site has trained."""

    run: Finished
    seen: _States
    final: list[np.ndarray]
    sites: Sequence[str]
    total: int
    rows: list[Row]

    def __call__(self, reply: Reply) -> None:
        run, taps = self.run, self.run.model.taps
        if not reply.error:
            for tap, x, y in zip(taps, self.seen(), self.final, strict=True):
                self.rows.append(run.row(f"site_cka/{tap}", linear_cka(x, y), "ratio", site=reply.site))
        run.watch("states", self.total - len(self.sites) + 1 + list(self.sites).index(reply.site), self.total)


def _once_more(run: Finished, final: Global, examples: Mapping[str, Sequence[Example]], look: _Look) -> None:
    """The last round once more, with its learning rate, now from the final model; what the server makes of it is not used."""
    model, stages = run.model, len(run.prepared.stages)
    assert model.initial is not None
    everyone = replace(run.recipe.federation, sites_per_round=0, quorum=1.0, deadline=math.inf, max_update_norm=math.inf)
    # masks change nothing at a site, and would ask for a round of keys
    recipe = replace(run.recipe, federation=everyone, privacy=replace(run.recipe.privacy, masks=False))
    kept = {name: Kept(rank=rank) for name, rank in recipe.lora.ranks(run.prepared.sites.rows).items()}
    before: list[Sequence[Example]] = [()] * (stages - 1)
    sites = {n: Site(n, [*before, encoded], recipe.federation.rounds, recipe) for n, encoded in examples.items()}
    rows = {name: len(encoded) for name, encoded in examples.items()}
    roster = roster_of(recipe, stages - 1, model.initial, list(examples), list(run.prepared.sites.rows), rows)
    run_round(replace(final, round=final.round - 1), LocalTransport(model, sites, kept, look), roster)
