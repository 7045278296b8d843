"""The numbers behind the pictures, against numbers worked out by hand, and the page that holds them."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import altair
import pytest
import vl_convert
from jsonschema.validators import validator_for
from suites import ODD, damages, one_leg, one_row, whole_run, whole_suite

from fedkeel.evidence.report import run_charts, suite_charts, suite_markdown, write_report, write_suite_report
from fedkeel.evidence.report.charts import Chart, Grid, Heat, Panel, Point, Series, chart_table, heat_table
from fedkeel.evidence.report.figures import Figure, chart_figure, figures_of, heat_figure
from fedkeel.evidence.report.page import Page, Section, Text, render
from fedkeel.evidence.report.pictures import run_pictures, still
from fedkeel.evidence.report.privacy import privacy_table
from fedkeel.evidence.report.results import results_of
from fedkeel.evidence.report.run_numbers import held_out, under_damage
from fedkeel.evidence.report.run_page import Run
from fedkeel.evidence.report.styles import DASHES, HUES, INK, PAPER, SHAPES, run_styles, styles_of
from fedkeel.evidence.report.suite import Suite, read_suite
from fedkeel.evidence.report.suite_tables import score_table
from fedkeel.evidence.report.tables import Table
from fedkeel.types import Row

RUN = one_leg("demo", 1, 0.1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `whole_suite`, which is read and not changed."""
    return whole_suite(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def suite(whole: Path) -> Suite:
    return read_suite(whole)


@pytest.fixture(scope="module")
def figures(suite: Suite) -> list[Figure]:
    return list(all_figures(suite))


def test_learning_curves_by_hand() -> None:
    """Validation: (60) after round 2, (50 + 70)/2 after round 4. Loss at a and b: 2/n and 2/n + 0.25."""
    chart = run_charts.learning(RUN)
    assert chart is not None
    scores, losses = chart.panels
    assert [(p.x, round(p.y, 6)) for p in scores.series[0].points] == [(2, 60.0), (4, 60.0)]
    assert losses.series[0].points[1] == Point(2, 1.125, 1.0, 1.25)
    assert chart.starts == (2.5,)
    table = chart_table(chart)
    assert table.header == ("panel", "at", "federated")
    assert table.lines[:3] == (
        ("Validation score", "2", "60.00"),
        ("Validation score", "4", "60.00"),
        ("Training loss over sites", "1", "2.12 (2.00 to 2.25)"),
    )
    assert table.rules == (2,)


def test_the_stage_matrix_by_hand() -> None:
    """80 after stage 1; 60 and 80 after stage 2: backward transfer 60 − 80."""
    heat = run_charts.stages(RUN)
    assert heat is not None
    (grid,) = heat.grids
    assert [[v if v is None else round(v, 6) for v in line] for line in grid.cells] == [[80.0, None], [60.0, 80.0]]
    assert grid.finding == (
        "federated: after the last stage, the stages' rows score 60.0, 80.0 points; "
        "backward transfer −20.0, forgetting 20.0 points."
    )
    assert heat_table(heat).lines == (("after stage 1", "80.0", "–"), ("after stage 2", "60.0", "80.0"))


def test_traffic_adds_up_all_that_was_sent() -> None:
    """1.1 MB up and as much down of two sites a round: 4.4 MB, so 8.8 after round 2."""
    chart = run_charts.traffic(RUN)
    assert chart is not None
    assert [(round(float(p.x), 6), round(p.y, 6)) for p in chart.panels[0].series[0].points] == [(8.8, 60.0), (17.6, 60.0)]


def test_sites_from_the_worst() -> None:
    rows = [one_row("demo", 1, "own_score", v, site=s, split="test") for s, v in (("a", 0.7), ("b", 0.5), ("c", 0.9))]
    rows += [one_row("demo", 1, "own_score", v, method="local", site=s, split="test") for s, v in (("a", 0.8), ("b", 0.4))]
    found = run_charts.sites(rows)
    assert found is not None
    chart, table = found
    federated = next(s for s in chart.panels[0].series if s.name == "federated")
    assert [p.x for p in federated.points] == ["b", "a", "c"]
    assert chart.finding == (
        "federated: 70.0 points in the mean over sites, from 50.0 to 90.0. "
        "It is above the site's own local-only model at 1 of 2 sites."
    )
    assert table.lines[1] == ("federated", "3", "50.0", "50.0", "70.0", "90.0", "20.0")


def test_drift_keeps_the_order_of_layers() -> None:
    heat = run_charts.drift(RUN)
    assert heat is not None
    assert heat.grids[0].lines == ("layer.2", "layer.10")
    # layer.10 in round 1: 1 + 1.0 + 0.2 + 0.1
    assert heat.grids[0].cells[1][0] == pytest.approx(2.3)
    assert "most in layer.10, with D = 2.60" in heat.grids[0].finding


def test_gates_are_means_with_quartiles() -> None:
    chart = run_charts.gates(RUN)
    assert chart is not None
    gate, strength = chart.panels
    first = gate.series[0].points[0]
    assert (first.y, first.low, first.high) == pytest.approx((0.52, 0.42, 0.62))
    assert math.isnan(strength.series[0].points[0].low)


def test_held_out_damage_comes_first_and_trained_damage_stands_apart() -> None:
    chart = run_charts.stability(damages("demo", 1, 0.7, True))
    assert chart is not None
    assert [(p.title, p.apart) for p in chart.panels] == [
        ("noise, held out", False),
        ("bits, held out", False),
        ("heads, trained on", True),
    ]
    noise, bits, _ = (panel.series[0].points for panel in chart.panels)
    assert [(p.x, round(p.y, 6)) for p in noise] == [(0.0, 70.0), (0.05, 65.0), (0.1, 60.0)]
    assert (noise[1].low, noise[1].high) == pytest.approx((64.0, 66.0))
    assert [p.x for p in bits] == ["none", "8", "4"]
    assert "loses 5.0 points on average, SSI 0.900" in chart.finding
    table = chart_table(chart)
    assert table.lines[0] == ("noise", "held out", "0.05", "65.0", "1.0", "90.0", "0.950", "0.900")
    assert table.lines[-1][:3] == ("heads", "trained on", "0.3")
    assert table.rules == (4,)


def test_what_was_not_measured_has_no_picture() -> None:
    rows = [one_row("demo", 1, "score", 0.5, split="test")]
    for draw in (
        run_charts.learning,
        run_charts.stages,
        run_charts.traffic,
        run_charts.sites,
        run_charts.drift,
        run_charts.gates,
    ):
        assert draw(rows) is None
    assert run_charts.stability([]) is None
    assert run_charts.site_cka([]) is None
    assert run_charts.kept_table(rows, []).lines == ()


def test_one_curve_of_several_seeds() -> None:
    """10 and 20 at x = 1: 15 ± 7.07; at x = 2 one seed alone."""
    first, second = suite_charts.pooled([{1.0: 10.0, 2.0: 5.0}, {1.0: 20.0}])
    assert (first.x, first.y, first.high - first.y) == pytest.approx((1.0, 15.0, math.sqrt(50)))
    assert (second.x, second.y) == (2.0, 5.0)
    assert math.isnan(second.low)


def test_suite_pictures_by_hand(suite: Suite) -> None:
    """Seeds shift scores by 2 and 4 points, methods by what whole_suite says: full 10, guided 5, the odd one 2."""
    results = results_of(suite, "s")
    forest = suite_charts.differences(suite, results)
    assert forest is not None
    points = {p.x: round(p.y, 6) for s in forest.panels[0].series for p in s.points}
    assert points == {
        "full": 10.0,
        "guided": 5.0,
        ODD: 2.0,
        "train.lr=0.1": 3.0,
        "train.lr=0.4": -3.0,
        "base": -48.0,
        "centralised": 27.0,
    }
    # A 80 when learnt and 50 in the end, B 70, each but A's first shifted; the base has one stage, so nothing to keep
    kept = suite_charts.kept(results)
    assert kept is not None
    learnt, left = ({p.x: round(p.y, 6) for p in s.points} for s in kept.panels[0].series)
    assert list(left) == ["full", "guided", "train.lr=0.1", ODD, "plain", "train.lr=0.4"]
    assert (learnt["full"], left["full"], learnt["plain"], left["plain"]) == (81.5, 73.0, 76.5, 63.0)
    assert kept.finding == "full ends best, with 73.0 points, 81.5 when learnt; the least is forgotten under full, 17.0 points."
    square = suite_charts.square(suite, "s", results)
    assert square is not None
    # without guidance 63 and 65, with it 68 and 73: 73 − 68 − 65 + 63
    assert [round(p.y, 6) for s in square.panels[0].series for p in s.points] == [63.0, 68.0, 65.0, 73.0]
    assert square.finding.endswith("+3.0 ± 0.0 points.")
    knob = suite_charts.knob(suite, "s", results, "train.lr", 1)
    assert knob is not None
    value, reference = knob.panels[0].series
    assert [(p.x, round(p.y, 6)) for p in value.points] == [(0.1, 66.0), (0.2, 63.0), (0.4, 60.0)]
    assert [(p.x, round(p.y, 6)) for p in reference.points] == [(0.2, 63.0)]
    stability = suite_charts.stability(results)
    assert stability is not None
    assert [p.title for p in stability.panels] == ["noise, held out", "bits, held out", "heads, trained on by 2 of 6"]
    assert {s.name for s in stability.panels[2].series if s.apart} == {"full", ODD}
    # heads is no held-out family of this suite, as two methods used it: noise and bits, each 5 and 10 points below
    assert held_out(run.measures for run in suite.runs) == ["noise", "bits"]
    assert all(r.held_out_fall == pytest.approx((0.075, 0.075)) for r in results if r.line.runs and not r.line.baseline)
    drift = suite_charts.drift(results)
    assert drift is not None
    assert [p.x for p in drift.panels[0].series[0].points] == ["layer.2", "layer.10"]


def test_runs_are_compared_on_damage_that_none_of_them_trained_on() -> None:
    def damage(trained: str, **scores: float) -> list[Row]:
        told = [("damage/clean", 0.9)]
        for family, score in scores.items():
            told += [(f"damage/{family}/trained", float(family == trained)), (f"damage/{family}/ssi", score)]
            told.append((f"damage/{family}/0.5/score", score))
        return [one_row("r", 1, name, value, split="test") for name, value in told]

    plain = damage("", heads=0.3, noise=0.8, bits=0.7)
    disturbed = damage("heads", heads=0.6, noise=0.8, skip=0.2)
    assert held_out([plain, [], disturbed]) == ["noise"]  # heads was used by one, bits and skip measured in one alone
    assert held_out([plain]) == ["heads", "noise", "bits"]
    assert held_out([[]]) == []
    assert under_damage(plain, ["noise"]) == pytest.approx((0.8, 0.1))
    assert under_damage(plain, ["heads", "noise"]) == pytest.approx((0.55, 0.35))
    assert under_damage(plain, []) == under_damage([], ["noise"]) == (None, None)


def test_a_table_says_where_no_damage_was_held_out_of_all(suite: Suite) -> None:
    only_heads = [r for r in damages("r", 1, 0.7, True) if "/noise/" not in r.name and "/bits/" not in r.name]
    suite = replace(suite, runs=[replace(run, measures=only_heads) for run in suite.runs])
    table = score_table(suite, "s", results_of(suite, "s"), {})
    assert not {"held-out SSI", "held-out fall"} & set(table.header)
    assert any("of no family that every method's training had left alone" in note for note in table.notes)
    assert not any("Not measured" in note and "held-out" in note for note in table.notes)


def test_no_two_styles_are_the_same() -> None:
    names = [f"method {n}" for n in range(24)]
    styles = styles_of(["base", "local-only", "centralised", *names], "method 3")
    assert len({(s.colour, s.dash, s.symbol) for s in styles.values()}) == 27
    assert styles["method 3"].colour == INK
    without_colour = {(s.dash, s.symbol) for name, s in styles.items() if name.startswith("method") and name != "method 3"}
    assert len(without_colour) == 23


def test_the_colours_are_those_of_okabe_and_ito() -> None:
    assert [light for light, _ in HUES] == ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    assert run_styles()["federated"].colour[0] == "#0072B2"


def layers(figure: Figure, mark: str, panel: int = 0) -> Iterator[Mapping[str, Any]]:
    """The layers of a panel that are drawn with a mark, in their order."""
    return (layer for layer in figure.specs[panel]["layer"] if layer["mark"]["type"] == mark)


def lines_of(spec: Mapping[str, Any], of: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """The lines of data that a specification, or a layer of it with data of its own, draws."""
    data = (of or spec)["data"]
    return list(data["values"] if "values" in data else spec["datasets"][data["name"]])


def in_series(layer: Mapping[str, Any], channel: str) -> dict[str, Any]:
    """series -> what it has in a channel, a colour as it is on a light page."""
    scale = layer["encoding"][channel]["scale"]
    light = (held["expr"].rpartition("'#")[2].rstrip("'") if isinstance(held, dict) else held for held in scale["range"])
    return dict(zip(scale["domain"], light, strict=True))


def test_a_figure_holds_the_numbers_of_its_chart() -> None:
    series = Series("<b>", (Point(1.0, 2.0, 1.5, 2.5), Point(2.0, math.nan)))
    chart = Chart("key", "Title", "Finding.", (Panel("", "round", "score", (series,)),), spread="range", starts=(1.5,))
    figure = chart_figure(chart, run_styles())
    (spec,) = figure.specs
    first, second = lines_of(spec)
    told = {"tip": "<b>\nround 1: 2.0 (1.5 to 2.5)", "label": "2.0", "series": "<b>", "marked": True}
    assert first == {"at": 1.0, "value": 2.0, "low": 1.5, "high": 2.5, **told}
    assert (second["at"], second["value"], second["low"], second["tip"]) == (2.0, None, None, "<b>\nround 2: not finite")
    (rule,), (band,), (line,), (points,) = (list(layers(figure, mark)) for mark in ("rule", "area", "line", "point"))
    assert lines_of(spec, rule) == [{"at": 1.5}]
    assert rule["encoding"]["x"]["field"] == "at"
    assert [band["encoding"][channel]["field"] for channel in ("x", "y", "y2")] == ["at", "low", "high"]
    assert [line["encoding"][channel]["field"] for channel in ("x", "y")] == ["at", "value"]
    assert [points["encoding"][channel]["field"] for channel in ("x", "y")] == ["at", "value"]
    assert figure.legend == ()  # one series: nothing to choose among
    assert figure.table.lines == (("1", "2.0 (1.5 to 2.5)"), ("2", "not finite"))


def test_a_series_is_told_by_dash_and_mark_too() -> None:
    names = ("a", "b", "federated")
    panel = Panel("", "round", "score", tuple(Series(name, (Point(1.0, 2.0), Point(2.0, 3.0))) for name in names))
    figure = chart_figure(Chart("key", "Title", "Finding.", (panel,)), run_styles())
    (line,), (points,) = layers(figure, "line"), layers(figure, "point")
    assert in_series(line, "stroke") == {"a": "0072B2", "b": "D55E00", "federated": "0072B2"}
    assert in_series(points, "shape") == {"a": SHAPES["square"], "b": SHAPES["diamond"], "federated": SHAPES["circle"]}
    assert in_series(line, "strokeDash") == {name: list(DASHES["solid"]) for name in names}
    assert [entry.name for entry in figure.legend] == list(names)


def test_of_long_curves_some_points_are_marked_and_of_a_long_one_alone_none() -> None:
    """100 points: every 12th of each, the second series' half of that later; every point can be pointed at."""

    def marked(count: int) -> list[list[int]]:
        series = tuple(Series(f"s{k}", tuple(Point(float(n), 1.0 * n) for n in range(100))) for k in range(count))
        (spec,) = chart_figure(Chart("key", "T", "F.", (Panel("", "round", "score", series),)), {}).specs
        found = lines_of(spec)
        assert len(found) == 100 * count
        return [[line["at"] for line in found if line["marked"] and line["series"] == s.name] for s in series]

    assert marked(1) == [[]]
    assert marked(2) == [[0, 12, 24, 36, 48, 60, 72, 84, 96], [6, 18, 30, 42, 54, 66, 78, 90]]


def test_rows_of_dots_stand_beside_their_names_with_bars() -> None:
    """Every dot of many: two seeds' differences, a baseline set apart, and zero, which they are held against."""
    methods = Series("methods", tuple(Point(f"m{n}", 0.5 * n, 0.5 * n - 1, 0.5 * n + 1) for n in range(50)))
    baselines = Series("baselines", (Point("base", -3.0),), apart=True)
    panel = Panel("Final test score", "difference, points", "", (methods, baselines))
    figure = chart_figure(Chart("differences", "T", "F.", (panel,), "rows", "sd", "bars", (0.0,)), {})
    (spec,) = figure.specs
    zero, bar = layers(figure, "rule")
    assert lines_of(spec, zero) == [{"value": 0.0}]
    assert (zero["encoding"]["x"]["field"], bar["encoding"]["x2"]["field"]) == ("value", "high")
    dots = list(layers(figure, "point"))[-1]
    assert dots["encoding"]["y"]["scale"]["domain"] == [*(f"m{n}" for n in range(50)), "base"]
    assert dots["encoding"]["x"]["title"] == "difference, points"
    assert in_series(dots, "fill") == {"methods": "0072B2", "baselines": PAPER[0].removeprefix("#")}  # hollow
    assert all(line["marked"] for line in lines_of(spec))
    assert [(entry.name, entry.hollow) for entry in figure.legend] == [("methods", False), ("baselines", True)]


def test_names_in_any_script_and_with_any_sign_are_shown_as_they_are() -> None:
    names = ("a.b[0]", "\"q\" 'r' <i>&", "日本語", "العربية", "two\nlines", "a\u2028b", "datum.value", "null", "\\x")
    points = tuple(Point(name, 1.0 * n) for n, name in enumerate(names))
    panel = Panel("T", "x", "y", (Series(names[1], points), Series(names[0], points[:1], apart=True)))
    drawn = vl_convert.vegalite_to_svg(still([Chart("key", "T", "F.", (panel,), "rows")]))
    texts = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn)]
    assert {*names} <= {*texts}
    assert texts.count(names[0]) == texts.count(names[1]) == 2  # in the legend too
    assert {f"{1.0 * n}" for n in range(len(names))} <= {*texts}


