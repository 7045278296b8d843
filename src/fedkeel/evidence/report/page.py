"""A report as one HTML page that needs nothing but itself: text, tables and figures, Vega once, no request to anywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from fedkeel.evidence.report.figures import Entry, Figure
from fedkeel.evidence.report.styles import DASHES, SHAPES
from fedkeel.evidence.report.tables import Table

WIDE = 11  # columns; a table with more is set tighter
SHORT_NAME = 22  # letters; a line's name up to here stays on one line
LEGEND = "Click to hide or show; double-click to see it alone"
LONG_CELL = 34  # letters; a column with longer cells gets room for them


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: a class of page.css, empty for plain text."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Code:
    """Text as it is. title: what it is, shown before it is unfolded."""

    title: str
    text: str


@dataclass(frozen=True)
class Folded:
    """A table behind its title."""

    table: Table


Block = Text | Code | Folded | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what follows; a part's parts are its subsections. key: its anchor, letters and digits."""

    key: str
    title: str
    blocks: tuple[Block, ...]
    parts: tuple[Section, ...] = ()


@dataclass(frozen=True)
class Page:
    """kicker: a line above the title. lead: what comes first, in words. source: name, recipe and commit, under each figure."""

    title: str
    kicker: str
    lead: tuple[Text, ...]
    source: str
    sections: tuple[Section, ...]


def render(page: Page) -> str:
    """The page as HTML. Every name in it is escaped, and scripts run only if their hash is the one that stands in the head."""
    writer = _Writer(page.source)
    body = "".join(writer.section(section, 2) for section in page.sections)
    held = json.dumps(writer.figures, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = [_vega(), _file("page.js")] if writer.figures else []
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in scripts) or "'none'"
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    title = html.escape(page.title)
    lead = "".join(_paragraph(text) for text in page.lead)
    tail = "".join(f"<script>{script}</script>\n" for script in scripts)
    notice = f"<!--\n{_file('licences.txt')}-->\n" if scripts else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{_file("page.css")}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<div class="sheet">
<header>
<p class="kicker">{html.escape(page.kicker)}</p>
<h1>{title}</h1>
{lead}</header>
<nav aria-label="Contents">{_contents(page.sections)}</nav>
<main id="main" tabindex="-1">
<noscript><p class="warning">The figures need JavaScript. Their numbers are in the tables below them.</p></noscript>
{body}</main>
<footer>{html.escape(page.source)}. Written by FedKeel from the runs' rows; figures by Vega, Vega-Lite and D3.</footer>
</div>
<script type="application/json" id="figures">{held}</script>
{notice}{tail}</body>
</html>
"""


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _vega() -> str:
    """Vega, Vega-Lite, Vega-Embed and the interpreter of expressions, without which a page would have to allow `eval`."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _file(name: str) -> str:
    return (files("fedkeel.evidence.report") / name).read_text(encoding="utf-8")


def _paragraph(text: Text) -> str:
    kind = f' class="{text.kind}"' if text.kind else ""
    return f"<p{kind}>{html.escape(text.text)}</p>\n"


def _contents(sections: Sequence[Section]) -> str:
    if not sections:
        return ""
    entries = (f'<li><a href="#{s.key}">{html.escape(s.title)}</a>{_contents(s.parts)}</li>' for s in sections)
    return f"<ol>{''.join(entries)}</ol>"


class _Writer:
    """Numbers tables and figures as they come, and keeps what page.js needs of each figure."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.figures: list[Mapping[str, Any]] = []
        self.tables = 0

    def section(self, section: Section, level: int) -> str:
        blocks = "".join(self.block(block) for block in section.blocks)
        parts = "".join(self.section(part, level + 1) for part in section.parts)
        head = f'<h{level} id="{section.key}-title">{html.escape(section.title)}</h{level}>'
        return f'<section id="{section.key}" aria-labelledby="{section.key}-title">\n{head}\n{blocks}{parts}</section>\n'

    def block(self, block: Block) -> str:
        match block:
            case Text():
                return _paragraph(block)
            case Code():
                code = f'<pre tabindex="0"><code>{html.escape(block.text)}</code></pre>'
                return f"<details>\n<summary>{html.escape(block.title)}</summary>\n{code}\n</details>\n"
            case Folded():
                lines = f"{html.escape(block.table.title)}: {len(block.table.lines):,} lines"
                return f"<details>\n<summary>{lines}</summary>\n{self.numbered(block.table)}</details>\n"
            case Table():
                return self.numbered(block)
            case Figure():
                return self.figure(block)

    def numbered(self, table: Table) -> str:
        self.tables += 1
        return table_html(table, f"table-{self.tables}", f"Table {self.tables}. {table.title}")

    def figure(self, figure: Figure) -> str:
        key = f"figure-{len(self.figures) + 1}"
        names = [entry.name for entry in figure.legend] or [name for name, _ in figure.choices]
        self.figures.append({"id": key, "specs": figure.specs, "names": names})
        count = len(self.figures)
        table = table_html(figure.table, f"{key}-table", f"Numbers of figure {count}. {figure.table.title}")
        finding = html.escape(figure.finding)
        described = f'id="{key}-plot" role="img" aria-label="{finding}" aria-describedby="{key}-table"'
        panels = '<div class="panel"></div>\n' * len(figure.specs)
        return f"""<figure id="{key}">
