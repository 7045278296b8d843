"""Suites: which runs a plan means, what tuning chooses, and that a killed suite goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from suites import one_row
from test_run import Silent, go, rows_of, without_time

from fedkeel import cli
from fedkeel.evidence.archive import RunFiles
from fedkeel.evidence.suites.pack import pack
from fedkeel.evidence.suites.plan import Plan, Planned, load_plan, plan_names
from fedkeel.evidence.suites.pool import jobs_for
from fedkeel.evidence.suites.runs import describe, execute, other_recipe, recipe_of, runs_of
from fedkeel.evidence.suites.tuning import chance, final_score, trial_scores, tuned_text
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError, to_toml
from fedkeel.runs.folder import RunFolder
from fedkeel.types import FedKeelError, Row

PLAN = """
title = "Two methods"
seeds = [3, 4]
tuning_seeds = [9]
reference = "plain"
set = ["train.lr=0.1", "train.local_steps=2"]
square = ["plain", "near", "far", "both"]
factors = ["near", "far"]

[streams.a]
set = ["train.local_steps=3"]
trial = ["federation.rounds=1"]
grid = { "train.lr" = [0.2, 0.3], "train.warmup" = [0.5] }
tuned = { near = ["train.lr=0.4"] }

[streams.b]
needs = ["data.root"]

[methods.plain]
untuned = true
[methods.near]
set = ["train.proximal=0.1", "train.local_steps=4"]
[methods.far]
set = ["train.proximal=9.0"]
streams = ["a"]
tuned_as = "near"
[methods.both]

[knobs]
"train.batch_size" = [4, 16, 8]
"train.lr" = [0.1]
"""


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    path = tmp_path / "two.toml"
    path.write_text(PLAN)
    return path


class Heard:
    """A `Watch` that remembers."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.over: list[tuple[str, str]] = []

    def begin(self, total: int, done: int) -> None:
        self.begun.append((total, done))

    def at(self, running: Sequence[str]) -> None:
        pass

    def ended(self, run: str, seconds: float, failure: str) -> None:
        self.over.append((run, failure))


# ---------------------------------------------------------------------------------------------------------------- the plan


def test_the_suites_that_come_with_fedkeel_resolve(tmp_path: Path) -> None:
    assert "main" in plan_names()
    for name in plan_names():
        plan = load_plan(name)
        for stream in plan.streams.values():
            for key in ("data.files", "data.tasks_file"):  # so that every key is right but what is on this machine
                found = [o.partition("=")[2] for o in (*plan.set, *stream.set) if o.startswith(f"{key}=")]
                for path in json.loads(found[0]) if found and key == "data.files" else found:
                    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                    (tmp_path / path).write_text("{}")
        extra = [f"{at}:{key}={tmp_path}" for at, stream in plan.streams.items() for key in stream.needs]
        for tune in (False, True):
            runs, left = runs_of(plan, extra=extra, tune=tune)
            assert not left
            assert len({r.name for r in runs}) == len(runs)
            assert runs or tune


def test_runs_come_seed_by_seed_and_later_overrides_win(plan_file: Path) -> None:
    runs, left = runs_of(load_plan(str(plan_file)), extra=["threads=1"])
    assert left == ["stream 'b' needs b:data.root=...; it is left out"]
    methods = ["plain", "near", "far", "both", "train.batch_size=4", "train.batch_size=8"]
    assert [(r.seed, r.method) for r in runs] == [(s, m) for s in (3, 4) for m in methods]
    # 16 rows and a rate of 0.1 are what `plain` has on every stream
    sizes = {"4": "train.batch_size=4", "16": "plain", "8": "train.batch_size=8"}
    assert load_plan(str(plan_file)).knobs == {"train.batch_size": sizes, "train.lr": {"0.1": "plain"}}
    resolved = {r.method: load_recipe(None, r.overrides) for r in runs if r.seed == 4}
    train = {m: (r.train.lr, r.train.local_steps, r.train.proximal, r.train.batch_size) for m, r in resolved.items()}
    assert train == {
        "plain": (0.1, 3, 0.0, 16),  # the stream's steps after the suite's
        "near": (0.4, 4, 0.1, 16),  # the method's after the stream's, and what tuning chose
        "far": (0.4, 3, 9.0, 16),  # tuned as `near`
        "both": (0.1, 3, 0.0, 16),
        "train.batch_size=4": (0.1, 3, 0.0, 4),
        "train.batch_size=8": (0.1, 3, 0.0, 8),
    }
    assert {(r.name, r.seed, r.threads) for r in resolved.values()} == {(f"a-{m}-s4", 4, 1) for m in resolved}


