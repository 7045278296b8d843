"""A suite's tables from a folder made by hand, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from suites import one_row, scored, write_plan, write_run

from fedkeel.evidence.report.chance import chances
from fedkeel.evidence.report.interval import paired_difference
from fedkeel.evidence.report.results import Result, interaction, results_of
from fedkeel.evidence.report.run_numbers import final_score, stage_matrix, stream_numbers, tasks_by_stage
from fedkeel.evidence.report.suite import Suite, chances_of, lines_of, read_suite
from fedkeel.evidence.report.suite_tables import (
    chance_table,
    knob_table,
    method_list,
    parts_table,
    retention_table,
    run_table,
    score_table,
    square_table,
    task_table,
)
from fedkeel.evidence.report.tables import points_with_sd
from fedkeel.rng import numpy_generator
from fedkeel.types import FedKeelError, Row


def two_stages(run: str, seed: int, first: float, last: tuple[float, float], own: dict[str, float]) -> list[Row]:
    """Task A comes in stage 1 and scores `first`; after stage 2 A and B score `last`."""
    a, b = last
    return [
        *scored(run, seed, {"A": first}, {}, stage=0, stages=(first,), round=1),
        *scored(run, seed, {"A": a, "B": b}, own, stage=1, stages=last, round=2),
        *(
            one_row(run, seed, name, 1e6 * (n + 1), "bytes", round=n, site=site)
            for name in ("bytes_up", "bytes_down")
            for n in (1, 2)
            for site in ("a", "b")
        ),
    ]


def cost(run: str, seed: int, seconds: float) -> list[Row]:
    return [one_row(run, seed, "cpu_seconds", v, "seconds", round=n) for n, v in ((1, seconds - 1), (2, seconds + 1))]


def per_row(a: float, b: float, method: str = "federated") -> list[dict[str, object]]:
    return [
        {"method": method, "site": "", "task": task, "id": f"{task}{k}", "score": base + (k % 3) / 10}
        for task, base in (("A", a), ("B", b))
        for k in range(9)
    ]


def make(folder: Path) -> Path:
    """Methods `plain` (reference; two seeds) and `keel` (one seed there, one failed), and one run of baselines."""
    runs = [("p1", "s", "plain", 1), ("p2", "s", "plain", 2), ("k1", "s", "keel", 1), ("k2", "s", "keel", 2)]
    write_plan(folder, [("b1", "s", "baselines", 1), *runs], trials={"s": {"keel": 7}})
    p1 = two_stages("p1", 1, 0.8, (0.5, 0.7), {"a": 0.5, "b": 0.7}) + cost("p1", 1, 3)
    p2 = two_stages("p2", 2, 0.8, (0.6, 0.8), {"a": 0.6, "b": 0.8}) + cost("p2", 2, 3)
    write_run(folder / "p1", p1, scores=per_row(0.4, 0.6))
    write_run(folder / "p2", p2, scores=per_row(0.5, 0.7))
    damage = {"clean": 0.7, "bits/trained": 0.0, "bits/ssi": 0.93, "bits/8/score": 0.68, "bits/4/score": 0.62}
    damage |= {"heads/trained": 1.0, "heads/ssi": 0.5, "heads/0.1/score": 0.3}
    measures = [one_row("k1", 1, f"damage/{n}", v, split="test") for n, v in damage.items()]
    measures.append(one_row("k1", 1, "kl_to_base", 0.25, "nats", split="general"))
    measures += [one_row("k1", 1, f"state_cka/{n}", v, "ratio", stage=s) for n, s, v in (("0", 0, 0.8), ("1", 0, 0.9))]
    k1 = two_stages("k1", 1, 0.8, (0.7, 0.7), {"a": 0.6, "b": 0.6}) + cost("k1", 1, 6)
    recipe = "name = 'k1'\n[train]\nlocal_steps = 5\nlocal_epochs = 0\n[distill]\nweight = 0.5\nnewer = 1\n"
    write_run(folder / "k1", k1, scores=per_row(0.6, 0.6), measures=measures, recipe=recipe)
    (folder / "k2.failed").write_text("exit status 1\nTraceback\nfedkeel: the disk | is full\n\n")
    base = scored("b1", 1, {"A": 0.1, "B": 0.3}, {}, "base", stage=1, stages=(0.1, 0.3))
    local = [r for s, v in (("a", 0.3), ("b", 0.5)) for r in scored("b1", 1, {"A": v, "B": v}, {s: v}, "local", 1, site=s)]
    central = scored("b1", 1, {"A": 0.9, "B": 0.55}, {"a": 0.9, "b": 0.8}, "centralised", 1, (0.9, 0.55))
    write_run(folder / "b1", base + local + central)
    return folder


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return read_suite(make(tmp_path))


def cells(suite: Suite, left_out: tuple[str, ...] = ()) -> dict[str, dict[str, str]]:
    table = score_table(suite, "s", results_of(suite, "s", left_out), {})
    return {line[0]: dict(zip(table.header, line, strict=True)) for line in table.lines}


def test_score_table_by_hand(suite: Suite) -> None:
    found = cells(suite)
    # baselines first, each group from the best
    assert list(found) == ["centralised", "local-only", "base", "keel", "plain (reference)"]
    plain, keel = found["plain (reference)"], found["keel"]
    # final: (50 + 70)/2 = 60 and (60 + 80)/2 = 70: 65, sd 10/√2 = 7.07. Learnt: 75 and 80. BWT: 50 − 80 and 60 − 80.
    assert plain["seeds"] == "2"
    assert plain["final score"] == "65.0 ± 7.1"
    assert plain["difference to plain"] == "reference"
    assert plain["when learnt"] == "77.5 ± 3.5"
    assert plain["BWT"] == "−25.0 ± 7.1"
    assert plain["forgetting"] == "25.0 ± 7.1"
    assert plain["retention ratio"] == "0.69 ± 0.09"  # 5/8 and 6/8
    assert (plain["worst site"], plain["sd over sites"]) == ("55.0 ± 7.1", "14.1 ± 0.0")  # 20/√2 both times
    # 2 sites: (2 + 3) MB each
    assert (plain["rounds"], plain["local steps"], plain["MB up"], plain["step cost"]) == ("2", "5", "10.0", "1.00")
    assert plain["trials"] == "–"
    # keel has the first seed alone: 70 against 60
    assert (keel["seeds"], keel["final score"], keel["difference to plain"]) == ("1 of 2", "70.0", "+10.0")
    # every row of A is 0.2 ahead, none of B: 0.1 in every resample
    assert keel["95 % interval"] == "+10.0 to +10.0"
    assert (keel["trials"], keel["step cost"]) == ("7", "2.00")
    assert (keel["held-out SSI"], keel["held-out fall"]) == ("0.93", "5.0")
    # local-only: 30 and 50 on all rows, its own scores 30 and 50
    local = found["local-only"]
    assert (local["final score"], local["worst site"], local["difference to plain"]) == ("40.0", "30.0", "−20.0")
    assert (local["MB up"], local["rounds"], local["95 % interval"]) == ("–", "–", "–")


def test_a_failed_run_is_told_with_its_last_line(suite: Suite) -> None:
    notes = score_table(suite, "s", results_of(suite, "s"), {}).notes
    assert "k2 failed: fedkeel: the disk | is full" in notes


def test_a_method_whose_every_run_failed_stays(tmp_path: Path) -> None:
    write_plan(tmp_path, [("p1", "s", "plain", 1), ("k1", "s", "keel", 1), ("m1", "s", "more", 1)])
    write_run(tmp_path / "p1", scored("p1", 1, {"A": 0.5}, {}))
    (tmp_path / "k1.failed").write_text("exit status 1\nout of memory\n")
    found = cells(read_suite(tmp_path))
    assert (found["keel"]["final score"], found["keel"]["seeds"]) == ("failed", "0 of 1")
    assert (found["more"]["final score"], found["more"]["seeds"]) == ("–", "0 of 1")
    assert "BWT" not in found["keel"]  # nobody has it


def test_an_unfinished_run_counts_for_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "p2" / "state.json").write_text('{"finished": false}')
    suite = read_suite(folder)
    assert {r.name: r.state for r in suite.runs} == {
        "b1": "finished",
        "p1": "finished",
        "p2": "unfinished",
        "k1": "finished",
        "k2": "failed",
    }
    assert cells(suite)["plain (reference)"]["seeds"] == "1 of 2"
    assert cells(suite)["plain (reference)"]["final score"] == "60.0"
    states = [line[4] for line in run_table(suite).lines]
    assert states == ["finished", "finished", "unfinished", "finished", "failed"]


def test_tasks_at_chance_are_left_out_of_averages(tmp_path: Path) -> None:
    folder = make(tmp_path)
    # bars: 0.5 + 2 √(0.25/10) = 0.816 < 0.9; 0.5 + 2 √(0.25/400) = 0.55, not exceeded by 0.55
    told = {"s": {"A": {"majority": 0.5, "rows": 10}, "B": {"majority": 0.5, "rows": 400}}}
    (folder / "chance.json").write_text(json.dumps(told))
    suite = read_suite(folder)
    lines = lines_of(suite, "s")
    found = chances_of(suite, "s", lines)
    assert {task: c.out for task, c in found.items()} == {"A": False, "B": True}
    table = chance_table("s", found)
    assert table.lines == (
        ("A", "10", "50.0", "81.6", "90.0", "kept"),
        ("B", "400", "50.0", "55.0", "55.0", "left out"),
    )
    out = cells(suite, ("B",))
    plain = out["plain (reference)"]
    assert (plain["final score"], plain["BWT"], plain["when learnt"]) == ("55.0 ± 7.1", "−25.0 ± 7.1", "80.0 ± 0.0")
    assert out["keel"]["95 % interval"] == "+20.0 to +20.0"
    tasks = task_table("s", results_of(suite, "s", ("B",)), found)
    assert tasks.header == ("task", "majority share", "centralised", "local-only", "base", "keel", "plain")
    assert tasks.lines == (
        ("A", "50.0", "90.0", "40.0", "10.0", "70.0", "55.0"),
        ("B †", "50.0", "55.0", "40.0", "30.0", "70.0", "75.0"),
        ("mean without †", "–", "90.0", "40.0", "10.0", "70.0", "55.0"),
    )


def test_the_rule_needs_both_numbers() -> None:
    assert chances({"A": (0.5, 100)}, {}) == {}
    assert chances({"A": (0.5, 100)}, {"A": 0.6})["A"].out  # the bar is 0.6 itself
    assert not chances({"A": (0.5, 100)}, {"A": 0.601})["A"].out


def test_a_stage_whose_tasks_are_all_left_out() -> None:
    """A (stage 1) goes 80, 50, 40; B (stage 2) 70, 60; C (stage 3) 90."""
    rows = [
        *scored("r", 1, {"A": 0.8}, {}, stage=0, stages=(0.8,)),
        *scored("r", 1, {"A": 0.5, "B": 0.7}, {}, stage=1, stages=(0.5, 0.7)),
        *scored("r", 1, {"A": 0.4, "B": 0.6, "C": 0.9}, {}, stage=2, stages=(0.4, 0.6, 0.9)),
    ]
    assert tasks_by_stage(rows, "federated") == [["A"], ["B"], ["C"]]
    assert stream_numbers(stage_matrix(rows))["bwt"] == pytest.approx((-0.4 - 0.1) / 2)
    without_b = stage_matrix(rows, "federated", ("B",))
    assert without_b == {0: {0: 0.8}, 2: {0: 0.4, 2: 0.9}}
    assert stream_numbers(without_b) == pytest.approx(
        {"learnt": 0.85, "final": 0.65, "bwt": -0.4, "forgetting": 0.4, "retention": 0.5}
    )
    # without the last task, what came last still tells what is left of the others
    without_c = stage_matrix(rows, "federated", ("C",))
    assert without_c == {0: {0: 0.8}, 1: {0: 0.5, 1: 0.7}, 2: {0: 0.4, 1: 0.6}}
    assert stream_numbers(without_c) == pytest.approx(
        {"learnt": 0.75, "final": 0.5, "bwt": -0.25, "forgetting": 0.25, "retention": (0.5 + 6 / 7) / 2}
    )
    assert final_score(rows, "federated", ("C",)) == pytest.approx(0.5)
    assert stage_matrix(rows, "federated", ("A", "B", "C")) == {}


def test_a_task_that_grows_with_the_stages_keeps_its_scores() -> None:
    rows = [
        *scored("r", 1, {"A": 0.8}, {}, stage=0, stages=(0.8,)),
        *scored("r", 1, {"A": 0.6}, {}, stage=1, stages=(0.5, 0.7)),
    ]
    assert tasks_by_stage(rows, "federated") is None
    assert stage_matrix(rows, "federated", ("other",)) == {0: {0: 0.8}, 1: {0: 0.5, 1: 0.7}}
    assert stream_numbers(stage_matrix(rows))["forgetting"] == pytest.approx(0.3)


def test_interval_of_equal_differences_has_no_width() -> None:
    """Pairing: the rows' scores differ wildly, their differences do not. Strata: A is 0 and B is 1 ahead, whatever is drawn."""
    other = {1: {"A": {str(k): k / 10 for k in range(9)}, "B": {str(k): 0.0 for k in range(5)}}}
    mine = {1: {"A": other[1]["A"], "B": {str(k): 1.0 for k in range(5)}}}
    found = paired_difference(mine, other, "x")
    assert found is not None
    assert (found.mean, found.low, found.high, found.rows, found.seeds) == (0.5, 0.5, 0.5, 14, 1)


