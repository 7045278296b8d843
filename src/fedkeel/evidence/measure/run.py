"""Settings of measuring, and a finished run with its model loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkeel.data.format import Formatter
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.run.folder import RunFolder
from fedkeel.run.prepare import Prepared
from fedkeel.run.served import serve
from fedkeel.scores.damage import FAMILIES, STRENGTHS
from fedkeel.scores.evaluate import Scored, choose, score
from fedkeel.types import FedKeelError, Row

# (part, steps done, steps in all), whenever a step of measuring is done
Watch = Callable[[str, int, int], None]


STATE_ROWS = 128  # most test rows a task whose hidden states are compared


def _state_rows(rows: int) -> int:
    return min(rows or STATE_ROWS, STATE_ROWS)


class MeasureError(FedKeelError):
    """A run that cannot be measured, or settings that say nothing."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and on how much.

    families: of damage. draws: of each random damage. rows: test rows a task, chosen by hash; 0: all. general: text files, a
    paragraph a line; general_rows: paragraphs a file, chosen by hash; 0: all. unseen: rows of further tasks, JSON Lines;
    unseen_tasks: their tasks file. states: whether hidden states are compared.
    """

    families: tuple[str, ...] = tuple(FAMILIES)
    draws: int = 20
    rows: int = 300
    general: tuple[Path, ...] = ()
    general_rows: int = 100
    unseen: Path | None = None
    unseen_tasks: Path | None = None
    states: bool = True

    def __post_init__(self) -> None:
        if unknown := [f for f in self.families if f not in FAMILIES]:
            raise MeasureError(f"no family of damage {unknown[0]!r}; there are {', '.join(FAMILIES)}")
        if self.draws < 1 or self.rows < 0 or self.general_rows < 0:
            raise MeasureError(f"draws are from 1 and rows from 0, not {self.draws}, {self.rows} and {self.general_rows}")
        if self.unseen_tasks and not self.unseen:
            raise MeasureError(f"{self.unseen_tasks} describes the tasks of a file of unseen tasks, and none is named")
        for path in (*self.general, self.unseen, self.unseen_tasks):
            if path and not path.is_file():
                raise MeasureError(f"{path} is no file")

    def parts(self) -> dict[str, dict[str, Any]]:
        """Every part that is asked for, with all that decides its outcome beside the run."""
        damage = {"draws": self.draws, "rows": self.rows}
        parts: dict[str, dict[str, Any]] = {"size": {}}
        if self.families:
            parts["damage"] = damage
            parts |= {f"damage/{f}": {**damage, "strengths": list(STRENGTHS[f])} for f in self.families}
        if self.general:
            parts["general"] = {"files": {p.name: _digest([p]) for p in self.general}, "rows": self.general_rows}
        if self.unseen:
            about = _digest([self.unseen_tasks]) if self.unseen_tasks else ""
            parts["unseen"] = {"file": _digest([self.unseen]), "tasks": about, "rows": self.rows}
        if self.states:
            parts["states"] = {"rows": _state_rows(self.rows)}
        return parts


@dataclass(frozen=True)
class Measured:
    """The rows of a run's measures.jsonl, and what could not be measured, in words."""

    rows: Sequence[Row]
    notes: Sequence[str] = ()


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


@dataclass(frozen=True)
class _Run:
    """A finished run with its model loaded. `served` puts into it what the federation serves."""

    folder: Path
    prepared: Prepared
    model: Model
    settings: Settings
    watch: Watch

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @cached_property
    def formatter(self) -> Formatter:
        return self.formatter_of(self.model)

    def formatter_of(self, model: Model) -> Formatter:
        data = self.recipe.data
        return Formatter(model.tokenizer, model.kind, data.max_length, data.list_labels, classes=model.classes)

    def served(self) -> Model:
        serve(self.model, RunFolder(self.folder), self.prepared)
        self.model.train(False)
        return self.model

    @cached_property
    def clean(self) -> list[Scored]:
        """The scores without damage."""
        rows = choose(self.prepared.stages[-1].all("test"), "test", self.settings.rows)
        if not rows:
            raise MeasureError(f"{self.folder}: its data has no test row")
        return score(self.served(), self.formatter, rows, self.recipe.evaluation)

    def row(self, name: str, value: float, unit: str, split: str = "test", **more: Any) -> Row:
        last = len(self.prepared.stages) - 1
        rounds = self.recipe.federation.rounds * (last + 1)
        where = {"method": "federated", "stage": last, **more}
        return Row(
            self.recipe.name, seed=self.recipe.seed, round=rounds, name=name, value=value, unit=unit, split=split, **where
        )
