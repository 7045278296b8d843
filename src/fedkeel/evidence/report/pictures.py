"""Pictures that stand alone: of one run, what it learnt and sent and how its methods compare; of a suite, what is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkeel.evidence.report import run_charts
from fedkeel.evidence.report.charts import Chart
from fedkeel.evidence.report.figures import all_styles
from fedkeel.evidence.report.panels import STILL, PanelChart, values
from fedkeel.evidence.report.styles import run_styles
from fedkeel.evidence.report.tables import check_one_run
from fedkeel.evidence.report.vega import complete
from fedkeel.files import write_atomic
from fedkeel.types import FedKeelError, Row

FONT = "Liberation Sans, Arial, Helvetica, sans-serif"  # letters of one width each; vl-convert brings the first, to measure by
ALONE = 520  # pixels, width of the only panel of a picture
SCALE = 1.5  # of a .png


def run_pictures(rows: Sequence[Row]) -> list[Chart]:
    """What the picture of a run shows; what was not measured is not there."""
    check_one_run(rows)
    found = (run_charts.learning(rows), run_charts.traffic(rows), run_charts.methods(rows))
    return [chart for chart in found if chart is not None]


def learning_curve(rows: Sequence[Row], path: Path) -> None:
    """Draw the run into `path`, in the format of its ending (.svg or .png); the same Rows give the same bytes.

    Raises FedKeelError if there is nothing to draw at all.
    """
    charts = run_pictures(rows)
    if not charts:
        raise FedKeelError(f"{path}: nothing to draw yet, no round is finished and nothing is scored")
    _save(still(charts), path)


def draw_rows(chart: Chart, path: Path) -> None:
    """Draw one chart as `learning_curve` does."""
    _save(still([chart]), path)


def still(charts: Sequence[Chart]) -> dict[str, Any]:
    """The specification of a picture of all panels of charts, two beside each other; `panel 1` are the numbers of the first."""
    import altair as alt

    drawn = [(chart, panel) for chart in charts for panel in chart.panels]
    data = {f"panel {n}": values(chart, panel) for n, (chart, panel) in enumerate(drawn, 1)}
    width = STILL if len(drawn) > 1 else ALONE

    def make() -> Any:
        panels = (
            PanelChart(chart, panel, all_styles(chart, run_styles()), still=True).whole(name).properties(width=width)
            for name, (chart, panel) in zip(data, drawn, strict=True)
        )
        channels = ("stroke", "fill", "color", "shape", "strokeDash", "strokeWidth", "size")
        own: dict[str, Any] = dict.fromkeys(channels, "independent")
        return alt.concat(*panels, columns=2, spacing=28, padding=12).resolve_scale(**own)

    return complete(make, FONT, data)


def _save(spec: Mapping[str, Any], path: Path) -> None:
    import vl_convert

    if path.suffix == ".png":
        write_atomic(path, vl_convert.vegalite_to_png(dict(spec), scale=SCALE, allowed_base_urls=[]))
    else:
        write_atomic(path, vl_convert.vegalite_to_svg(dict(spec), allowed_base_urls=[]))
