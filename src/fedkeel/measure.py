"""What a finished run is measured by beside its scores (METHOD §6): damage, general text, hidden states, unseen tasks.

Each part is measured once: `measures.json` in the run's folder keeps its rows beside the settings that they were measured
with and the hash of the adapter, so that a later or interrupted measuring does only what is lacking. `measures.jsonl` holds
all rows, for reports.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkeel.aggregate import AGGREGATORS
from fedkeel.client import Kept, layout_of, modules_left_out
from fedkeel.config import Data, Distill, LoraConfig, Recipe, Structure, Train, load_recipe
from fedkeel.config import Federation as FederationConfig
from fedkeel.damage import FAMILIES, STRENGTHS, check, family_index, outcomes
from fedkeel.data import Formatter, collate
from fedkeel.evaluate import Scored, choose, overall, score, task_table
from fedkeel.files import write_atomic
from fedkeel.folder import RunFolder
from fedkeel.local import LocalTransport
from fedkeel.metrics import kl_divergence, linear_cka, mean, perplexity_ratio
from fedkeel.model import Model
from fedkeel.report import Table
from fedkeel.report.run_numbers import damage_names, held_out, under_damage
from fedkeel.rng import derive
from fedkeel.run import Prepared, prepare, serve, served
from fedkeel.server import run_round
from fedkeel.sources import read_rows, unique_ids
from fedkeel.types import FedKeelError, Record, Reply, Row

# family of damage -> structures that disturb the same thing while training
TRAINED_BY = {
    "heads": ("heads",),
    "channels": ("channels",),
    "skip": ("layers",),
    "modules": ("branch", "lodrop"),
    "scale": ("rank",),
    "noise": ("weights",),
    "bits": (),
}
STATE_ROWS = 128  # most test rows a task whose hidden states are compared
LOGITS = 2**25  # most logits of general text at once, unless one paragraph has more
DIVERGED = 2**22  # most of them that are compared at once, in float64

# (part, steps done, steps in all), whenever a step of measuring is done
Watch = Callable[[str, int, int], None]


class MeasureError(FedKeelError):
    """A run that cannot be measured, or settings that say nothing."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and on how much.

    families: of damage. draws: of each random damage. rows: test rows a task, chosen by hash; 0: all. general: text files, a
    paragraph a line; general_rows: paragraphs a file, chosen by hash; 0: all. unseen: rows of further tasks, JSON Lines;
    unseen_tasks: their tasks file. states: whether hidden states are compared.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    draws: int = 20
    rows: int = 300
    general: tuple[Path, ...] = ()
    general_rows: int = 100
    unseen: Path | None = None
    unseen_tasks: Path | None = None
    states: bool = True

    def __post_init__(self) -> None:
        if unknown := [f for f in self.families if f not in FAMILIES]:
            raise MeasureError(f"no family of damage {unknown[0]!r}; there are {', '.join(FAMILIES)}")
        if self.draws < 1 or self.rows < 0 or self.general_rows < 0:
            raise MeasureError(f"draws are from 1 and rows from 0, not {self.draws}, {self.rows} and {self.general_rows}")
        if self.unseen_tasks and not self.unseen:
            raise MeasureError(f"{self.unseen_tasks} describes the tasks of a file of unseen tasks, and none is named")
        for path in (*self.general, self.unseen, self.unseen_tasks):
            if path and not path.is_file():
                raise MeasureError(f"{path} is no file")

    def parts(self) -> dict[str, dict[str, Any]]:
        """Every part that is asked for, with all that decides its outcome beside the run."""
        damage = {"draws": self.draws, "rows": self.rows}
        parts: dict[str, dict[str, Any]] = {"size": {}}
        if self.families:
            parts["damage"] = damage
            parts |= {f"damage/{f}": {**damage, "strengths": list(STRENGTHS[f])} for f in self.families}
        if self.general:
            parts["general"] = {"files": {p.name: _digest([p]) for p in self.general}, "rows": self.general_rows}
        if self.unseen:
            about = _digest([self.unseen_tasks]) if self.unseen_tasks else ""
            parts["unseen"] = {"file": _digest([self.unseen]), "tasks": about, "rows": self.rows}
        if self.states:
            parts["states"] = {"rows": _state_rows(self.rows)}
        return parts


