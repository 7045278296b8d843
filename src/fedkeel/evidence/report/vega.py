"""What every Vega-Lite specification of a report shares: colours that follow the page, and parameters that the page sets.

Names that come from a run are values of columns, never names of columns and never part of an expression, so that a dot, a
bracket or a quote in one means nothing. What depends on the reader is three parameters of every specification, which page.js
sets: `dark`, `narrow` and `hidden`, the names of the series that are not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedkeel.evidence.report import styles as tones
from fedkeel.evidence.report.styles import Tone

SHOWN = "indexof(hidden, datum.series) < 0"
# What pointing at a mark shows. Where the nearest mark is meant, `datum` is the mark and not its line of the data; the channel
# `tooltip`, which knows of that, shows `undefined` there in Vega-Lite 6.4 (its pull request 9707).
TIP = {"expr": "datum.datum ? datum.datum.tip : datum.tip"}
LETTERS = (18, 34)  # of a category on a narrow page and on a wide one; more are cut, the table has them
LETTER = 7  # pixels, about


def colour(tone: Tone) -> dict[str, str]:
    """A colour that follows the parameter `dark`."""
    light, dark = tone
    return {"expr": f"dark ? '{dark}' : '{light}'"}


def follows_width(narrow: float, wide: float) -> dict[str, str]:
    """A number that follows the parameter `narrow`."""
    return {"expr": f"narrow ? {narrow} : {wide}"}


def label_limit() -> dict[str, str]:
    """Pixels that the name of a category may take."""
    return follows_width(*(LETTER * letters for letters in LETTERS))


def below(names: Sequence[str], panels: int) -> dict[str, Any]:
    """How names below an axis stand: level where they have room beside each other, else slanted. panels: in the figure."""
    longest = max(map(len, names))
    room = (300, 900 if panels == 1 else 300)  # pixels, on a narrow page and on a wide one
    narrow, wide = (LETTER * min(longest, most) * len(names) > at for most, at in zip(LETTERS, room, strict=True))
    if longest <= 3 or not narrow:  # short names, such as numbers of rounds, are thinned out instead
        return {"labelAngle": 0, "labelOverlap": "greedy"}
    if wide:
        return {"labelAngle": -40, "labelAlign": "right", "labelBaseline": "middle", "labelOverlap": False}
    return {
        "labelAngle": follows_width(-40, 0),
        "labelAlign": {"expr": "narrow ? 'right' : 'center'"},
        "labelBaseline": {"expr": "narrow ? 'middle' : 'top'"},
        "labelOverlap": False,
    }


CONFIG: dict[str, Any] = {
    "background": colour(tones.PAPER),
    "aria": False,  # the page names each figure itself and has its numbers in a table
    "view": {"stroke": None},
    "axis": {
        "domainColor": colour(tones.AXIS),
        "gridColor": colour(tones.GRID),
        "labelColor": colour(tones.MUTED),
        "labelFontSize": 12,
        "labelPadding": 6,
        "labelSeparation": 6,
        "ticks": False,
        "tickColor": colour(tones.AXIS),
        "titleColor": colour(tones.MUTED),
        "titleFontSize": 12.5,
        "titleFontWeight": "normal",
        "titlePadding": 10,
    },
    "title": {
        "anchor": "start",
        "color": colour(tones.INK),
        "fontSize": 12.5,
        "frame": "bounds",
        "offset": 10,
        "subtitleColor": colour(tones.MUTED),
        "subtitleFontSize": 12.5,
        "subtitlePadding": 4,
    },
    "legend": {
        "labelColor": colour(tones.INK),
        "labelFontSize": 12,
        "labelLimit": 260,
        "titleColor": colour(tones.MUTED),
        "titleFontSize": 12,
        "titleFontWeight": "normal",
    },
}


def complete(
    make: Callable[[], Any], font: str, data: Mapping[str, Sequence[Mapping[str, Any]]], hidden: Sequence[str] = ()
) -> dict[str, Any]:
    """The specification of the Altair chart that `make` makes, with its parameters and colours.

    font: families, as CSS names them. data: the lines of each named data set of the chart. hidden: names at the start.
    """
    from altair.utils.schemapi import debug_mode

    # Altair's check of every part against the schema takes most of the time; the tests check whole specifications instead.
    with debug_mode(False):
        spec = make().to_dict(validate=False)
    own = [{"name": name, "value": value} for name, value in (("dark", False), ("narrow", False), ("hidden", [*hidden]))]
    return {
        **spec,
        "params": [*own, *spec.get("params", ())],
        "config": CONFIG | {"font": font},
        # The lines are kept out of Altair's hands, which copies what it holds once a layer.
        "datasets": {name: list(lines) for name, lines in data.items()},
    }
