"""Small suites on disk, with numbers that can be worked out by hand."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkeel.types import Row

ENVIRONMENT = {"commit": "0123456789ab", "versions": {"fedkeel": "0.1.0", "torch": "2.9.0"}, "machine": "x86_64"}


def one_row(run: str, seed: int, name: str, value: float, unit: str = "share", method: str = "federated", **at: Any) -> Row:
    return Row(run, method, seed, at.pop("round", 0), name, value, unit, **at)


def scored(
    run: str,
    seed: int,
    tasks: Mapping[str, float],
    own: Mapping[str, float],
    method: str = "federated",
    stage: int = 0,
    stages: Sequence[float] = (),
    site: str = "",
    round: int = 0,
    split: str = "test",
) -> list[Row]:
    """One scoring as a run writes it: every task on 10 rows, their mean, own scores, and score_of_stage_i."""
    at: dict[str, Any] = {"method": method, "stage": stage, "round": round, "split": split}
    rows = []
    for task, score in tasks.items():
        rows.append(one_row(run, seed, "score", score, task=task, site=site, **at))
        rows.append(one_row(run, seed, "rows", 10, "rows", task=task, site=site, **at))
    rows.append(one_row(run, seed, "score", sum(tasks.values()) / len(tasks), site=site, **at))
    rows += [one_row(run, seed, f"score_of_stage_{i}", v, site=site, **at) for i, v in enumerate(stages, 1)]
    return rows + [one_row(run, seed, "own_score", v, site=name, **at) for name, v in own.items()]


def write_run(folder: Path, rows: Sequence[Row], **files: Any) -> None:
    """rows.jsonl, recipe.toml, env.json and state.json; files: scores, measures (lines) and recipe (text)."""
    folder.mkdir(parents=True)

    def lines(name: str, held: Sequence[Mapping[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in held))

    lines("rows.jsonl", [r.as_json() for r in rows])
    if "scores" in files:
        lines("scores.jsonl", files["scores"])
    if "measures" in files:
        lines("measures.jsonl", [r.as_json() for r in files["measures"]])
    (folder / "recipe.toml").write_text(
        files.get("recipe", "[train]\nlocal_steps = 5\nlocal_epochs = 0\n[distill]\nweight = 0.0\n")
    )
    (folder / "env.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "state.json").write_text(json.dumps({"finished": True}))


MAIN = Path(__file__).parent.parent / "results" / "suites" / "main-short" / "runs.tar.xz"


def kept_run(name: str, folder: Path) -> Path:
    """A committed run of the suite `main-short`, unpacked into `folder`."""
    folder.mkdir(parents=True)
    with tarfile.open(MAIN, "r:xz") as tar:
        for member in tar:
            run, _, file = member.name.partition("/")
            if run == name:
                (folder / file).write_bytes(tar.extractfile(member).read())
    return folder


def write_plan(folder: Path, runs: Sequence[tuple[str, str, str, int]], **told: Any) -> None:
    """suite.json. runs: (name, stream, method, seed)."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = {stream: f"what {stream} is" for _, stream, _, _ in runs}
    methods = {method: f"what {method} is" for _, _, method, _ in runs}
    plan = {
        "name": "demo",
        "title": "A demonstration",
        "note": "Made by hand.",
        "reference": "plain",
        "streams": streams,
        "methods": methods,
        "trials": {},
        "factors": [],
        "square": [],
        "knobs": {},
        "runs": [{"name": n, "stream": s, "method": m, "seed": k} for n, s, m, k in runs],
    }
    (folder / "suite.json").write_text(json.dumps(plan | told))


def one_leg(run: str, seed: int, shift: float, method: str = "federated") -> list[Row]:
    """Two stages of two rounds at two sites, everything that a run measures; scores are `shift` above the plain ones."""
    rows = []
    up = 1e6 * (1 + shift)
    for n in (1, 2, 3, 4):
        stage = 0 if n <= 2 else 1
        at: dict[str, Any] = {"stage": stage, "round": n, "method": method}
        rows += [one_row(run, seed, "cpu_seconds", 2.0 + shift, "seconds", **at)]
        rows += [one_row(run, seed, f"drift/layer.{b}", 1.0 + b / 10 + n / 5 + shift, "ratio", **at) for b in (2, 10)]
        for k, site in enumerate(("a", "b")):
            rows.append(one_row(run, seed, "loss", 2.0 / n + k / 4, "nats", site=site, **at))
            rows += [one_row(run, seed, name, up, "bytes", site=site, **at) for name in ("bytes_up", "bytes_down")]
            gates = (("mean", 0.5), ("q1", 0.4), ("q2", 0.5), ("q3", 0.6))
            rows += [one_row(run, seed, f"gate_a_{q}", v + n / 50, "weight", site=site, **at) for q, v in gates]
            rows.append(one_row(run, seed, "strength", n / 4, "weight", site=site, **at))
        if n in (2, 4):
            tasks = {"A": 0.5 + shift} if n == 2 else {"A": 0.4 + shift, "B": 0.6 + shift}
            rows += scored(run, seed, tasks, {}, method, stage, round=n, split="validation")
    rows += scored(run, seed, {"A": 0.8}, {}, method, 0, (0.8,), round=2)
    own = {"a": 0.4 + shift, "b": 0.6 + shift}
    last = (0.5 + shift, 0.7 + shift)
    return rows + scored(run, seed, {"A": last[0], "B": last[1]}, own, method, 1, last, round=4)


