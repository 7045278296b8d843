"""Pictures that stand alone: of one run, what it learnt and sent and how its methods compare; of a suite, what is kept."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkeel.evidence.report.charts import Chart
from fedkeel.evidence.report.tables import METHODS, byte_unit, check_one_run, last_by_site, lowest, mean_and_sd, number
from fedkeel.files import write_atomic
from fedkeel.types import FedKeelError, Row

# Okabe and Ito's palette, told apart with any kind of colour vision.
COLOURS = {"base": "#999999", "local": "#E69F00", "federated": "#0072B2", "centralised": "#009E73"}
STYLE = {
    "font.family": "DejaVu Sans",  # shipped with matplotlib, so the same everywhere
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "svg.hashsalt": "fedkeel",
}


@dataclass(frozen=True)
class Curve:
    """What the picture shows; a part that was not measured is empty.

    validation: (round, score in points). traffic: (bytes of all sites up and down since the start, score in points).
    loss: (round, mean over sites, lowest, highest), nats a position. test: (method, score in points, standard deviation
    over sites in points, 0 but for several local-only models).
    """

    validation: tuple[tuple[int, float], ...]
    traffic: tuple[tuple[float, float], ...]
    loss: tuple[tuple[int, float, float, float], ...]
    test: tuple[tuple[str, float, float], ...]


def curve_points(rows: Sequence[Row]) -> Curve:
    """The numbers behind the picture. Validation scores and losses are the federation's, test scores every method's."""
    check_one_run(rows)
    validation: dict[int, float] = {}
    moved: dict[int, float] = defaultdict(float)
    losses: dict[int, list[float]] = defaultdict(list)
    for r in rows:
        if r.method != "federated" or r.task:
            continue
        if (r.name, r.split, r.site) == ("score", "validation", ""):
            validation[r.round] = 100 * r.value
        elif r.name in ("bytes_up", "bytes_down"):
            moved[r.round] += r.value
        elif r.name == "loss":
            losses[r.round].append(r.value)
    test = []
    for method in METHODS:
        scores = last_by_site(rows, method, "score", "test").values()
        if scores:
            mean, sd = mean_and_sd(scores)
            test.append((method, 100 * mean, 100 * sd))
    scored = sorted(validation.items())
    return Curve(
        tuple(scored),
        tuple((sum(size for round, size in moved.items() if round <= at), score) for at, score in scored) if moved else (),
        tuple((at, mean_and_sd(v)[0], lowest(v), -lowest(-x for x in v)) for at, v in sorted(losses.items())),
        tuple(test),
    )


def learning_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw the run into `path`, in the format of its ending (.svg or .png); the same Rows give the same bytes.

    A panel without data is left out. Raises FedKeelError if there is nothing to draw at all.
    """
    curve = curve_points(rows)
    panels: list[Callable[[Any, Curve], None]] = [
        draw
        for draw, data in (
            (_validation, curve.validation), (_traffic, curve.traffic), (_loss, curve.loss), (_test, curve.test),
        )
        if data
    ]  # fmt: skip
    if not panels:
        raise FedKeelError(f"{path}: nothing to draw yet, no round is finished and nothing is scored")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)

    def whole(figure: Any) -> None:
        for index, draw in enumerate(panels):
            draw(figure.add_subplot(lines, columns, index + 1), curve)

    _save(whole, (4.6 * columns, 3.1 * lines), path)