def test_interval_is_that_of_its_slow_twin() -> None:
    """Two seeds, one task; the second seed lacks a row. A row is drawn with all its seeds."""
    mine = {1: {"A": {"a": 1.0, "b": 0.0, "c": 1.0}}, 2: {"A": {"a": 1.0, "b": 1.0}}}
    other = {1: {"A": {"a": 0.0, "b": 0.0, "c": 1.0}}, 2: {"A": {"a": 0.0, "b": 0.5}}}
    rows = [[1.0, 1.0], [0.0, 0.5], [0.0]]
    found = paired_difference(mine, other, "x", resamples=500)
    assert found is not None
    assert found.mean == pytest.approx(2.5 / 5)
    draws = numpy_generator(0, "report-interval", "x").integers(3, size=(500, 3))
    means = []
    for draw in draws:
        held = [value for k in draw for value in rows[k]]
        means.append(sum(held) / len(held))
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])))
    assert found.low == pytest.approx(0.0)  # c, c, c: 1 in 27 draws


def test_interval_covers_what_it_says() -> None:
    """Normal differences of known mean: the interval's half width is about 1.96 standard errors."""
    generator = numpy_generator(3, "test")
    n = 2000
    values = generator.normal(0.1, 0.5, n)
    mine = {1: {"A": {str(k): float(v) for k, v in enumerate(values)}}}
    other = {1: {"A": {str(k): 0.0 for k in range(n)}}}
    found = paired_difference(mine, other, "y")
    assert found is not None
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / math.sqrt(n), rel=0.1)


