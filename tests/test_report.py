"""Reports from hand-made Rows, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedkeel.evidence.report import (
    Table,
    learning_curve,
    method_table,
    read_rows,
    site_table,
    stage_table,
    task_table,
    traffic_table,
    write_report,
)
from fedkeel.evidence.report.pictures import run_pictures, still
from fedkeel.evidence.report.tables import human_bytes
from fedkeel.types import FedKeelError, Row

RECIPE = '[federation]\nrounds = 2\n\n[evaluation]\nbaselines = ["base", "local", "centralised"]\n'
ENVIRONMENT = {"commit": "", "versions": {"fedkeel": "0.1.0", "torch": "2.9.0"}, "machine": "x86_64", "cores": 2}


def row(method: str, name: str, value: float, unit: str = "share", round: int = 0, **where: str) -> Row:
    return Row("demo", method, 7, round, name, value, unit, **where)


def scored(
    method: str, round: int, area: float, gist: float, own: dict[str, float], site: str = "", split: str = "test"
) -> list[Row]:
    """A scoring of two tasks: `area|gap` by accuracy on 30 rows, `gist` by ROUGE-L on 10."""
    at = {"site": site, "split": split}
    return [
        row(method, "accuracy", area, round=round, task="area|gap", **at),
        row(method, "score", area, round=round, task="area|gap", **at),
        row(method, "rows", 30, "rows", round, task="area|gap", **at),
        row(method, "rouge_l", gist, round=round, task="gist", **at),
        row(method, "score", gist, round=round, task="gist", **at),
        row(method, "rows", 10, "rows", round, task="gist", **at),
        row(method, "score", (area + gist) / 2, round=round, **at),
        row(method, "accuracy", area, round=round, **at),
        row(method, "rouge_l", gist, round=round, **at),
        *(row(method, "own_score", value, round=round, site=name, split=split) for name, value in own.items()),
    ]


def trained(method: str, round: int, losses: dict[str, float], up: int = 1000) -> list[Row]:
    rows = [row(method, "aggregation_error", 0.02 * round, round=round)]
    for site, loss in losses.items():
        rows += [
            row(method, "loss", loss, "nats", round, site=site),
            row(method, "positions", 600, "positions", round, site=site),
            row(method, "site_seconds", 2.5, "seconds", round, site=site),
            row(method, "bytes_up", up, "bytes", round, site=site),
            row(method, "bytes_down", 500, "bytes", round, site=site),
        ]
    return rows


def run_rows() -> list[Row]:
    """A finished run of two rounds at sites a, b and c, in the order in which a run writes it."""
    rows = scored("base", 0, 0.2, 0.1, {"a": 0.1, "b": 0.3})
    rows += trained("federated", 1, {"a": 2.0, "b": 3.0, "c": 4.0})
    rows += scored("federated", 1, 0.3, 0.2, {"a": 0.2}, split="validation")
    rows += [*trained("federated", 2, {"a": 1.0, "b": 1.5}), row("federated", "failed", 1, "rounds", 2, site="c")]
    rows += scored("federated", 2, 0.5, 0.3, {"a": 0.4, "b": 0.6}, split="validation")
    rows += [*scored("federated", 2, 0.6, 0.4, {"a": 0.45, "b": 0.65}), row("federated", "test_seconds", 1.5, "seconds", 2)]
    for site, score, own in (("a", 0.2, {"a": 0.5}), ("b", 0.3, {"b": 0.2}), ("c", 0.7, {})):
        rows += trained("local", 1, {site: 0.5}) + scored("local", 1, score, score, own, site)
    return rows + trained("centralised", 1, {"all": 0.9}) + scored("centralised", 1, 0.7, 0.5, {"a": 0.6, "b": 0.6})


def folder_of(path: Path, rows: list[Row], recipe: str = RECIPE) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "rows.jsonl").write_text("".join(json.dumps(r.as_json()) + "\n" for r in rows))
    (path / "recipe.toml").write_text(recipe)
    (path / "env.json").write_text(json.dumps(ENVIRONMENT))
    return path


def test_method_table_by_hand() -> None:
    table = method_table(run_rows())
    assert table.header[:4] == ("method", "score, points", "accuracy", "ROUGE-L")
    assert table.header[4:] == (
        "worst site, own rows",
        "mean over sites, own rows",
        "bytes up",
        "bytes down",
        "train, s",
        "rows scored",
    )
    # local-only: 20, 30 and 70: mean 40, deviations -20, -10, 30: variance 1400 / 2 = 700, whose root is 26.46
    assert table.lines == (
        ("base", "15.0", "20.0", "10.0", "10.0", "20.0", "–", "–", "–", "40"),
        ("local-only", "40.0 ± 26.5", "40.0 ± 26.5", "40.0 ± 26.5", "20.0", "35.0", "–", "–", "7.5", "40"),
        ("federated", "50.0", "60.0", "40.0", "45.0", "55.0", "5.0 kB", "2.5 kB", "12.5", "40"),
        ("centralised", "60.0", "70.0", "50.0", "60.0", "60.0", "–", "–", "2.5", "40"),
    )
    notes = "\n".join(table.notes)
    assert "40 test rows of 2 tasks; 3 sites, 2 rounds, seed 7." in notes
    assert "1 site without test rows left out" in notes
    assert "5,000 up to the server, 2,500 down" in notes
    assert "3 % of the exact change" in notes  # (2 % + 4 %) / 2
    assert "Failures: 1, each left out of its round (c 1×)." in notes
    assert "scoring the test rows took, apart from them, federated 1.5 s." in notes
    assert "centralised pools all rows: what federation avoids; an upper reference." in notes


def test_a_loss_without_a_finite_perplexity_is_told_in_words() -> None:
    """One site may say so much that the mean of all is beyond what a float's exponential holds."""
    table = method_table([*run_rows(), row("federated", "nats", 1e5, "nats", 2, split="test")])
    told = dict(zip(table.header, next(line for line in table.lines if line[0] == "federated"), strict=True))
    assert (told["loss, nats a token"], told["perplexity"]) == ("100000.000", "not finite")