def draw_rows(chart: Chart, path: Path) -> None:
    """Draw a chart of kind `rows` with two series, from the first's value of a row to the second's, as `learning_curve` does.

    The first is hollow; bars are `low` and `high` of the second.
    """
    (panel,) = chart.panels
    first, second = panel.series

    def whole(figure: Any) -> None:
        axes = figure.add_subplot()
        for height, (begin, end) in enumerate(zip(reversed(first.points), reversed(second.points), strict=True)):
            axes.plot([begin.y, end.y], [height, height], color="#b8d4e6", linewidth=3, solid_capstyle="round")
            if math.isfinite(end.low):
                sides = [[end.y - end.low], [end.high - end.y]]
                axes.errorbar(end.y, height, xerr=sides, color="black", linewidth=1, capsize=2.5)
            axes.annotate(number(end.y), (end.y, height), (0, 6), textcoords="offset points", ha="center", fontsize=7.5)
        heights = range(len(first.points) - 1, -1, -1)
        colour = COLOURS["federated"]
        axes.plot([p.y for p in first.points], heights, "o", markerfacecolor="white", markeredgecolor=colour, label=first.name)
        axes.plot([p.y for p in second.points], heights, "o", color=colour, label=f"{second.name}, {chart.spread}", zorder=3)
        axes.set_yticks(heights, [str(p.x) for p in first.points])
        axes.set_ylim(-0.6, len(first.points) - 0.2)
        axes.grid(False, axis="y")
        axes.set_title(chart.title)
        axes.set_xlabel(f"{panel.title.lower()}, {panel.x}")
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.05), ncols=2, borderaxespad=0)

    _save(whole, (6.6, 0.9 + 0.3 * len(first.points)), path)


def _save(draw: Callable[[Any], None], size: tuple[float, float], path: Path) -> None:
    """Write the figure that `draw` draws. size: inches."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's own style: the same picture everywhere
        matplotlib.rcParams.update(STYLE)
        layout = ConstrainedLayoutEngine(h_pad=0.09, w_pad=0.09)  # inches around each panel
        figure = Figure(figsize=size, dpi=110, layout=layout, facecolor="white")
        draw(figure)
        drawn = io.BytesIO()
        form = path.suffix.removeprefix(".")
        figure.savefig(drawn, format=form, metadata={"Date": None} if form == "svg" else None)
    write_atomic(path, drawn.getvalue())


def _line(axes: Any, xs: Sequence[float], ys: Sequence[float], colour: str) -> None:
    axes.plot(xs, ys, color=colour, linewidth=1.8, marker="o" if len(xs) <= 40 else None, markersize=4)


def _whole_rounds(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _validation(axes: Any, curve: Curve) -> None:
    _line(axes, [r for r, _ in curve.validation], [s for _, s in curve.validation], COLOURS["federated"])
    axes.set_title("Validation score by round, federated")
    axes.set_ylabel("score (points)")
    _whole_rounds(axes)


def _traffic(axes: Any, curve: Curve) -> None:
    unit, bytes_ = byte_unit(curve.traffic[-1][0])
    _line(axes, [size / bytes_ for size, _ in curve.traffic], [s for _, s in curve.traffic], COLOURS["federated"])
    axes.set_title("Validation score by traffic, federated")
    axes.set_ylabel("score (points)")
    axes.set_xlabel(f"sent up and down, all sites ({unit})")
    axes.set_xlim(left=0)


def _loss(axes: Any, curve: Curve) -> None:
    rounds, mean, low, high = zip(*curve.loss, strict=True)
    _line(axes, rounds, mean, COLOURS["federated"])
    if low != high:
        axes.lines[0].set_label("mean over sites")
        axes.fill_between(rounds, low, high, color=COLOURS["federated"], alpha=0.2, linewidth=1, label="lowest to highest")
        axes.legend(frameon=False)
    axes.set_title("Training loss, federated")
    axes.set_ylabel("loss (nats per position)")
    _whole_rounds(axes)


def _test(axes: Any, curve: Curve) -> None:
    for height, (method, score, sd) in enumerate(reversed(curve.test)):
        axes.barh(height, score, height=0.62, color=COLOURS[method])
        if sd:
            axes.errorbar(score, height, xerr=sd, color="black", linewidth=1.2, capsize=3)
        end = score + sd if math.isfinite(score + sd) else 0.0
        axes.annotate(number(score), (end, height), (4, 0), textcoords="offset points", va="center")
    names = [METHODS[m] + ("\n(± sd over sites)" if sd else "") for m, _, sd in reversed(curve.test)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - len(METHODS) - 0.6, len(names) - 0.4)  # bars of one thickness, however many
    axes.grid(False, axis="y")
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.set_title("Held-out test score by method")
    axes.set_xlabel("score (points)")