def test_logarithms_have_no_place_for_nothing_sent() -> None:
    panel = Panel("", "MB", "score", (Series("federated", (Point(0.0, 2.0), Point(10.0, 3.0))),), log_x=True)
    (spec,) = chart_figure(Chart("key", "T", "F.", (panel,)), run_styles()).specs
    assert [line["at"] for line in lines_of(spec)] == [None, 10.0]
    none = Panel("", "MB", "score", (Series("federated", (Point(0.0, 2.0),)),), log_x=True)
    assert chart_figure(Chart("key", "T", "F.", (none,)), run_styles()).table.lines == (("0", "2.0"),)


def test_damage_that_training_had_used_is_drawn_on_a_tint_and_all_families_on_one_scale() -> None:
    figure = chart_figure(run_charts.stability(damages("demo", 1, 0.7, True)), run_styles())
    assert ["view" in spec for spec in figure.specs] == [False, False, True]
    ends = [next(layers(figure, "line", n))["encoding"]["y"]["scale"]["domain"] for n in range(3)]
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][0] < 60.0 < 70.0 < ends[0][1]
    assert [line["at"] for line in lines_of(figure.specs[1])] == ["none", "8", "4"]


def test_what_is_learnt_is_joined_to_what_is_kept(suite: Suite) -> None:
    kept = suite_charts.kept(results_of(suite, "s"))
    (figure,) = figures_of(kept, {})
    joined = next(layers(figure, "rule"))
    ends = {line["at"]: (line["low"], line["high"]) for line in lines_of(figure.specs[0], joined)}
    assert ends["full"] == pytest.approx((81.5, 73.0))


