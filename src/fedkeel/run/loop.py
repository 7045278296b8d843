"""A whole run: data to sites, the federated loop and its baselines, held-out scores, and a folder that can be resumed.

A run is a list of legs, each the same loop with other settings: `base` trains nothing, `federated` is the recipe itself,
`local/<site>` is a federation of that one site, `centralised` is a federation of one site that holds every row. After each
round, and after each leg's test, the folder is in a state to resume from.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from fedkeel.data.format import Example, Formatter
from fedkeel.data.sites import Sites
from fedkeel.federation.kept import Kept, layout_of, modules_left_out
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.server import run_round
from fedkeel.federation.train import injection_of, steps_a_round
from fedkeel.method.aggregate import AGGREGATORS, blend, folded
from fedkeel.model.lora import Model
from fedkeel.recipe.settings import ConfigError
from fedkeel.run.folder import RunFolder
from fedkeel.run.legs import Leg, legs_of
from fedkeel.run.prepare import Prepared
from fedkeel.run.rows import _score_rows, _unseen_rows, round_rows
from fedkeel.run.served import serve, served
from fedkeel.run.track import Tracks
from fedkeel.run.watch import Watch, tell_failures
from fedkeel.scores.evaluate import Scored, choose, score
from fedkeel.types import Adapter, Global, Record, Reply, Row, Transport

TRAIN_COST = 3.0  # a training row against a scored row, in forward passes: forward, and backward about twice that


class Carrier(Transport, Protocol):
    """A transport to sites in other processes."""

    @property
    def cpu(self) -> float:
        """Seconds of processor time that the sites' answers took so far."""


class Engine(Protocol):
    """What carries the messages of the federated leg where its sites are not in this process."""

    def connect(self, rounds: int, kept: dict[str, Kept], watch: Callable[[Reply], None]) -> Carrier:
        """A transport for one stage of `rounds` rounds. kept, watch: as in `local.LocalTransport`."""


