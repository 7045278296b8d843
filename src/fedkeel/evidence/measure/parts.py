"""What a finished run is measured by beside its scores (method.md §6): damage, general text, hidden states, unseen tasks.

Each part is measured once: `measures.json` in the run's folder keeps its rows beside the settings that they were measured
with and the hash of the adapter, so that a later or interrupted measuring does only what is lacking. `measures.jsonl` holds
all rows, for reports.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkeel import tables
from fedkeel.evidence.measure.damage import about_family, damage, over_families
from fedkeel.evidence.measure.run import Finished, Measured, MeasureError, Settings, UnmeasuredError, Watch, digest
from fedkeel.files import write_atomic
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.prepare import Prepared, data_view, prepare
from fedkeel.scores.damage import check
from fedkeel.types import Row


def finished(folder: Path) -> tuple[Recipe, str]:
    """The recipe of a run whose federation has ended, and the hash of its adapter: of all of them where factors stay at the
    sites. Raises MeasureError if it has not ended."""
    recipe, adapters = folder / "recipe.toml", sorted((folder / "adapter").rglob("adapter_model.safetensors"))
    for what, path in ((recipe.is_file(), recipe), (adapters, folder / "adapter" / "adapter_model.safetensors")):
        if not what:
            raise MeasureError(f"{path} is missing: {folder} is not a run whose federation has ended")
    return load_recipe(recipe), digest(adapters)


@dataclass
class _Loaded:
    """Data and base of the run before, for the next one to use where they are the same."""

    prepared: Prepared | None = None
    model: Model | None = None
    made_for: tuple[Any, ...] = ()

    def data(self, recipe: Recipe) -> Prepared:
        if self.prepared is None or data_view(self.prepared.recipe) != data_view(recipe):
            self.prepared = prepare(recipe)
        self.prepared = replace(self.prepared, recipe=recipe)
        return self.prepared

    def base(self, prepared: Prepared) -> Model:
        recipe = prepared.recipe
        wanted = (recipe.model, recipe.lora, recipe.seed, prepared.classes)
        if self.model is None or self.made_for != wanted:
            self.model = None  # before the next is loaded: two may not fit
            self.model, self.made_for = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes), wanted
        return self.model


def _wanted(settings: Settings) -> dict[str, Any]:
    """Every part that is asked for, with all that decides its outcome beside the run; damage is a part a family."""
    parts = {}
    for name, entry in tables.MEASURES.items():
        told = entry.asked(settings)
        if told is not None:
            parts[name] = told
            if name == "damage":
                parts |= {f"damage/{family}": about_family(settings, family) for family in settings.damages}
    return parts


def _measured(part: str, run: Finished) -> list[Row]:
    """The rows of a part. Raises UnmeasuredError where it says nothing of this run."""
    name, _, family = part.partition("/")
    rule = tables.RULES[run.recipe.federation.rule]
    if rule.personal and tables.MEASURES[name].one_model:
        raise UnmeasuredError(
            f"not measured, as rule {rule.name!r} leaves factors at the sites and so no one model that could be damaged, read "
            f"or asked"
        )
    rows: list[Row] = damage(run, family) if family else tables.MEASURES[name].load()(run)
    return rows


def _kept(folder: Path, adapter: str) -> dict[str, dict[str, Any]]:
    """The parts that measures.json holds of this adapter: {part: {settings, rows, note}}."""
    path = folder / "measures.json"
    try:
        held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        parts: dict[str, dict[str, Any]] = held["parts"] if held.get("adapter") == adapter else {}
    except (ValueError, KeyError, AttributeError) as error:
        raise MeasureError(f"{path} cannot be read: {error!r}; delete it to measure anew") from error
    return parts


def _rows(parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """All rows in order, the means over families of damage among them."""
    found = {part: [Row.from_json(row) for row in held["rows"]] for part, held in parts.items()}
    rows = [row for part in found.values() for row in part]
    families = {part.removeprefix("damage/"): rows for part, rows in found.items() if part.startswith("damage/") and rows}
    return rows + (over_families(found["damage"][0], families) if families else [])


def _write(folder: Path, adapter: str, parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    rows = _rows(parts)
    write_atomic(folder / "measures.json", json.dumps({"adapter": adapter, "parts": parts}) + "\n")
    lines = [json.dumps(row.as_json(), allow_nan=False) + "\n" for row in rows]
    write_atomic(folder / "measures.jsonl", "".join(lines))
    return rows


def _measure(folder: Path, settings: Settings, loaded: _Loaded, watch: Watch) -> Measured:
    recipe, adapter = finished(folder)
    wanted = _wanted(settings)
    parts = _kept(folder, adapter)
    if "damage" in wanted and parts.get("damage", {}).get("settings") != wanted["damage"]:
        # other draws or rows: families measured with them do not compare
        parts = {part: held for part, held in parts.items() if not part.startswith("damage")}
    lacking = [part for part, about in wanted.items() if parts.get(part, {}).get("settings") != about]
    if lacking:
        prepared = loaded.data(recipe)
        run = Finished(folder, prepared, loaded.base(prepared), settings, watch)
        if not tables.RULES[recipe.federation.rule].personal:  # what cannot be damaged so is told before hours of scoring
            due = [part.partition("/")[2] for part in lacking if part.startswith("damage/")]
            check(run.model, {family: tables.DAMAGES[family].strengths[:1] for family in due})
        for part in lacking:
            watch(part, 0, 1)
            rows, note = [], ""
            try:
                rows = [row.as_json() for row in _measured(part, run)]
            except UnmeasuredError as why:
                note = str(why)
            parts[part] = {"settings": wanted[part], "rows": rows, "note": note}
            _write(folder, adapter, parts)
            watch(part, 1, 1)
    notes = {part: str(held["note"]) for part, held in parts.items() if part in wanted and held["note"]}
    told = [f"{', '.join(p for p in notes if notes[p] == text)} {text}" for text in dict.fromkeys(notes.values())]
    return Measured(tuple(_write(folder, adapter, parts)), tuple(told))


def measure(
    folders: Sequence[Path],
    settings: Settings,
    watch: Callable[[Path, str, int, int], None] = lambda folder, part, done, total: None,
) -> dict[Path, Measured]:
    """Measure finished runs and write measures.jsonl into each. What is measured already, with these settings, is kept.

    Runs that share data and base share them in memory, and are done together. watch: told of each step, see `Watch`.
    Raises MeasureError, before any work, if a folder holds no run whose federation has ended.
    """
    groups: dict[Recipe, list[Path]] = {}
    for folder in folders:
        groups.setdefault(data_view(finished(folder)[0]), []).append(folder)
    loaded, found = _Loaded(), {}
    for group in groups.values():
        for folder in group:
            found[folder] = _measure(folder, settings, loaded, _told(watch, folder))
    return {folder: found[folder] for folder in folders}


def _told(watch: Callable[[Path, str, int, int], None], folder: Path) -> Watch:
    return lambda part, done, total: watch(folder, part, done, total)