def test_a_heat_map_holds_its_cells() -> None:
    heat = run_charts.stages(RUN)
    assert isinstance(heat, Heat)
    figure = heat_figure(heat)
    (spec,) = figure.specs
    cells = [(line["y"], line["x"], line["label"]) for line in lines_of(spec)]
    assert cells == [
        ("after stage 1", "stage 1", "80.0"),
        ("after stage 1", "stage 2", ""),
        ("after stage 2", "stage 1", "60.0"),
        ("after stage 2", "stage 2", "80.0"),
    ]
    assert [line["value"] for line in lines_of(spec)][1] is None
    (rect,) = layers(figure, "rect")
    assert rect["encoding"]["fill"]["scale"]["domain"] == [0.0, 100.0]
    assert lines_of(spec)[2]["tip"] == "federated\nafter stage 2, test rows of stage 1: 60.0"
    assert figure.choices == ()


def test_of_several_grids_one_is_shown() -> None:
    """The first cell of the second grid is empty; its column still comes first."""
    first = Grid("a.b", "a.b: finding", ("l",), ("c1", "c2"), ((1.0, 3.0),))
    second = Grid("x['y']", "second: finding", ("l", "m"), ("c1", "c2"), ((None, 2.0), (4.0, math.nan)))
    figure = heat_figure(Heat("key", "T", "x", "y", "points", (first, second)))
    (spec,) = figure.specs
    assert {one["name"]: one["value"] for one in spec["params"]}["hidden"] == ["x['y']"]
    assert figure.choices == (("a.b", "a.b: finding"), ("x['y']", "second: finding"))
    params = [{**one, "value": ["a.b"]} if one["name"] == "hidden" else one for one in spec["params"]]
    chosen = {**spec, "width": 300, "params": params}
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", vl_convert.vegalite_to_svg(chosen))
    assert [text for text in texts if text] == ["2.0", "4.0", "not finite", "c1", "c2", "x", "l", "m"]