def test_where_a_run_ran_makes_no_other_recipe(plan_file: Path) -> None:
    (run, *_), _ = runs_of(load_plan(str(plan_file)), methods=["plain"])

    def held(*more: str) -> str:
        return to_toml(load_recipe(None, [*run.overrides, *more]))

    assert not other_recipe(run, held())
    assert not other_recipe(run, held("out=elsewhere", "threads=3", "model.device=cuda", "evaluation.batch_size=7"))
    assert other_recipe(run, held("model.precision=fp32")) == "model.precision was 'fp32' and is 'auto'"
    assert other_recipe(run, held("train.batch_size=7", "model.device=cuda")) == "train.batch_size was 7 and is 16"


def test_a_run_older_than_a_key_had_its_default(plan_file: Path) -> None:
    """As a plan that says nothing of it means, and not as one that sets it."""
    run = runs_of(load_plan(str(plan_file)))[0][0]
    older = to_toml(recipe_of(run)).replace("prototype = 0.0\n", "")
    assert "prototype" not in older
    assert not other_recipe(run, older)
    asks = replace(run, given=(*run.given, "evidence.prototype=0.5", "model.head=analytic"))
    assert other_recipe(asks, older) == "evidence.prototype was 0.0 and is 0.5"


def test_seeds_are_compared_once_and_not_tuned_on(plan_file: Path) -> None:
    plan = load_plan(str(plan_file))
    with pytest.raises(ConfigError, match=r"seeds = \[3, 3\]: each once belongs here"):
        runs_of(plan, seeds=[3, 3])
    with pytest.raises(ConfigError, match=rf"is tuned on \[{plan.tuning_seeds[0]}\], which are not compared"):
        runs_of(plan, seeds=[3, plan.tuning_seeds[0]])


def test_two_methods_of_one_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.toml"
    path.write_text('[streams.a]\n[methods."c d"]\n[methods."c/d"]\n')
    with pytest.raises(ConfigError, match="'a', 'c d' and 'a', 'c/d' would both be run as a-c-d-s1: rename one"):
        runs_of(load_plan(str(path)))


def test_trials_are_those_of_a_method_that_was_tuned(plan_file: Path) -> None:
    plan = load_plan(str(plan_file))
    told = json.loads(describe(plan, runs_of(plan)[0]))["trials"]
    for stream, of in told.items():
        for method, count in of.items():
            tuned = (plan.methods[method].tuned_as or method) in plan.streams[stream].tuned
            assert count == (len(plan.streams[stream].settings()) if tuned else 0)
    assert {bool(count) for of in told.values() for count in of.values()} == {False, True}


def test_tuning_judges_what_is_served() -> None:
    """Not the last point of the curve, which goes by the first candidate; and whatever round the choice stands under."""
    curve = [Row("r", "federated", 1, n, "score", v, "share", split="validation") for n, v in ((1, 0.4), (2, 0.5))]
    tried = [Row("r", "federated", 1, 3, "score_at_serve_1", 0.9, "share", split="validation")]
    chosen = [Row("r", "federated", 1, 3, "served_score", 0.9, "share", split="validation")]
    assert final_score([*curve, *tried, *chosen], "validation") == 0.9
    by_stage = [
        Row("r", "federated", 1, 3, f"served_score_of_stage_{s}", v, "share", split="validation")
        for s, v in ((1, 0.2), (2, 0.6))
    ]
    assert final_score([*curve, *tried, *chosen, *by_stage], "validation") == pytest.approx(0.4)
    assert final_score(curve, "validation") == 0.5


