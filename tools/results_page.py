"""Fill the tables of docs/results.md, docs/results-all.md and README.md from committed results, and draw pictures; words are by
hand.

    python tools/results_page.py

In docs/results-all.md a table stands between `<!-- table: SOURCE TITLE -->` and `<!-- end -->`, as `tables_in` finds it: of a
packed suite, by the title it has in the suite's tables.md, which is made anew from the suite's rows first; of a run of the main
job; or of a benchmark's output. A note below a table is printed once on the page, where it first applies. The tables of the
README stand between `<!-- NAME -->` and `<!-- end of NAME -->`, and a part of one, on either page, between
`<!-- part: SOURCE TITLE | COLUMN, … | LINE, … -->` and `<!-- end -->`. `tests/test_results.py` fails where page and
results disagree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkeel.evidence.report import Table, kept_picture, method_table, read_rows
from fedkeel.evidence.suites.pack import tables_of
from fedkeel.files import write_atomic

ROOT = Path(__file__).resolve().parent.parent
RESULTS, README = ROOT / "results", ROOT / "README.md"
PAGE, SHORT = ROOT / "docs" / "results-all.md", ROOT / "docs" / "results.md"
PICTURES = {"main": ("clinc150", "banking77"), "main-short": ("clinc150", "cl15")}  # streams whose kept score the page shows
SUITES = tuple(sorted(path.parent.name for path in (RESULTS / "suites").glob("*/suite.json")))
MARK = re.compile(r"<!-- table: (\S+) (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def suite_tables(suite: str) -> str:
    """tables.md of a packed suite as its rows give it."""
    folder = RESULTS / "suites" / suite
    return tables_of(folder, json.loads((folder / "suite.json").read_text(encoding="utf-8")))


def tables_in(source: str, title: str) -> str:
    """A table and its notes in Markdown, without a heading.

    source: a suite, `main-job` (title: the run), `step-cost` or `engines` (title: the file of a benchmark's output).
    """
    if source == "main-job":
        return _body(method_table(read_rows(RESULTS / source / title / "rows.jsonl")).markdown())
    if source in ("step-cost", "engines"):
        return _body(BENCHMARKS[source, title.partition("-")[0]](figures(source, title)).markdown())
    text = (RESULTS / "suites" / source / "tables.md").read_text(encoding="utf-8")
    found = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    if len(found) != 1:
        raise SystemExit(f"suite {source!r} has {len(found)} tables with the title {title!r}")
    return str(found[0]).strip("\n")


def _body(markdown: str) -> str:
    return markdown.partition("\n")[2].strip("\n")


def figures(source: str, title: str) -> dict[str, Any]:
    """What a benchmark found: the last line of its committed output."""
    found: dict[str, Any] = json.loads((RESULTS / source / f"{title}.txt").read_text().splitlines()[-1])
    return found


def step_cost(told: dict[str, Any]) -> Table:
    """benchmarks/step_cost.py: seconds, ratio to plain, and peak memory by variant."""
    header = ("base", "variant", "s a round", "against plain", "peak MB", "against plain, peak")
    lines = [
        (r["base"], r["variant"], f"{r['seconds']:.2f}", f"{r['ratio']:.2f}", f"{r['peak_mb']:.0f}", f"{r['peak_ratio']:.2f}")
        for r in told["results"]
    ]
    note = f"benchmarks/step_cost.py: {told['rows']} rows of {told['length']} tokens, one thread."
    return Table("Step cost", header, tuple(lines), (note,))


def engines(told: dict[str, Any]) -> Table:
    """benchmarks/engines.py: seconds and memory by engine and number of sites, and their ratios to one process."""
    times = ("first round, s", "a round, s", "against local", "whole run, s")
    lines = [
        (
            *(str(r["sites"]), r["engine"]),
            *(f"{r['first']:.2f}", f"{r['round']:.2f}", f"{r['ratio']:.2f}", f"{r['whole']:.0f}"),
            *(f"{r['mb']:.0f}", f"{r['mb_ratio']:.2f}"),
        )
        for r in told["results"]
    ]
    note = f"benchmarks/engines.py: {told['rounds']} rounds, {told['cores']} cores, repeats: {told['repeats']}."
    return Table("Engines", ("sites", "engine", *times, "peak MB", "memory against local"), tuple(lines), (note,))


def warm_site(told: dict[str, Any]) -> Table:
    """benchmarks/warm_site.py: seconds of a round in a worker that holds its base, and in a fresh one, by base."""
    times = ("a warm round, s", "a cold one, s", "load, s", "load from disk, s")
    lines = [
        (
            *(r["base"], f"{r['megabytes']:.0f}" if r["megabytes"] else "–"),
            *(f"{r['warm']:.1f}", f"{r['cold']:.1f}", f"{r['load']:.1f}"),
            "–" if r["from_disk"] is None else f"{r['from_disk']:.1f}",
            *(f"{100 * r['share']:.0f} %", f"{r['hidden_at']:.0f}"),
        )
        for r in told["results"]
    ]
    header = ("base", "MB on disk", *times, "load in a cold round", "a warm round that makes it a tenth, s")
    note = f"benchmarks/warm_site.py: {told['steps']} steps of 4 rows, repeats: {told['repeats']}."
    return Table("A warm worker", header, tuple(lines), (note,))


def llm(told: dict[str, Any]) -> Table:
    """benchmarks/llm.py: seconds a step and peak memory of FedKeel and TRL, and what keeping the lower blocks' states saves."""
    header = ("run", "s a step", "against TRL", "peak MB", "against TRL, peak")
    lines = [
        (r["run"], f"{r['step_s']:.2f}", f"{r['step_to_trl']:.2f}", f"{r['peak_mb']:.0f}", f"{r['peak_to_trl']:.2f}")
        for r in told["results"]
    ]
    cache = told["cache"]
    notes = (
        f"benchmarks/llm.py: {told['base']}, {told['rows']} rows of {told['tokens']:,} tokens together, batches of "
        f"{told['batch']}, one thread, repeats: {told['repeats']}.",
        f"With the states of the lower blocks kept to without, in turns in one process: a step {cache['step']:.2f}, a forward "
        f"pass {cache['pass']:.2f}.",
    )
    return Table("A step of a language model", header, tuple(lines), notes)


BENCHMARKS = {
    ("step-cost", "cpu"): step_cost,
    ("step-cost", "llm"): llm,
    ("engines", "cpu"): engines,
    ("engines", "warm"): warm_site,
}


def filled(text: str) -> str:
    """A page with every marked table, or part of one, as the results have it."""
    told: set[str] = set()

    def one(found: re.Match[str]) -> str:
        lines = tables_in(found[1], found[2]).splitlines()
        new = [line for line in lines if not (line.startswith("- ") and line in told)]
        told.update(line for line in lines if line.startswith("- "))
        table = "\n".join(new).strip("\n")
        return f"<!-- table: {found[1]} {found[2]} -->\n\n{table}\n\n<!-- end -->"

    return short(MARK.sub(one, text))


def _selected(table: str, columns: Sequence[str], lines: Sequence[str] = ()) -> str:
    """Of a table in Markdown, its columns of these names, in their order, and its lines that begin so; without lines: all."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.partition("\n\n")[0].splitlines()]
    keep = [cells[0].index(name) for name in columns]
    body = [next(line for line in cells[2:] if line[0] == name) for name in lines] if lines else cells[2:]
    return "\n".join("| " + " | ".join(line[i] for i in keep) + " |" for line in [*cells[:2], *body])


PART = re.compile(r"<!-- part: (\S+) ([^|]+?) \| ([^|]+?) \| ([^|]+?) -->\n.*?<!-- end -->", re.DOTALL)


def short(text: str) -> str:
    """A page with every marked part of a table as the results have it."""

    def one(found: re.Match[str]) -> str:
        source, title, columns, lines = found.groups()
        table = _selected(tables_in(source, title), columns.split(", "), lines.split(", "))
        return f"<!-- part: {source} {title} | {columns} | {lines} -->\n\n{table}\n\n<!-- end -->"

    return PART.sub(one, text)


def readme(text: str) -> str:
    """The README with its tables: the encoder on CLINC150 by leg, and a few methods of the main suite."""
    legs = ("method", "score, points", "mean over sites, own rows", "bytes up", "bytes down")
    suite = ("method", "seeds", "final score", "difference to fedit", "95 % interval", "forgetting", "MB up")
    methods = (
        "fedit (reference)",
        "fedprox",
        "fedgkd",
        "ffa-lora",
        "o-lora",
        "fedrs",
        "fedit-average",
        "full",
        "full-two",
        "analytic-two",
    )
    streams = _selected(tables_in("main", "clinc150: scores"), suite, methods)
    tables = {
        "table": _selected(tables_in("main-job", "clinc150-minilm"), legs),
        "streams": streams,
    }
    for name, table in tables.items():
        before, rest = text.split(f"<!-- {name} -->\n", 1)
        after = rest.split(f"<!-- end of {name} -->", 1)[1]
        text = f"{before}<!-- {name} -->\n{table}\n<!-- end of {name} -->{after}"
    return text


if __name__ == "__main__":
    for suite in SUITES:
        write_atomic(RESULTS / "suites" / suite / "tables.md", suite_tables(suite))
    for suite, streams in PICTURES.items():
        for stream in streams:
            kept_picture(RESULTS / "suites" / suite, stream, RESULTS / "suites" / suite / f"{stream}.svg")
    write_atomic(PAGE, filled(PAGE.read_text(encoding="utf-8")))
    write_atomic(SHORT, short(SHORT.read_text(encoding="utf-8")))
    write_atomic(README, readme(README.read_text(encoding="utf-8")))
