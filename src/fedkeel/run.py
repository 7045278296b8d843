"""A whole run: data to sites, the federated loop and its baselines, held-out scores, and a folder that can be resumed.

A run is a list of legs, each the same loop with other settings: `base` trains nothing, `federated` is the recipe itself,
`local/<site>` is a federation of that one site, `centralised` is a federation of one site that holds every row. After each
round, and after each leg's test, the folder is in a state to resume from.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from fedkeel import partition
from fedkeel.client import steps_a_round
from fedkeel.config import ConfigError, Recipe, to_toml
from fedkeel.data import Example, Formatter
from fedkeel.evaluate import Scored, choose, score, task_table
from fedkeel.files import append_lines, write_atomic
from fedkeel.local import LocalTransport
from fedkeel.messages import pack, unpack
from fedkeel.metrics import macro
from fedkeel.model import Model, kind_of, load_config
from fedkeel.rng import derive, numpy_generator
from fedkeel.server import RoundResult, run_round
from fedkeel.sources import load_records
from fedkeel.types import Adapter, FedKeelError, Global, Lora, Record, Reply, Row

TRAIN_COST = 3.0  # a training row against a scored row, in forward passes: forward, and backward about twice that


class RunError(FedKeelError):
    """A run folder that cannot be used as asked."""


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
class Sites:
    """The rows of every site, by split: sites[name][split] -> records sorted by id."""

    rows: Mapping[str, Mapping[str, Sequence[Record]]]

    def all(self, split: str) -> list[Record]:
        """The rows of all sites together, sorted by id, so that no file order or site name matters."""
        return sorted((r for held in self.rows.values() for r in held[split]), key=lambda r: r.id)


def make_sites(records: Sequence[Record], recipe: Recipe) -> Sites:
    """Deal the records to sites as the recipe's partition says.

    Raises ConfigError if a site would have no training row, naming it, or if a natural split has no key to go by.
    """
    spec = recipe.partition
    strata = [r.split for r in records]
    rng = numpy_generator(recipe.seed, "partition")
    if spec.scheme == "natural":
        if not all(r.site for r in records):
            raise ConfigError(
                "partition.scheme = 'natural' needs a site for every row: set data.site_column to the column that names it, or "
                "choose partition.scheme = 'dirichlet', 'iid', 'by-task' or 'quantity'"
            )
        held = partition.natural([r.site for r in records])
    else:
        if spec.scheme == "iid":
            dealt = partition.iid(strata, spec.sites, rng)
        elif spec.scheme == "quantity":
            dealt = partition.quantity_skew(strata, spec.sites, spec.alpha, rng)
        elif spec.scheme == "by-task":
            try:
                dealt = partition.by_task([r.task for r in records], spec.sites, rng)
            except ValueError as error:
                raise ConfigError(f"partition.scheme = 'by-task': {error}") from error
        else:
            keys = [(r.task, r.output if spec.over == "labels" and r.labels else "") for r in records]
            dealt = partition.dirichlet(keys, strata, spec.sites, spec.alpha, rng)
        width = len(str(spec.sites - 1))
        held = {f"site-{k:0{width}d}": indices for k, indices in enumerate(dealt)}
    sites: dict[str, dict[str, list[Record]]] = {}
    for name, indices in held.items():
        sites[name] = {s: [records[i] for i in indices if records[i].split == s] for s in ("train", "validation", "test")}
        cap = recipe.data.rows_per_site
        if cap and recipe.data.source != "pydocs":  # pydocs caps by itself, balanced over its tasks
            hashed = sorted(sites[name]["train"], key=lambda r: derive(recipe.seed, "cap", r.id))[:cap]
            sites[name]["train"] = sorted(hashed, key=lambda r: r.id)
    empty = [name for name, held_rows in sites.items() if not held_rows["train"]]
    if empty:
        raise ConfigError(
            f"site {', '.join(empty)} would have no training row under partition.scheme = {spec.scheme!r} "
            f"(sites = {len(sites)}, alpha = {spec.alpha:g}, {len(records)} rows); use fewer sites, a larger alpha or more rows"
        )
    return Sites(sites)


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the weights. notes: what was done to the data that the user should know."""

    recipe: Recipe
    sites: Sites
    kind: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(recipe: Recipe) -> Prepared:
    """Read and deal the data, and look at the base model's configuration. Loads no weights."""
    base_config = load_config(recipe.model)
    kind = kind_of(recipe.model, base_config)
    records = load_records(recipe.data, recipe.seed)
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
        classes = tuple(sorted({label for r in records for label in r.labels}))
    sites = make_sites(records, recipe)
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
    return Prepared(recipe, sites, kind, classes, tuple(notes))


