"""Small suites on disk, with numbers that can be worked out by hand."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkeel.types import Row

ENVIRONMENT = {"commit": "0123456789ab", "versions": {"fedkeel": "0.1.0", "torch": "2.9.0"}, "machine": "x86_64"}


def one_row(run: str, seed: int, name: str, value: float, unit: str = "share", method: str = "federated", **at: Any) -> Row:
    return Row(run, method, seed, at.pop("round", 0), name, value, unit, **at)


def scored(
    run: str, seed: int, tasks: Mapping[str, float], own: Mapping[str, float], method: str = "federated", stage: int = 0,
    stages: Sequence[float] = (), site: str = "", round: int = 0, split: str = "test",
) -> list[Row]:  # fmt: skip
    """One scoring as a run writes it: every task on 10 rows, their mean, own scores, and score_of_stage_i."""
    at: dict[str, Any] = {"method": method, "stage": stage, "round": round, "split": split}
    rows = []
    for task, score in tasks.items():
        rows.append(one_row(run, seed, "score", score, task=task, site=site, **at))
        rows.append(one_row(run, seed, "rows", 10, "rows", task=task, site=site, **at))
    rows.append(one_row(run, seed, "score", sum(tasks.values()) / len(tasks), site=site, **at))
    rows += [one_row(run, seed, f"score_of_stage_{i}", v, site=site, **at) for i, v in enumerate(stages, 1)]
    return rows + [one_row(run, seed, "own_score", v, site=name, **at) for name, v in own.items()]


def write_run(folder: Path, rows: Sequence[Row], packed: bool = False, **files: Any) -> None:
    """rows.jsonl, recipe.toml, env.json and state.json; files: scores, measures (lines) and recipe (text)."""
    folder.mkdir(parents=True)

    def lines(name: str, held: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(one) + "\n" for one in held)
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
        else:
            (folder / name).write_text(text)

    lines("rows.jsonl", [r.as_json() for r in rows])
    if "scores" in files:
        lines("scores.jsonl", files["scores"])
    if "measures" in files:
        lines("measures.jsonl", [r.as_json() for r in files["measures"]])
    (folder / "recipe.toml").write_text(files.get("recipe", "[train]\nlocal_steps = 5\nlocal_epochs = 0\n"))
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT))
    if not packed:
        (folder / "state.json").write_text(json.dumps({"finished": True}))


def write_plan(folder: Path, runs: Sequence[tuple[str, str, str, int]], **told: Any) -> None:
    """suite.json. runs: (name, stream, method, seed)."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = {stream: f"what {stream} is" for _, stream, _, _ in runs}
    methods = {method: f"what {method} is" for _, _, method, _ in runs}
    plan = {
        "name": "demo", "title": "A demonstration", "note": "Made by hand.", "reference": "plain", "streams": streams,
        "methods": methods, "trials": {}, "factors": [], "square": [], "knobs": {},
        "runs": [{"name": n, "stream": s, "method": m, "seed": k} for n, s, m, k in runs],
    }  # fmt: skip
    (folder / "suite.json").write_text(json.dumps(plan | told))