@dataclass(frozen=True)
class Measured:
    """The rows of a run's measures.jsonl, and what could not be measured, in words."""

    rows: Sequence[Row]
    notes: Sequence[str] = ()


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


def _state_rows(rows: int) -> int:
    return min(rows or STATE_ROWS, STATE_ROWS)


def finished(folder: Path) -> tuple[Recipe, str]:
    """The recipe of a run whose federation has ended, and the hash of its adapter: of all of them where factors stay at the
    sites. Raises MeasureError if it has not ended."""
    recipe, adapters = folder / "recipe.toml", sorted((folder / "adapter").rglob("adapter_model.safetensors"))
    for what, path in ((recipe.is_file(), recipe), (adapters, folder / "adapter" / "adapter_model.safetensors")):
        if not what:
            raise MeasureError(f"{path} is missing: {folder} is not a run whose federation has ended")
    return load_recipe(recipe), _digest(adapters)


def _data_of(recipe: Recipe) -> Recipe:
    """The recipe without all that `prepare` does not look at: runs for which it is equal can share their data."""
    return replace(
        recipe,
        name="",
        out="",
        threads=0,
        lora=LoraConfig(),
        train=Train(),
        distill=Distill(),
        structure=Structure(),
        federation=FederationConfig(),
        stream=replace(recipe.stream, average=0.0),
        evaluation=replace(recipe.evaluation, baselines=()),
    )


@dataclass
class _Loaded:
    """Data and base of the run before, for the next one to use where they are the same."""

    prepared: Prepared | None = None
    model: Model | None = None
    made_for: tuple[Any, ...] = ()

    def data(self, recipe: Recipe) -> Prepared:
        if self.prepared is None or _data_of(self.prepared.recipe) != _data_of(recipe):
            self.prepared = prepare(recipe)
        self.prepared = replace(self.prepared, recipe=recipe)
        return self.prepared

    def base(self, prepared: Prepared) -> Model:
        recipe = prepared.recipe
        wanted = (recipe.model, recipe.lora, recipe.seed, prepared.classes)
        if self.model is None or self.made_for != wanted:
            self.model = None  # before the next is loaded: two may not fit
            self.model, self.made_for = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes), wanted
        return self.model


@dataclass(frozen=True)
class _Run:
    """A finished run with its model loaded. `served` puts into it what the federation serves."""

    folder: Path
    prepared: Prepared
    model: Model
    settings: Settings
    watch: Watch

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @cached_property
    def formatter(self) -> Formatter:
        return self.formatter_of(self.model)

    def formatter_of(self, model: Model) -> Formatter:
        data = self.recipe.data
        return Formatter(model.tokenizer, model.kind, data.max_length, data.list_labels, classes=model.classes)

    def served(self) -> Model:
        serve(self.model, RunFolder(self.folder), self.prepared)
        self.model.train(False)
        return self.model

    @cached_property
    def clean(self) -> list[Scored]:
        """The scores without damage."""
        rows = choose(self.prepared.stages[-1].all("test"), "test", self.settings.rows)
        if not rows:
            raise MeasureError(f"{self.folder}: its data has no test row")
        return score(self.served(), self.formatter, rows, self.recipe.evaluation)

    def row(self, name: str, value: float, unit: str, split: str = "test", **more: Any) -> Row:
        last = len(self.prepared.stages) - 1
        rounds = self.recipe.federation.rounds * (last + 1)
        where = {"method": "federated", "stage": last, **more}
        return Row(
            self.recipe.name, seed=self.recipe.seed, round=rounds, name=name, value=value, unit=unit, split=split, **where
        )


def _size(run: _Run) -> list[Row]:
    count = sum(p.numel() for p in run.model.parameters())
    return [run.row("trainable_parameters", float(count), "parameters", split="")]