def test_one_kind_of_metric_needs_no_columns_of_its_own() -> None:
    rows = [r for r in run_rows() if r.task != "gist" and r.name != "rouge_l"]
    assert method_table(rows).header[:3] == ("method", "score, points", "worst site, own rows")


def test_task_table_by_hand() -> None:
    table = task_table(run_rows())
    assert table.header == ("task", "metric", "rows", "base", "local-only (mean)", "federated", "centralised")
    assert table.lines == (
        ("area|gap", "accuracy", "30", "20.0", "40.0", "60.0", "70.0"),
        ("gist", "ROUGE-L", "10", "10.0", "40.0", "40.0", "50.0"),
    )


def stream_rows() -> list[Row]:
    """A run in two stages: in the first only `area|gap` has arrived, in the second both tasks."""

    def in_stage(stage: int, found: list[Row]) -> list[Row]:
        return [dataclasses.replace(r, stage=stage) for r in found]

    first = [
        row("federated", name, value, unit, 1, task=task, split="test")
        for name, value, unit, task in (
            ("score", 0.8, "share", "area|gap"),
            ("accuracy", 0.8, "share", "area|gap"),
            ("rows", 30, "rows", "area|gap"),
            ("score", 0.8, "share", ""),
            ("accuracy", 0.8, "share", ""),
            ("score_of_stage_1", 0.8, "share", ""),
        )
    ]
    second = scored("federated", 2, 0.5, 0.3, {"a": 0.5})
    second += [row("federated", f"score_of_stage_{n}", v, round=2, split="test") for n, v in ((1, 0.5), (2, 0.3))]
    return [*in_stage(0, first), *in_stage(1, second)]


def test_a_stream_is_told_by_its_last_stage() -> None:
    (line,) = method_table(stream_rows()).lines
    assert line[:2] == ("federated", "40.0")
    assert line[-1] == "40"  # rows of the last scoring, not of both
    assert task_table(stream_rows()).lines == (
        ("area|gap", "accuracy", "30", "50.0"),
        ("gist", "ROUGE-L", "10", "30.0"),
    )


