"""Settings of measuring, and a finished run with its model loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkeel import tables
from fedkeel.data.format import Formatter
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.served import serve
from fedkeel.scores.evaluate import Scored, choose, score
from fedkeel.types import FedKeelError, Row

# (part, steps done, steps in all), whenever a step of measuring is done
Watch = Callable[[str, int, int], None]


class MeasureError(FedKeelError):
    """A run that cannot be measured, or settings that say nothing."""


class UnmeasuredError(FedKeelError):
    """A part that says nothing of this run; the text says why, and stands as a note."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and on how much.

    families: of damage; None: all. draws: of each random damage. rows: test rows a task, chosen by hash; 0: all. general: text
    files, a paragraph a line; general_rows: paragraphs a file, chosen by hash; 0: all. unseen: rows of further tasks, JSON
    Lines; unseen_tasks: their tasks file. states: whether hidden states are compared. speculation: whether lower blocks draft
    the model's answers.
    """

    families: tuple[str, ...] | None = None
    draws: int = 20
    rows: int = 300
    general: tuple[Path, ...] = ()
    general_rows: int = 100
    unseen: Path | None = None
    unseen_tasks: Path | None = None
    states: bool = True
    speculation: bool = True

    def __post_init__(self) -> None:
        if unknown := [f for f in self.damages if f not in tables.DAMAGES]:
            raise MeasureError(f"no family of damage {unknown[0]!r}; there are {', '.join(tables.DAMAGES)}")
        if self.draws < 1 or self.rows < 0 or self.general_rows < 0:
            raise MeasureError(f"draws are from 1 and rows from 0, not {self.draws}, {self.rows} and {self.general_rows}")
        if self.unseen_tasks and not self.unseen:
            raise MeasureError(f"{self.unseen_tasks} describes the tasks of a file of unseen tasks, and none is named")
        for path in (*self.general, self.unseen, self.unseen_tasks):
            if path and not path.is_file():
                raise MeasureError(f"{path} is no file")

    @property
    def damages(self) -> tuple[str, ...]:
        """The families of damage that are asked for."""
        return tuple(tables.DAMAGES) if self.families is None else self.families


@dataclass(frozen=True)
class Measured:
    """The rows of a run's measures.jsonl, and what could not be measured, in words."""

    rows: Sequence[Row]
    notes: Sequence[str] = ()


def digest(files: Iterable[Path]) -> str:
    """A hash of the content of files."""
    whole = hashlib.sha256()
    for path in files:
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:16]


@dataclass(frozen=True)
class Finished:
    """A finished run with its model loaded. `served` puts into it what the federation serves."""

    folder: Path
    prepared: Prepared
    model: Model
    settings: Settings
    watch: Watch

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.prepared.recipe

    @cached_property
    def formatter(self) -> Formatter:
        """Of its model."""
        return formatter_of(self.model, self.prepared)

    def served(self) -> Model:
        """The model, with what the federation serves in it."""
        serve(self.model, RunFolder(self.folder), self.prepared.recipe)
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
        """A Row of the run's end; more: further fields of it."""
        last = len(self.prepared.stages) - 1
        rounds = self.recipe.federation.rounds * (last + 1)
        where = {"method": "federated", "stage": last, **more}
        return Row(
            self.recipe.name, seed=self.recipe.seed, round=rounds, name=name, value=value, unit=unit, split=split, **where
        )
