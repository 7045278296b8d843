"""What one leg of one run is worth: numbers from its Rows, as shares. Averages may leave tasks out (see chance.py)."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from fedkeel.scores import metrics
from fedkeel.scores.metrics import mean
from fedkeel.types import Row

Matrix = dict[int, dict[int, float]]  # R[after stage][stage that the rows came with], both from 0


def last_stage(rows: Sequence[Row], leg: str) -> int:
    """The last stage after which this leg was scored on test rows; 0 outside a stream."""
    return max((r.stage for r in rows if r.method == leg and r.split == "test"), default=0)


def by_task(rows: Sequence[Row], leg: str, stage: int, split: str = "test") -> dict[str, float]:
    """task -> score after `stage`, over the sites' models if there are several."""
    found: dict[str, list[float]] = defaultdict(list)
    for r in rows:
        if (r.method, r.name, r.split, r.stage) == (leg, "score", split, stage) and r.task:
            found[r.task].append(r.value)
    return {task: mean(values) for task, values in sorted(found.items())}


def final_score(rows: Sequence[Row], leg: str, left_out: Collection[str] = ()) -> float | None:
    """The score after the last stage, the mean over tasks (without those left out) and over the sites' models if there are
    several; None if it was not scored."""
    stage = last_stage(rows, leg)
    if left_out:
        kept = [score for task, score in by_task(rows, leg, stage).items() if task not in left_out]
        return mean(kept) if kept else None
    key = (leg, "score", "test", stage, "")
    scores = [r.value for r in rows if (r.method, r.name, r.split, r.stage, r.task) == key]
    return mean(scores) if scores else None


def tasks_by_stage(rows: Sequence[Row], leg: str) -> list[list[str]] | None:
    """Of a stream whose stages are made of whole tasks, those that each stage brought; None if a stage brought none, or a
    task got more test rows in a later stage: then a task's score belongs to no one stage."""
    counts: dict[str, dict[int, float]] = defaultdict(dict)
    for r in rows:
        if (r.method, r.name, r.split) == (leg, "rows", "test") and r.task:
            counts[r.task][r.stage] = r.value
    if any(len(set(seen.values())) > 1 for seen in counts.values()):
        return None
    stages: list[list[str]] = [[] for _ in range(last_stage(rows, leg) + 1)]
    for task, seen in sorted(counts.items()):
        stages[min(seen)].append(task)
    return stages if all(stages) else None


def stage_matrix(rows: Sequence[Row], leg: str = "federated", left_out: Collection[str] = ()) -> Matrix:
    """R[s][i]: the score on the rows of stage i after stage s, i ≤ s; empty outside a stream.

    Tasks left out are taken out of their stage's mean where stages are made of whole tasks; a stage with no other task is
    missing as a column, and as a line unless it is the last, which tells what is left of the others. Where they are not, the
    scores stand as the run wrote them.
    """
    found: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if (r.method, r.split) == (leg, "test") and r.name.startswith("score_of_stage_"):
            found[r.stage][int(r.name.rpartition("_")[2]) - 1].append(r.value)
    matrix = {s: {i: mean(v) for i, v in sorted(line.items())} for s, line in sorted(found.items())}
    stages = tasks_by_stage(rows, leg) if left_out else None
    if not matrix or stages is None:
        return matrix
    kept = {i: tasks for i, brought in enumerate(stages) if (tasks := [t for t in brought if t not in left_out])}
    matrix = {}
    for s in sorted({*kept, len(stages) - 1} if kept else ()):
        scores = by_task(rows, leg, s)
        matrix[s] = {i: mean([scores[t] for t in tasks]) for i, tasks in kept.items() if i <= s}
    return matrix


