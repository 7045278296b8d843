"""Charts and heat maps as figures of a page: Vega-Lite specifications, built with Altair, and the table that says the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedkeel.evidence.report import styles as tones
from fedkeel.evidence.report.charts import Chart, Grid, Heat, Panel, chart_table, heat_table
from fedkeel.evidence.report.panels import PanelChart, measured, values, with_air
from fedkeel.evidence.report.styles import OWN, Style, styles_of
from fedkeel.evidence.report.tables import Table, number
from fedkeel.evidence.report.vega import SHOWN, TIP, below, colour, complete, label_limit

SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif'
NUMBERED = 8  # columns of a heat map; one with more has a scale of its colours, as its numbers may find no room
# As wide as its place in the page, whatever its labels become.
AS_WIDE = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding", "resize": True}}
DATA = "shown"  # what a specification's numbers are called
CELL = 34  # pixels, height of a heat map's cell


@dataclass(frozen=True)
class Entry:
    """A line of the legend. line: drawn as a line with marks, not as marks alone. hollow: its marks are."""

    name: str
    style: Style
    line: bool
    hollow: bool


@dataclass(frozen=True)
class Figure:
    """specs: Vega-Lite, one a panel. finding: what it shows, in words. table: its numbers.

    legend: what a reader can hide, empty where there is one series. choices: (name, finding) of a heat map's grids, if several.
    """

    key: str
    title: str
    finding: str
    specs: tuple[Mapping[str, Any], ...]
    table: Table
    legend: tuple[Entry, ...] = ()
    choices: tuple[tuple[str, str], ...] = ()


def figures_of(chart: Chart | Heat | None, styles: Mapping[str, Style]) -> tuple[Figure, ...]:
    """The one figure of a chart or heat map; none where there is nothing to show."""
    if chart is None:
        return ()
    return (heat_figure(chart),) if isinstance(chart, Heat) else (chart_figure(chart, styles),)


def chart_figure(chart: Chart, styles: Mapping[str, Style]) -> Figure:
    """The figure of a chart. styles: of its series by name; a name that is not there is one of OWN."""
    found = all_styles(chart, styles)
    held = measured(chart.panels)
    ends = with_air(held, 0.05) if held and chart.key == "stability" else None  # its panels are compared

    def spec(panel: Panel) -> dict[str, Any]:
        drawn = PanelChart(chart, panel, found, ends=ends)
        return complete(lambda: drawn.whole(DATA).properties(**AS_WIDE), SANS, {DATA: values(chart, panel)})

    legend: dict[str, Entry] = {}
    for series in (s for panel in chart.panels for s in panel.series):
        line = chart.kind == "lines"
        legend.setdefault(series.name, Entry(series.name, found[series.name], line, series.apart and not line))
    shown = tuple(legend.values()) if len(legend) > 1 else ()
    return Figure(chart.key, chart.title, chart.finding, tuple(map(spec, chart.panels)), chart_table(chart), shown)


def all_styles(chart: Chart, styles: Mapping[str, Style]) -> dict[str, Style]:
    """A style for every series of a chart."""
    names = [s.name for panel in chart.panels for s in panel.series]
    others = styles_of([name for name in names if name not in {*styles, *OWN}])
    return {name: styles.get(name) or OWN.get(name) or others[name] for name in names}


def heat_figure(heat: Heat) -> Figure:
    """The figure of a heat map, whose reader chooses among its grids."""
    hidden = [grid.name for grid in heat.grids[1:]]
    choices = tuple((grid.name, grid.finding) for grid in heat.grids) if hidden else ()
    cells = [cell for grid in heat.grids for cell in _cells(heat, grid)]
    spec = complete(lambda: _heat_chart(heat).properties(**AS_WIDE), SANS, {DATA: cells}, hidden)
    return Figure(heat.key, heat.title, heat.grids[0].finding, (spec,), heat_table(heat), choices=choices)


def _cells(heat: Heat, grid: Grid) -> list[dict[str, Any]]:
    """A line a cell: x, y: names. value: None where there is none or it is not finite. label, tip: text. series: the grid."""
    found = []
    for line, cells in zip(grid.lines, grid.cells, strict=True):
        for column, value in zip(grid.columns, cells, strict=True):
            text = "" if value is None else number(value, heat.digits)
            tip = f"{grid.name}\n{line}, {heat.x} {column}: {text}" if text else ""
            held = value if value is not None and math.isfinite(value) else None
            found.append({"x": column, "y": line, "value": held, "label": text, "tip": tip, "series": grid.name})
    return found


def _heat_chart(heat: Heat) -> Any:
    """Cells in the order of their lines and columns, in colours and, where there is room, with their numbers."""
    import altair as alt

    held = [v for grid in heat.grids for line in grid.cells for v in line if v is not None and math.isfinite(v)]
    ends = heat.ends or ((min(held), max(held)) if held else (0.0, 1.0))
    columns = max((grid.columns for grid in heat.grids), key=len)
    limit = label_limit()
    x = alt.Axis(domain=False, labelLimit=limit, **below(columns, 1))
    places = {
        "x": alt.X(field="x", type="nominal", sort=None, title=heat.x, axis=x),
        "y": alt.Y(field="y", type="nominal", sort=None, title=None, axis=alt.Axis(domain=False, labelLimit=limit)),
    }
    legend = alt.Legend(title=heat.unit, orient="bottom", gradientThickness=9) if len(columns) > NUMBERED else None
    scale = alt.Scale(domain=list(ends), range=[colour(tone) for tone in tones.HEAT])
    fill = alt.Fill(field="value", type="quantitative", scale=scale, legend=legend, title=heat.unit)
    rect = alt.Chart().mark_rect(stroke=colour(tones.PAPER), strokeWidth=2, invalid=None, tooltip=TIP)
    room = {"expr": "bandwidth('x') < 30 ? 0 : 1"}
    text = alt.Chart().mark_text(fontSize=12.5, fill=colour(tones.INK), opacity=room, tooltip=TIP)
    layers = (
        rect.encode(**places, fill=alt.condition("!isValid(datum.value)", alt.value("transparent"), fill)),
        text.encode(**places, text=alt.Text(field="label", type="nominal")),
    )
    height = CELL * max(3, *(len(grid.lines) for grid in heat.grids))
    return alt.layer(*layers, data=alt.NamedData(DATA)).transform_filter(SHOWN).properties(height=height)
