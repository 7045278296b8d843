"""A whole run: data to sites, the federated loop and its baselines, held-out scores, and a folder that can be resumed.

A run is a list of legs, each the same loop with other settings: `base` trains nothing, `federated` is the recipe itself,
`local/<site>` is a federation of that one site, `centralised` is a federation of one site that holds every row. After each
round, and after each leg's test, the folder is in a state to resume from.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fedkeel.aggregate import AGGREGATORS, blend, folded
from fedkeel.client import Kept, injection_of, layout_of, modules_left_out, steps_a_round
from fedkeel.codecs import make_codec
from fedkeel.config import ConfigError, Recipe, check_one_model
from fedkeel.data import Example, Formatter
from fedkeel.evaluate import Scored, choose, over_tasks, overall, score, task_table
from fedkeel.folder import RunFolder
from fedkeel.local import LocalTransport
from fedkeel.messages import factors_down, names_of, pack, pack_global
from fedkeel.model import Model, kind_of, load_config
from fedkeel.server import RoundResult, run_round
from fedkeel.sites import (
    Sites,
    arrivals,
    check_stages_are_learnt,
    kept_between_stages,
    make_sites,
    stages_of,
    unseen_sites,
)
from fedkeel.sources import load_records
from fedkeel.track import Tracks
from fedkeel.types import Adapter, Global, Lora, Record, Reply, Row, Transport

TRAIN_COST = 3.0  # a training row against a scored row, in forward passes: forward, and backward about twice that


class Watch(Protocol):
    """What a display is told. `work` is in row-equivalents (one scored row = 1), see TRAIN_COST."""

    def begin(self, total_work: float) -> None:
        """Before anything runs."""

    def leg(self, name: str, detail: str) -> None:
        """A leg, or its scoring, begins."""

    def advance(self, work: float) -> None:
        """Some work is done."""

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        """A round is done."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the weights. sites: those that take part, all stages together; stages: see
    `sites.stages_of`. unseen: by stage, the sites that take no part in training. arrival: record id -> stage. notes: what was
    done to the data that the user should know."""

    recipe: Recipe
    sites: Sites
    stages: Sequence[Sites]
    unseen: Sequence[Sites]
    arrival: Mapping[str, int]
    kind: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(recipe: Recipe, alone: str = "") -> Prepared:
    """Read and deal the data, and look at the base model's configuration. Loads no weights.

    alone: the name of the one site that holds all of the data; empty: the recipe's partition deals them.
    """
    base_config = load_config(recipe.model)
    kind = kind_of(recipe.model, base_config)
    records = load_records(recipe.data, recipe.seed)
    if alone:
        records = [dataclasses.replace(r, site=alone) for r in records]
        recipe = dataclasses.replace(recipe, partition=dataclasses.replace(recipe.partition, scheme="natural"))
    classes: tuple[str, ...] = ()
    notes = []
    if kind == "classifier":
        unlabelled = sum(not r.labels for r in records)
        records = [r for r in records if r.labels]
        if unlabelled:
            notes.append(f"{unlabelled} rows without candidate labels left out: this base is a classifier")
        if not records:
            raise ConfigError(
                f"model.base = {recipe.model.base!r} is a classifier, and no row of the data has labels; use a causal base"
            )
        classes = tuple(sorted({label for labels in {r.labels for r in records} for label in labels}))
    arrival = {r.id: at for r, at in zip(records, arrivals(records, recipe), strict=True) if at >= 0}
    if len(arrival) < len(records):
        notes.append(f"{len(records) - len(arrival)} rows left out: no stage of the stream names their task or label group")
        records = [r for r in records if r.id in arrival]
    if recipe.stream.stages:
        notes.append(kept_between_stages(recipe))
    dealt = make_sites(records, recipe)
    apart = unseen_sites(dealt, recipe)
    taking_part = dealt.rows.keys() - set(apart)
    sites, stages = dealt.only(taking_part), stages_of(dealt, arrival, recipe)
    if apart:
        tests = len(dealt.only(apart).all("test"))
        notes.append(f"{', '.join(apart)}: no part in any training (evaluation.unseen_sites); {tests} test rows to score")
    label_sets: dict[str, set[tuple[str, ...]]] = {}
    for record in records:
        label_sets.setdefault(record.task, set()).add(record.labels)
    trained = {(r.task, r.output) for r in sites.all("train")}
    for split in ("validation", "test"):
        # A task whose every row offers the same labels; where each row brings options of its own, answers may well be new.
        fixed = [r for r in sites.all(split) if r.labels and len(label_sets[r.task]) == 1]
        unseen = [r for r in fixed if (r.task, r.output) not in trained]
        if unseen:
            names = ", ".join(sorted({f"{r.task}: {r.output}" for r in unseen})[:5])
            notes.append(
                f"{len(unseen)} {split} rows carry a label never seen in training ({names}); they are scored all the same"
            )
    trains, scored_only = ([stage.only(names) for stage in stages] for names in (taking_part, apart))
    check_stages_are_learnt(trains, arrival, recipe)
    return Prepared(recipe, sites, trains, scored_only, arrival, kind, classes, tuple(notes))


def payload_bytes(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> tuple[int, int]:
    """(down, up): bytes of one message each way for an adapter of these shapes, by sealing one of zeros.

    True messages are a little longer: their headers carry names and numbers. In a stream with distill.memory the message
    down holds two adapters from the second stage on, and that is the size given here. Base shifts come on top: of rank up
    to that of all sites' adapters together, for every round that a site has not seen.
    """
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    paths = sorted(name[:-2] for name in zeros if name.endswith(".a") and f"{name[:-2]}.b" in zeros)
    lora = {p: Lora(zeros[f"{p}.a"], zeros[f"{p}.b"], 1.0) for p in paths}
    factors = {f"{p}.{x}" for p in paths for x in "ab"}
    adapter = Adapter(lora, {n: t for n, t in zeros.items() if n not in factors})
    stats = {"loss": 0.1234567890123456}
    more = {"site": "site-0", "positions": 10_000, "stats": stats, "seconds": "00000000.000", "tasks": {}}
    remembers = recipe.distill.weight and recipe.distill.memory and len(recipe.stream.stages) > 1
    federation, state = recipe.federation, Global(0, adapter, adapter if remembers else None)
    rule = AGGREGATORS[federation.rule]
    down = pack_global("global", state, federation.codec_down, names_of(adapter, factors_down(rule)), tasks={}, unsent="0" * 16)
    sent = names_of(adapter, rule.trained(0) & rule.shared)
    changes = {name: t for name, t in adapter.tensors().items() if name in sent}
    encoded = make_codec(federation.codec_up).encode(changes, 0)
    up = pack("update", 0, adapter, encoded, federation.codec_up, held=0, **more)
    return len(down), len(up)


@dataclass(frozen=True)
class Stage:
    """What one leg does in one stage. rows: training records by site; sites without any are not asked."""

    recipe: Recipe
    rows: Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Leg:
    """One method's loop over the stages. method: as in Row. rounds: of each stage."""

    name: str
    method: str
    rounds: int
    stages: Sequence[Stage]

    @property
    def site(self) -> str:
        """The one site of a local leg; empty for the others."""
        return next(iter(self.stages[0].rows)) if self.method == "local" else ""

    @property
    def seed(self) -> int:
        return self.stages[0].recipe.seed