def test_choices_of_the_command_line(plan_file: Path) -> None:
    plan = load_plan(str(plan_file))
    runs, _ = runs_of(
        plan,
        methods=["both", "near"],
        seeds=[7],
        extra=["a:train.lr=5.0", "train.clip_norm=2.0", "b:data.root=x"],
        streams=["a"],
    )
    assert [(r.method, r.seed) for r in runs] == [("near", 7), ("both", 7)]
    recipe = load_recipe(None, runs[0].overrides)
    assert (recipe.train.lr, recipe.train.clip_norm, recipe.data.root) == (5.0, 2.0, "")
    for asked, told in (
        ({"streams": ["c"]}, "streams = 'c': one of a, b belongs here"),
        ({"methods": ["plane"]}, "did you mean 'plain'"),
        ({"streams": ["b"]}, "stream 'b' needs b:data.root"),
        ({"extra": ["z:train.lr=1"]}, "z:train.lr=1: streams = 'z': one of a, b"),
        ({"extra": ["train.lrr=1"]}, "stream 'a', method 'plain': unknown key 'train.lrr'"),
        ({"seeds": [3, -1]}, "seeds = \\[3, -1\\]: whole numbers from 0"),
    ):
        with pytest.raises(ConfigError, match=told):
            runs_of(plan, **asked)


def test_every_method_is_tried_with_every_setting_of_the_grid(plan_file: Path) -> None:
    runs, _ = runs_of(load_plan(str(plan_file)), methods=["plain", "near", "far", "both"], tune=True)
    settings = ["train.lr=0.2,train.warmup=0.5", "train.lr=0.3,train.warmup=0.5"]
    # `plain` has nothing to tune and `far` shares the choice of `near`
    assert [r.method for r in runs] == [f"{m}@{s}" for m in ("near", "both") for s in settings]
    recipe = load_recipe(None, runs[1].overrides)
    assert (recipe.seed, recipe.train.lr, recipe.train.warmup, recipe.federation.rounds) == (9, 0.3, 0.5, 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("title", "titel"), "unknown key 'titel'; did you mean 'title'"),
        (
            ('reference = "plain"', 'reference = "plane"'),
            "reference = 'plane': one of plain, near, far, both belongs here; did you mean 'plain'",
        ),
        (("tuning_seeds = [9]", "tuning_seeds = [4]"), r"share \[4\]"),
        (("seeds = [3, 4]", "seeds = [true]"), "whole numbers from 0"),
        (('streams = ["a"]', 'streams = ["aa"]'), "methods.far.streams = 'aa': one of a, b belongs here"),
        (('tuned_as = "near"', 'tuned_as = "nearer"'), "methods.far.tuned_as = 'nearer': .* did you mean 'near'"),
        (("[4, 16, 8]", "[]"), r"knobs\.train\.batch_size = \[\]: a list of values, not empty"),
        (('factors = ["near", "far"]', ""), "square names four methods"),
        (('"train.batch_size" =', '"train.batch" ='), "unknown key 'train.batch'; did you mean 'train.batch_size'"),
        (("tuned = { near", "tuned = { neer"), "streams.a.tuned = 'neer': .* did you mean 'near'"),
        (("[streams.a]", "[streams.a"), "two.toml: cannot be read"),
        (("tuning_seeds = [9]", "tuning_seeds = []"), "tuning_seeds = .*, not empty"),
        (
            ('set = ["train.local_steps=3"]', 'set = ["train.local_steps"]'),
            "streams.a.set = .* overrides such as 'train.lr=0.1'",
        ),
        (("[0.2, 0.3]", "0.2"), "streams.a.grid.train.lr = 0.2: a list of values"),
        (('needs = ["data.root"]', "need = []"), "unknown key 'streams.b.need'; did you mean 'streams.b.needs'"),
        (("untuned = true", 'untuned = "yes"'), "methods.plain.untuned = 'yes': bool belongs here"),
        (("untuned = true", 'leg = "local"'), "methods.plain.leg = 'local': one of federated, centralised"),
        (("[streams.a]", "[stream.a]"), "unknown key 'stream'; did you mean 'streams'"),
    ],
)
def test_a_plan_that_cannot_be_right_names_what_is_wrong(plan_file: Path, change: tuple[str, str], told: str) -> None:
    plan_file.write_text(PLAN.replace(*change, 1))
    with pytest.raises(ConfigError, match=told):
        load_plan(str(plan_file))


def test_a_plan_needs_something_to_compare(plan_file: Path) -> None:
    plan_file.write_text("[streams.a]\n")
    with pytest.raises(ConfigError, match=r"methods is not set: a plan needs \[streams.NAME\] and \[methods.NAME\]"):
        load_plan(str(plan_file))