def all_figures(suite: Suite) -> Iterator[Figure]:
    """Every figure of the page of a run and of that of a suite, both with all that can be measured."""
    results = results_of(suite, "s")
    sites, of_suite = run_charts.sites(RUN), suite_charts.sites(results)
    measures = damages("demo", 1, 0.7, True)
    of_run = (
        run_charts.learning,
        run_charts.stages,
        run_charts.traffic,
        run_charts.methods,
        run_charts.drift,
        run_charts.gates,
    )
    of_results = (
        suite_charts.learning,
        suite_charts.stability,
        suite_charts.traffic,
        suite_charts.kept,
        suite_charts.drift,
        suite_charts.gates,
    )
    drawn = [
        *(make(RUN) for make in of_run),
        *(make(results) for make in of_results),
        run_charts.stability(measures),
        sites and sites[0],
        suite_charts.stages(results, ()),
        suite_charts.differences(suite, results),
        suite_charts.square(suite, "s", results),
        suite_charts.knob(suite, "s", results, "train.lr", 1),
        of_suite and of_suite[0],
    ]
    for chart in drawn:
        assert chart is not None
        yield from figures_of(chart, styles_of(["base", "local-only", "federated", "centralised", *suite.methods], "plain"))


def test_every_specification_is_what_vega_lite_reads(suite: Suite, figures: list[Figure]) -> None:
    """They are built without Altair's check; here each is held against the whole schema, and compiled."""
    schema = altair.load_schema()
    validator = validator_for(schema)(schema)
    checked = 0
    for figure in figures:
        for spec in figure.specs:
            validator.validate(json.loads(json.dumps(spec)))
            assert vl_convert.vegalite_to_vega(spec)["marks"]
            checked += 1
    assert checked == 28
    for charts in (run_pictures(RUN), [suite_charts.kept(results_of(suite, "s"))]):
        validator.validate(json.loads(json.dumps(still(charts))))