def stream_numbers(matrix: Matrix) -> dict[str, float]:
    """learnt, final, bwt, forgetting and retention of a stream (see metrics.py), those that have a value."""
    order = sorted(matrix)
    triangle = [[matrix[s].get(i, math.nan) for i in order if i <= s] for s in order]
    judged = bool(order) and order[-1] in matrix[order[-1]]
    learnt = triangle if judged else triangle[:-1]  # a last stage that is left out was not learnt ...
    if not judged and triangle:
        triangle[-1] = [*triangle[-1][:-1], 0.0]  # ... and what the others measure reads earlier stages alone
    measures: dict[str, tuple[Callable[[Any], float], list[list[float]]]] = {
        "learnt": (metrics.average_learnt, learnt),
        "bwt": (metrics.backward_transfer, triangle),
        "forgetting": (metrics.forgetting, triangle),
        "retention": (metrics.retention_ratio, triangle),
    }
    found = {}
    for name, (measure, table) in measures.items():
        with contextlib.suppress(ValueError):  # a stage not scored, one stage alone, or nothing above 0 to keep
            found[name] = measure(table)
    last = list(matrix[order[-1]].values()) if order else []
    if last and all(map(math.isfinite, last)):
        found["final"] = metrics.mean(last)  # not `average_final`: a stage that is left out is no part of it
    return found


def own_scores(rows: Sequence[Row], leg: str, split: str = "test") -> dict[str, float]:
    """site -> score on its own test rows, after the last stage; sites whose score is no number are left out."""
    key = (leg, "own_score", split, last_stage(rows, leg))
    return {r.site: r.value for r in rows if (r.method, r.name, r.split, r.stage) == key and math.isfinite(r.value)}


def measured(rows: Sequence[Row], name: str) -> float | None:
    """The value over all tasks and sites of a measure of the federated model; None if it was not measured."""
    found = [r.value for r in rows if (r.method, r.name, r.task, r.site) == ("federated", name, "", "")]
    return found[-1] if found else None


def damage_names(measures: Sequence[Row]) -> dict[str, dict[str, float]]:
    """family -> what was measured of it -> value: `ssi`, `trained`, and `{strength}/score` and its like."""
    return measured_of(measures, "damage")


def measured_of(measures: Sequence[Row], part: str) -> dict[str, dict[str, float]]:
    """The rows PART/WHAT/NAME of a part of `fedkeel measure`: what -> name -> value."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for r in measures:
        parts = r.name.split("/", 2)
        if parts[0] == part and len(parts) == 3:
            found[parts[1]][parts[2]] = r.value
    return dict(found)


def clean_score(measures: Sequence[Row]) -> float | None:
    return next((r.value for r in measures if r.name == "damage/clean"), None)


def held_out(runs: Iterable[Sequence[Row]]) -> list[str]:
    """The families of damage that were measured in all of the runs where any was, and that the training of none had used: only
    over these can runs be compared, as some families cost more than others. runs: the measures of each."""
    found = [named for measures in runs if (named := damage_names(measures))]
    return [
        family for family in (found[0] if found else ()) if all(family in n and not n[family].get("trained") for n in found)
    ]


def under_damage(measures: Sequence[Row], families: Collection[str]) -> tuple[float | None, float | None]:
    """(SSI, the clean score less the damaged one), means over `families`, the second over all their strengths; None without."""
    clean, named = clean_score(measures), damage_names(measures)
    index = [named[family]["ssi"] for family in families if "ssi" in named.get(family, {})]
    scores = [v for family in families for name, v in named.get(family, {}).items() if name.endswith("/score")]
    fall = None if clean is None or not scores else clean - metrics.mean(scores)
    return metrics.mean(index) if index else None, fall


def mean_cka(rows: Sequence[Row], name: str) -> float | None:
    """The mean of NAME/{tap} over taps, stages and sites; None if it was not measured."""
    found = [r.value for r in rows if r.name.startswith(f"{name}/")]
    return mean(found) if found else None


def split_score(rows: Sequence[Row], split: str) -> float | None:
    """The federated model's last score over all tasks on rows of `split`; None if there were none."""
    found = [r.value for r in rows if (r.method, r.name, r.split, r.task, r.site) == ("federated", "score", split, "", "")]
    return found[-1] if found else None


def cpu_seconds(rows: Sequence[Row]) -> list[float]:
    """Processor seconds of every federated round, all sites together."""
    return [r.value for r in rows if (r.method, r.name) == ("federated", "cpu_seconds")]
