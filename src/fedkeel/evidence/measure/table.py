"""The table of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedkeel import tables
from fedkeel.evidence.measure.run import Measured
from fedkeel.evidence.report import Table
from fedkeel.evidence.report.run_numbers import damage_names, held_out, under_damage
from fedkeel.scores.metrics import mean
from fedkeel.types import Row


def measures_table(found: Mapping[Path, Measured]) -> Table:
    """A line a run, with what all its rows come to; a column that no run has is left out.

    Held-out damage is that of families which the training of none of the runs had used, and the other that of families which
    all had used: some families cost more than others, and lines are there to be compared.
    """
    families = held_out(measured.rows for measured in found.values())
    named = [damage_names(measured.rows) for measured in found.values()]
    disturbed = [family for family in (named[0] if named else ()) if all(n.get(family, {}).get("trained") for n in named)]
    lines = {folder.name: _cells(measured.rows, families, disturbed) for folder, measured in found.items()}
    columns = [column.title for entry in tables.MEASURES.values() for column in entry.columns]
    header = [name for name in [columns[0], *DAMAGED, *columns[1:]] if any(name in line for line in lines.values())]
    body = tuple((run, *(line.get(name, "–") for name in header)) for run, line in lines.items())
    over = f"over the families that no run here had used in training ({', '.join(families)}), and " if families else ""
    notes = (
        f"Scores and falls in points of 100. SSI: stability index under damage, {over}over those that all had. "
        "CKA: with the final model, mean over tapped blocks.",
        *(f"{folder.name}: {note}." for folder, measured in found.items() for note in measured.notes),
    )
    return Table("Measures", ("run", *header), body, notes)


# columns that depend on which families the other runs had used
DAMAGED = ("held-out damage: mean fall", "SSI held out", "SSI trained on")


def _cells(rows: Sequence[Row], families: Sequence[str], disturbed: Sequence[str]) -> dict[str, str]:
    """title of a column -> its cell, of one run."""
    own = [r for r in rows if not r.task]
    ssi, fall = under_damage(own, families)
    damaged = dict(zip(DAMAGED, (fall, ssi, under_damage(own, disturbed)[0]), strict=True))
    cells = {}
    for column in (column for entry in tables.MEASURES.values() for column in entry.columns):
        value = _mean_of(own, column)
        if value is not None:
            cells[column.title] = f"{100 * value:.1f}" if column.percent else f"{value:.3f}"
    for title, damage in damaged.items():
        if damage is not None:
            cells[title] = f"{100 * damage:.1f}" if title == DAMAGED[0] else f"{damage:.3f}"
    return cells


def _mean_of(rows: Sequence[Row], column: tables.Column) -> float | None:
    last = max(r.stage for r in rows)
    values = [
        r.value
        for r in rows
        if r.name.startswith(column.rows)
        and r.method == column.method
        and column.split in ("", r.split)
        and (column.last_stage or r.stage < last)
    ]
    return mean(values) if values else None
