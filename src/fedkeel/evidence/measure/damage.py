"""Scores under damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import stdev
from typing import Any

from fedkeel import tables
from fedkeel.evidence.measure.run import Finished, Settings
from fedkeel.recipe.schema import Recipe
from fedkeel.scores.damage import Subject, family_index, outcomes
from fedkeel.scores.evaluate import overall
from fedkeel.scores.metrics import mean
from fedkeel.types import Row


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    return {"draws": settings.draws, "rows": settings.rows} if settings.damages else None


def about_family(settings: Settings, family: str) -> dict[str, Any]:
    """All that decides the outcome of one family's damage."""
    return {"draws": settings.draws, "rows": settings.rows, "strengths": list(tables.DAMAGES[family].strengths)}


def undamaged(run: Finished) -> list[Row]:
    """Scores without damage, which all families are held against."""
    return [
        run.row("damage/clean", overall(run.clean), "share"),
        run.row("damage/draws", float(run.settings.draws), "draws"),
        run.row("damage/rows", float(len(run.clean)), "rows"),
    ]


def damage(run: Finished, family: str) -> list[Row]:
    """Scores under one family, and its stability index: there is none where the undamaged model scores 0."""
    draws, strengths = run.settings.draws, tables.DAMAGES[family].strengths
    clean, part = run.clean, f"damage/{family}"
    subject = Subject(run.served(), run.formatter, run.recipe.evaluation, draws)
    total = len(strengths) * (draws if tables.DAMAGES[family].random else 1)
    found = []
    for outcome in outcomes(subject, clean, family, strengths):
        found.append(outcome)
        run.watch(part, len(found), total)
    rows, scores = [], {}
    for strength in strengths:
        mine = [o for o in found if o.strength == strength]
        told = {"score": mean([o.score for o in mine]), "agreement": mean([o.agreement for o in mine])}
        scores[strength] = told["score"]
        if len(mine) > 1:
            told["sd"] = stdev(o.score for o in mine)
        consistent = [o.consistency for o in mine if o.consistency is not None]
        if consistent:
            told["consistency"] = mean(consistent)
        rows += [run.row(f"{part}/{strength:g}/{name}", value, "share") for name, value in told.items()]
    rows.append(run.row(f"{part}/trained", float(trained_by(run.recipe, family)), "flag"))
    if at_rest := overall(clean):
        rows.append(run.row(f"{part}/ssi", family_index(family, scores, at_rest), "ratio"))
    return rows


def trained_by(recipe: Recipe, family: str) -> bool:
    """Whether a recipe's training disturbs what a family of damage does."""
    damage = tables.DAMAGES[family]
    return any(map(recipe.structure.amount, damage.trained_by)) or (damage.exits and recipe.exit.weight > 0)


def over_families(clean: Row, families: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The means over the families that training left alone and over those it used; none where there are none."""
    index: dict[bool, list[float]] = {False: [], True: []}
    falls = []
    for family, rows in families.items():
        found = {r.name.removeprefix(f"damage/{family}/"): r.value for r in rows}
        trained = bool(found["trained"])
        if "ssi" in found:
            index[trained].append(found["ssi"])
        if not trained:
            falls += [clean.value - value for name, value in found.items() if name.endswith("/score")]
    heads = {"held_out_ssi": (index[False], "ratio"), "trained_ssi": (index[True], "ratio"), "held_out_fall": (falls, "share")}
    return [replace(clean, name=f"damage/{name}", value=mean(v), unit=unit) for name, (v, unit) in heads.items() if v]
