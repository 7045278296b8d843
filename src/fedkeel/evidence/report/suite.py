"""A suite's folder, read: its plan in a few words, and what each of its runs left there."""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedkeel.evidence.archive import RunFiles
from fedkeel.evidence.report.chance import Chance, Majority, chances
from fedkeel.evidence.report.interval import Scores
from fedkeel.evidence.report.run_numbers import by_task, final_score, last_stage
from fedkeel.evidence.report.sure import scores_by_model
from fedkeel.evidence.report.tables import METHODS, mean_and_sd, rows_of
from fedkeel.types import FedKeelError, Row

BASELINES = "baselines"  # the planned method whose runs are there for their other legs
LEGS = ("base", "analytic", "local", "centralised")
NEEDED = ("rows.jsonl", "recipe.toml", "env.json")  # of a finished run; scores and measures may be missing


@dataclass(frozen=True)
class SuiteRun:
    """A planned run. state: finished, failed, unfinished, or not begun; only a finished run's numbers are read.

    reason: the last line of why it failed. scores: leg -> task -> id -> score of every final test row, the mean over models
    where each site has its own.
    """

    name: str
    stream: str
    method: str
    seed: int
    state: str
    reason: str = ""
    rows: tuple[Row, ...] = ()
    measures: tuple[Row, ...] = ()
    scores: Mapping[str, Scores] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """See `runs.describe`, which wrote it. majority: stream -> task -> (majority share, test rows), where it is known. twins:
    stream -> the same rows dealt evenly."""

    name: str
    title: str
    note: str
    reference: str
    streams: Mapping[str, str]
    methods: Mapping[str, str]
    trials: Mapping[str, Mapping[str, int]]
    factors: tuple[str, ...]
    square: tuple[str, ...]
    knobs: Mapping[str, Mapping[str, str]]
    runs: tuple[SuiteRun, ...]
    majority: Mapping[str, Majority]
    twins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A line of a stream's table: one leg of the runs of a planned method. name: as shown. runs: the finished ones, by seed."""

    name: str
    leg: str
    method: str
    runs: tuple[SuiteRun, ...]
    planned: int
    failed: tuple[SuiteRun, ...]

    @property
    def baseline(self) -> bool:
        return self.leg != "federated"


def _tree(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedKeelError(f"{path} cannot be read: {error}") from error


def read_suite(folder: Path) -> Suite:
    """The suite in `folder`, its runs in folders of their own or packed (see `archive.RunFiles`).

    Raises FedKeelError if suite.json is missing or malformed, or the archive or a finished run's files are.
    """
    told = _tree(folder / "suite.json")
    chance = folder / "chance.json"
    held = _tree(chance) if chance.exists() else {}
    files = RunFiles(folder)
    try:
        return Suite(
            name=told["name"],
            title=told["title"],
            note=told["note"],
            reference=told["reference"],
            streams=dict(told["streams"]),
            methods=dict(told["methods"]),
            trials=dict(told["trials"]),
            factors=tuple(told["factors"]),
            square=tuple(told["square"]),
            knobs=dict(told["knobs"]),
            runs=tuple(_run(files, SuiteRun(r["name"], r["stream"], r["method"], r["seed"], "")) for r in told["runs"]),
            twins=dict(told.get("twins", {})),  # of an earlier version: none
            majority={s: {t: (float(v["majority"]), int(v["rows"])) for t, v in tasks.items()} for s, tasks in held.items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        at = "suite.json or chance.json" if held else "suite.json"
        raise FedKeelError(f"{folder}: {at} is not what `fedkeel bench` writes: {error!r}") from error


def _run(files: RunFiles, planned: SuiteRun) -> SuiteRun:
    """A planned run with what it left."""
    run, state = planned.name, files.state(planned.name)
    if state != "finished":
        lines = (files.reason(run) or "").split("\n") if state == "failed" else []
        return replace(planned, state=state, reason=next((s.strip() for s in reversed(lines) if s.strip()), ""))

    def text(name: str) -> str:
        return files.text(run, name) if name in NEEDED or files.holds(run, name) else ""

    def parsed(name: str, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        try:
            return parse(text(name))
        except ValueError as error:
            raise FedKeelError(f"{files.where(run, name)} cannot be read: {error}") from error

    return replace(
        planned,
        state=state,
        rows=tuple(rows_of(text("rows.jsonl"), files.where(run, "rows.jsonl"))),
        measures=tuple(rows_of(text("measures.jsonl"), files.where(run, "measures.jsonl"))),
        scores=scores_of(text("scores.jsonl"), files.where(run, "scores.jsonl")),
        recipe=parsed("recipe.toml", tomllib.loads),
        environment=parsed("env.json", json.loads),
    )


def scores_of(text: str, where: str) -> dict[str, Scores]:
    """leg -> task -> id -> score of the text of a scores.jsonl, see SuiteRun.

    where: the file, for messages. Raises FedKeelError, naming file and line.
    """
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (leg, _), scores in scores_by_model(text, where).items():
        for task, of in scores.items():
            for row, score in of.items():
                found[leg][task][row].append(score)
    return {
        leg: {task: {row: sum(v) / len(v) for row, v in rows.items()} for task, rows in tasks.items()}
        for leg, tasks in found.items()
    }


SKIPPED = ("name", "seed", "out", "threads")  # of a recipe: no part of a method


def streams_of(suite: Suite) -> list[str]:
    """The streams that have a run, in the order of the plan."""
    return [s for s in suite.streams if any(r.stream == s for r in suite.runs)]


def lines_of(suite: Suite, stream: str) -> list[Line]:
    """The lines of a stream's table: baselines that were asked for, then the methods, in the order of the plan.

    A baseline is the same under every method's seed, so each seed counts it once: from the runs planned as `baselines`, else
    from the reference's, else from the first that has it.
    """
    runs = [r for r in suite.runs if r.stream == stream]
    order = {BASELINES: 0, suite.reference: 1}
    first = sorted(runs, key=lambda r: order.get(r.method, 2))
    lines = []
    for leg in LEGS:
        by_seed: dict[int, SuiteRun] = {}
        for run in first:
            if final_score(run.rows, leg) is not None:
                by_seed.setdefault(run.seed, run)
        planned = [r for r in first if r.method == BASELINES]
        failed = tuple(r for r in planned if r.state == "failed" and r.seed not in by_seed)
        if by_seed or (planned and leg != "analytic"):  # which few plans ask for
            known = tuple(by_seed[seed] for seed in sorted(by_seed))
            givers = {BASELINES} if planned else {r.method for r in known}
            seeds = {r.seed for r in runs if r.method in givers}
            lines.append(Line(METHODS[leg], leg, BASELINES, known, len(seeds), failed))
    for method in suite.methods:
        own = sorted((r for r in runs if r.method == method), key=lambda r: r.seed)
        if own and method != BASELINES:
            done = tuple(r for r in own if final_score(r.rows, "federated") is not None)
            lines.append(Line(method, "federated", method, done, len(own), tuple(r for r in own if r.state == "failed")))
    return lines


def chances_of(suite: Suite, stream: str, lines: list[Line]) -> dict[str, Chance]:
    """What the rule for tasks at chance says of a stream's tasks; empty without chance.json or a centralised reference."""
    scores: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for run in line.runs if line.leg == "centralised" else ():
            for task, score in by_task(run.rows, "centralised", last_stage(run.rows, "centralised")).items():
                scores[task].append(score)
    return chances(suite.majority.get(stream, {}), {task: mean_and_sd(values)[0] for task, values in scores.items()})
