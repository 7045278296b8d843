"""One pair of axes of a chart as an Altair chart: curves, dots, bands and bars, from the columns that `values` makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedkeel.evidence.report import styles as tones
from fedkeel.evidence.report.charts import Chart, Panel, Point, Series, point_text, x_text
from fedkeel.evidence.report.styles import DASHES, SHAPES, Style
from fedkeel.evidence.report.tables import number
from fedkeel.evidence.report.vega import SHOWN, TIP, below, colour, label_limit

MARKED = 40  # points; of longer curves some are marked, so that they are still told apart without their colours
LINES = 5  # across a panel, about
STILL = 340  # pixels, width of a panel of a still picture
STEP = 26  # pixels between two rows of dots


def categories(panel: Panel) -> list[str] | None:
    """The categories of a panel, in their order, or None if its x is a number."""
    found = [p.x for s in panel.series for p in s.points]
    if not any(isinstance(x, str) for x in found):
        return None
    return list(dict.fromkeys(x_text(x) for x in found))


def values(chart: Chart, panel: Panel) -> list[dict[str, Any]]:
    """A line a point, those of a series in the order in which a line joins them.

    at: x, a number or a category, None where the axis has no place for it. value, low, high: None where not finite. series: a
    name. marked: whether it has a mark. label: the value as text, empty in a series set apart. tip: what pointing at it shows,
    the series' name in a line alone.
    """
    named = categories(panel) is not None
    found = []
    for k, series in enumerate(panel.series):
        every, first = _marks(chart, panel, k)
        for n, point in enumerate(series.points):
            line = {
                "at": x_text(point.x) if named else _at(float(point.x), panel.log_x),
                "value": _finite(point.y),
                "low": _finite(point.low),
                "high": _finite(point.high),
                "series": series.name,
                "marked": n % every == first,
                "label": "" if series.apart else number(point.y, chart.digits),
                "tip": _tip(chart, panel, series, point),
            }
            found.append(line)
    return found


def _marks(chart: Chart, panel: Panel, k: int) -> tuple[int, int]:
    """(n, m): every n-th point of series k has a mark, from the m-th; of a long curve that is alone none has."""
    count = len(panel.series[k].points)
    if chart.kind != "lines" or count <= MARKED:
        return 1, 0
    every = count // 8
    return (every, k * every // len(panel.series)) if len(panel.series) > 1 else (1, 1)


def _at(x: float, log: bool) -> float | None:
    """x where an axis has a place for it; none has one for 0 in logarithms."""
    return _finite(x) if x > 0 or not log else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _tip(chart: Chart, panel: Panel, series: Series, point: Point) -> str:
    where = x_text(point.x)
    at = f"{panel.x} {where}" if chart.kind == "lines" and panel.x else where
    return f"{series.name}\n{at}: {point_text(point, chart.digits)}"


def measured(panels: Sequence[Panel]) -> list[float]:
    """All finite values of panels, the ends of bands and bars among them."""
    found = [v for panel in panels for s in panel.series for p in s.points for v in (p.y, p.low, p.high)]
    return [v for v in found if math.isfinite(v)]


def with_air(held: Sequence[float], share: float) -> tuple[float, float]:
    """Ends of an axis around numbers, with air: a share of their range, or of themselves where they are all the same."""
    low, high = min(held), max(held)
    air = share * (high - low) if high - low > 1e-9 * abs(high) else 0.1 * abs(low) or 1.0
    return low - air, high + air


class PanelChart:
    """Builds the Altair chart of a panel.

    styles: of all its series. still: for a picture that nobody can point at: numbers stand beside its dots, and a legend
    where the axes do not name the series. ends: of the measure's axis; None: as needed.
    """

    def __init__(
        self,
        chart: Chart,
        panel: Panel,
        styles: Mapping[str, Style],
        *,
        still: bool = False,
        ends: tuple[float, float] | None = None,
    ) -> None:
        import altair as alt

        self.alt, self.chart, self.panel, self.still = alt, chart, panel, still
        self.rows = chart.kind == "rows"
        self.names = categories(panel)
        self.series = {s.name: (s, styles[s.name]) for s in panel.series}
        held = measured([panel])
        flat = bool(held) and max(held) - min(held) <= 1e-9 * abs(max(held))
        self.ends = with_air(held, 0.0) if ends is None and flat else ends
        self.spread = chart.drawn if any(math.isfinite(p.low) for s in panel.series for p in s.points) else "none"

    def whole(self, data: str) -> Any:
        """The chart, without a width and without what `vega.complete` adds. data: what `values` are called there."""
        alt, several = self.alt, len(self.chart.panels) > 1
        layers = [*self._rules(), *self._ends(), *self._marks()]
        height = STEP * len(self.names or ()) if self.rows else 200 if several or self.still else 300
        whole = alt.layer(*layers, data=alt.NamedData(data)).transform_filter(SHOWN).properties(height=height)
        if self.panel.apart:
            whole = whole.properties(view=alt.ViewBackground(fill=colour(tones.TINT)))
        title = self._title(several)
        return whole if title is None else whole.properties(title=title)

    def _title(self, several: bool) -> Any:
        """The panel's name and that of its measure, above the axes; rows have the latter below them."""
        measure, own = "" if self.rows else self.panel.y, self.panel.title
        if not (several or self.still):
            return self.alt.Title(measure, color=colour(tones.MUTED), fontWeight="normal") if measure else None
        title = own if several else self.chart.title
        spread = f"{self.spread}: {self.chart.spread}" if self.still and self.spread != "none" else ""
        under = [line for line in ("" if own == title else own, measure, spread) if line]
        return self.alt.Title(title, subtitle=under or self.alt.Undefined)

    def _places(self, field: str = "value", other: str = "") -> dict[str, Any]:
        """The channels x and y: where a point stands, and a column of the measure; `other` is that of a mark's second end."""
        alt = self.alt
        if self.rows:
            found = {"y": alt.Y(**self._position()), "x": alt.X(**self._measure(field))}
            return found | ({"x2": alt.X2(field=other)} if other else {})
        found = {"x": alt.X(**self._position()), "y": alt.Y(**self._measure(field))}
        return found | ({"y2": alt.Y2(field=other)} if other else {})

    def _position(self) -> dict[str, Any]:
        """Categories, below or down the side, or numbers."""
        alt = self.alt
        found: dict[str, Any] = {"field": "at", "title": None if self.rows else self.panel.x or None}
        if self.names is not None:
            if self.rows:
                ink = colour(tones.INK)
                axis = alt.Axis(grid=True, gridDash=[1, 3], domain=False, labelColor=ink, labelLimit=label_limit())
            else:
                axis = alt.Axis(grid=False, labelLimit=label_limit(), **below(self.names, len(self.chart.panels)))
            scale = alt.Scale(type="point", domain=self.names, padding=0.5)
            return found | {"type": "nominal", "scale": scale, "axis": axis}
        numbers = [float(p.x) for s in self.panel.series for p in s.points]
        above = [v for v in numbers if v > 0]
        if self.panel.log_x and above:
            scale = alt.Scale(type="log", nice=False, domain=[min(above) * 0.9, max(above) * 1.1])
            axis = alt.Axis(grid=False, ticks=True, tickCount=self._ticks(50), labelOverlap="greedy", format="~g")
        else:
            scale = alt.Scale(zero=False, nice=False, padding=8)
            axis = alt.Axis(grid=False, labelOverlap="greedy", **self._rounds(numbers))
        return found | {"type": "quantitative", "scale": scale, "axis": axis}

    def _measure(self, field: str) -> dict[str, Any]:
        alt = self.alt
        if self.ends:
            scale = alt.Scale(domain=list(self.ends), nice=False)
        else:
            scale = alt.Scale(zero=False, nice=False, padding=14) if self.rows else alt.Scale(zero=False, nice=LINES)
        axis = alt.Axis(domain=False, tickCount=self._ticks(70) if self.rows else LINES, labelOverlap="greedy")
        title = self.panel.x if self.rows else None
        return {"field": field, "type": "quantitative", "scale": scale, "axis": axis, "title": title}

    def _ticks(self, apart: int) -> Any:
        """How many fit below the axes, `apart` pixels each."""
        return math.ceil(STILL / apart) if self.still else {"expr": f"ceil(width / {apart})"}

    def _rounds(self, numbers: Sequence[float]) -> dict[str, Any]:
        """Ticks below the axes; those of whole numbers, such as rounds, are whole."""
        if not all(v.is_integer() for v in numbers):
            return {"tickCount": self._ticks(70)}
        first, last = int(min(numbers)), int(max(numbers))
        if last - first > MARKED:
            return {"tickCount": self._ticks(70), "tickMinStep": 1, "format": "d"}
        return {"tickCount": self._ticks(30), "values": list(range(first, last + 1)), "format": "d"}  # of which Vega leaves out

    def _by_series(self, *channels: str) -> dict[str, Any]:
        """Channels that tell the series apart, each with what every series has there."""
        alt = self.alt
        styles = [style for _, style in self.series.values()]
        fills = [tones.PAPER if series.apart else style.colour for series, style in self.series.values()]
        of: dict[str, tuple[Any, Sequence[Any]]] = {
            "stroke": (alt.Stroke, [colour(style.colour) for style in styles]),
            "fill": (alt.Fill, [colour(tone) for tone in fills]),
            "color": (alt.Color, [colour(style.colour) for style in styles]),
            "strokeDash": (alt.StrokeDash, [list(DASHES[style.dash]) for style in styles]),
            "strokeWidth": (alt.StrokeWidth, [style.width for style in styles]),
            "shape": (alt.Shape, [SHAPES[style.symbol] for style in styles]),
            "size": (alt.Size, [style.size for style in styles]),
        }
        named = len(styles) < 2 or set(self.series) == set(self.names or ())
        legend = alt.Legend(title=None, orient="top") if self.still and not named else None
        found = {}
        for name in channels:
            make, held = of[name]
            scale = alt.Scale(type="ordinal", domain=list(self.series), range=held)
            kind = "ordinal" if name in ("strokeWidth", "size") else "nominal"  # as Vega-Lite would have it
            found[name] = make(field="series", type=kind, scale=scale, legend=None if name == "color" else legend, title=None)
        return found

    def _rules(self) -> list[Any]:
        """Upright rules: of rows in ink, for what their dots are held against, else dotted, for what begins there."""
        if not self.chart.starts:
            return []
        alt = self.alt
        channel = self._measure("value") if self.rows else self._position()
        held = alt.Data(values=[{channel["field"]: at} for at in self.chart.starts])
        look = {"stroke": colour(tones.INK)} if self.rows else {"stroke": colour(tones.AXIS), "strokeDash": [1.5, 2.5]}
        return [alt.Chart(held).mark_rule(**look).encode(x=alt.X(**channel))]

    def _ends(self) -> list[Any]:
        """What leads from one number to another: between the two series of a row, bands, and bars with their caps."""
        alt, layers = self.alt, []
        if self.chart.joined:
            first, second = ({x_text(p.x): _finite(p.y) for p in s.points} for s in self.panel.series)
            held = alt.Data(values=[{"at": at, "low": first[at], "high": second[at]} for at in first if at in second])
            both = alt.Chart(held).transform_filter("length(hidden) == 0")
            layers.append(both.mark_rule(stroke=colour(tones.PALE), strokeWidth=3).encode(**self._places("low", "high")))
        known, ends = alt.Chart().transform_filter("isValid(datum.low)"), self._places("low", "high")
        if self.spread == "band":
            layers.append(known.mark_area(order=False, opacity=0.16).encode(**ends, **self._by_series("color")))
        if self.spread == "bars":
            layers.append(known.mark_rule(strokeWidth=1.4).encode(**ends, **self._by_series("stroke")))
            cap = known.mark_point(shape="stroke", size=64, strokeWidth=1.4, angle=90 if self.rows else 0, opacity=1)
            layers += [cap.encode(**self._places(end), **self._by_series("stroke")) for end in ("low", "high")]
        return layers

    def _marks(self) -> list[Any]:
        """Lines, points that tell their number, and in a still picture the numbers of rows."""
        alt, layers = self.alt, []
        if self.chart.kind == "lines":
            look = self._by_series("stroke", "strokeDash", "strokeWidth")
            layers.append(alt.Chart().mark_line(order=False).encode(**self._places(), **look))
        points = (
            alt.Chart()
            .mark_point(strokeWidth=1.6, tooltip=TIP)
            .encode(**self._places(), **self._by_series("stroke", "fill", "shape"))
        )
        size = self._by_series("size")["size"]
        if self.still:
            layers.append(points.encode(size=size, opacity=alt.condition("datum.marked", alt.value(1), alt.value(0))))
        else:
            near = alt.selection_point(
                name="near", on="pointerover", clear="pointerout", nearest=True, toggle=False, empty=False
            )
            seen = alt.condition(near | "datum.marked", alt.value(1), alt.value(0))
            layers.append(points.encode(size=alt.condition(near, alt.value(150), size), opacity=seen))
            layers[-1] = layers[-1].add_params(near)
        if self.still and self.rows:
            text = alt.Chart().transform_filter("datum.label !== ''").mark_text(dy=-10, fontSize=10, fill=colour(tones.INK))
            layers.append(text.encode(**self._places(), text=alt.Text(field="label", type="nominal")))
        return layers