def test_stage_table_by_hand() -> None:
    table = stage_table(stream_rows())
    assert table.header == ("", "rows of stage 1", "rows of stage 2", "mean")
    assert table.lines == (("after stage 1", "80.0", "–", "80.0"), ("after stage 2", "50.0", "30.0", "40.0"))
    assert stage_table(run_rows()).lines == ()


def test_traffic_table_by_hand() -> None:
    """Best score 0.8 in round 3; half of it, 0.4, is reached in round 1, 0.8 · 0.8 = 0.64 in round 2 and not before."""
    rows = []
    for round, score in ((1, 0.5), (2, 0.65), (3, 0.8), (4, 0.7)):
        rows.append(row("federated", "score", score, round=round, split="validation"))
        rows.append(row("federated", "score", 1.0, round=round, split="validation", task="area"))  # of one task
        rows += [row("federated", "bytes_up", 1000 * round, "bytes", round, site=s) for s in ("a", "b")]
        rows.append(row("federated", "bytes_down", 500, "bytes", round, site="a"))
        rows.append(row("local", "bytes_up", 1e9, "bytes", round, site="a"))
    table = traffic_table(rows)
    assert table.lines == (
        ("50%", "50.0", "1", "2.0 kB", "500 B"),
        ("80%", "65.0", "2", "6.0 kB", "1.0 kB"),
        ("90%", "80.0", "3", "12.0 kB", "1.5 kB"),
        ("95%", "80.0", "3", "12.0 kB", "1.5 kB"),
        ("100%", "80.0", "3", "12.0 kB", "1.5 kB"),
    )
    assert traffic_table(stream_rows()).lines == ()  # its rows change from stage to stage
    assert traffic_table([r for r in rows if r.name != "score"]).lines == ()


def test_site_table_by_hand() -> None:
    assert site_table(run_rows()).lines == (
        ("a", "1,200", "1.000", "2.0 kB", "1.0 kB", "50.0", "45.0"),
        ("b", "1,200", "1.500", "2.0 kB", "1.0 kB", "20.0", "65.0"),
        ("c", "600", "4.000", "1.0 kB", "500 B", "–", "–"),
    )


def test_picture_shows_the_rows() -> None:
    """Losses of 2, 3 and 4 and then 1 and 1.5 nats; 4.5 kB after round 1, 3 more in round 2; local-only 40 ± 26.46."""
    spec = still(run_pictures(run_rows()))
    drawn = [(panel["title"]["text"], spec["datasets"][panel["data"]["name"]]) for panel in spec["concat"]]
    assert [title for title, _ in drawn] == [
        "Validation score",
        "Training loss over sites",
        "Score against traffic",
        "Held-out test score by method",
    ]
    score, loss, traffic, test = ([(p["at"], p["value"], p["low"], p["high"]) for p in lines] for _, lines in drawn)
    assert score == [(1, 25.0, None, None), (2, 40.0, None, None)]
    assert loss == [(1, 3.0, 2.0, 4.0), (2, 1.25, 1.0, 1.5)]
    assert traffic == [(4.5, 25.0, None, None), (7.5, 40.0, None, None)]
    assert [(name, round(score, 6)) for name, score, _, _ in test] == [
        ("base", 15.0),
        ("local-only", 40.0),
        ("federated", 50.0),
        ("centralised", 60.0),
    ]
    assert [high if high is None else round(high, 2) for _, _, _, high in test] == [None, 66.46, None, None]


