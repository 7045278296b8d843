"""A run's page: which tables and figures, in which order."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedkeel.evidence.report import run_charts as charts
from fedkeel.evidence.report.charts import Chart, Heat
from fedkeel.evidence.report.figures import figures_of
from fedkeel.evidence.report.page import Block, Code, Folded, Page, Section, Text
from fedkeel.evidence.report.privacy import privacy_table
from fedkeel.evidence.report.styles import run_styles
from fedkeel.evidence.report.sure import Models, sure_table
from fedkeel.evidence.report.tables import METHODS, Table, final, method_table, site_table, task_table, traffic_table
from fedkeel.evidence.report.verdicts import Verdict, measured, verdict_table
from fedkeel.types import Row

LONGEST = 400  # letters of a text in a table of answers
LONG = 20  # lines; a table with more is folded away


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def foldable(table: Table) -> Block:
    return Folded(table) if len(table.lines) > LONG else table


@dataclass(frozen=True)
class Run:
    """What a run's folder says. rows: never none. measures: of `fedkeel measure`. scores: of the test rows. recipe: TOML.
    environment: of env.json. verdicts: kept beside what the rows tell. answers: see `RunFolder.write_answers`."""

    rows: Sequence[Row]
    measures: Sequence[Row]
    scores: Models
    recipe: str
    environment: Mapping[str, Any]
    verdicts: Sequence[Verdict] = ()
    audit: Sequence[Table] = ()
    answers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.rows[0].run

    def verdict_table(self) -> Table:
        """What `fedkeel doctor` says of the run; empty where it has nothing to say."""
        return verdict_table([*measured(self.rows, self.scores), *self.verdicts])

    def answers_table(self) -> Table:
        """A line a row: what was asked and wanted, and what the models said; empty where they said nothing
        (`evaluation.generate = false`)."""
        said = {who: answers for who, answers in self.answers.get("said", {}).items() if any(answers.values())}
        lines = [
            (row["task"], *map(_short, (row["prompt"], row["wanted"], *(said[who].get(row["id"], "–") for who in said))))
            for row in self.answers.get("rows", [])
            if said
        ]
        header = ("task", "asked", "wanted", *(METHODS[who] for who in said))
        notes = (
            "Test rows of each task in turn, by the hash that is their id: neither good nor bad answers are picked. Long texts "
            "are cut here and whole in answers.json; evaluation.samples = 0 keeps none.",
        )
        return Table("Answers", header, tuple(lines), notes if lines else ())

    def privacy_table(self) -> Table:
        """What was promised and spent; empty where nothing was."""
        return privacy_table(tomllib.loads(self.recipe), self.rows)

    def environment_table(self) -> Table:
        """Software and machine, a line each."""
        lines = []
        for key, value in self.environment.items():
            named = value.items() if isinstance(value, dict) else [(key.replace("_", " "), value)]
            lines += [(name, "not known" if shown == "" else str(shown)) for name, shown in named]
        return Table("Environment", ("what", "value"), tuple(lines))


def run_page(run: Run, summary: str, missing: Sequence[str]) -> Page:
    """summary: a paragraph. missing: what a run that is not finished lacks."""
    rows, measures = run.rows, run.measures
    styles = run_styles()

    def figure(chart: Chart | Heat | None) -> tuple[Block, ...]:
        return figures_of(chart, styles)

    sites = charts.sites(rows)
    traffic = traffic_table(rows)
    tasks = task_table(rows)
    kept, drafts, shorter = charts.kept_table(rows, measures), charts.drafts_table(measures), charts.blocks_table(measures)
    verdicts, answers, privacy = run.verdict_table(), run.answers_table(), run.privacy_table()
    found: list[tuple[str, str, tuple[Block, ...]]] = [
        ("verdicts", "What to look at", (verdicts,) if verdicts.lines else ()),
        (
            "scores",
            "Scores",
            (method_table(rows), *(foldable(table) for table in (sure_table(run.scores), tasks) if table.lines)),
        ),
        ("answers", "Sample answers", (answers,) if answers.lines else ()),
        ("privacy", "Privacy", (privacy,) if privacy.lines else ()),
        ("audit", "Leak audit", tuple(run.audit)),
        ("learning", "Learning curves", figure(charts.learning(rows))),
        ("stages", "Score by stage", figure(charts.stages(rows))),
        ("traffic", "Score against traffic", (*figure(charts.traffic(rows)), *((traffic,) if traffic.lines else ()))),
        ("sites", "Sites", (*figure(sites[0]), sites[1], foldable(site_table(final(rows)))) if sites else ()),
        ("drift", "Drift by layer", (*figure(charts.drift(rows)), *figure(charts.site_cka(measures)))),
        ("gates", "Gates over time", figure(charts.gates(rows))),
        ("stability", "Stability under damage", figure(charts.stability(measures))),
        ("shorter", "Fewer blocks", (shorter,) if shorter.lines else ()),
        ("drafts", "Drafts of the lower blocks", (drafts,) if drafts.lines else ()),
        ("kept", "Retention and generalisation", (kept,) if kept.lines else ()),
        ("how", "How it was run", (Code("Recipe", run.recipe.rstrip()), run.environment_table())),
    ]
    lead = [Text(f"This run is not finished. Still missing: {'; '.join(missing)}.", "warning")] if missing else []
    lead.append(Text(summary, "lead"))
    commit = run.environment.get("commit") or "not known"
    source = f"Run {run.name}, seed {rows[0].seed}, recipe.toml beside it, commit {commit}"
    return Page(
        run.name,
        "FedKeel · report of a run",
        tuple(lead),
        source,
        tuple(Section(key, title, blocks) for key, title, blocks in found if blocks),
    )
