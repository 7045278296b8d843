"""What a site says before round 1, as a coordinator reads it: nothing of it is believed before it has been looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# what must be one at all sites, and how a person would say it
ONE = {
    "base": "base model",
    "tokenizer": "tokenizer",
    "kind": "kind of model",
    "classes": "list of classes (list a task's labels in data.tasks_file)",
    "layout": "adapter layout",
    "initial": "initial adapter",
}
MOST_ROWS = 2**40
MOST_PARTS = 10_000  # tasks, stages, splits or versions


class HelloError(ValueError):
    """A site says what no site of FedKeel's says; the text names the key."""


@dataclass(frozen=True)
class Hello:
    """one: what must be one at all sites, by the keys of ONE. tasks: task -> a hash of what it means there. rows: of each
    stage, by split. encoded: of each stage, training rows that fit. versions: of libraries. load_seconds: to a loaded base
    and encoded rows."""

    one: Mapping[str, str]
    tasks: Mapping[str, str]
    rows: Sequence[Mapping[str, int]]
    encoded: Sequence[int]
    versions: Mapping[str, str]
    load_seconds: float

    def held(self, stage: int, split: str) -> int:
        """Rows of a split in a stage."""
        return self.rows[stage].get(split, 0) if stage < len(self.rows) else 0

    def trained(self, stage: int) -> int:
        """Training rows of a stage that fit."""
        return self.encoded[stage] if stage < len(self.encoded) else 0


def read_hello(told: Any) -> Hello:
    """What `work.Work.hello` said, and came as JSON. Raises HelloError."""
    if not isinstance(told, dict):
        raise HelloError(f"its hello is {told!r:.60} where an object belongs")
    names, splits = {key: told.get(key) for key in ONE}, _list("rows", told)
    seconds = told.get("load_seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        raise HelloError(f"its hello says load_seconds = {seconds!r:.60}")
    return Hello(
        _table("base", names, str),
        _table("tasks", told.get("tasks"), str),
        [_table("rows", rows, int) for rows in splits],
        [_count("encoded", count) for count in _list("encoded", told)],
        _table("versions", told.get("versions"), str),
        float(seconds),
    )


def _list(key: str, told: Mapping[str, Any]) -> list[Any]:
    value = told.get(key)
    if not isinstance(value, list) or len(value) > MOST_PARTS:
        raise HelloError(f"its hello says {key} = {value!r:.60} where a list belongs; is its FedKeel of another version?")
    return value


def _table(key: str, value: Any, kind: type) -> dict[str, Any]:
    """An object of texts, or of numbers of rows."""
    if not isinstance(value, dict) or len(value) > MOST_PARTS:
        raise HelloError(f"its hello says {key} = {value!r:.60} where an object belongs; is its FedKeel of another version?")
    if kind is int:
        return {name: _count(key, count) for name, count in value.items()}
    for name, text in value.items():
        if not isinstance(text, str):
            raise HelloError(f"its hello says {name} = {text!r:.60} where a text belongs; is its FedKeel of another version?")
    return value


def _count(key: str, count: Any) -> int:
    if type(count) is not int or not 0 <= count < MOST_ROWS:
        raise HelloError(f"its hello says {count!r:.60} for a number of rows in {key}")
    return count