def _undamaged(run: _Run) -> list[Row]:
    return [
        run.row("damage/clean", overall(run.clean), "share"),
        run.row("damage/draws", float(run.settings.draws), "draws"),
        run.row("damage/rows", float(len(run.clean)), "rows"),
    ]


def _damage(run: _Run, family: str) -> list[Row]:
    """Scores under one family, and its stability index: there is none where the undamaged model scores 0."""
    draws, strengths = run.settings.draws, STRENGTHS[family]
    clean, model, part = run.clean, run.served(), f"damage/{family}"
    total = len(strengths) * (draws if FAMILIES[family].random else 1)
    found = []
    for outcome in outcomes(model, run.formatter, run.recipe.evaluation, clean, family, strengths, draws, seed=0):
        found.append(outcome)
        run.watch(part, len(found), total)
    rows, scores = [], {}
    for strength in strengths:
        mine = [o for o in found if o.strength == strength]
        told = {"score": mean([o.score for o in mine]), "agreement": mean([o.agreement for o in mine])}
        scores[strength] = told["score"]
        if len(mine) > 1:
            told["sd"] = stdev(o.score for o in mine)
        consistent = [o.consistency for o in mine if o.consistency is not None]
        if consistent:
            told["consistency"] = mean(consistent)
        rows += [run.row(f"{part}/{strength:g}/{name}", value, "share") for name, value in told.items()]
    amounts = asdict(run.recipe.structure)
    rows.append(run.row(f"{part}/trained", float(any(amounts[name] for name in TRAINED_BY[family])), "flag"))
    if undamaged := overall(clean):
        rows.append(run.row(f"{part}/ssi", family_index(family, scores, undamaged), "ratio"))
    return rows


def _over_families(clean: Row, families: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The means over the families that training left alone and over those it used; none where there are none."""
    index: dict[bool, list[float]] = {False: [], True: []}
    falls = []
    for family, rows in families.items():
        found = {r.name.removeprefix(f"damage/{family}/"): r.value for r in rows}
        trained = bool(found["trained"])
        if "ssi" in found:
            index[trained].append(found["ssi"])
        if not trained:
            falls += [clean.value - value for name, value in found.items() if name.endswith("/score")]
    heads = {"held_out_ssi": (index[False], "ratio"), "trained_ssi": (index[True], "ratio"), "held_out_fall": (falls, "share")}
    return [replace(clean, name=f"damage/{name}", value=mean(v), unit=unit) for name, (v, unit) in heads.items() if v]


def _paragraphs(files: Sequence[Path], limit: int) -> list[str]:
    """The paragraphs of each file, one a line, at most `limit` a file (0: all): the first by a hash of their text."""
    chosen = []
    for path in files:
        try:
            lines = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
        except UnicodeDecodeError as error:
            raise MeasureError(f"{path} is no text in UTF-8: {error}") from error
        chosen += sorted(lines, key=lambda line: (derive(0, "general", line), line))[: limit or None]
    return chosen


@torch.no_grad()
def _log_chances(model: Model, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Of every token behind another one: (N, V) log probabilities of what could stand there, float32; (N,) what does."""
    width = max(map(len, texts))
    pad = model.tokenizer.pad_token_id
    inputs = {
        "input_ids": torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in texts], device=model.device),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts], device=model.device),
    }
    rows, columns = inputs["attention_mask"][:, 1:].nonzero(as_tuple=True)
    with model.autocast():
        logits, _ = model.logits_at(inputs, rows, columns)
    return logits.float().log_softmax(-1).cpu(), inputs["input_ids"][rows, columns + 1].cpu()


