"""What the trials of tuning scored and what it chose, and the chance level of each task."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedkeel.evidence.archive import RunFiles
from fedkeel.evidence.report.suite import BASELINES
from fedkeel.evidence.report.tables import MISSING, Table, points, rows_of
from fedkeel.evidence.suites.plan import Planned
from fedkeel.evidence.suites.runs import recipe_of
from fedkeel.runs.rounds import SERVED
from fedkeel.scores.metrics import mean
from fedkeel.types import FedKeelError, Row

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]  # stream -> method -> setting -> mean validation score over seeds


def final_score(rows: Sequence[Row], split: str, leg: str = "federated") -> float | None:
    """A finished run's score at its end on the rows of `split`, in [0, 1]: in a stream the mean over its stages, else over
    tasks. None where the run holds none. Where what is served was scored apart from the curve, it is that which counts."""
    rows = [r for r in rows if (r.method, r.split, r.task, r.site) == (leg, split, "", "")]
    rows = [replace(r, name=r.name.removeprefix(SERVED)) for r in rows if r.name.startswith(SERVED)] or rows
    last = max((r.round for r in rows), default=0)
    by_stage = [r.value for r in rows if r.round == last and r.name.startswith("score_of_stage_")]
    whole = [r.value for r in rows if r.round == last and r.name == "score"]
    return mean(by_stage or whole) if by_stage or whole else None


def trial_scores(runs: Sequence[Planned], out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """stream -> method -> setting (overrides, joined by commas) -> mean validation score over seeds, of the runs that ended.

    out: the suite's folder. Raises FedKeelError where a run was not scored on validation rows.
    """
    files = RunFiles(out)
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in runs:
        if files.state(run.name) == "finished":
            method, _, setting = run.method.partition("@")
            where = files.where(run.name, "rows.jsonl")
            score = final_score(rows_of(files.text(run.name, "rows.jsonl"), where), "validation", run.leg)
            if score is None:
                raise FedKeelError(f"{where}: no score on validation rows; set evaluation.validation_rows and a round scored")
            found[run.stream, method, setting].append(score)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for (stream, method, setting), values in found.items():
        scores.setdefault(stream, {}).setdefault(method, {})[setting] = mean(values)
    return scores


def best_of(settings: Mapping[str, float]) -> str:
    """The setting with the best score, the first of equal ones."""
    return max(settings, key=settings.__getitem__)


def tuned_text(scores: Scores) -> str:
    """What tuning chose, as the `[streams.NAME.tuned]` tables of a plan."""
    lines = []
    for stream, methods in scores.items():
        lines.append(f"[streams.{json.dumps(stream)}.tuned]")
        for method, settings in methods.items():
            best = best_of(settings)
            lines.append(f"{json.dumps(method)} = {json.dumps(best.split(','))} # {100 * settings[best]:.1f}")
    return "\n".join(lines) + "\n"


def trial_tables(out: Path) -> list[Table]:
    """What every trial in a suite's folder scored, a table a stream. Raises FedKeelError as `trial_scores` does."""
    told = json.loads((out / "suite.json").read_text(encoding="utf-8"))
    runs = []
    for r in told["runs"]:
        leg = "centralised" if r["method"].partition("@")[0] == BASELINES else "federated"
        runs.append(Planned(r["name"], r["stream"], r["method"], r["seed"], (), leg))
    tables = []
    for stream, methods in trial_scores(runs, out).items():
        settings = list(dict.fromkeys(setting for scores in methods.values() for setting in scores))
        lines = [
            (method, *(points(scores[s]) if s in scores else MISSING for s in settings), best_of(scores))
            for method, scores in methods.items()
        ]
        note = f"Final score on validation rows, in points from 0 to 100; of {BASELINES}, that of the centralised model."
        tables.append(Table(f"{stream}: trials", ("method", *settings, "chosen"), tuple(lines), (note,)))
    return tables


def chance(runs: Sequence[Planned]) -> dict[str, dict[str, dict[str, float]]]:
    """stream -> task -> {"majority": the share of the commonest answer among its test rows, "rows": how many}.

    What a report needs to tell a score from chance; tasks without candidate labels are left out. Reads the data of one run of
    each stream, no weights.
    """
    from fedkeel.evidence.report.chance import majority
    from fedkeel.runs.prepare import prepare
    from fedkeel.scores.evaluate import choose

    found: dict[str, dict[str, dict[str, float]]] = {}
    for stream, run in {run.stream: run for run in reversed(runs)}.items():
        recipe = recipe_of(run)
        rows = choose(prepare(recipe).sites.all("test"), "test", recipe.evaluation.limit("test"))
        found[stream] = {task: {"majority": share, "rows": count} for task, (share, count) in majority(rows).items()}
    return found
