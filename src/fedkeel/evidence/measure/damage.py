"""Scores under damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import stdev

from fedkeel.evidence.measure.run import _Run
from fedkeel.scores.damage import FAMILIES, STRENGTHS, family_index, outcomes
from fedkeel.scores.evaluate import overall
from fedkeel.scores.metrics import mean
from fedkeel.types import Row

# family of damage -> structures that disturb the same thing while training
TRAINED_BY = {
    "heads": ("heads",),
    "channels": ("channels",),
    "skip": ("layers",),
    "modules": ("branch", "lodrop"),
    "scale": ("rank",),
    "noise": ("weights",),
    "bits": (),
}


def _undamaged(run: _Run) -> list[Row]:
    return [
        run.row("damage/clean", overall(run.clean), "share"),
        run.row("damage/draws", float(run.settings.draws), "draws"),
        run.row("damage/rows", float(len(run.clean)), "rows"),
    ]


def _damage(run: _Run, family: str) -> list[Row]:
    """Scores under one family, and its stability index: there is none where the undamaged model scores 0."""
    draws, strengths = run.settings.draws, STRENGTHS[family]
    clean, model, part = run.clean, run.served(), f"damage/{family}"
    total = len(strengths) * (draws if FAMILIES[family].random else 1)
    found = []
    for outcome in outcomes(model, run.formatter, run.recipe.evaluation, clean, family, strengths, draws, seed=0):
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
    amounts = asdict(run.recipe.structure)
    rows.append(run.row(f"{part}/trained", float(any(amounts[name] for name in TRAINED_BY[family])), "flag"))
    if undamaged := overall(clean):
        rows.append(run.row(f"{part}/ssi", family_index(family, scores, undamaged), "ratio"))
    return rows


def _over_families(clean: Row, families: Mapping[str, Sequence[Row]]) -> list[Row]:
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
