"""What tuning tried, and what it chose."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkeel.evidence.report import read_rows
from fedkeel.recipe.load import load_recipe
from fedkeel.scores.metrics import mean
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    pass

from fedkeel.evidence.suites.plan import Planned
from fedkeel.evidence.suites.runs import finished


def final_score(folder: Path, split: str, leg: str = "federated") -> float:
    """A finished run's score at its end on the rows of `split`, in [0, 1]: in a stream the mean over its stages, else over
    tasks. Raises FedKeelError where the run holds none."""
    rows = [r for r in read_rows(folder / "rows.jsonl") if (r.method, r.split, r.task, r.site) == (leg, split, "", "")]
    last = max((r.round for r in rows), default=0)
    by_stage = [r.value for r in rows if r.round == last and r.name.startswith("score_of_stage_")]
    whole = [r.value for r in rows if r.round == last and r.name == "score"]
    if not (by_stage or whole):
        raise FedKeelError(f"{folder}: no score on {split} rows; set evaluation.{split}_rows and a round that is scored")
    return mean(by_stage or whole)


def trial_scores(runs: Sequence[Planned], out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """stream -> method -> setting (overrides, joined by commas) -> mean validation score over seeds, of the runs that ended."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in runs:
        if finished(out / run.name):
            method, _, setting = run.method.partition("@")
            found[run.stream, method, setting].append(final_score(out / run.name, "validation", run.leg))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for (stream, method, setting), values in found.items():
        scores.setdefault(stream, {}).setdefault(method, {})[setting] = mean(values)
    return scores


def tuned_text(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What tuning chose, as the `[streams.NAME.tuned]` tables of a plan: of each method the setting with the best score, the
    first of equal ones."""
    lines = []
    for stream, methods in scores.items():
        lines.append(f"[streams.{json.dumps(stream)}.tuned]")
        for method, settings in methods.items():
            best = max(settings, key=settings.__getitem__)
            lines.append(f"{json.dumps(method)} = {json.dumps(best.split(','))} # {100 * settings[best]:.1f}")
    return "\n".join(lines) + "\n"


def chance(runs: Sequence[Planned]) -> dict[str, dict[str, dict[str, float]]]:
    """stream -> task -> {"majority": the share of the commonest answer among its test rows, "rows": how many}.

    What a report needs to tell a score from chance; tasks without candidate labels are left out. Reads the data of one run of
    each stream, no weights.
    """
    from fedkeel.run.prepare import prepare
    from fedkeel.scores.evaluate import choose

    found: dict[str, dict[str, dict[str, float]]] = {}
    for stream, run in {run.stream: run for run in reversed(runs)}.items():
        recipe = load_recipe(None, run.overrides)
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for record in choose(prepare(recipe).sites.all("test"), "test", recipe.evaluation.test_rows):
            if record.labels:
                answers[record.task][record.output] += 1
        found[stream] = {
            task: {"majority": max(counts.values()) / counts.total(), "rows": counts.total()}
            for task, counts in answers.items()
        }
    return found