def test_no_name_is_a_column_or_part_of_an_expression(figures: list[Figure]) -> None:
    """Names may hold dots, brackets and quotes: they are values, and every column and expression is one of ours."""

    def found(value: Any, key: str) -> Iterator[str]:
        if isinstance(value, dict):
            for name, held in value.items():
                if name == key and isinstance(held, str):
                    yield held
                yield from found(held, key)
        elif isinstance(value, list):
            for held in value:
                yield from found(held, key)

    seen = 0
    for figure in figures:
        for spec in figure.specs:
            columns = {key for lines in spec["datasets"].values() for line in lines for key in line}
            assert columns <= {"at", "value", "low", "high", "series", "marked", "label", "tip", "x", "y"}
            assert {*found(spec, "field")} <= columns
            told = [*found(spec, "expr"), *found(spec, "filter"), *found(spec, "test")]
            assert not [text for text in told if ODD in text or "train.lr" in text]
            seen += ODD in json.dumps(spec["datasets"], ensure_ascii=False).replace('\\"', '"')
    assert seen >= 6


def test_a_page_needs_nothing_but_itself(whole: Path) -> None:
    page = write_suite_report(whole).read_text(encoding="utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 2
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy[1]
    around = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"""(?:src|href)=["'](?!#|data:)""", around) == []
    assert "url(" not in around
    assert "@import" not in around
    assert page.count("window.vegaEmbed") == 1
    assert "unsafe-eval" not in policy[1]
    assert "unsafe-inline" not in policy[1].split("style-src")[0]
    assert "Mike Bostock" in around  # the licences of what the page brings along
    assert ODD not in around
    assert html.escape(ODD) in around
    assert "</script" not in around.replace("</script>\n", "", 1)  # that of the figures' numbers alone
    held = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    figures = json.loads(held[1])
    assert len({one["id"] for one in figures}) == len(figures) == page.count("<figure id=") == page.count('role="img"')
    assert sum(len(one["specs"]) for one in figures) == page.count('<div class="panel">')