def test_no_shared_row_gives_no_interval() -> None:
    assert paired_difference({1: {"A": {"a": 1.0}}}, {2: {"A": {"a": 1.0}}}) is None
    assert paired_difference({1: {"A": {"a": 1.0}}}, {1: {"A": {"b": 1.0}}}) is None
    assert paired_difference({}, {}) is None


def square_suite(folder: Path) -> tuple[Suite, list[Result]]:
    scores = {"plain": (0.5, 0.6), "guidance": (0.6, 0.65), "structure": (0.55, 0.6), "full": (0.7, 0.75), "part": (0.52, 0.6)}
    runs = [(f"{m}-s{k}", "s", m, k) for m in scores for k in (1, 2)]
    square = ["plain", "guidance", "structure", "full"]
    write_plan(folder, runs, square=square, factors=["guidance", "structure"])
    for method, finals in scores.items():
        for k, final in enumerate(finals, 1):
            write_run(folder / f"{method}-s{k}", scored(f"{method}-s{k}", k, {"A": final}, {}))
    suite = read_suite(folder)
    return suite, results_of(suite, "s")


def test_square_by_hand(tmp_path: Path) -> None:
    suite, results = square_suite(tmp_path)
    found = interaction(results, suite.square)
    # 70 − 60 − 55 + 50 = 5 and 75 − 65 − 60 + 60 = 10
    assert [found[k]["interaction"] for k in (1, 2)] == pytest.approx([0.05, 0.10])
    table = square_table(suite, "s", results)
    assert table.header == ("", "method", "mean ± sd", "seed 1", "seed 2")
    assert table.lines[0] == ("neither", "plain", "55.0 ± 7.1", "50.0", "60.0")
    assert table.lines[4] == ("gain of guidance alone", "–", "+7.5 ± 3.5", "+10.0", "+5.0")
    assert table.lines[7] == ("interaction", "–", "+7.5 ± 3.5", "+5.0", "+10.0")
    (part,) = parts_table(suite, "s", results).lines
    assert part == ("part", "what part is", "56.0 ± 5.7", "+1.0 ± 1.4", "–")