def test_the_picture_has_its_names_and_numbers_as_text(tmp_path: Path) -> None:
    learning_curve(run_rows(), tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    texts = {"".join(re.findall(">([^<]+)<", text)) for text in re.findall(r"<text.*?</text>", drawn)}
    assert {"loss, nats a positionband: lowest to highest of the sites", "kB sent up and down, all sites"} <= texts
    assert {"base", "local-only", "federated", "centralised", "15.0", "40.0", "50.0", "60.0"} <= texts
    assert not re.findall(r"""(?:href|src)=|url\(""", drawn)


def test_byte_units() -> None:
    sizes = (0, 999, 1000, 659_788, 999_949, 999_950, 1_234_567_890, 5e15)
    assert [human_bytes(s) for s in sizes] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "659.8 kB",
        "999.9 kB",
        "1.0 MB",
        "1.2 GB",
        "5000.0 TB",
    ]


def test_null_becomes_nan_and_is_told_in_words(tmp_path: Path) -> None:
    rows = [*run_rows(), row("local", "score", math.inf, round=1, site="d", split="test")]
    read = read_rows(folder_of(tmp_path, rows) / "rows.jsonl")
    assert read[:-1] == rows[:-1]
    assert math.isnan(read[-1].value)
    assert method_table(read).lines[1][:3] == ("local-only", "not finite", "40.0 ± 26.5")
    assert method_table(read).numeric()[1]
    learning_curve(read, tmp_path / "curve.png")  # a gap, and no warning turned into an error


@pytest.mark.parametrize("bad", ["{", "[1]", '{"run": "demo"}', "", json.dumps(run_rows()[0].as_json() | {"value": "0.5"})])
def test_a_malformed_line_is_named(tmp_path: Path, bad: str) -> None:
    path = folder_of(tmp_path, run_rows()[:2]) / "rows.jsonl"
    path.write_text(path.read_text() + bad + "\n" + json.dumps(run_rows()[0].as_json()) + "\n")
    with pytest.raises(FedKeelError, match=re.escape(f"{path}:3: not a row")):
        read_rows(path)


def test_rows_of_two_runs_are_not_added_up() -> None:
    other = Row("other", "base", 7, 0, "score", 0.5, "share", split="test")
    with pytest.raises(FedKeelError, match="of 2: demo"):
        method_table([*run_rows(), other])


def test_markdown_shows_names_as_they_are() -> None:
    table = Table("T", ("task", "n"), (("a|b", "1"), ("*x* _y_ a_b <br>\n`z`", "–")), ("note|",))
    assert table.markdown().splitlines() == [
        "## T",
        "",
        "| task | n |",
        "| --- | ---: |",
        r"| a\|b | 1 |",
        r"| \*x\* \_y\_ a_b \<br> \`z\` | – |",
        "",
        r"- note\|",
    ]
    assert r"| area\|gap | accuracy | 30 |" in task_table(run_rows()).markdown()


def test_the_terminal_shows_every_column_in_80_characters() -> None:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(method_table(run_rows()).rich())
        console.print(task_table(run_rows()).rich())
    text = capture.get()
    for word in ("local-only", "centralised", "accuracy", "ROUGE-L", "scored", "area|gap", "reference."):
        assert word in text


def test_report_of_a_finished_run(tmp_path: Path) -> None:
    report = write_report(folder_of(tmp_path / "demo", run_rows()))
    text = report.read_text()
    assert report.name == "report.md"
    assert text.startswith("# demo: report of a FedKeel run\n")
    assert "not finished" not in text
    assert "After 2 rounds at 3 sites, the federated model scores 50.0 points on 40 test rows of 2 tasks." in text
    assert (
        "+35.0 against the base model (15.0); +10.0 against the mean of the sites' local-only models (40.0); "
        "−10.0 against the centralised model, which pools all rows (60.0)." in text
    )
    assert (
        "The lowest score of a site on its own test rows is 45.0, and 20.0 when each site is scored with its local-only model."
        in text
    )
    assert "](curve.svg)" in text
    assert (report.parent / "curve.svg").stat().st_size < 200_000
    assert f"```toml\n{RECIPE}```\n" in text
    assert "| commit | not known |" in text
    assert "| machine | x86_64 |" in text
    assert "<details>" not in text
    table = (report.parent / "table.md").read_text()
    assert method_table(run_rows()).markdown() in table
    assert task_table(run_rows()).markdown() in table