def against_base(
    model: Model, base: Model, texts: Sequence[Sequence[int]], advance: Callable[[int], None] = lambda texts: None
) -> tuple[float, float]:
    """(KL(base ‖ tuned) in nats, mean over tokens; perplexity ratio) of a causal model on texts of two tokens or more.

    base: the same model, or another one where the frozen maps of `model` have been shifted; its adapter is switched off.
    """
    divergence = 0.0
    tuned_nats: list[float] = []
    base_nats: list[float] = []
    for chunk in _chunks(sorted(texts, key=len), LOGITS // len(model.tokenizer)):
        tuned, gold = _log_chances(model, chunk)
        with base.net.disable_adapter():
            before, _ = _log_chances(base, chunk)
        step = max(1, DIVERGED // tuned.shape[1])
        for at in (slice(start, start + step) for start in range(0, len(gold), step)):
            divergence += kl_divergence(before[at], tuned[at]) * len(gold[at])
        for log_chances, nats in ((tuned, tuned_nats), (before, base_nats)):
            nats += (-log_chances.gather(1, gold[:, None])[:, 0]).tolist()
        advance(len(chunk))
    return divergence / len(base_nats), perplexity_ratio(tuned_nats, base_nats)


def _chunks(texts: Sequence[Sequence[int]], tokens: int) -> Iterable[Sequence[Sequence[int]]]:
    """Texts in order, shortest first, as many together as have `tokens` tokens when padded, and at least one."""
    begin = 0
    for end in range(1, len(texts) + 1):
        if end == len(texts) or (end + 1 - begin) * len(texts[end]) > tokens:
            yield texts[begin:end]
            begin = end


def _general(run: _Run) -> list[Row]:
    model, recipe = run.served(), run.recipe
    # the base has no shifts in it, and the model has
    base = Model(recipe.model, recipe.lora, recipe.seed, run.prepared.classes) if model.shifts else model
    paragraphs = _paragraphs(run.settings.general, run.settings.general_rows)
    texts = [model.tokenizer(p)["input_ids"][: recipe.data.max_length] for p in paragraphs]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise MeasureError(f"{', '.join(map(str, run.settings.general))}: no paragraph of two tokens or more")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        run.watch("general", done, len(texts))

    divergence, ratio = against_base(model, base, texts, advance)
    return [
        run.row("kl_to_base", divergence, "nats", split="general"),
        run.row("perplexity_ratio", ratio, "ratio", split="general"),
    ]


def _unseen_records(settings: Settings, prepared: Prepared) -> list[Record]:
    """Test rows of the file of unseen tasks, at most `rows` a task; a row without a split is a test row.

    Raises MeasureError where no row is of a task that no site trained on.
    """
    assert settings.unseen is not None
    tasks_file = str(settings.unseen_tasks.absolute()) if settings.unseen_tasks else ""
    data = Data(source="jsonl", files=(str(settings.unseen.absolute()),), tasks_file=tasks_file)
    records = [replace(r, split=r.split or "test") for r in read_rows(data)]
    trained = {r.task for r in prepared.sites.all("train")}
    found = choose(unique_ids([r for r in records if r.task not in trained]), "test", settings.rows)
    if not found:
        raise MeasureError(
            f"{settings.unseen}: no test row of a task that no site trained on; its tasks are "
            f"{', '.join(sorted({r.task for r in records})[:10])}"
        )
    return found


def _unseen(run: _Run) -> list[Row]:
    """Scores of the base and of the federated model on tasks that no site trained on."""
    recipe, model = run.recipe, run.model
    records = _unseen_records(run.settings, run.prepared)
    if model.kind == "classifier":  # the answers of other tasks are other classes
        records = [r for r in records if r.labels]
        classes = tuple(sorted({label for r in records for label in r.labels}))
        if not classes:
            raise MeasureError(f"{run.settings.unseen}: no row has labels, and {recipe.model.base!r} is a classifier")
        model = Model(recipe.model, recipe.lora, recipe.seed, classes)
    formatter, done, rows = run.formatter_of(model), 0, []

    def advance(count: int) -> None:
        nonlocal done
        done += count
        run.watch("unseen", done, 2 * len(records))

    model.rewind()
    with model.net.disable_adapter():
        before = score(model, formatter, records, recipe.evaluation, advance)
    serve(model, RunFolder(run.folder), run.prepared)
    after = score(model, formatter, records, recipe.evaluation, advance)
    for method, scored in (("base", before), ("federated", after)):
        for task, metrics in task_table(scored).items():
            rows.append(run.row("score", metrics["score"], "share", split="unseen", task=task, method=method))
            rows.append(run.row("rows", metrics["rows"], "rows", split="unseen", task=task, method=method))
        rows.append(run.row("score", overall(scored), "share", split="unseen", method=method))
    return rows


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


def _cannot(part: str, recipe: Recipe, model: Model) -> str:
    """Why this part says nothing of this run; empty where it does."""
    if part == "size":
        return ""
    if AGGREGATORS[recipe.federation.rule].personal:
        return (
            f"not measured, as rule {recipe.federation.rule!r} leaves factors at the sites and so no one model that could be "
            f"damaged, read or asked"
        )
    if part == "general" and model.kind != "causal":
        return f"not measured, as a {model.kind} predicts no next token of a text"
    if part == "unseen" and model.linear_head:
        return "not measured, as a linear head has no output for classes that it was not trained on"
    if part == "states" and not model.taps:
        return f"not measured, as the blocks of {recipe.model.base!r} are not known"
    return ""


def _measured(part: str, run: _Run) -> list[Row]:
    what = {"size": _size, "damage": _undamaged, "general": _general, "unseen": _unseen, "states": _compared}
    return what[part](run) if part in what else _damage(run, part.removeprefix("damage/"))


def _kept(folder: Path, adapter: str) -> dict[str, dict[str, Any]]:
    """The parts that measures.json holds of this adapter: {part: {settings, rows, note}}."""
    path = folder / "measures.json"
    try:
        held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        parts: dict[str, dict[str, Any]] = held["parts"] if held.get("adapter") == adapter else {}
    except (ValueError, KeyError, AttributeError) as error:
        raise MeasureError(f"{path} cannot be read: {error!r}; delete it to measure anew") from error
    return parts


def _rows(parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """All rows in order, the means over families of damage among them."""
    found = {part: [Row.from_json(row) for row in held["rows"]] for part, held in parts.items()}
    rows = [row for part in found.values() for row in part]
    families = {part.removeprefix("damage/"): rows for part, rows in found.items() if part.startswith("damage/") and rows}
    return rows + (_over_families(found["damage"][0], families) if families else [])


def _write(folder: Path, adapter: str, parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows = _rows(parts)
    write_atomic(folder / "measures.json", json.dumps({"adapter": adapter, "parts": parts}) + "\n")
    lines = [json.dumps(row.as_json(), allow_nan=False) + "\n" for row in rows]
    write_atomic(folder / "measures.jsonl", "".join(lines))
    return rows


def _measure(folder: Path, settings: Settings, loaded: _Loaded, watch: Watch) -> Measured:
    recipe, adapter = finished(folder)
    wanted = settings.parts()
    parts = _kept(folder, adapter)
    if "damage" in wanted and parts.get("damage", {}).get("settings") != wanted["damage"]:
        # other draws or rows: families measured with them do not compare
        parts = {part: held for part, held in parts.items() if not part.startswith("damage")}
    lacking = [part for part, about in wanted.items() if parts.get(part, {}).get("settings") != about]
    if lacking:
        prepared = loaded.data(recipe)
        run = _Run(folder, prepared, loaded.base(prepared), settings, watch)
        possible = [part for part in lacking if not _cannot(part, recipe, run.model)]
        check(run.model, {f: STRENGTHS[f][:1] for f in settings.families if f"damage/{f}" in possible})
        for part in lacking:
            watch(part, 0, 1)
            rows = [row.as_json() for row in _measured(part, run)] if part in possible else []
            parts[part] = {"settings": wanted[part], "rows": rows, "note": _cannot(part, recipe, run.model)}
            _write(folder, adapter, parts)
            watch(part, 1, 1)
    notes = {part: str(held["note"]) for part, held in parts.items() if part in wanted and held["note"]}
    told = [f"{', '.join(p for p in notes if notes[p] == text)} {text}" for text in dict.fromkeys(notes.values())]
    return Measured(tuple(_write(folder, adapter, parts)), tuple(told))


def measure(
    folders: Sequence[Path],
    settings: Settings,
    watch: Callable[[Path, str, int, int], None] = lambda folder, part, done, total: None,
) -> dict[Path, Measured]:
    """Measure finished runs and write measures.jsonl into each. What is measured already, with these settings, is kept.

    Runs that share data and base share them in memory, and are done together. watch: told of each step, see `Watch`.
    Raises MeasureError, before any work, if a folder holds no run whose federation has ended.
    """
    groups: dict[Recipe, list[Path]] = {}
    for folder in folders:
        groups.setdefault(_data_of(finished(folder)[0]), []).append(folder)
    loaded, found = _Loaded(), {}
    for group in groups.values():
        for folder in group:
            found[folder] = _measure(folder, settings, loaded, _told(watch, folder))
    return {folder: found[folder] for folder in folders}


def _told(watch: Callable[[Path, str, int, int], None], folder: Path) -> Watch:
    return lambda part, done, total: watch(folder, part, done, total)


def measures_table(found: Mapping[Path, Measured]) -> Table:
    """A line a run, with what all its rows come to; a column that no run has is left out.

    Held-out damage is that of families which the training of none of the runs had used, and the other that of families which
    all had used: some families cost more than others, and lines are there to be compared.
    """
    families = held_out(measured.rows for measured in found.values())
    named = [damage_names(measured.rows) for measured in found.values()]
    disturbed = [family for family in (named[0] if named else ()) if all(n.get(family, {}).get("trained") for n in named)]

    def cells(rows: Sequence[Row]) -> dict[str, str]:
        own = [r for r in rows if not r.task]

        def mean_of(prefix: str, method: str = "federated", split: str = "", last: bool = True) -> float | None:
            values = [
                r.value
                for r in own
                if r.name.startswith(prefix) and r.method == method and split in ("", r.split) and (last or r.stage < stages)
            ]
            return mean(values) if values else None

        stages = max(r.stage for r in rows)
        ssi, fall = under_damage(own, families)
        shares = {
            "undamaged": mean_of("damage/clean"),
            "held-out damage: mean fall": fall,
            "unseen tasks": mean_of("score", split="unseen"),
            "unseen tasks: base": mean_of("score", "base", split="unseen"),
        }
        ratios = {
            "SSI held out": ssi,
            "SSI trained on": under_damage(own, disturbed)[0],
            "KL to base": mean_of("kl_to_base"),
            "perplexity ratio": mean_of("perplexity_ratio"),
            "CKA: earlier stages": mean_of("state_cka/", last=False),
            "CKA: sites": mean_of("site_cka/"),
        }
        return {
            **{name: f"{100 * value:.1f}" for name, value in shares.items() if value is not None},
            **{name: f"{value:.3f}" for name, value in ratios.items() if value is not None},
        }

    lines = {folder.name: cells(measured.rows) for folder, measured in found.items()}
    order = (
        "undamaged", "held-out damage: mean fall", "SSI held out", "SSI trained on", "KL to base", "perplexity ratio",
        "CKA: earlier stages", "CKA: sites", "unseen tasks", "unseen tasks: base",
    )  # fmt: skip
    header = [name for name in order if any(name in line for line in lines.values())]
    body = tuple((run, *(line.get(name, "–") for name in header)) for run, line in lines.items())
    over = f"over the families that no run here had used in training ({', '.join(families)}), and " if families else ""
    notes = (
        f"Scores and falls in points of 100. SSI: stability index under damage, {over}over those that all had. "
        "CKA: with the final model, mean over tapped blocks.",
        *(f"{folder.name}: {note}." for folder, measured in found.items() for note in measured.notes),
    )
    return Table("Measures", ("run", *header), body, notes)
