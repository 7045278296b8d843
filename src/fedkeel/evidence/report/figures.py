"""Charts as Plotly figures: plain dicts, which page.js lays out for the width at hand and colours for a light or dark page.

A colour is a name that page.js knows, such as `@ink` or `@2` or, with an opacity, `@2:0.15`. Texts that Plotly would read as
its own HTML are escaped; names that page.js shortens or writes itself are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkeel.evidence.report.charts import Chart, Grid, Heat, Panel, Point, Series, chart_table, heat_table, point_text, x_text
from fedkeel.evidence.report.tables import Table, number

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
COLOURS = 6  # of page.js, Okabe and Ito's without black and yellow
MARKED = 40  # points; a longer curve gets no markers
BASELINE = ("base", "local-only", "centralised")


@dataclass(frozen=True)
class Figure:
    """spec: what page.js draws. finding: what it shows, in words. table: its numbers."""

    key: str
    title: str
    finding: str
    spec: Mapping[str, Any]
    table: Table


@dataclass(frozen=True)
class Style:
    """How a series is told from others: colour, dash and marker, so that no two differ in colour alone."""

    colour: str
    dash: str
    symbol: str
    width: float = 1.8


def styles_of(names: Sequence[str], reference: str = "") -> dict[str, Style]:
    """A style for every name, the same wherever it appears: the reference in ink and bold, baselines in grey."""
    found: dict[str, Style] = {}
    n = 0
    for name in dict.fromkeys(names):
        if name == reference:
            found[name] = Style("@ink", "solid", "circle", 2.6)
        elif name in BASELINE:
            k = BASELINE.index(name)
            found[name] = Style("@muted", ("dot", "dash", "longdash")[k], ("x", "triangle-down", "square")[k])
        else:
            found[name] = Style(f"@{n % COLOURS}", DASHES[n // COLOURS % len(DASHES)], SYMBOLS[(n + 1) % len(SYMBOLS)])
            n += 1
    return found


def run_styles() -> dict[str, Style]:
    """A run's legs, in the colours of curve.svg."""
    return {
        "base": Style("@muted", "dot", "x"),
        "local-only": Style("@4", "dash", "diamond"),
        "federated": Style("@0", "solid", "circle"),
        "centralised": Style("@2", "longdash", "square"),
    }


OWN = {  # series that are no method
    "held out": Style("@0", "solid", "circle"),
    "trained on": Style("@1", "dash", "square"),
    "methods": Style("@0", "solid", "circle"),
    "baselines": Style("@muted", "solid", "square"),
    "a site of a seed": Style("@0", "solid", "circle"),
    "mean": Style("@1", "solid", "diamond"),
    "part": Style("@0", "solid", "circle"),
    "when learnt": Style("@0", "solid", "circle"),
    "after the last stage": Style("@0", "solid", "circle"),
    "value": Style("@0", "solid", "circle"),
    "reference's value": Style("@1", "solid", "diamond"),
}