def test_a_page_without_figures_has_no_script() -> None:
    table = Table("T", ("a", "b"), (("<i>", "1.0 ± 0.2"),))
    page = render(Page("Title", "kicker", (Text("Lead & more"),), "source", (Section("one", "One", (table,)),)))
    assert "script-src 'none'" in page
    assert "<script>" not in page
    assert '<th scope="row" class="short">&lt;i&gt;</th><td class="n">1.0<small> ± 0.2</small></td>' in page


def test_a_run_leaves_all_its_reports(tmp_path: Path) -> None:
    assert write_report(whole_run(tmp_path / "run")).name == "report.md"
    assert {"report.html", "report.md", "table.md", "curve.svg"} <= {path.name for path in (tmp_path / "run").iterdir()}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 1_500_000
    assert "Run demo, seed 1, recipe.toml beside it, commit 0123456789ab" in page


def test_markdown_of_a_suite(whole: Path) -> None:
    text = suite_markdown(whole)
    assert text.startswith("## s\n\nwhat s is\n\n### s: scores\n")
    titles = re.findall(r"^### (.*)$", text, re.MULTILINE)
    assert titles[0] == "s: scores"
    assert titles[-1] == "s: methods"
    assert "### s: train.lr" in text
    assert "| full | 2 | 73.0 ± 1.4 | +10.0 ± 0.0 |" in text
    assert "| lost | 0 of 2 | failed |" in text
    assert "- r6-1 failed: out of memory" in text
    write_suite_report(whole)
    assert "| full | 2 | 73.0 ± 1.4 |" in (whole / "table.md").read_text()
    assert text in (whole / "report.md").read_text()