@pytest.mark.slow
def test_twice_the_same_bytes(tmp_path: Path) -> None:
    learning_curve(run_rows(), tmp_path / "curve.png")
    first = [write_report(folder_of(tmp_path / "1", run_rows())).parent / n for n in ("report.md", "table.md", "curve.svg")]
    second = [write_report(folder_of(tmp_path / "2", run_rows())).parent / n for n in ("report.md", "table.md", "curve.svg")]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    before = (tmp_path / "curve.png").read_bytes()
    learning_curve(run_rows(), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == before
    assert before.startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_partial_run_says_so(tmp_path: Path) -> None:
    rows = run_rows()
    one_round = rows[: next(k for k, r in enumerate(rows) if r.method == "federated" and r.round == 2)]
    text = write_report(folder_of(tmp_path / "early", one_round)).read_text()
    assert "**This run is not finished.** Still missing: rounds (1 of 2 done); " in text
    assert "the test score of local-only; the test score of federated; the test score of centralised." in text
    assert "Done so far: 1 round at 3 sites; the federated model has no test score yet." in text
    assert "base 15.0" in text
    assert "| federated | – |" in text
    assert "| centralised |" not in text
    one_local = rows[: next(k for k, r in enumerate(rows) if r.method == "local" and r.site == "b")]
    text = write_report(folder_of(tmp_path / "late", one_local)).read_text()
    assert "the test score of local-only (1 of 3 sites scored); the test score of centralised." in text
    assert "| local-only | 20.0 |" in text


def test_no_baselines_no_validation_one_site(tmp_path: Path) -> None:
    rows = trained("federated", 1, {"a": 2.0}) + scored("federated", 1, 0.6, 0.4, {"a": 0.5})
    text = write_report(folder_of(tmp_path, rows, "[federation]\nrounds = 1\n\n[evaluation]\nbaselines = []\n")).read_text()
    assert "not finished" not in text
    assert "After 1 round at 1 site, the federated model scores 50.0 points" in text
    assert "against" not in text
    assert "](curve.svg)" in text
    assert len(method_table(rows).lines) == 1
    assert [chart.key for chart in run_pictures(rows)] == ["learning", "methods"]
    assert [panel.title for panel in run_pictures(rows)[0].panels] == ["Training loss over sites"]


def test_nothing_to_draw_leaves_the_picture_out(tmp_path: Path) -> None:
    rows = [row("federated", "aggregation_error", 0.0, round=1)]
    with pytest.raises(FedKeelError, match="nothing to draw"):
        learning_curve(rows, tmp_path / "curve.svg")
    assert "curve.svg" not in write_report(folder_of(tmp_path, rows)).read_text()


def test_backticks_in_the_recipe_stay_inside_its_block(tmp_path: Path) -> None:
    recipe = RECIPE + "\n[data]\ninstruction = '```'\n"
    assert f"````toml\n{recipe}````\n" in write_report(folder_of(tmp_path, run_rows(), recipe)).read_text()


def test_many_tasks_are_folded(tmp_path: Path) -> None:
    rows = run_rows() + [row("base", "score", 0.5, split="test", task=f"task {k}") for k in range(19)]
    text = write_report(folder_of(tmp_path, rows)).read_text()
    assert "<details>\n<summary>Score by task: 21 lines</summary>\n\n## Score by task\n" in text
    assert text.count("<details>") == text.count("</details>") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("rows.jsonl", "", "nothing is measured"), ("recipe.toml", "= 1", "not TOML"), ("env.json", "{", "not JSON")],
)
def test_a_broken_folder_is_an_error_that_names_the_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (folder_of(tmp_path, run_rows()) / name).write_text(content)
    with pytest.raises(FedKeelError, match=f"{name}.*{message}"):
        write_report(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FedKeelError, match=f"{name} cannot be read"):
        write_report(tmp_path)


def test_import_is_light() -> None:
    heavy = {"torch", "altair", "vl_convert", "rich", "numpy"}
    code = f"import sys, fedkeel.evidence.report; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
