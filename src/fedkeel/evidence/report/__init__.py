"""Reports of runs and suites: tables, pictures and pages, from Rows and the text of recipes and environments."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkeel.evidence.report.leaks import audit_tables, read_audit
from fedkeel.evidence.report.page import render
from fedkeel.evidence.report.pictures import learning_curve, run_pictures
from fedkeel.evidence.report.run_page import LONG, Run, run_page
from fedkeel.evidence.report.suite_page import kept_picture, suite_markdown, write_suite_report
from fedkeel.evidence.report.suite_tables import same_value
from fedkeel.evidence.report.sure import read_scores, sure_table
from fedkeel.evidence.report.tables import (
    METHODS,
    Table,
    check_one_run,
    escape,
    final,
    human_bytes,
    last_by_site,
    lowest,
    mean_and_sd,
    method_table,
    plural,
    points,
    read_rows,
    rounds_done,
    rows_scored,
    signed,
    site_names,
    site_table,
    stage_table,
    task_names,
    task_table,
    total,
    traffic_table,
)
from fedkeel.evidence.report.verdicts import read_verdicts
from fedkeel.files import write_atomic
from fedkeel.types import FedKeelError, Row


def write_report(folder: Path) -> Path:
    """Write table.md, curve.svg, report.html and report.md into a run's folder and return the path of report.md.

    Reads rows.jsonl, recipe.toml and env.json there, and measures.jsonl, scores.jsonl, verdicts.json and answers.json if they
    are there; a run that is not finished gets a report that says so. Raises FedKeelError if one of the first three is missing
    or malformed, or if there is no Row yet.
    """
    run = _read(folder)
    rows = run.rows
    tables = [method_table(rows).markdown(), _foldable(task_table(rows))]
    stages, sure = stage_table(rows), sure_table(run.scores)
    if stages.lines:
        tables.insert(1, stages.markdown())
    if sure.lines:
        tables.insert(1, _foldable(sure))
    write_atomic(folder / "table.md", "\n".join(tables))
    page = [f"# {escape(run.name)}: report of a FedKeel run\n"]
    missing = [] if _ended(folder) else missing_parts(rows, tomllib.loads(run.recipe))
    if missing:
        page.append(f"**This run is not finished.** Still missing: {escape('; '.join(missing))}.\n")
    page.append(escape(summary(rows)) + "\n")
    page += [table.markdown() for table in (run.verdict_table(),) if table.lines]
    page.append(tables[0])
    if run_pictures(rows):
        learning_curve(rows, folder / "curve.svg")
        page.append("![Validation score, training loss and test scores; the numbers are in the tables](curve.svg)\n")
    traffic = traffic_table(rows)
    if traffic.lines:
        tables.append(traffic.markdown())
    page += [table.markdown() for table in (run.answers_table(), run.privacy_table(), *run.audit) if table.lines]
    page += [*tables[1:], _foldable(site_table(rows)), "## How it was run\n", _fenced(run.recipe, "toml")]
    page.append(run.environment_table().markdown())
    report = folder / "report.md"
    write_atomic(report, "\n".join(page))
    write_atomic(folder / "report.html", render(run_page(run, summary(rows), missing)))
    return report


def _read(folder: Path) -> Run:
    """What a run's folder says. Raises FedKeelError, see `write_report`."""
    rows = read_rows(folder / "rows.jsonl")
    if not rows:
        raise FedKeelError(f"{folder / 'rows.jsonl'} is empty: nothing is measured yet")
    check_one_run(rows)
    recipe = _text(folder / "recipe.toml")
    try:
        tomllib.loads(recipe)
    except tomllib.TOMLDecodeError as error:
        raise FedKeelError(f"{folder / 'recipe.toml'} is not TOML: {error}") from error
    try:
        environment = json.loads(_text(folder / "env.json"))
    except json.JSONDecodeError as error:
        raise FedKeelError(f"{folder / 'env.json'} is not JSON: {error}") from error
    measures = folder / "measures.jsonl"
    measured = read_rows(measures) if measures.exists() else []
    audit = audit_tables(read_audit(folder))
    return Run(rows, measured, read_scores(folder), recipe, environment, read_verdicts(folder), audit, _answers(folder))