def payload_bytes(shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> tuple[int, int]:
    """(down, up): bytes of one message each way for an adapter of these shapes, by sealing one of zeros.

    The true update is a few bytes longer or shorter: its header carries the site's name and numbers.
    """
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    paths = sorted(name[:-2] for name in zeros if name.endswith(".a") and f"{name[:-2]}.b" in zeros)
    lora = {p: Lora(zeros[f"{p}.a"], zeros[f"{p}.b"], 1.0) for p in paths}
    factors = {f"{p}.{x}" for p in paths for x in "ab"}
    adapter = Adapter(lora, {n: t for n, t in zeros.items() if n not in factors})
    stats = {"loss": 0.1234567890123456}
    more = {"site": "site-0", "positions": 10_000, "stats": stats, "seconds": "00000000.000", "tasks": {}}
    down = pack("global", 0, adapter, adapter.tensors(), recipe.federation.codec_down)
    up = pack("update", 0, adapter, adapter.tensors(), recipe.federation.codec_up, **more)
    return len(down), len(up)


@dataclass(frozen=True)
class Leg:
    """One method's loop. method: as in Row. sites: who takes part; rows: their training records by site name."""

    name: str
    method: str
    recipe: Recipe
    rows: Mapping[str, Sequence[Record]]

    @property
    def rounds(self) -> int:
        return self.recipe.federation.rounds if self.rows else 0


def legs_of(prepared: Prepared) -> list[Leg]:
    """The legs in the order they run: base, federated, local ones, centralised.

    A baseline has the budget of what it is compared with: a local site takes the steps it takes in the federation, the
    centralised run as many as all sites together, both in one go, with the same batch, learning rate and schedule.
    """
    recipe = prepared.recipe
    train, rounds = recipe.train, recipe.federation.rounds
    rows = {name: held["train"] for name, held in prepared.sites.rows.items()}
    single = dataclasses.replace(
        recipe.federation, rounds=1, sites_per_round=0, quorum=1.0, rule="mean", codec_up="fp32", codec_down="fp32"
    )

    def alone(name: str, method: str, held: Sequence[Record], site: str, steps: int) -> Leg:
        own = dataclasses.replace(train, local_steps=steps, local_epochs=0)
        return Leg(name, method, dataclasses.replace(recipe, federation=single, train=own), {site: held})

    legs = []
    if "base" in recipe.evaluation.baselines:
        legs.append(Leg("base", "base", recipe, {}))
    legs.append(Leg("federated", "federated", recipe, rows))
    steps = {name: rounds * steps_a_round(train, len(held)) for name, held in rows.items()}
    if "local" in recipe.evaluation.baselines:
        legs += [alone(f"local/{name}", "local", held, name, steps[name]) for name, held in rows.items()]
    if "centralised" in recipe.evaluation.baselines:
        asked = recipe.federation.sites_per_round or len(rows)
        total = round(sum(steps.values()) * min(asked, len(rows)) / len(rows))
        legs.append(alone("centralised", "centralised", prepared.sites.all("train"), "all", total))
    return legs


def environment() -> dict[str, Any]:
    """Versions, machine and, in a checkout of FedKeel, its commit."""
    packages = ("fedkeel", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "commit": commit,
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


class RunFolder:
    """`runs/<name>`: the resolved recipe, rows, checkpoints and the state to resume from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows_file = path / "rows.jsonl"

    @property
    def _state_file(self) -> Path:
        return self.path / "state.json"

    def state(self) -> dict[str, Any]:
        """{done: names of finished legs, leg, round: the last checkpoint, rows_bytes, finished}."""
        if not self._state_file.exists():
            return {"done": [], "leg": "", "round": 0, "rows_bytes": 0, "finished": False}
        state: dict[str, Any] = json.loads(self._state_file.read_text())
        return state

    def open(self, recipe: Recipe, resume: bool, fresh: bool) -> dict[str, Any]:
        """Make the folder for a new run, or go back to the last whole state of an old one. Raises RunError."""
        written = to_toml(recipe)
        if self._state_file.exists() and not fresh:
            if not resume:
                raise RunError(
                    f"{self.path} holds a run already; continue it with --resume, replace it with --fresh, or set name=OTHER"
                )
            before = (self.path / "recipe.toml").read_text()
            if before != written:
                pairs = zip(before.splitlines(), written.splitlines(), strict=False)
                changed = next((f"{a!r} became {b!r}" for a, b in pairs if a != b), "a key was added or removed")
                raise RunError(f"{self.path} cannot be resumed with another recipe: {changed}")
            state = self.state()
            if self.rows_file.exists():  # rows written after the last checkpoint belong to work that is done again
                os.truncate(self.rows_file, state["rows_bytes"])
            return state
        if resume:
            raise RunError(f"{self.path} holds no run to resume")
        if self.path.exists():
            ours = {"recipe.toml", "state.json"} & {p.name for p in self.path.iterdir()}
            if any(self.path.iterdir()) and not ours:
                raise RunError(f"{self.path} exists and is not a run of FedKeel; set out= or name= to another folder")
            shutil.rmtree(self.path)
        write_atomic(self.path / "recipe.toml", written)
        write_atomic(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")
        state = self.state()
        write_atomic(self._state_file, json.dumps(state))
        return state

    def save(self, state: dict[str, Any], rows: Sequence[Row]) -> None:
        """Append rows and move the state on: the one point after which a resumed run continues."""
        state["rows_bytes"] = append_lines(self.rows_file, [json.dumps(r.as_json(), allow_nan=False) for r in rows])
        write_atomic(self._state_file, json.dumps(state))

    def checkpoint(self, leg: str, round: int) -> Path:
        """Where the adapter after `round` rounds of a leg lies."""
        return self.path / "checkpoints" / leg / f"round-{round:04d}.fkl"


def _score_rows(leg: Leg, round: int, split: str, scored: Sequence[Scored], sites: Sites, run: str) -> list[Row]:
    """Rows of one scoring: per task, over all tasks, and per site on that site's own rows."""
    site = next(iter(leg.rows)) if leg.method == "local" else ""

    def row(name: str, value: float, unit: str = "share", task: str = "", at: str = site) -> Row:
        return Row(run, leg.method, leg.recipe.seed, round, name, value, unit, site=at, task=task, split=split)

    table = task_table(scored)
    rows = []
    for task, metrics in table.items():
        rows += [row(n, v, "rows" if n == "rows" else "share", task) for n, v in metrics.items()]
    for name in ("score", "accuracy", "rouge_l", "exact_match"):
        per_task = {task: metrics[name] for task, metrics in table.items() if name in metrics}
        if per_task:
            rows.append(row(name, macro(per_task)))
    by_id = {s.record.id: s for s in scored}
    for name, held in sites.rows.items():
        own = [by_id[r.id] for r in held[split] if r.id in by_id]
        if own and (leg.method != "local" or name == site):
            rows.append(row("own_score", macro({t: m["score"] for t, m in task_table(own).items()}), at=name))
    return rows


def round_rows(leg: Leg, result: RoundResult, run: str) -> list[Row]:
    def row(name: str, value: float, unit: str, site: str = "") -> Row:
        return Row(run, leg.method, leg.recipe.seed, result.state.round, name, value, unit, site=site)

    rows = [
        row("aggregation_error", result.error, "share"),
        row("seconds", result.seconds, "seconds"),
        row("aggregation_seconds", result.aggregation_seconds, "seconds"),
    ]
    for update in result.updates:
        rows.append(row("loss", update.stats["loss"], "nats", update.site))
        rows.append(row("positions", update.positions, "positions", update.site))
        rows.append(row("update_norm", update.stats["update_norm"], "norm", update.site))
        rows.append(row("site_seconds", update.stats["seconds"], "seconds", update.site))
    for name, sizes in (("bytes_down", result.bytes_down), ("bytes_up", result.bytes_up)):
        rows += [row(name, size, "bytes", site) for site, size in sorted(sizes.items())]
    rows += [row("failed", 1, "rounds", site) for site in sorted(result.failures)]
    return rows


def load_checkpoint(path: Path, like: Adapter) -> Adapter:
    try:
        _, tensors = unpack(path.read_bytes(), "checkpoint", None, like)
    except (OSError, ValueError) as error:
        raise RunError(f"checkpoint {path} cannot be used: {error}; start over with --fresh") from error
    return like.with_tensors(tensors)


def _work(leg: Leg, curve: int, test: int) -> tuple[float, float]:
    """(work of one round without its scoring, work of the leg)."""
    batch = leg.recipe.train.batch_size
    one = TRAIN_COST * batch * sum(steps_a_round(leg.recipe.train, len(held)) for held in leg.rows.values())
    points = leg.rounds // leg.recipe.evaluation.every if leg.method == "federated" else 0
    return one, leg.rounds * one + points * curve + test


def execute(prepared: Prepared, folder: RunFolder, watch: Watch, resume: bool = False, fresh: bool = False) -> Model:
    """Run every leg, from the folder's last state on. Returns the model with the federated adapter in it.

    Leaves recipe.toml, env.json, rows.jsonl, checkpoints/, and adapter/ in PEFT format in the folder.
    """
    recipe = prepared.recipe
    torch.set_num_threads(recipe.threads)
    state = folder.open(recipe, resume, fresh)
    model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes)
    initial = model.read()
    formatter = Formatter(
        model.tokenizer, model.kind, recipe.data.max_length, recipe.data.list_labels, classes=prepared.classes
    )
    examples = {name: formatter.encode_all(held["train"]) for name, held in prepared.sites.rows.items()}
    for name, encoded in examples.items():
        if not encoded:
            raise ConfigError(f"site {name}: none of its rows fits into data.max_length = {recipe.data.max_length} tokens")
    for what, text in (("truncated", "had their text shortened"), ("dropped", "were left out, their answer being too long")):
        if formatter.counts[what]:
            watch.note(f"{formatter.counts[what]} training rows {text} (data.max_length = {recipe.data.max_length} tokens)")
    for note in prepared.notes:
        watch.note(note)
    every = recipe.evaluation
    curve_rows = choose(prepared.sites.all("validation"), "validation", every.validation_rows)
    test_rows = choose(prepared.sites.all("test"), "test", every.test_rows)
    if not test_rows:
        raise ConfigError("no test row: nothing could be scored; add rows with split `test` or set data.test_share")
    legs = legs_of(prepared)
    watch.begin(sum(_work(leg, len(curve_rows), len(test_rows))[1] for leg in legs))
    for leg in legs:
        one_round, leg_work = _work(leg, len(curve_rows), len(test_rows))
        if leg.name in state["done"]:
            watch.advance(leg_work)
            continue
        held = examples
        if leg.method == "local":
            held = {name: examples[name] for name in leg.rows}
        elif leg.method == "centralised":
            together = [e for encoded in examples.values() for e in encoded]
            held = {"all": sorted(together, key=lambda e: e.record)}
        current = Global(0, initial)
        if state["leg"] == leg.name and state["round"]:
            current = Global(state["round"], load_checkpoint(folder.checkpoint(leg.name, state["round"]), initial))
            scored_before = current.round // every.every * len(curve_rows) if leg.method == "federated" else 0
            watch.advance(current.round * one_round + scored_before)
        current = _rounds(leg, current, model, held, formatter, curve_rows, prepared, folder, state, watch, one_round)
        watch.leg(leg.name, "scoring held-out rows")
        model.write(current.adapter)
        begin = time.perf_counter()
        scored = score(model, formatter, test_rows, every, watch.advance)
        seconds = time.perf_counter() - begin
        rows = _score_rows(leg, current.round, "test", scored, prepared.sites, recipe.name)
        site = next(iter(leg.rows)) if leg.method == "local" else ""
        rows.append(Row(recipe.name, leg.method, recipe.seed, current.round, "test_seconds", seconds, "seconds", site=site))
        if leg.method == "federated":
            _save_adapter(model, folder.path / "adapter")
        state.update(done=[*state["done"], leg.name], leg="", round=0)
        folder.save(state, rows)
    model.write(load_checkpoint(folder.checkpoint("federated", recipe.federation.rounds), initial))
    state["finished"] = True
    folder.save(state, [])
    return model


def _save_adapter(model: Model, target: Path) -> None:
    """The PEFT folder, whole or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save(partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _rounds(
    leg: Leg, current: Global, model: Model, examples: Mapping[str, Sequence[Example]], formatter: Formatter,
    curve_rows: Sequence[Record], prepared: Prepared, folder: RunFolder, state: dict[str, Any], watch: Watch,
    one_round: float,
) -> Global:  # fmt: skip
    """The rounds of one leg from `current` on; each ends in a checkpoint."""
    recipe = leg.recipe
    rows_total = sum(map(len, examples.values()))

    def site_done(reply: Reply) -> None:
        share = len(examples[reply.site]) / rows_total if recipe.train.local_epochs else 1 / len(examples)
        watch.advance(one_round * share)

    transport = LocalTransport(model, examples, recipe, leg.rounds, site_done)
    while current.round < leg.rounds:
        watch.leg(leg.name, f"round {current.round + 1} of {leg.rounds}")
        result = run_round(current, transport, list(examples), recipe.federation, recipe.seed)
        current = result.state
        rows = round_rows(leg, result, recipe.name)
        for site, text in sorted(result.failures.items()):
            watch.note(f"round {current.round}: site {site} failed and was left out (the quorum holds): {text.strip()}")
        if leg.method == "federated" and curve_rows and current.round % recipe.evaluation.every == 0:
            watch.leg(leg.name, f"round {current.round}: scoring validation rows")
            model.write(current.adapter)
            scored = score(model, formatter, curve_rows, recipe.evaluation, watch.advance)
            rows += _score_rows(leg, current.round, "validation", scored, prepared.sites, recipe.name)
        watch.round(leg.name, current.round, leg.rounds, result)
        # Checkpoints are exact: float32, whatever the exchange rounds to.
        sealed = pack("checkpoint", current.round, current.adapter, current.adapter.tensors(), "fp32")
        write_atomic(folder.checkpoint(leg.name, current.round), sealed)
        state.update(leg=leg.name, round=current.round)
        folder.save(state, rows)
    return current


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
