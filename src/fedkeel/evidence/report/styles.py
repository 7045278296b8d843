"""How series are told apart: Okabe and Ito's colours, for a light and a dark page, with dashes and marks beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Tone = tuple[str, str]  # a colour on a light page and on a dark one

INK: Tone = ("#1c1c1a", "#e9e7e1")
MUTED: Tone = ("#6b6b66", "#a5a39b")
GRID: Tone = ("#e6e5df", "#33353a")
AXIS: Tone = ("#a8a79f", "#6d6f74")
PAPER: Tone = ("#ffffff", "#17191c")
TINT: Tone = ("#f5f4f0", "#22252a")
PALE: Tone = ("#b8d4e6", "#2b4a5e")
HEAT: tuple[Tone, ...] = (("#f3f6f8", "#1f252b"), ("#b7d3e5", "#24495f"), ("#62a5cf", "#2a729d"))
# Okabe and Ito without black and yellow: blue, vermilion, bluish green, reddish purple, orange, sky blue
HUES: tuple[Tone, ...] = (
    ("#0072B2", "#4FA8E0"),
    ("#D55E00", "#E8752B"),
    ("#009E73", "#1FB58B"),
    ("#CC79A7", "#D98BB5"),
    ("#E69F00", "#E69F00"),
    ("#56B4E9", "#8FD0F5"),
)
# Paths in a box from −1 to 1, which Vega takes as they are and an SVG of the page too.
SHAPES = {
    "circle": "M-0.8,0a0.8,0.8 0 1,0 1.6,0a0.8,0.8 0 1,0 -1.6,0Z",
    "square": "M-0.72,-0.72H0.72V0.72H-0.72Z",
    "diamond": "M0,-1L1,0L0,1L-1,0Z",
    "triangle-up": "M0,-0.92L0.92,0.72H-0.92Z",
    "triangle-down": "M0,0.92L0.92,-0.72H-0.92Z",
    "cross": "M-0.3,-0.9H0.3V-0.3H0.9V0.3H0.3V0.9H-0.3V0.3H-0.9V-0.3H-0.3Z",
    "x": (
        "M-0.84,-0.48L-0.48,-0.84L0,-0.36L0.48,-0.84L0.84,-0.48L0.36,0L0.84,0.48L0.48,0.84L0,0.36L-0.48,0.84L-0.84,0.48L-0.36,0Z"
    ),
    "star": "M0,-1L0.28,-0.32L1,-0.3L0.44,0.16L0.62,0.88L0,0.46L-0.62,0.88L-0.44,0.16L-1,-0.3L-0.28,-0.32Z",
}
DASHES: dict[str, tuple[float, ...]] = {  # lengths of ink and gap, pixels
    "solid": (1, 0),
    "dash": (6, 3),
    "dot": (1.5, 2.5),
    "dashdot": (6, 2.5, 1.5, 2.5),
    "longdash": (9, 3),
}
BASELINE = {  # dash and mark of each
    "base": ("dot", "x"),
    "analytic head": ("dashdot", "star"),
    "local-only": ("dash", "triangle-down"),
    "centralised": ("longdash", "square"),
}


@dataclass(frozen=True)
class Style:
    """How a series is told from others: colour, dash and mark, so that no two differ in colour alone.

    dash: one of DASHES. symbol: one of SHAPES. width: of a line, pixels. size: of a mark, square pixels.
    """

    colour: Tone
    dash: str
    symbol: str
    width: float = 1.8
    size: float = 64


def styles_of(names: Sequence[str], reference: str = "") -> dict[str, Style]:
    """A style for every name, the same wherever it appears: the reference in ink and bold, baselines in grey."""
    dashes, shapes = list(DASHES), list(SHAPES)
    found: dict[str, Style] = {}
    n = 0
    for name in dict.fromkeys(names):
        if name == reference:
            found[name] = Style(INK, "solid", "circle", 2.6)
        elif name in BASELINE:
            found[name] = Style(MUTED, *BASELINE[name])
        else:
            hue = HUES[n % len(HUES)]
            found[name] = Style(hue, dashes[n // len(HUES) % len(dashes)], shapes[(n + 1) % len(shapes)])
            n += 1
    return found


def run_styles() -> dict[str, Style]:
    """A run's legs."""
    return {
        "base": Style(MUTED, "dot", "x"),
        "analytic head": Style(HUES[1], "dashdot", "star"),
        "local-only": Style(HUES[4], "dash", "diamond"),
        "federated": Style(HUES[0], "solid", "circle"),
        "centralised": Style(HUES[2], "longdash", "square"),
    }


OWN = {  # series that are no method
    "held out": Style(HUES[0], "solid", "circle"),
    "trained on": Style(HUES[1], "dash", "square"),
    "methods": Style(HUES[0], "solid", "circle"),
    "baselines": Style(MUTED, "solid", "square"),
    "a site of a seed": Style(("#0072B28c", "#4FA8E08c"), "solid", "circle", size=36),
    "mean": Style(HUES[1], "solid", "diamond"),
    "part": Style(HUES[0], "solid", "circle"),
    "when learnt": Style(HUES[0], "solid", "circle"),
    "after the last stage": Style(HUES[0], "solid", "circle"),
    "value": Style(HUES[0], "solid", "circle"),
    "reference's value": Style(HUES[1], "solid", "diamond"),
}
