"""A stream beside the same rows dealt evenly, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from suites import one_row, scored, write_plan, write_run

from fedkeel.evidence.report.results import results_of
from fedkeel.evidence.report.suite import Suite, read_suite
from fedkeel.evidence.report.suite_page import write_suite_report
from fedkeel.evidence.report.tables import Table
from fedkeel.evidence.report.twins import twin_table
from fedkeel.types import Row


def rows_of(run: str, seed: int, score: float, drifts: tuple[float, ...]) -> list[Row]:
    """A score of one task, and the drift of two blocks in each round."""
    found = scored(run, seed, {"A": score}, {"a": score}, stage=0, stages=(score,), round=2)
    return found + [one_row(run, seed, f"drift/{n % 2}", d, "ratio", round=1 + n // 2) for n, d in enumerate(drifts)]


def per_row(right: int) -> list[dict[str, object]]:
    """Of forty test rows the first `right` have the score 1."""
    return [{"method": "federated", "site": "", "task": "A", "id": f"{k}", "score": float(k < right)} for k in range(40)]


def suite_of(folder: Path, evenly: int) -> Suite:
    """`plain` has 20 of 40 rows right, 10 under its other seed, and `evenly` on the even twin, under the first seed alone;
    `keel` ran on the stream alone, and `quiet` noted no drift on the twin."""
    runs = [("p1", "s", "plain", 1), ("p2", "s", "plain", 2), ("k1", "s", "keel", 1), ("q1", "s", "quiet", 1)]
    runs += [("e1", "s-iid", "plain", 1), ("e2", "s-iid", "quiet", 1)]
    streams, methods = {"s": "skewed", "s-iid": "dealt evenly"}, {"plain": "", "keel": "", "quiet": ""}
    write_plan(folder, runs, streams=streams, methods=methods, twins={"s": "s-iid"}, trials={})
    write_run(folder / "p1", rows_of("p1", 1, 0.5, (3.0, 1.0, 4.0, 2.0)), scores=per_row(20))
    write_run(folder / "p2", rows_of("p2", 2, 0.25, (9.0, 9.0)), scores=per_row(10))
    write_run(folder / "k1", rows_of("k1", 1, 0.6, (1.0,)), scores=per_row(24))
    write_run(folder / "q1", rows_of("q1", 1, 0.5, (1.0, 2.0)), scores=per_row(20))
    write_run(folder / "e1", rows_of("e1", 1, evenly / 40, (1.0, 1.0, 2.0, 1.0)), scores=per_row(evenly))
    write_run(folder / "e2", rows_of("e2", 1, evenly / 40, ()), scores=per_row(evenly))
    return read_suite(folder)


def table_of(suite: Suite) -> Table:
    return twin_table(suite, "s", results_of(suite, "s", ()), results_of(suite, "s-iid", ()), ())


def test_what_skew_costs_is_told_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    table = table_of(suite_of(tmp_path, 36))
    lines = {line[0]: dict(zip(table.header, line, strict=True)) for line in table.lines}
    assert set(lines) == {"plain", "quiet"}
    plain = lines["plain"]
    assert (plain["final score"], plain["on s-iid"], plain["difference"]) == ("50.0", "90.0", "−40.0")
    # Γ: 1 + the mean of 3, 1, 4 and 2, and 1 + that of 1, 1, 2 and 1
    assert (plain["Γ"], plain["Γ on s-iid"], plain["difference of Γ"]) == ("3.50", "2.25", "1.25")
    low, high = (float(bound.replace("−", "-")) for bound in plain["95 % interval"].split(" to "))
    # 16 of 40 rows differ by one: a deviation of 100 √(0.4 · 0.6 / 40) = 7.7
    assert (low, high) == (pytest.approx(-40 - 1.96 * 7.75, abs=2.5), pytest.approx(-40 + 1.96 * 7.75, abs=2.5))
    assert (lines["quiet"]["Γ"], lines["quiet"]["Γ on s-iid"], lines["quiet"]["difference of Γ"]) == ("2.50", "–", "–")
    assert table.notes[1] == "Skew costs plain 40.0 points here."


def test_a_task_at_chance_on_one_of_the_two_is_in_no_number(tmp_path: Path) -> None:
    """A alike on both; B, which is left out, far apart."""
    runs = [("p", "s", "plain", 1), ("e", "s-iid", "plain", 1)]
    streams = {"s": "skewed", "s-iid": "dealt evenly"}
    write_plan(tmp_path, runs, streams=streams, methods={"plain": ""}, twins={"s": "s-iid"}, trials={})
    for name, b in (("p", 4), ("e", 36)):
        found = scored(name, 1, {"A": 0.5, "B": b / 40}, {"a": 0.5}, stage=0, stages=(0.5,), round=2)
        write_run(tmp_path / name, found, scores=[*per_row(20), *({**row, "task": "B"} for row in per_row(b))])
    suite = read_suite(tmp_path)
    both = [results_of(suite, stream, ()) for stream in ("s", "s-iid")]
    whole, without = (twin_table(suite, "s", *both, left_out) for left_out in ((), ("B",)))
    header = whole.header.index("difference")
    assert whole.lines[0][header] == "−40.0"
    assert without.lines[0][header : header + 2] == ("0.0", "0.0 to 0.0")


def test_a_stream_that_skew_does_not_hurt_is_called_so(tmp_path: Path) -> None:
    table = table_of(suite_of(tmp_path, 21))
    assert (
        table.notes[1] == "plain does not trail its twin beyond chance: too easy a stream to tell methods against skew apart."
    )


def test_the_table_stands_in_the_report_of_the_stream_that_has_a_twin(tmp_path: Path) -> None:
    suite_of(tmp_path, 36)
    write_suite_report(tmp_path)
    assert (tmp_path / "report.md").read_text().count("s: against its even twin") == 1
    assert (tmp_path / "report.html").read_text().count("Skew costs plain 40.0 points here.") == 1