def damages(run: str, seed: int, clean: float, trained: bool) -> list[Row]:
    """Measures of a run: heads (which `trained` runs had disturbed), noise and bits, CKA, KL and a task that nobody saw."""
    found = [("damage/clean", clean, "share"), ("damage/held_out_ssi", 0.9, "ratio"), ("damage/held_out_fall", 0.05, "share")]
    for family, strengths in (("heads", (0.1, 0.3)), ("noise", (0.05, 0.1)), ("bits", (4, 8))):
        found.append((f"damage/{family}/trained", float(trained and family == "heads"), "flag"))
        found.append((f"damage/{family}/ssi", 0.9, "ratio"))
        for n, at in enumerate(strengths, 1):
            told = (("score", clean - n / 20), ("sd", 0.01), ("agreement", 1 - n / 10), ("consistency", 1 - n / 20))
            found += [(f"damage/{family}/{at:g}/{what}", value, "share") for what, value in told]
    found += [("kl_to_base", 0.25, "nats"), ("perplexity_ratio", 1.1, "ratio")]
    rows = [one_row(run, seed, name, value, unit, split="test", stage=1, round=4) for name, value, unit in found]
    rows += [one_row(run, seed, f"state_cka/{tap}", 0.8, "ratio", stage=0, round=4) for tap in ("2", "10")]
    rows += [one_row(run, seed, f"site_cka/{tap}", 0.9, "ratio", site=s, round=4) for tap in ("2", "10") for s in ("a", "b")]
    return rows + [one_row(run, seed, "score", 0.3, split="unseen", task=task) for task in ("C", "")]


def whole_run(folder: Path) -> Path:
    """A finished run with all legs and all measures, for its page."""
    rows = one_leg("demo", 1, 0.1)
    rows += scored("demo", 1, {"A": 0.1, "B": 0.2}, {"a": 0.1, "b": 0.2}, "base", 1, (0.1, 0.2))
    for site, value in (("a", 0.5), ("b", 0.55)):
        rows += scored("demo", 1, {"A": value, "B": value}, {site: value}, "local", 1, (value, value), site)
    rows += scored("demo", 1, {"A": 0.9, "B": 0.9}, {"a": 0.9, "b": 0.9}, "centralised", 1, (0.9, 0.9))
    write_run(
        folder, rows, measures=damages("demo", 1, 0.7, True), recipe="[federation]\nrounds = 2\n[stream]\nstages = ['A', 'B']\n"
    )
    return folder


ODD = "<script>alert('x')</script> & \"quoted\" %{y} <b>bold</b>"


def whole_suite(folder: Path) -> Path:
    """A suite with everything that a page can show: baselines, a square, a knob, measures, a failure and an odd name."""
    methods = {"plain": 0.0, "guided": 0.05, ODD: 0.02, "full": 0.1, "train.lr=0.1": 0.03, "train.lr=0.4": -0.03, "lost": 0.0}
    runs = [(f"r{n}-{seed}", "s", method, seed) for n, method in enumerate(methods) for seed in (1, 2)]
    knobs = {"train.lr": {"0.1": "train.lr=0.1", "0.4": "train.lr=0.4"}}
    square = ["plain", "guided", ODD, "full"]
    write_plan(folder, runs, square=square, factors=["guidance", "<i>structure</i>"], knobs=knobs, trials={"s": {"plain": 3}})
    for name, _, method, seed in runs:
        if method == "lost":
            (folder / f"{name}.failed").write_text("exit status 1\nout of memory\n")
            continue
        shift = methods[method] + seed / 50
        rows = one_leg(name, seed, shift)
        if method == "plain":
            rows += scored(name, seed, {"A": 0.1, "B": 0.2}, {}, "base", 1, (0.1, 0.2))
            rows += scored(name, seed, {"A": 0.9, "B": 0.9}, {"a": 0.9, "b": 0.9}, "centralised", 1, (0.9, 0.9))
        legs = ("federated", "centralised") if method == "plain" else ("federated",)
        wave = 0.1 * (len(method) % 3)  # of no effect on a mean, but on its interval
        scores = [
            {
                "method": leg,
                "site": "",
                "task": task,
                "id": f"{task}{k}",
                "score": 0.3 + k % 5 / 10 + shift + (wave if (k + seed) % 2 else -wave),
            }
            for leg in legs
            for task in "AB"
            for k in range(20)
        ]
        measures = damages(name, seed, 0.7 + shift, method in ("full", ODD))
        write_run(folder / name, rows, scores=scores, measures=measures, recipe="[train]\nlr = 0.2\nlocal_steps = 5\n")
    return folder
