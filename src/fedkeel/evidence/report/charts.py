"""The numbers behind a picture, and the table that says the same. figures.py draws them; nothing is computed there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedkeel.evidence.report.tables import MISSING, Table, number


@dataclass(frozen=True)
class Point:
    """x: a number, or the name of a category. y, and the ends of its band or bar; NaN where there is none."""

    x: float | str
    y: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Series:
    """What one entry of the legend shows. apart: drawn as set apart from the others, say damage that training had used."""

    name: str
    points: tuple[Point, ...]
    apart: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes. x, y: their names with units. apart: drawn on a tinted ground, see Series."""

    title: str
    x: str
    y: str
    series: tuple[Series, ...]
    log_x: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves or dots. finding: what it shows, in words. spread: what low and high are; drawn as a `band`, as `bars` or not.

    kind: `lines` join a series' points, `dots` do not, `rows` are dots with the categories down the side.
    starts: numbers of x at which something begins, drawn as upright rules, such as a new stage; of `rows`, numbers of the
    measure that its dots are held against. joined: of `rows`, bars lead from the first of two series to the second.
    digits: decimals of y. table: the numbers, where the one made by `chart_table` would not read well.
    """

    key: str
    title: str
    finding: str
    panels: tuple[Panel, ...]
    kind: str = "lines"
    spread: str = ""
    drawn: str = "band"
    starts: tuple[float, ...] = ()
    joined: bool = False
    digits: int = 1
    notes: tuple[str, ...] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Grid:
    """One choice of a heat map. cells: a line a name of `lines`, None where nothing was measured."""

    name: str
    finding: str
    lines: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Heat:
    """A heat map whose reader picks one of several grids. unit: of the cells. ends: of the colours; None: of all cells."""

    key: str
    title: str
    x: str
    y: str
    unit: str
    grids: tuple[Grid, ...]
    ends: tuple[float, float] | None = None
    digits: int = 1
    notes: tuple[str, ...] = ()


def point_text(point: Point, digits: int) -> str:
    """`61.2`, or `61.2 (60.0 to 63.1)` with its ends."""
    shown = number(point.y, digits)
    if math.isnan(point.low):
        return shown
    return f"{shown} ({number(point.low, digits)} to {number(point.high, digits)})"


def x_text(x: float | str) -> str:
    """A category as it is, a number with at most six digits."""
    return x if isinstance(x, str) else f"{x:.6g}".replace("-", "−")


def chart_table(chart: Chart) -> Table:
    """A line an x, a column a series; panels, if there are several, one after the other."""
    if chart.table is not None:
        return chart.table
    several = len(chart.panels) > 1
    names = list(dict.fromkeys(s.name for panel in chart.panels for s in panel.series))
    lines: list[tuple[str, ...]] = []
    rules = []
    for panel in chart.panels:
        if lines:
            rules.append(len(lines))
        by_name = {s.name: {p.x: p for p in s.points} for s in panel.series}
        order = dict.fromkeys(p.x for s in panel.series for p in s.points)
        if not any(isinstance(x, str) for x in order):
            order = dict.fromkeys(sorted(order))
        for x in order:
            found = [by_name.get(name, {}).get(x) for name in names]
            cells = [MISSING if p is None else point_text(p, chart.digits) for p in found]
            lines.append((*((panel.title,) if several else ()), x_text(x), *cells))
    header = (*(("panel",) if several else ()), chart.panels[0].x if not several else "at", *names)
    units = {f"{panel.title}: {panel.y} by {panel.x}" if several else panel.y for panel in chart.panels}
    notes = [*chart.notes, *([f"In brackets: {chart.spread}."] if chart.spread else [])]
    return Table(chart.title, header, tuple(lines), (f"{'; '.join(sorted(units))}.", *notes), tuple(rules))


def heat_table(heat: Heat) -> Table:
    """All grids of a heat map, one after the other."""
    columns = list(dict.fromkeys(name for grid in heat.grids for name in grid.columns))
    lines: list[tuple[str, ...]] = []
    rules = []
    for grid in heat.grids:
        if lines:
            rules.append(len(lines))
        for name, cells in zip(grid.lines, grid.cells, strict=True):
            held = dict(zip(grid.columns, cells, strict=True))
            shown = [MISSING if (v := held.get(c)) is None else number(v, heat.digits) for c in columns]
            lines.append((*((grid.name,) if len(heat.grids) > 1 else ()), name, *shown))
    header = (*(("",) if len(heat.grids) > 1 else ()), heat.y, *columns)
    return Table(heat.title, header, tuple(lines), (f"In {heat.unit}.", *heat.notes), tuple(rules))
