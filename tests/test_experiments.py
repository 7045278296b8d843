"""The scripts that run plans and read their tables, on made-up folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import stream_table
import sweep

PLAN = {"recipe": "r.toml", "common": ["a=1"], "seeds": [1, 2], "methods": {"plain": [], "other": ["b=2"]}}


def write_run(folder: Path, scores: dict[tuple[int, int], float], finished: bool = True) -> None:
    """A run folder with a stage × stage matrix on test rows, and something else in between."""
    folder.mkdir(parents=True)
    rows = []
    for (stage, of), value in scores.items():
        kept = {"method": "federated", "split": "test", "stage": stage, "name": f"score_of_stage_{of + 1}", "value": value}
        rows += [kept, {**kept, "method": "base", "value": 0.0}, {**kept, "split": "validation", "value": 0.0}]
    rows.append({"method": "federated", "split": "", "stage": 0, "name": "bytes_up", "value": 2e6})
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "state.json").write_text(json.dumps({"finished": finished}))


def test_runs_of_a_plan() -> None:
    found = sweep.runs_of(PLAN, "plan", Path("out"))
    assert [folder.name for folder, _ in found] == ["plan-plain-s1", "plan-other-s1", "plan-plain-s2", "plan-other-s2"]
    folder, command = found[3]
    assert folder == Path("out/plan/plan-other-s2")
    assert command[1:] == ["run", "r.toml", "a=1", "b=2", "name=plan-other-s2", "seed=2", "out=out/plan"]
    assert [f.name for f, _ in sweep.runs_of(PLAN, "plan", Path("out"), ["other"])] == ["plan-other-s1", "plan-other-s2"]


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    write_run(tmp_path / "plan-plain-s1", {(0, 0): 1.0})
    assert sweep.work(tmp_path / "plan-plain-s1", ["false"]) == ("plan-plain-s1", 0.0, 0)
    assert sweep.work(tmp_path / "plan-other-s1", ["false"])[2] == 1


def test_table_of_a_plan_by_hand(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    write_run(plan / "plan-plain-s1", {(0, 0): 0.9, (1, 0): 0.5, (1, 1): 0.7})
    write_run(plan / "plan-plain-s2", {(0, 0): 0.7, (1, 0): 0.5, (1, 1): 0.9})
    write_run(plan / "plan-other-s1", {(0, 0): 0.8, (1, 0): 0.9, (1, 1): 0.7})
    write_run(plan / "plan-other-s2", {(0, 0): 0.8}, finished=False)
    table = stream_table.table_of(plan, "test")
    assert table.lines == (
        ("other", "1", "80.0", "75.0", "+10.0", "−10.0", "2.0", "0"),
        ("plain", "2", "65.0 ± 7.1", "80.0 ± 0.0", "−30.0 ± 14.1", "+30.0 ± 14.1", "2.0", "0"),
    )
    assert stream_table.measures(plan / "plan-plain-s1", "test")["final"] == pytest.approx(0.6)


def test_flat_table_of_a_plan_by_hand(tmp_path: Path) -> None:
    """Differences are taken seed by seed: −10 and +2 points are −4 ± 8.5, though the scores lie 20 apart."""
    plan = tmp_path / "plan"
    for name, scores, up in (("whole", (0.5, 0.7), 4e6), ("small", (0.4, 0.72), 5e5)):
        for seed, score in enumerate(scores, 1):
            run = plan / f"plan-{name}-s{seed}"
            run.mkdir(parents=True)
            kept = {"method": "federated", "split": "test", "round": 3, "name": "score", "task": "", "site": "", "value": score}
            rows = [
                {**kept, "round": 2, "value": 0.0}, kept, {**kept, "split": "validation", "value": 0.0},
                {**kept, "task": "t", "value": 0.0},
                {**kept, "method": "base", "round": 9, "value": 0.0}, {**kept, "name": "bytes_up", "split": "", "value": up},
                {**kept, "name": "bytes_down", "split": "", "value": 3e6},
            ]  # fmt: skip
            (run / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = stream_table.flat_table_of(plan, "test", "whole")
    assert table.lines == (
        ("whole", "2", "60.0 ± 14.1", "–", "4.0", "1.0", "3.0", "0"),
        ("small", "2", "56.0 ± 22.6", "−4.0 ± 8.5", "0.5", "8.0", "3.0", "0"),
    )