def test_square_without_one_of_its_four_is_no_square(tmp_path: Path) -> None:
    suite, results = square_suite(tmp_path)
    assert interaction([r for r in results if r.line.name != "full"], suite.square) == {}


def test_knobs_by_hand(tmp_path: Path) -> None:
    runs = [("p1", "s", "plain", 1), ("a1", "s", "distill.weight=2", 1), ("b1", "s", "distill.weight=0.5", 1)]
    knobs = {"distill.weight": {"2": "distill.weight=2", "0.5": "distill.weight=0.5", "9": "distill.weight=9"}}
    write_plan(tmp_path, runs, knobs=knobs)
    for name, score in (("p1", 0.6), ("a1", 0.5), ("b1", 0.65)):
        recipe = "[distill]\nweight = 1.0\n" if name == "p1" else "[distill]\nweight = 7\n"
        write_run(tmp_path / name, scored(name, 1, {"A": score}, {}), recipe=recipe)
    suite = read_suite(tmp_path)
    assert knob_table(suite, "s", results_of(suite, "s"), "distill.weight").lines == (
        ("0.5", "1", "65.0", "+5.0", "–"),
        ("1.0 (reference)", "1", "60.0", "reference", "–"),
        ("2", "1", "50.0", "−10.0", "–"),
    )