def plain(recipe: Recipe) -> Recipe:
    """The recipe without averaging over stages, distillation, structures, proximal term and ascent: plain LoRA."""
    return dataclasses.replace(
        recipe,
        stream=dataclasses.replace(recipe.stream, average=0.0),
        distill=dataclasses.replace(recipe.distill, weight=0.0),
        structure=type(recipe.structure)(),
        train=dataclasses.replace(recipe.train, proximal=0.0, sam=0.0),
    )


def legs_of(prepared: Prepared) -> list[Leg]:
    """The legs in the order they run: base, federated, local ones, centralised.

    A baseline has the budget of what it is compared with: a local site takes the steps it takes in the federation, the
    centralised run as many as all sites together, both in one go a stage, with the same batch, learning rate and schedule.
    Local and centralised legs are `plain`: there is no one to learn from.
    """
    recipe = prepared.recipe
    train, rounds = recipe.train, recipe.federation.rounds
    held = [{name: splits["train"] for name, splits in stage.rows.items()} for stage in prepared.stages]
    single = dataclasses.replace(
        plain(recipe),
        federation=dataclasses.replace(
            recipe.federation,
            rounds=1,
            sites_per_round=0,
            quorum=1.0,
            rule="mean",
            codec_up="fp32",
            codec_down="fp32",
            hostile=0,
            optimiser="average",
            server_lr=1.0,
            # both are meant for one round, and here is the whole budget in one
            max_update_norm=float("inf"),
            deadline=float("inf"),
        ),
        lora=dataclasses.replace(recipe.lora, site_ranks=()),
    )

    def alone(rows: Mapping[str, Sequence[Record]], steps: int) -> Stage:
        own = dataclasses.replace(single.train, local_steps=max(1, steps), local_epochs=0)
        return Stage(dataclasses.replace(single, train=own), rows)

    steps = [{name: rounds * steps_a_round(train, len(rows)) if rows else 0 for name, rows in stage.items()} for stage in held]
    legs = []
    if "base" in recipe.evaluation.baselines:
        legs.append(Leg("base", "base", 0, [Stage(recipe, {}) for _ in held]))
    legs.append(Leg("federated", "federated", rounds, [Stage(recipe, {n: r for n, r in stage.items() if r}) for stage in held]))
    if "local" in recipe.evaluation.baselines:
        for name in prepared.sites.rows:
            stages = [alone({name: rows[name]}, taken[name]) for rows, taken in zip(held, steps, strict=True)]
            legs.append(Leg(f"local/{name}", "local", 1, stages))
    if "centralised" in recipe.evaluation.baselines:
        stages = []
        for at, taken in zip(prepared.stages, steps, strict=True):
            present = sum(1 for count in taken.values() if count)
            asked = min(recipe.federation.sites_per_round or present, present)
            stages.append(alone({"all": at.all("train")}, round(sum(taken.values()) * asked / present)))
        legs.append(Leg("centralised", "centralised", 1, stages))
    return legs