class _Run:
    """A run in progress: what all its legs share."""

    def __init__(self, prepared: Prepared, folder: RunFolder, watch: Watch, engine: Engine | None = None) -> None:
        recipe = prepared.recipe
        self.prepared, self.folder, self.watch, self.engine = prepared, folder, watch, engine
        self.kept: dict[str, Kept] = {}  # of the present leg
        self.state: dict[str, Any] = {}  # see RunFolder.state; set once the folder is open
        self.model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes)
        assert self.model.initial is not None
        self.initial = self.model.initial
        self.formatter = Formatter(
            self.model.tokenizer, self.model.kind, recipe.data.max_length, recipe.data.list_labels, classes=prepared.classes
        )
        self.examples = [
            {name: self.formatter.encode_all(held["train"]) for name, held in stage.rows.items()} for stage in prepared.stages
        ]
        for number, (stage, encoded) in enumerate(zip(prepared.stages, self.examples, strict=True), 1):
            for name, rows in encoded.items():
                if stage.rows[name]["train"] and not rows:
                    where = f" of stage {number}" if len(self.examples) > 1 else ""
                    raise ConfigError(
                        f"site {name}: none of its rows{where} fits into data.max_length = {recipe.data.max_length} tokens"
                    )
        for what, text in (("truncated", "had their text shortened"), ("dropped", "were left out: their answer is too long")):
            if self.formatter.counts[what]:
                count, limit = self.formatter.counts[what], recipe.data.max_length
                watch.note(f"{count} training rows {text} (data.max_length = {limit} tokens)")
        for note in prepared.notes:
            watch.note(note)
        injection = injection_of(self.model, recipe)
        if injection is not None:  # a structure without a place is an error now, not at a site's first step
            with injection:
                pass
        if recipe.distill.weight and recipe.distill.align != "off" and not self.model.taps:
            raise ConfigError(
                f"distill.align = {recipe.distill.align!r}: the blocks of {recipe.model.base!r} are not known, so no hidden "
                f"state can be tapped; set distill.align = 'off'"
            )
        self.curve_rows = self._held_out("validation", recipe.evaluation.validation_rows, prepared.stages)
        self.test_rows = self._held_out("test", recipe.evaluation.test_rows, prepared.stages)
        self.unseen_rows = self._held_out("test", recipe.evaluation.test_rows, prepared.unseen)
        if not all(self.test_rows):
            raise ConfigError("no test row: nothing could be scored; add rows with split `test` or set data.test_share")

    @staticmethod
    def _held_out(split: str, limit: int, stages: Sequence[Sites]) -> list[list[Record]]:
        """The rows to score after each stage: one choice for the whole run, each stage seeing what has arrived by then."""
        chosen = {r.id for r in choose(stages[-1].all(split), split, limit)}
        found = [[r for r in stage.all(split) if r.id in chosen] for stage in stages]
        return [choose(rows, split, 0) for rows in found]

    def _work(self, leg: Leg, stage: int) -> tuple[float, float, float]:
        """(work of one round without its scoring, of all rounds of a stage with theirs, of scoring its test rows)."""
        at = leg.stages[stage]
        batch = at.recipe.train.batch_size
        one = TRAIN_COST * batch * sum(steps_a_round(at.recipe.train, len(rows)) for rows in at.rows.values() if rows)
        scored = len(self.curve_rows[stage]) if leg.method == "federated" else 0
        points = sum(self._curve_point(leg, stage * leg.rounds + n + 1) for n in range(leg.rounds))
        tested = len(self.test_rows[stage]) + len(self.unseen_rows[stage]) + len(self._judged_by(leg, stage))
        return one, leg.rounds * one + points * scored, tested

    def _curve_point(self, leg: Leg, round: int) -> bool:
        return leg.method == "federated" and round % self.prepared.recipe.evaluation.every == 0

    def _judged_by(self, leg: Leg, stage: int) -> Sequence[Record]:
        """Validation rows beside the test rows: the centralised leg has no curve, and at its end tuning judges it by them, as a
        reference must not be worse for another's learning rate."""
        return self.curve_rows[stage] if leg.method == "centralised" and stage + 1 == len(leg.stages) else ()

    def total_work(self, legs: Sequence[Leg]) -> float:
        """In row-equivalents."""
        return sum(sum(self._work(leg, stage)[1:]) for leg in legs for stage in range(len(leg.stages)))

    def run(self, leg: Leg) -> None:
        """A leg from its last state to its end."""
        state, folder = self.state, self.folder
        if leg.name in state["done"]:
            self.watch.advance(self.total_work([leg]))
            return
        if state["leg"] != leg.name:
            state.update(leg=leg.name, round=0, tested=0)
        self.model.rewind()
        ranks = self.prepared.recipe.lora.ranks(self.prepared.sites.rows) if leg.method == "federated" else {}
        self.kept = {name: Kept(rank=rank) for name, rank in ranks.items()}
        current = Global(0, self.initial)
        if state["round"]:
            current = folder.read_checkpoint(leg.name, state["round"], self.initial)
            self.model.replay(current.shifts, 0)  # the one base of all sites here
            kept, optimiser = folder.read_kept(leg.name, state["round"], self.initial)
            current = dataclasses.replace(current, optimiser=optimiser)
            for name, tensors in kept.items():
                self.kept[name] = self.kept.get(name, Kept()).restored(tensors)
        for stage in range(len(leg.stages)):
            if stage < state["tested"]:
                self.watch.advance(sum(self._work(leg, stage)[1:]))
                continue
            current = self._stage(leg, stage, current)
            self._test(leg, stage, current)
        state.update(done=[*state["done"], leg.name], leg="", round=0, tested=0)
        folder.save(state, [])

    def _held(self, leg: Leg, stage: int) -> dict[str, Sequence[Example]]:
        examples = self.examples[stage]
        if leg.method == "centralised":
            together = [e for encoded in examples.values() for e in encoded]
            return {"all": sorted(together, key=lambda e: e.record)}
        return {name: examples[name] for name in leg.stages[stage].rows if examples[name]}

    def _stage(self, leg: Leg, stage: int, current: Global) -> Global:
        """The rounds of one stage from `current` on; each ends in a checkpoint."""
        recipe, end = leg.stages[stage].recipe, (stage + 1) * leg.rounds
        one_round = self._work(leg, stage)[0]
        for round in range(stage * leg.rounds + 1, current.round + 1):  # done before this process began
            self.watch.advance(one_round + self._curve_point(leg, round) * len(self.curve_rows[stage]))
        held = self._held(leg, stage) if leg.rounds else {}
        if not held:  # nobody learns in this stage; rounds are counted all the same
            return dataclasses.replace(current, round=end)
        rows_total = sum(map(len, held.values()))

        def site_done(reply: Reply) -> None:
            share = len(held[reply.site]) / rows_total if recipe.train.local_epochs else 1 / len(held)
            self.watch.advance(one_round * share)

        by_stage = {name: [()] * stage + [rows] for name, rows in held.items()}
        carrier = self.engine.connect(leg.rounds, self.kept, site_done) if self.engine and leg.method == "federated" else None
        transport = carrier or LocalTransport(self.model, by_stage, recipe, leg.rounds, site_done, self.kept)
        layouts = {n: layout_of(self.initial, recipe.lora, kept.rank) for n, kept in self.kept.items() if kept.rank}
        out = modules_left_out(recipe, self.initial.lora)
        where = f" of stage {stage + 1}" if len(leg.stages) > 1 else ""
        remembers = bool(stage and recipe.distill.weight and recipe.distill.memory)
        while current.round < end:
            done = current.round - stage * leg.rounds
            self.watch.leg(leg.name, f"round {done + 1} of {leg.rounds}{where}")
            before = current
            if not done:  # a new stage: what the sites reported of the last one says nothing about this one
                # and if the memory is the global adapter itself, it need not travel twice
                apart = remembers and recipe.stream.average
                before = dataclasses.replace(before, counts={}, memory=self._served(leg, stage - 1) if apart else None)
            begin, elsewhere = time.process_time(), carrier.cpu if carrier else 0.0
            result = run_round(before, transport, list(held), recipe.federation, recipe.seed, layouts=layouts, hold=out)
            cpu = time.process_time() - begin + (carrier.cpu - elsewhere if carrier else 0.0)
            current = result.state
            if remembers and not done:
                current = dataclasses.replace(current, memory=self._served(leg, stage - 1))
            rows = round_rows(leg, stage, result, self.prepared.recipe.name, cpu)
            tell_failures(self.watch, result)
            if self.curve_rows[stage] and self._curve_point(leg, current.round):
                self.watch.leg(leg.name, f"round {done + 1}{where}: scoring validation rows")
                scored = self._score(leg, stage, current, self.curve_rows[stage], self.prepared.stages[stage])
                rows += _score_rows(leg, stage, current.round, "validation", scored, self.prepared)
            self.watch.round(leg.name, current.round, leg.rounds * len(leg.stages), result)
            self.folder.write_checkpoint(leg.name, current, self._kept_tensors())
            self.state.update(round=current.round)
            self.folder.save(self.state, rows)
        return current

    def _served(self, leg: Leg, stage: int) -> Adapter:
        """What is served after `stage`, from the checkpoints of the stages' ends."""
        return served(self.folder, leg.name, leg.rounds, stage, leg.stages[stage].recipe.stream.average, self.initial)

    def _save_adapter(self, leg: Leg, current: Global) -> None:
        """The PEFT folder of what the model holds, whole or not at all; one a site where factors stay at the sites."""
        target = self.folder.path / "adapter"
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        if AGGREGATORS[leg.stages[-1].recipe.federation.rule].personal:
            for name in sorted(self.prepared.sites.rows):  # also of a site that was never asked: it has what is shared
                self.model.write(self.kept.get(name, Kept()).adapter(current.adapter))
                self.model.save(partial / name)
        elif current.shifts:
            self.model.save(partial, folded(self.model.read(), current.shifts))
        else:
            self.model.save(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)

    def _kept_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What the sites keep, for the checkpoint."""
        return {site: tensors for site, kept in self.kept.items() if (tensors := kept.tensors())}

    def _score(self, leg: Leg, stage: int, current: Global, records: Sequence[Record], sites: Sites) -> list[Scored]:
        """Scores of what would be served if the stage ended now; where factors stay at the sites, of each row by the model
        of the one of `sites` that holds it."""
        recipe = leg.stages[stage].recipe
        share = recipe.stream.average if stage and leg.rounds else 0.0
        served = blend(self._served(leg, stage - 1), current.adapter, share) if share else current.adapter
        self.model.replay(current.shifts, 0)
        scored: list[Scored] = []
        if leg.rounds and AGGREGATORS[recipe.federation.rule].personal:
            for name, held in sites.rows.items():
                self.model.write(self.kept.get(name, Kept()).adapter(served))
                ids = {r.id for rows in held.values() for r in rows}
                own = [r for r in records if r.id in ids]
                scored += score(self.model, self.formatter, own, self.prepared.recipe.evaluation, self.watch.advance)
            scored.sort(key=lambda s: s.record.id)
        else:
            self.model.write(served)
            scored = score(self.model, self.formatter, records, self.prepared.recipe.evaluation, self.watch.advance)
        return scored

    def _test(self, leg: Leg, stage: int, current: Global) -> None:
        """Score the held-out rows of all stages so far."""
        self.watch.leg(leg.name, "scoring held-out rows")
        begin = time.perf_counter()
        scored = self._score(leg, stage, current, self.test_rows[stage], self.prepared.stages[stage])
        seconds = time.perf_counter() - begin
        rows = _score_rows(leg, stage, current.round, "test", scored, self.prepared)
        if judged_by := self._judged_by(leg, stage):
            held_out = self._score(leg, stage, current, judged_by, self.prepared.stages[stage])
            rows += _score_rows(leg, stage, current.round, "validation", held_out, self.prepared)
        if self.unseen_rows[stage]:
            apart = self._score(leg, stage, current, self.unseen_rows[stage], self.prepared.unseen[stage])
            rows += _unseen_rows(leg, stage, current.round, apart, self.prepared)
        name = self.prepared.recipe.name
        rows.append(
            Row(name, leg.method, leg.seed, current.round, "test_seconds", seconds, "seconds", site=leg.site, stage=stage)
        )
        if leg.method == "federated" and stage + 1 == len(leg.stages):
            self._save_adapter(leg, current)
        if stage + 1 == len(leg.stages):
            self.folder.write_scores(leg.method, leg.site, {s.record.id: (s.record.task, s.score) for s in scored})
        self.folder.write_checkpoint(leg.name, current, self._kept_tensors())  # also of a stage in which nobody learnt
        self.state.update(round=current.round, tested=stage + 1)
        self.folder.save(self.state, rows)


def execute(
    prepared: Prepared, folder: RunFolder, watch: Watch, resume: bool = False, fresh: bool = False,
    engine: Engine | None = None,
) -> Model:  # fmt: skip
    """Run every leg, from the folder's last state on. Returns the model with the federated adapter in it.

    engine: where the sites of the federated leg are; None: in this process. All else, scoring and baselines, is done here.

    Leaves recipe.toml, env.json, rows.jsonl, scores.jsonl, checkpoints/, tb/, and adapter/ in PEFT format in the folder.
    """
    recipe = prepared.recipe
    torch.set_num_threads(recipe.threads)
    folder.check(recipe, resume, fresh)
    tracks = Tracks(recipe.track, folder.path, recipe.name, watch.note)
    run = _Run(prepared, folder, watch, engine)
    run.state = folder.open(recipe, resume, fresh)  # only now: a recipe that cannot run leaves no folder, and replaces none
    legs = legs_of(prepared)
    watch.begin(run.total_work(legs))
    with nullcontext() if run.state["finished"] else tracks as folder.tracks:
        for leg in legs:
            run.run(leg)
    if not AGGREGATORS[recipe.federation.rule].personal:
        serve(run.model, folder, prepared)
    run.state["finished"] = True
    folder.save(run.state, [])
    return run.model
