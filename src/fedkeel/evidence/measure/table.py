"""The table of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

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

    def cells(rows: Sequence[Row]) -> dict[str, str]:
        own = [r for r in rows if not r.task]

        def mean_of(prefix: str, method: str = "federated", split: str = "", last: bool = True) -> float | None:
            values = [
                r.value
                for r in own
                if r.name.startswith(prefix) and r.method == method and split in ("", r.split) and (last or r.stage < stages)
            ]
            return mean(values) if values else None

        stages = max(r.stage for r in rows)
        ssi, fall = under_damage(own, families)
        shares = {
            "undamaged": mean_of("damage/clean"),
            "held-out damage: mean fall": fall,
            "unseen tasks": mean_of("score", split="unseen"),
            "unseen tasks: base": mean_of("score", "base", split="unseen"),
        }
        ratios = {
            "SSI held out": ssi,
            "SSI trained on": under_damage(own, disturbed)[0],
            "KL to base": mean_of("kl_to_base"),
            "perplexity ratio": mean_of("perplexity_ratio"),
            "CKA: earlier stages": mean_of("state_cka/", last=False),
            "CKA: sites": mean_of("site_cka/"),
        }
        return {
            **{name: f"{100 * value:.1f}" for name, value in shares.items() if value is not None},
            **{name: f"{value:.3f}" for name, value in ratios.items() if value is not None},
        }

    lines = {folder.name: cells(measured.rows) for folder, measured in found.items()}
    order = (
        "undamaged", "held-out damage: mean fall", "SSI held out", "SSI trained on", "KL to base", "perplexity ratio",
        "CKA: earlier stages", "CKA: sites", "unseen tasks", "unseen tasks: base",
    )  # fmt: skip
    header = [name for name in order if any(name in line for line in lines.values())]
    body = tuple((run, *(line.get(name, "–") for name in header)) for run, line in lines.items())
    over = f"over the families that no run here had used in training ({', '.join(families)}), and " if families else ""
    notes = (
        f"Scores and falls in points of 100. SSI: stability index under damage, {over}over those that all had. "
        "CKA: with the final model, mean over tapped blocks.",
        *(f"{folder.name}: {note}." for folder, measured in found.items() for note in measured.notes),
    )
    return Table("Measures", ("run", *header), body, notes)