def _answers(folder: Path) -> dict[str, Any]:
    """What `RunFolder.write_answers` kept; empty where nothing was."""
    path = folder / "answers.json"
    if not path.exists():
        return {}
    try:
        told = json.loads(_text(path))
        said = {str(who): {str(k): str(v) for k, v in of.items()} for who, of in told["said"].items() if who in METHODS}
        rows = [{key: str(row[key]) for key in ("id", "task", "prompt", "wanted")} for row in told["rows"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FedKeelError(f"{path} is not what a run keeps: {error!r}") from error
    return {"rows": rows, "said": said}


def _ended(folder: Path) -> bool:
    """Whether the run itself says that it has ended, as one does that could not score everything its recipe names."""
    path = folder / "state.json"
    try:
        return bool(path.exists() and json.loads(_text(path)).get("finished"))
    except (ValueError, AttributeError) as error:
        raise FedKeelError(f"{path} is not what a run keeps: {error!r}") from error


def missing_parts(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """What the recipe asks for and the Rows do not hold yet, in plain words; empty for a finished run.

    settings: the resolved recipe as read from TOML.
    """
    missing = []
    rounds = settings.get("federation", {}).get("rounds", 0) * max(1, len(settings.get("stream", {}).get("stages", [])))
    if rounds_done(rows) < rounds:
        missing.append(f"rounds ({rounds_done(rows)} of {rounds} done)")
    wanted = {"federated", *settings.get("evaluation", {}).get("baselines", [])}
    for method in (m for m in METHODS if m in wanted):
        scored = len(last_by_site(rows, method, "score", "test"))
        sites = len(site_names(rows)) if method == "local" else 1
        if scored < sites or not scored:
            part = f" ({scored} of {plural(sites, 'site')} scored)" if method == "local" and scored else ""
            missing.append(f"the test score of {METHODS[method]}{part}")
    return missing


def summary(rows: Sequence[Row]) -> str:
    """One paragraph in plain words, computed from the numbers; scores in points of 100."""
    rows = final(rows)
    took = f"{plural(rounds_done(rows), 'round')} at {plural(len(site_names(rows)), 'site')}"
    score = {m: last_by_site(rows, m, "score", "test") for m in METHODS}
    if not score["federated"]:
        known = [f"{METHODS[m]} {points(mean_and_sd(found.values())[0])}" for m, found in score.items() if found]
        told = f" Test scores so far, in points: {', '.join(known)}." if known else ""
        return f"Done so far: {took}; the federated model has no test score yet.{told}"
    own = mean_and_sd(score["federated"].values())[0]
    sentences = [
        f"After {took}, the federated model scores {points(own)} points on "
        f"{plural(rows_scored(rows, 'federated'), 'test row')} of {plural(len(task_names(rows)), 'task')}."
    ]
    against = {
        "base": "the base model",
        "analytic": "the analytic head alone",
        "local": "the mean of the sites' local-only models",
        "centralised": "the centralised model, which pools all rows",
    }
    compared = []
    for method, words in against.items():
        if score[method]:
            other = mean_and_sd(score[method].values())[0]
            change = signed(100 * (own - other)) if math.isfinite(own - other) else "not comparable"
            compared.append(f"{change} against {words} ({points(other)})")
    if compared:
        sentences.append(f"In points, that is {'; '.join(compared)}.")
    lows = {
        m: points(lowest(found.values()))
        for m in ("federated", "local")
        if (found := last_by_site(rows, m, "own_score", "test")) and len(found) > 1
    }
    if "federated" in lows:
        local = f", and {lows['local']} when each site is scored with its local-only model" if "local" in lows else ""
        sentences.append(f"The lowest score of a site on its own test rows is {lows['federated']}{local}.")
    up, down = (total(rows, "federated", name) for name in ("bytes_up", "bytes_down"))
    if up is not None and down is not None:
        sentences.append(f"The sites sent {human_bytes(up)} up and received {human_bytes(down)}.")
    return " ".join(sentences)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedKeelError(f"{path} cannot be read: {error}") from error


def _foldable(table: Table) -> str:
    """The table's Markdown, folded behind its title if it is long."""
    if len(table.lines) <= LONG:
        return table.markdown()
    opening = f"<details>\n<summary>{table.title}: {len(table.lines)} lines</summary>\n"
    return f"{opening}\n{table.markdown()}\n</details>\n"


def _fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"


__all__ = [
    "Table",
    "human_bytes",
    "kept_picture",
    "learning_curve",
    "method_table",
    "read_rows",
    "read_scores",
    "same_value",
    "site_table",
    "stage_table",
    "suite_markdown",
    "sure_table",
    "task_table",
    "traffic_table",
    "write_report",
    "write_suite_report",
]