<figcaption><b>Figure {count}.</b> <span class="finding">{finding}</span></figcaption>
{_legend(figure.legend)}{_choice(figure.choices)}<div class="plot" {described}>
{panels}</div>
<details>
<summary>Numbers of figure {count}</summary>
{table}</details>
<p class="source">{html.escape(self.source)}</p>
</figure>
"""


def _legend(entries: Sequence[Entry]) -> str:
    """Buttons, a series each, which page.js shows; their order is that of the names that it is given."""
    if not entries:
        return ""
    buttons = "".join(
        f'<button type="button" aria-pressed="true" title="{LEGEND}">'
        f"{_swatch(entry)}<span>{html.escape(entry.name)}</span></button>\n"
        for entry in entries
    )
    return f'<div class="legend" role="group" aria-label="Shown in the figure" hidden>\n{buttons}</div>\n'


def _swatch(entry: Entry) -> str:
    """A piece of a series' line with its mark on it. Its colours are what page.css makes of --light and --dark."""
    light, dark = entry.style.colour
    dash = " ".join(f"{length:g}" for length in DASHES[entry.style.dash])
    line = f'<path d="M-14,0H14" stroke-width="2" stroke-dasharray="{dash}"/>' if entry.line else ""
    hollow = ' fill="none" stroke-width="0.32"' if entry.hollow else ' fill="currentColor" stroke="none"'
    mark = f'<path d="{SHAPES[entry.style.symbol]}" transform="scale(5)"{hollow}/>'
    size = 'viewBox="-14 -6 28 12" width="28" height="12"'
    return f'<svg {size} stroke="currentColor" style="--light:{light};--dark:{dark}" aria-hidden="true">{line}{mark}</svg>'


def _choice(choices: Sequence[tuple[str, str]]) -> str:
    """A list of the grids of a heat map, which page.js shows; the value of each is what the figure then says."""
    if not choices:
        return ""
    options = "".join(f'<option value="{html.escape(finding)}">{html.escape(name)}</option>\n' for name, finding in choices)
    return f'<label class="choice" hidden>Shown <select>\n{options}</select></label>\n'


def _cell(text: str) -> str:
    """A cell, the standard deviation of a `61.2 ± 0.4` in small print."""
    mean, sign, sd = text.partition(" ± ")
    return f"{html.escape(mean)}<small>{sign}{html.escape(sd)}</small>" if sign else html.escape(text)


def table_html(table: Table, key: str, caption: str) -> str:
    """A table in a box of its own that scrolls sideways, its first column a heading of each line, and its notes below."""
    right = table.numeric()
    columns = list(zip(*table.lines, strict=True)) or [()] * len(table.header)
    long = [any(len(cell) > LONG_CELL for cell in cells) for cells in columns]
    kinds = [' class="n"' if n else ' class="text"' if wordy else "" for n, wordy in zip(right, long, strict=True)]
    head = "".join(
        f'<th scope="col"{kind if n else ""}>{html.escape(name)}</th>' if name else "<td></td>"
        for name, kind, n in zip(table.header, kinds, right, strict=True)
    )
    body = []
    for n, line in enumerate(table.lines):
        first, *rest = line
        cells = "".join(f"<td{kind}>{_cell(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        ruled = ' class="ruled"' if n in table.rules else ""
        short = ' class="short"' if len(first) <= SHORT_NAME else ""
        body.append(f'<tr{ruled}><th scope="row"{short}>{html.escape(first)}</th>{cells}</tr>\n')
    notes = "".join(f"<li>{html.escape(note)}</li>\n" for note in table.notes)
    wide = " wide" if len(table.header) > WIDE else ""
    label = html.escape(caption)
    return f"""<div class="scroll{wide}" tabindex="0" role="region" aria-label="{label}">
<table id="{key}">
<caption>{label}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{"".join(body)}</tbody>
</table>
</div>
{f'<ul class="notes">{notes}</ul>' if notes else ""}
"""
