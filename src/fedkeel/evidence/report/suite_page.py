"""A suite's page and its Markdown: which tables and figures, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkeel.evidence.report import suite_charts as charts
from fedkeel.evidence.report import suite_tables as tables
from fedkeel.evidence.report.chance import Chance
from fedkeel.evidence.report.charts import Chart, Heat
from fedkeel.evidence.report.figures import figures_of
from fedkeel.evidence.report.page import Block, Folded, Page, Section, Text, render
from fedkeel.evidence.report.pictures import draw_rows
from fedkeel.evidence.report.results import Result, results_of
from fedkeel.evidence.report.styles import styles_of
from fedkeel.evidence.report.suite import BASELINES, Suite, chances_of, lines_of, read_suite, streams_of
from fedkeel.evidence.report.tables import METHODS, Table, escape
from fedkeel.evidence.report.twins import twin_table
from fedkeel.files import write_atomic
from fedkeel.types import FedKeelError


def write_suite_report(folder: Path) -> Path:
    """Write table.md, report.md and report.html into a suite's folder and return the path of report.html.

    Reads suite.json, chance.json if it is there, and what every run left; a suite that is not finished gets a report that says
    so. Raises FedKeelError, naming the file, if something there is malformed.
    """
    suite = read_suite(folder)
    streams = _all_judged(suite)
    scores = [tables.score_table(suite, s.name, s.results, s.chances).markdown() for s in streams]
    write_atomic(folder / "table.md", "\n".join(scores))
    write_atomic(folder / "report.md", _markdown(suite, streams))
    page = folder / "report.html"
    write_atomic(page, render(_page(suite, streams)))
    return page


def kept_picture(folder: Path, stream: str, path: Path) -> None:
    """Draw into `path` (.svg or .png) what each method of a stream learnt, and what it kept of it; as the page's figure.

    Raises FedKeelError if something in the suite's folder is malformed, or nothing of a stream with stages is there.
    """
    chart = charts.kept(_judged(read_suite(folder), stream).results)
    if chart is None:
        raise FedKeelError(f"{folder}: no finished run of {stream!r} that is scored over stages")
    draw_rows(chart, path)


def suite_markdown(folder: Path) -> str:
    """The tables of the suite in `folder` as sections of Markdown, a second-level heading a stream. Raises FedKeelError."""
    suite = read_suite(folder)
    return _sections(suite, _all_judged(suite))


class _Stream:
    """A stream's lines with their numbers, averages without the tasks at chance. beside: the stream against its even twin,
    without a line where it has none."""

    beside = Table("", (), ())

    def __init__(self, name: str, results: list[Result], chances: dict[str, Chance]) -> None:
        self.name, self.results, self.chances = name, results, chances
        self.left_out = [task for task, chance in chances.items() if chance.out]


def _judged(suite: Suite, name: str) -> _Stream:
    chances = chances_of(suite, name, lines_of(suite, name))
    return _Stream(name, results_of(suite, name, [task for task, c in chances.items() if c.out]), chances)


def _all_judged(suite: Suite) -> list[_Stream]:
    found = {name: _judged(suite, name) for name in streams_of(suite)}
    for name, twin in suite.twins.items():
        if name in found and twin in found:
            here, there = found[name], found[twin]
            left_out = {*here.left_out, *there.left_out}
            here.beside = twin_table(suite, name, here.results, there.results, left_out)
    return list(found.values())


def _tables(suite: Suite, stream: _Stream) -> list[Table]:
    """All tables of a stream that have a line, the score table first."""
    found = [
        tables.score_table(suite, stream.name, stream.results, stream.chances),
        stream.beside,
        tables.task_table(stream.name, stream.results, stream.chances),
        tables.chance_table(stream.name, stream.chances),
        tables.retention_table(stream.name, stream.results),
        tables.square_table(suite, stream.name, stream.results),
        tables.parts_table(suite, stream.name, stream.results),
        *(tables.knob_table(suite, stream.name, stream.results, key) for key in suite.knobs),
    ]
    return [table for table in found if table.lines]


def _sections(suite: Suite, streams: Sequence[_Stream]) -> str:
    parts = []
    for stream in streams:
        text = suite.streams.get(stream.name, "")
        parts.append(f"## {escape(stream.name)}\n" + (f"\n{escape(text)}\n" if text else ""))
        parts += [table.markdown(level=3) for table in _tables(suite, stream)]
        parts.append(tables.method_list(suite, stream.name, stream.results).markdown(level=3))
    return "\n".join(parts)


def _markdown(suite: Suite, streams: Sequence[_Stream]) -> str:
    head = [f"# {escape(suite.title)}\n", escape(tables.suite_summary(suite)) + "\n"]
    note = [escape(suite.note) + "\n"] if suite.note else []
    figures = "Figures are in report.html, which opens without a network.\n"
    return "\n".join([*head, *note, figures, _sections(suite, streams), tables.run_table(suite).markdown()])


def _page(suite: Suite, streams: Sequence[_Stream]) -> Page:
    commits = sorted({str(r.environment["commit"]) for r in suite.runs if r.environment.get("commit")})
    told = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}" if commits else "commit not known"
    lead = [Text(tables.suite_summary(suite), "lead")]
    if any(r.state != "finished" for r in suite.runs):
        lead.insert(0, Text("This suite is not finished: see the states of its runs at the end.", "warning"))
    lead += [Text(suite.note)] if suite.note else []
    compared = [
        Table("Streams", ("stream", "what it is"), tuple((s.name, suite.streams.get(s.name, "")) for s in streams)),
        *(tables.method_list(suite, s.name, s.results) for s in streams),
    ]
    sections = [Section("compared", "What is compared", tuple(t for t in compared if t.lines))]
    sections += [_stream_section(suite, stream, n) for n, stream in enumerate(streams, 1)]
    runs = tables.run_table(suite)
    sections.append(Section("runs", "Runs", (Folded(runs),)))
    source = f"Suite {suite.name}, recipe.toml in each run's folder, {told}"
    return Page(suite.title, "FedKeel · report of a suite", tuple(lead), source, tuple(sections))


def _stream_section(suite: Suite, stream: _Stream, number: int) -> Section:
    results, name = stream.results, stream.name
    methods = [m for m in suite.methods if m != BASELINES]
    styles = styles_of([*METHODS.values(), *methods], suite.reference)

    def figure(chart: Chart | Heat | None) -> tuple[Block, ...]:
        return figures_of(chart, styles)

    def table(made: Table) -> tuple[Block, ...]:
        return (made,) if made.lines else ()

    sites = charts.sites(results)
    knobs = [block for n, key in enumerate(suite.knobs, 1) for block in figure(charts.knob(suite, name, results, key, n))]
    found: list[tuple[str, str, tuple[Block, ...]]] = [
        ("scores", "Scores", table(tables.score_table(suite, name, results, stream.chances))),
        ("skew", "Against its even twin", table(stream.beside)),
        ("differences", "Differences", figure(charts.differences(suite, results))),
        ("square", "Two by two", figure(charts.square(suite, name, results))),
        (
            "parts",
            "Every part alone",
            (*figure(charts.parts(suite, results)), *table(tables.parts_table(suite, name, results))),
        ),
        ("knobs", "Sensitivity", tuple(knobs)),
        (
            "tasks",
            "Tasks",
            (*table(tables.task_table(name, results, stream.chances)), *table(tables.chance_table(name, stream.chances))),
        ),
        ("learning", "Learning curves", figure(charts.learning(results))),
        ("stages", "Score by stage", figure(charts.stages(results, stream.left_out))),
        ("stability", "Stability under damage", figure(charts.stability(results))),
        ("kept", "Retention", (*figure(charts.kept(results)), *table(tables.retention_table(name, results)))),
        ("traffic", "Traffic", figure(charts.traffic(results))),
        ("sites", "Sites", figure(sites[0]) if sites else ()),
        ("drift", "Drift", figure(charts.drift(results))),
        ("gates", "Gates", figure(charts.gates(results))),
    ]
    parts = tuple(Section(f"s{number}-{key}", title, blocks) for key, title, blocks in found if blocks)
    text = suite.streams.get(name, "")
    return Section(f"s{number}", name, (Text(text),) if text else (), parts)
