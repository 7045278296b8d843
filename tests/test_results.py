"""The published numbers are those of the committed rows."""

from __future__ import annotations

import gzip
import json
import re
import tomllib
from pathlib import Path
from statistics import mean

import pytest

import results_page
import sweep
from fedkeel.evidence.suites.plan import load_plan
from fedkeel.evidence.suites.runs import other_recipe, runs_of
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import to_toml

ROOT = Path(__file__).parent.parent


def test_docs_and_readme_are_generated_from_the_rows() -> None:
    whole = (ROOT / "docs" / "results.md").read_text()
    assert whole == results_page.whole()
    assert (ROOT / "README.md").read_text() == results_page.readme()
    for target in re.findall(r"\]\((\.\./[^)]+)\)", whole):
        assert (ROOT / "docs" / target).exists(), target


def test_contents_number_headings_of_one_name() -> None:
    text = "# One\n## a b\n### c\n# Two: x\n## a b\n## c\n"
    assert results_page.contents(text) == "* [One](#one): [a b](#a-b)\n* [Two: x](#two-x): [a b](#a-b-1), [c](#c-1)\n"


@pytest.mark.parametrize("stream", results_page.PICTURES)
def test_pictures_hold_what_is_left_in_the_end(stream: str) -> None:
    """Each method's mean over stages and seeds after the last stage, from the raw lines; matplotlib names text in comments."""
    drawn = re.findall(r"<!-- (.*?) -->", (ROOT / "results" / "suites" / "main" / f"{stream}.svg").read_text())
    methods = [name for name in drawn if any((ROOT / "results" / "suites" / "main").glob(f"{stream}-{name}-s1"))]
    assert len(methods) >= 13
    out = {"amazon"} if stream == "cl15" else set()  # at chance by the rule, as the page says
    order = ("dbpedia", "amazon", "yahoo", "agnews")
    for method in methods:
        finals = []
        for folder in (ROOT / "results" / "suites" / "main").glob(f"{stream}-{method}-s[0-9]"):
            scores = by_stage(raw_rows(folder), "federated", "")
            finals.append(mean(score for (after, of), score in scores.items() if after == 3 and order[of] not in out))
        assert f"{100 * mean(finals):.1f}" in drawn, method


@pytest.mark.parametrize("name", results_page.committed())
def test_scores_recomputed_from_rows_by_hand(name: str) -> None:
    """Apart from the report's code: the mean over tasks of each method, from the raw lines, stands in the page."""
    lines = (ROOT / "results" / "main-job" / name / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    section = results_page.page().split(f"## {name}\n")[1].split("\n## ")[0]
    for method in ("base", "federated", "centralised"):
        scores = [
            r["value"]
            for r in rows
            if (r["method"], r["name"], r["split"]) == (method, "score", "test") and r["task"] and not r["site"]
        ]
        line = re.search(rf"^\| {method} \| ([^|]+) \|", section, re.MULTILINE)
        assert line is not None
        assert line.group(1).strip() == f"{100 * mean(scores):.1f}"


@pytest.mark.parametrize("name", results_page.committed())
def test_every_result_carries_its_recipe_and_commit(name: str) -> None:
    """A tree with uncommitted changes says so (`-dirty`), on the page too."""
    folder = ROOT / "results" / "main-job" / name
    commit = json.loads((folder / "env.json").read_text())["commit"]
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit)
    assert f"commit `{commit}`" in results_page.page().split(f"## {name}\n")[1].split("\n## ")[0]
    for file in ("recipe.toml", "table.md", "report.md", "curve.svg"):
        assert (folder / file).stat().st_size > 0


@pytest.mark.parametrize("plan", results_page.STREAMS)
def test_stream_scores_recomputed_from_rows_by_hand(plan: str) -> None:
    """Final score and forgetting of each method from the raw lines, apart from the code that wrote the page."""
    section = results_page.streams().split(f"## {plan}\n", 1)[1].split("\n## ")[0]
    methods: dict[str, list[tuple[float, float]]] = {}
    for folder in sorted((ROOT / "results" / "streams" / plan).iterdir()):
        found: dict[tuple[int, int], float] = {}
        for line in gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).decode().splitlines():
            row = json.loads(line)
            if row["method"] == "federated" and row["split"] == "test" and row["name"].startswith("score_of_stage_"):
                found[row["stage"], int(row["name"].split("_")[-1]) - 1] = row["value"]
        last = max(stage for stage, _ in found)
        final = mean(found[last, i] for i in range(last + 1))
        forgot = mean(max(found[s, i] for s in range(i, last)) - found[last, i] for i in range(last))
        name = folder.name.removeprefix(f"{plan}-").rpartition("-s")[0]
        methods.setdefault(name, []).append((final, forgot))
    assert len(methods) >= 5
    for name, values in methods.items():
        cells = next(line for line in section.splitlines() if line.startswith(f"| {name} |")).split("|")
        assert cells[3].split("±")[0].strip() == f"{100 * mean(f for f, _ in values):.1f}"
        assert float(cells[6].split("±")[0].strip().replace("−", "-")) == pytest.approx(
            100 * mean(f for _, f in values), abs=0.0501
        )