def test_methods_tell_what_differs_from_the_reference(suite: Suite) -> None:
    assert method_list(suite, "s", results_of(suite, "s")).lines == (
        ("keel", "what keel is", "distill.weight = 0.5"),
        ("plain", "what plain is", "reference"),
    )


def test_retention_by_hand(suite: Suite) -> None:
    table = retention_table("s", results_of(suite, "s"))
    assert table.header == ("method", "KL to base, nats", "CKA to stage ends")
    assert table.lines == (("keel", "0.250", "0.850"), ("plain", "–", "–"))


def test_the_participation_gap_is_of_each_seed(suite: Suite) -> None:
    results = {r.line.name: r for r in results_of(suite, "s")}
    keel = results["keel"]
    unseen = (0.25, 0.5)
    runs = [
        replace(run, rows=(*run.rows, Row(run.name, "federated", run.seed, 9, "score", score, "share", split="unseen-sites")))
        for run, score in zip(keel.line.runs, unseen, strict=False)
    ]
    finals = [final_score(run.rows, "federated") for run in runs]
    gaps = [final - score for final, score in zip(finals, unseen, strict=False)]
    table = retention_table("s", [replace(keel, line=replace(keel.line, runs=tuple(runs))), results["plain"]])
    assert table.header[-2:] == ("unseen sites", "participation gap")
    assert table.lines[0][-1] == points_with_sd(gaps)
    assert table.lines[1][-2:] == ("–", "–")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("suite.json", "{", "cannot be read"),
        ("suite.json", '{"name": "x"}', "is not what `fedkeel bench` writes"),
        ("chance.json", '{"s": {"A": 3}}', "chance.json is not what"),
        ("p1/scores.jsonl", '{"method": "federated"}\n', "scores.jsonl:1"),
        ("p1/recipe.toml", "= 1", "recipe.toml"),
    ],
)
def test_a_broken_suite_is_an_error_that_names_the_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (make(tmp_path) / name).write_text(content)
    with pytest.raises(FedKeelError, match=message):
        read_suite(tmp_path)


def test_the_success_of_a_backdoor_is_a_column_where_there_is_one(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for run, seed, value in (("p1", 1, 0.25), ("p2", 2, 0.75)):
        with (folder / run / "rows.jsonl").open("a") as rows:
            rows.write(json.dumps(asdict(one_row(run, seed, "attack_success", value, split="test"))) + "\n")
    suite = read_suite(folder)
    found = cells(suite)
    assert found["plain (reference)"]["attack success"] == "50.0 ± 35.4"
    assert found["keel"]["attack success"] == "–"
    assert any("given the target" in note for note in score_table(suite, "s", results_of(suite, "s"), {}).notes)


def test_without_a_backdoor_it_is_not_spoken_of(suite: Suite) -> None:
    table = score_table(suite, "s", results_of(suite, "s"), {})
    assert "attack success" not in table.header
    assert not any("attack" in note for note in table.notes)