def test_a_page_tells_what_privacy_was_promised_and_spent() -> None:
    rows = [one_row("r", 1, "epsilon", value, "epsilon", round=n) for n, value in enumerate((1.2, 1.75, 2.25), 1)]
    told = {"unit": "site", "clip": 0.1, "noise": 4.0, "delta": 1e-5, "epsilon": 3.0, "noise_at": "coordinator", "masks": True}
    assert privacy_table({"privacy": told}, rows).lines == (
        ("what is hidden", "each site's whole contribution"),
        ("ε spent", "2.25 at δ = 1e-05, after 3 rounds"),
        ("ε allowed", "3"),
        ("clipped to", "0.1"),
        ("noise", "z = 4 times that, by the coordinator"),
        ("what the coordinator saw", "sums of the sites' changes alone (secure aggregation)"),
    )
    moved = [*rows, *(one_row("r", 1, "clip", value, "norm", round=n) for n, value in enumerate((0.5, 0.25, 0.2), 1))]
    assert privacy_table({"privacy": told}, moved).lines[3] == ("clipped to", "0.5, moving to 0.2")
    assert privacy_table({"privacy": {"unit": "none", "masks": True}}, []).lines == (
        ("what the coordinator saw", "sums of the sites' changes alone (secure aggregation)"),
    )
    assert not privacy_table({"privacy": {"unit": "none", "masks": False}}, rows).lines
    assert not privacy_table({}, rows).lines


def test_answers_that_nobody_gave_are_no_table() -> None:
    asked = [{"id": "x", "task": "t", "prompt": "p", "wanted": "w"}]
    answers = {"rows": asked, "said": {"base": {"x": ""}, "federated": {"x": ""}}}
    run = Run([one_row("r", 1, "score", 0.5)], [], {}, "", {}, answers=answers)
    assert not run.answers_table().lines
    some = Run(run.rows, [], {}, "", {}, answers={"rows": asked, "said": {"base": {"x": ""}, "federated": {"x": "yes"}}})
    assert some.answers_table().lines == (("t", "p", "w", "yes"),)