def test_a_knob_at_its_default_is_the_reference(plan_file: Path) -> None:
    plan_file.write_text(
        PLAN.replace('"train.batch_size" = [4, 16, 8]', '"structure.heads" = [0.0, 0.1]\n"lora.targets" = [[]]')
    )
    assert load_plan(str(plan_file)).knobs == {
        "structure.heads": {"0.0": "plain", "0.1": "structure.heads=0.1"},
        "lora.targets": {"[]": "plain"},
        "train.lr": {"0.1": "plain"},
    }


def test_choices_of_tuning_replace_the_plans_own(plan_file: Path, tmp_path: Path) -> None:
    chosen = tmp_path / "tuned.toml"
    chosen.write_text('[streams.a.tuned]\nboth = ["train.lr=0.7"]\n')
    plan = load_plan(str(plan_file), chosen)
    assert (plan.streams["a"].tuned, plan.streams["b"].tuned) == ({"both": ("train.lr=0.7",)}, {})
    for text, told in (
        ('[streams.c.tuned]\nboth = ["train.lr=0.7"]', "tuned.toml: streams = 'c': one of a, b belongs here"),
        ("[streams.a]\ntunde = {}", "tuned.toml: unknown key 'streams.a.tunde'; did you mean 'streams.a.tuned'"),
        (
            '[streams.a.tuned]\nbohr = ["train.lr=0.7"]',
            "two.toml with .*tuned.toml: streams.a.tuned = 'bohr': .* did you mean 'both'",
        ),
    ):
        chosen.write_text(text)
        with pytest.raises(ConfigError, match=told):
            load_plan(str(plan_file), chosen)
    with pytest.raises(ConfigError, match="tuned file not found"):
        load_plan(str(plan_file), tmp_path / "none.toml")


def test_an_unknown_suite_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"suite = 'mian': one of .*; did you mean 'main'"):
        load_plan("mian")


# -------------------------------------------------------------------------------------------------------------- the choice


def test_the_final_score_is_the_mean_over_stages_at_the_end() -> None:
    def row(name: str, value: float, round: int, split: str = "validation", task: str = "") -> Row:
        return one_row("x", 0, name, value, round=round, split=split, task=task)

    last = [row("score_of_stage_1", 0.4, 4), row("score_of_stage_2", 0.8, 4), row("score_of_stage_2", 0.0, 4, "test")]
    stream = [row("score_of_stage_1", 0.9, 2), row("score", 0.1, 4), *last]
    assert final_score(stream, "validation") == pytest.approx(0.6)
    assert final_score(stream, "test") == 0.0
    whole = [row("score", 0.3, 1), row("score", 0.5, 2), row("score", 0.7, 2, task="t")]
    assert final_score(whole, "validation") == 0.5
    assert final_score(whole, "test") is None


def ended(folder: Path, *rows: Row) -> None:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.as_json()) + "\n" for row in rows))
    (folder / "state.json").write_text('{"finished": true}')


def test_tuning_takes_the_best_mean_over_seeds(tmp_path: Path, plan_file: Path) -> None:
    values = {
        ("m", "k=1", 0): 0.2,
        ("m", "k=1", 1): 0.4,
        ("m", "k=2,l=3", 0): 0.5,
        ("m", "k=2,l=3", 1): 0.3,
        ("n", "k=1", 0): 0.6,
    }
    runs = [Planned(f"r{i}", "a", f"{m}@{s}", seed, ()) for i, (m, s, seed) in enumerate(values)]
    for run, value in zip(runs, values.values(), strict=True):
        ended(tmp_path / run.name, one_row(run.name, run.seed, "score", value, split="validation"))
    unfinished = Planned("no", "a", "m@k=7", 0, ())
    scores = trial_scores([*runs, unfinished], tmp_path)
    assert scores == {"a": {"m": {"k=1": pytest.approx(0.3), "k=2,l=3": pytest.approx(0.4)}, "n": {"k=1": 0.6}}}
    (tmp_path / "tuned.toml").write_text(tuned_text({"a": {"near": scores["a"]["m"], "both": scores["a"]["n"]}}))
    plan = load_plan(str(plan_file), tmp_path / "tuned.toml")
    assert plan.streams["a"].tuned == {"near": ("k=2", "l=3"), "both": ("k=1",)}
    ended(tmp_path / "no", one_row("no", 0, "score", 0.5, split="test"))
    with pytest.raises(FedKeelError, match=r"no/rows\.jsonl: no score on validation rows"):
        trial_scores([unfinished], tmp_path)


