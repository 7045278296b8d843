"""A suite's folder, read: its plan in a few words, and what each of its runs left there."""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedkeel.evidence.report.chance import Chance, Majority, chances
from fedkeel.evidence.report.interval import Scores
from fedkeel.evidence.report.run_numbers import by_task, final_score, last_stage
from fedkeel.evidence.report.tables import METHODS, mean_and_sd, read_lines, read_rows
from fedkeel.types import FedKeelError, Row

BASELINES = "baselines"  # the planned method whose runs are there for their other legs
LEGS = ("base", "local", "centralised")


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
    """See `suites.describe`, which wrote it. majority: stream -> task -> (majority share, test rows), where it is known."""

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
    """The suite in `folder`. Raises FedKeelError if suite.json is missing or malformed, or a finished run's files are."""
    told = _tree(folder / "suite.json")
    chance = folder / "chance.json"
    held = _tree(chance) if chance.exists() else {}
    try:
        return Suite(
            name=told["name"], title=told["title"], note=told["note"], reference=told["reference"],
            streams=dict(told["streams"]), methods=dict(told["methods"]), trials=dict(told["trials"]),
            factors=tuple(told["factors"]), square=tuple(told["square"]), knobs=dict(told["knobs"]),
            runs=tuple(_run(folder, r["name"], r["stream"], r["method"], r["seed"]) for r in told["runs"]),
            majority={s: {t: (float(v["majority"]), int(v["rows"])) for t, v in tasks.items()} for s, tasks in held.items()},
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        at = "suite.json or chance.json" if held else "suite.json"
        raise FedKeelError(f"{folder}: {at} is not what `fedkeel bench` writes: {error!r}") from error


def _run(folder: Path, name: str, stream: str, method: str, seed: int) -> SuiteRun:
    at, failure = folder / name, folder / f"{name}.failed"
    state = at / "state.json"
    has_rows = (at / "rows.jsonl").exists() or (at / "rows.jsonl.gz").exists()
    if not (bool(_tree(state).get("finished")) if state.exists() else has_rows):
        if failure.exists():
            lines = failure.read_text(encoding="utf-8", errors="replace").split("\n")
            return SuiteRun(name, stream, method, seed, "failed", next((s.strip() for s in reversed(lines) if s.strip()), ""))
        return SuiteRun(name, stream, method, seed, "unfinished" if has_rows else "not begun")
    try:
        recipe = tomllib.loads((at / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FedKeelError(f"{at / 'recipe.toml'} cannot be read: {error}") from error
    return SuiteRun(
        name, stream, method, seed, "finished", "", tuple(read_rows(at / "rows.jsonl")),
        tuple(read_rows(at / "measures.jsonl")) if _there(at / "measures.jsonl") else (),
        read_scores(at / "scores.jsonl") if _there(at / "scores.jsonl") else {}, recipe, _tree(at / "env.json"),
    )  # fmt: skip


def _there(path: Path) -> bool:
    return path.exists() or path.with_name(path.name + ".gz").exists()


def read_scores(path: Path) -> dict[str, Scores]:
    """leg -> task -> id -> score of a scores.jsonl, see SuiteRun. Raises FedKeelError, naming file and line."""
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for number, line in enumerate(read_lines(path), 1):
        try:
            one = json.loads(line)
            found[one["method"]][one["task"]][one["id"]].append(float(one["score"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FedKeelError(f"{path}:{number}: not a score of a run: {error!r}") from error
    return {
        leg: {task: {row: sum(v) / len(v) for row, v in rows.items()} for task, rows in tasks.items()}
        for leg, tasks in found.items()
    }


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
        if by_seed or planned:
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