def _score_rows(leg: Leg, stage: int, round: int, split: str, scored: Sequence[Scored], prepared: Prepared) -> list[Row]:
    """Rows of one scoring: per task, over all tasks, in a stream per stage that the rows came with, and per site on its own."""
    run = prepared.recipe.name

    def row(name: str, value: float, unit: str = "share", task: str = "", at: str = leg.site) -> Row:
        return Row(run, leg.method, leg.seed, round, name, value, unit, site=at, stage=stage, task=task, split=split)

    table = task_table(scored)
    rows = []
    for task, metrics in table.items():
        rows += [row(n, v, "rows" if n == "rows" else "share", task) for n, v in metrics.items()]
    rows += [row(name, value) for name, value in over_tasks(table).items()]
    if len(leg.stages) > 1:
        for came in range(stage + 1):
            of_stage = [s for s in scored if prepared.arrival[s.record.id] == came]
            if of_stage:
                rows.append(row(f"score_of_stage_{came + 1}", overall(of_stage)))
    by_id = {s.record.id: s for s in scored}
    for name, held in prepared.stages[stage].rows.items():
        own = [by_id[r.id] for r in held[split] if r.id in by_id]
        if own and (leg.method != "local" or name == leg.site):
            rows.append(row("own_score", overall(own), at=name))
    return rows


def _unseen_rows(leg: Leg, stage: int, round: int, scored: Sequence[Scored], prepared: Prepared) -> list[Row]:
    """Rows of one scoring of the sites that take no part in training: over all tasks, and of each such site on its own, but
    for a local model, whose rows are under the name of the site that it is of."""

    def row(name: str, value: float, at: str) -> Row:
        run = prepared.recipe.name
        return Row(run, leg.method, leg.seed, round, name, value, "share", site=at, stage=stage, split="unseen-sites")

    rows = [row("score", overall(scored), leg.site)]
    by_id = {s.record.id: s for s in scored}
    for name, held in prepared.unseen[stage].rows.items():
        own = [by_id[r.id] for r in held["test"] if r.id in by_id]
        if own and leg.method != "local":
            rows.append(row("own_score", overall(own), name))
    return rows


UNITS = {"loss": "nats", "distill_loss": "nats", "structure_loss": "nats", "update_norm": "norm", "dropped": "share"}