def test_at_least_one_job_and_no_more_than_memory_allows() -> None:
    assert jobs_for(1e30) == 1
    assert 1 <= jobs_for(1.0) <= (os.cpu_count() or 1)


# --------------------------------------------------------------------------------------------------------------- the runs


@pytest.fixture
def tiny_plan(tiny_overrides: list[str], tmp_path: Path) -> Path:
    """Two methods of a tiny federation, a second or two each, and one that cannot work."""
    common = [o for o in tiny_overrides if not o.startswith(("name=", "out="))]
    methods = {"plain": [], "near": ["train.proximal=0.1"], "broken": ["train.lr=1e30", "train.clip_norm=1e30"]}
    lines = [
        f"seeds = [1]\nset = {json.dumps([*common, 'train.local_steps=1'])}\n[streams.tiny]",
        *(f"[methods.{name}]\nset = {json.dumps(given)}" for name, given in methods.items()),
    ]
    path = tmp_path / "tiny.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_suite_runs_once_and_keeps_failures_as_failures(tiny_plan: Path, tmp_path: Path) -> None:
    """A begun run is resumed to the bits of a whole one, one that cannot work stops nothing but itself, none is done twice."""
    plan, out, heard = load_plan(str(tiny_plan)), tmp_path / "suite", Heard()
    runs, _ = runs_of(plan)

    def interrupt(leg: str, done: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go([*runs[0].overrides, f"out={out}"], Silent(interrupt))
    begun = RunFolder(out / "tiny-plain-s1").state()
    assert begun.round in (1, 2)
    assert not begun.finished
    failed = execute(plan, runs, out, 2, heard)
    assert [r.method for r in failed] == ["broken"]
    assert states(out) == {"tiny-plain-s1": "finished", "tiny-near-s1": "finished", "tiny-broken-s1": "failed"}
    assert "the loss became" in (out / "tiny-broken-s1.failed").read_text()
    assert {run: bool(failure) for run, failure in heard.over} == {r.name: r.method == "broken" for r in runs}
    _, whole, _ = go([*runs[0].overrides, f"out={tmp_path}"])
    assert without_time(rows_of(RunFolder(out / "tiny-plain-s1"))) == without_time(rows_of(whole))
    assert [r["name"] for r in json.loads((out / "suite.json").read_text())["runs"]] == [r.name for r in runs]
    before = {p: p.stat().st_mtime_ns for p in (out / "tiny-plain-s1").rglob("*")}
    assert passed_over(plan, out)
    assert {p: p.stat().st_mtime_ns for p in (out / "tiny-plain-s1").rglob("*")} == before
    assert {r["method"] for r in json.loads((out / "suite.json").read_text())["runs"]} == {"plain", "near", "broken"}
    kept = tmp_path / "kept"
    assert pack(out, kept) == (2, [])
    assert passed_over(plan, kept)
    assert states(kept) == states(out)
    tiny_plan.write_text(tiny_plan.read_text().replace("train.proximal=0.1", "train.proximal=0.2"))
    for folder in (out, kept):
        with pytest.raises(ConfigError, match=r"train\.proximal was 0\.1 and is 0\.2"):
            execute(load_plan(str(tiny_plan)), runs_of(load_plan(str(tiny_plan)))[0], folder, 2, Heard())


def states(suite: Path) -> dict[str, str]:
    files = RunFiles(suite)
    return {run["name"]: files.state(run["name"]) for run in json.loads((suite / "suite.json").read_text())["runs"]}


def passed_over(plan: Plan, out: Path) -> bool:
    """Whether a second call finds both runs that can work done, and does nothing."""
    heard = Heard()
    execute(plan, runs_of(plan, methods=["plain", "near"])[0], out, 2, heard)
    return (heard.begun, heard.over) == ([(2, 2)], [])


def test_bench_and_report_from_the_command_line(
    tiny_plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two calls for parts of a suite: the page and suite.json hold both, chance.json keeps what it knew of other streams."""
    monkeypatch.chdir(tmp_path)

    def fedkeel(*arguments: str) -> tuple[int, str, str]:
        """Exit status, output and errors of a call in this process; the runs have processes of their own."""
        monkeypatch.setattr("sys.argv", ["fedkeel", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        return int(end.value.code or 0), told.out, told.err

    assert "main" in fedkeel("bench")[1]
    folder = tmp_path / "out" / "tiny"
    folder.mkdir(parents=True)
    (folder / "chance.json").write_text('{"other": {"t": {"majority": 0.5, "rows": 2}}}')
    status, told, errors = fedkeel("bench", str(tiny_plan), "--methods", "plain", "--out", "out", "--jobs", "1")
    assert status == 0, errors
    assert "[1/1] tiny-plain-s1: finished" in told
    status, _, errors = fedkeel("bench", str(tiny_plan), "--methods", "near,broken", "--out", "out", "--jobs", "2")
    assert status == 1
    assert "1 of 2 runs failed: tiny-broken-s1" in errors
    page = (folder / "report.html").read_text()
    assert all(f">{method}" in page for method in ("plain (reference)", "near", "broken"))
    assert json.loads((folder / "chance.json").read_text()).keys() == {"other", "tiny"}
    assert fedkeel("report", "out/tiny")[:2] == (0, "report: out/tiny/report.html\n")
    assert "neither suite.json nor recipe.toml" in fedkeel("report", ".")[2]


def test_chance_is_the_commonest_answer_of_each_task(tiny_plan: Path) -> None:
    runs, _ = runs_of(load_plan(str(tiny_plan)))
    # of the 6 test rows with a label, by number 11, 23, 35, 47, 59, 71: colours 2, 2, 2, … of 0, 1, 2
    assert chance(runs) == {"tiny": {"colour": {"majority": 1.0, "rows": 6}}}


@pytest.mark.skipif(sys.platform != "linux", reason="processes die with their suite on Linux only")
def test_a_process_dies_with_its_suite(tmp_path: Path) -> None:
    """kill -9 of a suite's process ends what it began, which holds the pipe open for as long as it lives."""
    script = (
        "import os, time\nfrom fedkeel.evidence.suites.pool import die_with\n"
        "suite = os.getpid()\n"
        "if os.fork() == 0:\n"
        "    die_with(suite)\n"
        "    print('begun', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    process.kill()
    assert process.communicate(timeout=20) == (b"", None)


@pytest.mark.slow
def test_a_suite_killed_at_once_goes_on_and_ends_as_a_whole_one(tiny_plan: Path, tmp_path: Path) -> None:
    """kill -9 of the suite's process, also while a run is on its way; no run survives it, and none is done twice."""
    script = tmp_path / "go.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom fedkeel.evidence.suites.plan import load_plan\n"
        "from fedkeel.evidence.suites.runs import execute, other_recipe, runs_of\n"
        "from test_suites import Heard\n"
        "if __name__ == '__main__':\n"
        "    plan = load_plan(sys.argv[1])\n"
        "    execute(plan, runs_of(plan, methods=['plain', 'near'])[0], Path(sys.argv[2]), 1, Heard())\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}

    def begin(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(tiny_plan), str(out)], env=environment)

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = begin(cut)
    first = cut / "tiny-plain-s1"
    for _ in range(1200):  # until the first run is on its way, and not at its end
        time.sleep(0.05)
        if list(first.glob("checkpoints/federated/round-0001.fkl")):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)
    state = (first / "state.json").read_bytes()
    time.sleep(2.0)
    assert (first / "state.json").read_bytes() == state  # the run died with its suite
    assert RunFiles(cut).state(first.name) != "finished" or not (cut / "tiny-near-s1").exists()
    assert begin(cut).wait() == 0
    assert begin(whole).wait() == 0
    for name in ("tiny-plain-s1", "tiny-near-s1"):
        assert RunFiles(cut).state(name) == "finished"
        assert without_time(rows_of(RunFolder(cut / name))) == without_time(rows_of(RunFolder(whole / name)))
        assert (cut / name / "adapter/adapter_model.safetensors").read_bytes() == (
            whole / name / "adapter/adapter_model.safetensors"
        ).read_bytes()