def test_damage_and_cost_tables_hold_every_line() -> None:
    lines = results_page.damage_lines()
    table = results_page.damage_table()
    for cells in table.lines:
        own = [line for line in lines if line["run"].startswith(f"minilm-{cells[0]}-s")]
        clean = {line["run"]: line["clean"] for line in own}
        assert cells[2].split(" ")[0] == f"{100 * mean(clean.values()):.1f}"
        assert not any(line["trained"] for line in own)  # families that a run trained on would not be held out
    text = results_page.streams()
    costs = [row for file in results_page.STEP_COST for row in results_page.step_cost(file)["results"]]
    assert len(costs) > 20
    for row in costs:
        assert f"| {row['base']} | {row['variant']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" in text
    for row in results_page.engines()["results"]:
        first = f"{row['first']:.2f} | {row['round']:.2f} | {row['ratio']:.2f}"
        assert f"| {row['sites']} | {row['engine']} | {first} |" in text
    for row in results_page.warm_site()["results"]:
        told = next(line for line in text.splitlines() if line.startswith(f"| {row['base']} | ") and line.count("|") == 9)
        assert [float(cell) for cell in told.split(" | ")[2:5]] == [round(row[key], 1) for key in ("warm", "cold", "load")]


@pytest.mark.skipif(not (ROOT / "../shared/data").is_dir(), reason="the plans name ../shared/data, which is not here")
@pytest.mark.parametrize(
    "folder",
    sorted(p for kind in ("streams", "tuning", "exchange") for p in (ROOT / "results" / kind).iterdir()),
    ids=lambda p: p.name,
)
def test_the_plan_still_means_what_was_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipe and plan of today resolve to the committed recipe of every run, key by key, but for keys that came later."""
    monkeypatch.chdir(ROOT)
    name = folder.name
    plan = tomllib.loads((ROOT / "experiments" / "streams" / f"{name}.toml").read_text())
    runs = {run.name: command for run, command in sweep.runs_of(plan, name, Path("build/streams"))}
    for run in sorted(folder.iterdir()):
        resolved = tomllib.loads(to_toml(load_recipe(Path(runs[run.name][2]), runs[run.name][3:])))
        committed = tomllib.loads((run / "recipe.toml").read_text())
        del resolved["out"], committed["out"]
        for key, value in committed.items():
            same = {k: resolved[key][k] for k in value} if isinstance(value, dict) else resolved[key]
            assert same == value, (run.name, key)


def raw_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress((folder / "rows.jsonl.gz").read_bytes()).decode().splitlines()]


def by_stage(rows: list[dict], leg: str, site: str) -> dict[tuple[int, int], float]:
    """(stage after which, stage of the rows, both from 0) -> test score."""
    return {
        (row["stage"], int(row["name"].split("_")[-1]) - 1): row["value"]
        for row in rows
        if (row["method"], row["split"], row["site"]) == (leg, "test", site) and row["name"].startswith("score_of_stage_")
    }


def task_scores(rows: list[dict], leg: str) -> dict[int, dict[str, float]]:
    """stage -> task -> test score after it."""
    found: dict[int, dict[str, float]] = {}
    for r in rows:
        if (r["method"], r["name"], r["split"], r["site"]) == (leg, "score", "test", "") and r["task"]:
            found.setdefault(r["stage"], {})[r["task"]] = r["value"]
    return found


def at_chance(folder: Path, runs: list[dict], majority: dict[str, dict[str, float]]) -> set[str]:
    """The tasks of a stream that the centralised model does not beat the commonest answer at, by two standard errors."""
    finals: dict[str, list[float]] = {}
    for run in runs:
        if run["method"] == "baselines" and (folder / run["name"]).exists():
            scores = task_scores(raw_rows(folder / run["name"]), "centralised")
            for task, score in scores[max(scores)].items():
                finals.setdefault(task, []).append(score)
    bars = {task: m["majority"] + 2 * (m["majority"] * (1 - m["majority"]) / m["rows"]) ** 0.5 for task, m in majority.items()}
    return {task for task, scores in finals.items() if mean(scores) <= bars[task]}


@pytest.mark.parametrize("suite", results_page.suite_names())
def test_suite_scores_recomputed_from_rows_by_hand(suite: str) -> None:
    """Seeds, final score, forgetting and bytes of each method from the raw lines, apart from the report's code."""
    folder = ROOT / "results" / "suites" / suite
    told = json.loads((folder / "suite.json").read_text())
    page = results_page.suites().split(f"# {told['title']}\n", 1)[1].split("\n# ")[0]
    chance = json.loads((folder / "chance.json").read_text())
    checked = 0
    for stream in told["streams"]:
        out = at_chance(folder, [r for r in told["runs"] if r["stream"] == stream], chance[stream])
        section = page.split(f"### {stream}: scores\n", 1)[1].split("\n### ")[0]
        header = [c.strip() for c in next(x for x in section.splitlines() if x.startswith("| method")).split("|")]
        found: dict[str, list[tuple[float, float, float]]] = {}
        for run in told["runs"]:
            at = folder / run["name"]
            if run["stream"] != stream or not at.exists() or run["method"] == "baselines":
                continue
            rows = raw_rows(at)
            scores = by_stage(rows, "federated", "")
            tasks = task_scores(rows, "federated")
            last = max(tasks)
            if out >= set(tasks[last]):  # nothing is left to average
                line = next(x for x in section.splitlines() if x.startswith((f"| {run['method']} |", f"| {run['method']} (")))
                assert line.split("|")[header.index("final score")].strip() == "–"
                checked += 1
                continue
            last_score = mean(score for task, score in tasks[last].items() if task not in out)
            if out:
                stages = tomllib.loads((at / "recipe.toml").read_text())["stream"]["stages"]
                kept = [[task for task in stage.split(" + ") if task not in out] for stage in stages]
                lines = [s for s in range(last + 1) if kept[s] or s == last]  # a stage that is out is no line either
                scores = {(s, i): mean(tasks[s][t] for t in kept[i]) for s in lines for i in range(s + 1) if kept[i]}
            lost = [
                max(v for (s, j), v in scores.items() if j == i and s < last) - scores[last, i]
                for i in range(last)
                if (last, i) in scores
            ]
            assert bool(lost) == (last > 0)
            forgot = mean(lost) if lost else 0.0
            up = sum(r["value"] for r in rows if r["method"] == "federated" and r["name"] == "bytes_up") / 1e6
            found.setdefault(run["method"], []).append((last_score, forgot, up))
        for method, values in found.items():
            line = next(x for x in section.splitlines() if x.startswith((f"| {method} |", f"| {method} (reference) |")))
            cells = dict(zip(header, (c.strip().replace("−", "-") for c in line.split("|")), strict=True))
            assert cells["seeds"].split(" ")[0] == str(len(values))
            for key, column in (("final score", 0), ("forgetting", 1)):
                if key == "forgetting" and key not in cells:  # no stream, and so nothing to forget
                    assert not any(v[column] for v in values)
                    continue
                assert float(cells[key].split("±")[0]) == pytest.approx(100 * mean(v[column] for v in values), abs=0.0501)
            assert float(cells["MB up"]) == pytest.approx(mean(v[2] for v in values), abs=0.0501)
            checked += 1
    assert checked >= 3


@pytest.mark.skipif(not (ROOT / "../shared/data").is_dir(), reason="the plans name ../shared/data, which is not here")
@pytest.mark.parametrize("suite", results_page.suite_names())
def test_the_suite_plan_still_means_what_was_run(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan = load_plan(suite)
    paths = {"data.root": "../shared/data", "model.base": "build/minilm"}
    extra = [f"{name}:{key}={paths[key]}" for name, stream in plan.streams.items() for key in stream.needs]
    planned = {run.name: run for run in runs_of(plan, extra=extra)[0]}
    for folder in sorted((ROOT / "results" / "suites" / suite).iterdir()):
        if folder.is_dir():
            assert not other_recipe(planned[folder.name], folder)