def round_rows(leg: Leg, stage: int, result: RoundResult, run: str, cpu: float) -> list[Row]:
    """Rows of one round: what it took, what was sent, how far the sites disagreed by block, and what each site told.

    A site's numbers keep their names (`loss`, `gate_a_mean`, `strength`, ...), but for its wall clock, `site_seconds`.
    cpu: seconds of processor time of the round, all sites and the exchange: unlike wall clock, it says what a method costs on
    a machine that has other work too.
    """

    def row(name: str, value: float, unit: str, site: str = "") -> Row:
        return Row(run, leg.method, leg.seed, result.state.round, name, value, unit, site=site, stage=stage)

    rows = [
        row("aggregation_error", result.error, "share"),
        row("seconds", result.seconds, "seconds"),
        row("cpu_seconds", cpu, "seconds"),
        row("aggregation_seconds", result.aggregation_seconds, "seconds"),
    ]
    rows += [row(f"drift/{block}", value, "ratio") for block, value in result.state.drift.items()]
    for update in result.updates:
        rows.append(row("positions", update.positions, "positions", update.site))
        for name, value in sorted(update.stats.items()):
            if name == "seconds":
                rows.append(row("site_seconds", value, "seconds", update.site))
            else:
                rows.append(row(name, value, UNITS.get(name, "weight"), update.site))
    for name, sizes in (("bytes_down", result.bytes_down), ("bytes_up", result.bytes_up)):
        rows += [row(name, size, "bytes", site) for site, size in sorted(sizes.items())]
    rows += [row("failed", 1, "rounds", site) for site in sorted(result.failures)]
    return rows


def tell_failures(watch: Watch, result: RoundResult) -> None:
    """A note for each site that a round went on without."""
    for site, text in sorted(result.failures.items()):
        told = f"site {site} failed and was left out (the quorum holds): {text.strip()}"
        watch.note(f"round {result.state.round}: {told}")


def served(folder: RunFolder, leg: str, rounds: int, stage: int, share: float, like: Adapter) -> Adapter:
    """What a leg serves after `stage` (from 0), from the checkpoints of the stages' ends: see `config.Stream.average`.

    rounds: of one stage. share: 0 takes the stage as it ended.
    """
    first = 0 if share else stage
    ends = (folder.read_checkpoint(leg, rounds * (s + 1), like).adapter for s in range(first, stage + 1))
    return reduce(lambda before, end: blend(before, end, share), ends)


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


def serve(model: Model, folder: RunFolder, prepared: Prepared) -> None:
    """Put into the model what a finished federation serves: its adapter, and the base shifts below it.

    Raises ConfigError where there is no such one model, as factors stayed at the sites.
    """
    assert model.initial is not None
    recipe = prepared.recipe
    check_one_model(recipe, folder.path / "adapter")
    rounds, last = recipe.federation.rounds, len(prepared.stages) - 1
    model.rewind()
    model.replay(folder.read_checkpoint("federated", rounds * (last + 1), model.initial).shifts, 0)
    model.write(served(folder, "federated", rounds, last, recipe.stream.average, model.initial))


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


def trained_model(prepared: Prepared, folder: Path) -> Model:
    """The model of a run with its federated adapter in it."""
    recipe = prepared.recipe
    model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes)
    serve(model, RunFolder(folder), prepared)
    return model


def describe_sites(prepared: Prepared) -> list[tuple[str, int, int, int, int, str]]:
    """Per site: name, training, validation and test rows, tasks, and its commonest answer with its share."""
    lines = []
    for name, held in prepared.sites.rows.items():
        tasks = len({r.task for r in held["train"]})
        answers = Counter(r.output for r in held["train"] if r.labels).most_common(1)
        top = f"{answers[0][0][:24]} {answers[0][1] / len(held['train']):.0%}" if answers else ""
        lines.append((name, len(held["train"]), len(held["validation"]), len(held["test"]), tasks, top))
    return lines


def describe_model(prepared: Prepared) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """(frozen parameters, trainable parameters, adapter shapes) of the recipe's base, without reading its weights."""
    recipe = prepared.recipe
    model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes, weights=False)
    shapes = model.read_shapes()
    return model.base_parameters(), sum(p.numel() for p in model.parameters()), shapes