def _escape(text: str) -> str:
    """Text that Plotly shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _positions(panel: Panel) -> list[str] | None:
    """The categories of a panel, in their order, or None if its x is a number."""
    found = [p.x for s in panel.series for p in s.points]
    if not any(isinstance(x, str) for x in found):
        return None
    return list(dict.fromkeys(x_text(x) for x in found))


def _finite(values: Sequence[float]) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values]


def chart_figure(chart: Chart, styles: Mapping[str, Style]) -> Figure:
    """The figure of a chart. styles: of its series by name; a name that is not there is one of OWN."""
    across = chart.kind != "rows"  # categories, if any, along x and the measure along y
    traces: list[dict[str, Any]] = []
    panels: list[dict[str, Any]] = []
    legend: dict[str, dict[str, Any]] = {}
    others = styles_of([s.name for panel in chart.panels for s in panel.series if s.name not in {*styles, *OWN}])
    for n, panel in enumerate(chart.panels):
        categories = _positions(panel)
        place = {name: k for k, name in enumerate(categories or ())}
        panels.append({
            "title": panel.title, "x": panel.x, "y": panel.y, "log": panel.log_x, "apart": panel.apart,
            "categories": categories,
        })  # fmt: skip
        for series in panel.series:
            style = styles.get(series.name) or OWN.get(series.name) or others[series.name]
            at = [float(place[x_text(p.x)]) if categories is not None else float(p.x) for p in series.points]
            traces += _traces(chart, panel, series, style, at, n, across)
            entry = {"name": series.name, "colour": style.colour, "dash": style.dash, "symbol": style.symbol}
            entry["mode"] = "lines" if chart.kind == "lines" else "markers"
            legend.setdefault(series.name, entry | {"hollow": series.apart and chart.kind != "lines"})
    spec = {
        "key": chart.key, "kind": chart.kind, "traces": traces, "panels": panels, "legend": list(legend.values()),
        "starts": list(chart.starts), "zero": chart.key in ("differences", "parts"),
        "shared": chart.key == "stability",
    }  # fmt: skip
    return Figure(chart.key, chart.title, chart.finding, spec, chart_table(chart))


def _traces(
    chart: Chart, panel: Panel, series: Series, style: Style, at: Sequence[float], n: int, across: bool
) -> list[dict[str, Any]]:
    axes = {"xaxis": f"x{n + 1}" if n else "x", "yaxis": f"y{n + 1}" if n else "y", "legendgroup": series.name}
    y = [p.y for p in series.points]
    marker = {"symbol": style.symbol + ("-open" if series.apart else ""), "size": 8 if chart.kind != "lines" else 7}
    marker["color"] = style.colour
    trace: dict[str, Any] = {
        "type": "scatter", **axes, "name": series.name,
        "x": _finite(at) if across else _finite(y), "y": _finite(y) if across else _finite(at),
        "mode": "markers" if chart.kind != "lines" else "lines+markers" if len(y) <= MARKED else "lines",
        "marker": marker, "line": {"color": style.colour, "width": style.width, "dash": style.dash},
        "hoverinfo": "text", "hovertext": [_hover(chart, panel, series, p) for p in series.points],
    }  # fmt: skip
    if series.name == "a site of a seed":
        marker |= {"size": 6, "color": "@0:0.55"}
    ends = [(p.low, p.high) for p in series.points]
    known = any(math.isfinite(low) for low, _ in ends)
    if known and chart.drawn == "bars":
        trace["error_y" if across else "error_x"] = {
            "type": "data", "symmetric": False, "color": style.colour, "thickness": 1.4, "width": 4,
            "array": [h - p.y if math.isfinite(h) else 0.0 for p, (_, h) in zip(series.points, ends, strict=True)],
            "arrayminus": [p.y - low if math.isfinite(low) else 0.0 for p, (low, _) in zip(series.points, ends, strict=True)],
        }  # fmt: skip
    if not (known and chart.drawn == "band"):
        return [trace]
    inside = [(x, low, high) for x, (low, high) in zip(at, ends, strict=True) if math.isfinite(low)]
    xs, lows, highs = (list(v) for v in zip(*inside, strict=True))
    band = {
        "type": "scatter", **axes, "name": series.name, "mode": "lines", "x": xs + xs[::-1], "y": highs + lows[::-1],
        "fill": "toself", "fillcolor": style.colour + ":0.16", "line": {"width": 0, "color": style.colour}, "hoverinfo": "skip",
    }  # fmt: skip
    return [band, trace]


def _hover(chart: Chart, panel: Panel, series: Series, point: Point) -> str:
    where = _escape(x_text(point.x))
    at = f"{_escape(panel.x)} {where}" if chart.kind == "lines" and panel.x else where
    name = _escape(series.name)
    return f"<b>{name}</b><br>{at}: {point_text(point, chart.digits)}"


def heat_figure(heat: Heat) -> Figure:
    """The figure of a heat map; page.js lets the reader choose among its grids."""
    cells = [v for grid in heat.grids for line in grid.cells for v in line if v is not None and math.isfinite(v)]
    ends = heat.ends or ((min(cells), max(cells)) if cells else (0.0, 1.0))
    choices = [{"name": grid.name, "finding": grid.finding, "trace": _heat_trace(heat, grid, ends)} for grid in heat.grids]
    panel = {"title": "", "x": heat.x, "y": heat.y, "log": False, "apart": False, "categories": None}
    spec = {
        "key": heat.key, "kind": "heat", "traces": [], "panels": [panel], "legend": [], "starts": [], "zero": False,
        "shared": False,
        "choices": choices, "unit": heat.unit,
        "columns": [list(grid.columns) for grid in heat.grids],
        "lines": [list(grid.lines) for grid in heat.grids],
    }  # fmt: skip
    return Figure(heat.key, heat.title, heat.grids[0].finding, spec, heat_table(heat))


def figures_of(chart: Chart | Heat | None, styles: Mapping[str, Style]) -> tuple[Figure, ...]:
    """The one figure of a chart or heat map; none where there is nothing to show."""
    if chart is None:
        return ()
    return (heat_figure(chart),) if isinstance(chart, Heat) else (chart_figure(chart, styles),)


def _heat_trace(heat: Heat, grid: Grid, ends: tuple[float, float]) -> dict[str, Any]:
    shown = [["" if v is None else number(v, heat.digits) for v in line] for line in grid.cells]
    hover = [
        [
            f"<b>{_escape(grid.name)}</b><br>{_escape(f'{line}, {heat.x} {column}')}: {text or '–'}"
            for column, text in zip(grid.columns, texts, strict=True)
        ]
        for line, texts in zip(grid.lines, shown, strict=True)
    ]
    return {
        "type": "heatmap", "z": [[v if v is not None and math.isfinite(v) else None for v in line] for line in grid.cells],
        "x": list(range(len(grid.columns))), "y": list(range(len(grid.lines))), "text": shown,
        "hoverinfo": "text", "hovertext": hover, "zmin": ends[0], "zmax": ends[1], "xgap": 2, "ygap": 2, "hoverongaps": False,
    }  # fmt: skip
