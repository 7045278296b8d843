"""What a run keeps for its report and for later questions: a few test rows with what the models said, and how tasks ask."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from fedkeel.scores.evaluate import Scored
from fedkeel.types import Record


def chosen(scored: Sequence[Scored], count: int) -> list[Scored]:
    """Of each task in turn, by the rows' ids, so that neither order nor outcome decides."""
    tasks: dict[str, list[Scored]] = {}
    for one in sorted(scored, key=lambda s: (s.record.task, s.record.id)):
        tasks.setdefault(one.record.task, []).append(one)
    return [one for turn in zip_longest(*tasks.values()) for one in turn if one is not None][:count]


def asked(record: Record) -> str:
    """A row's question, as a person reads it: without the template, and in a chat with the turns before."""
    if record.messages:
        return "\n".join(f"{role}: {text}" for role, text in record.messages[:-1])
    return "\n".join(part for part in (record.instruction, record.input) if part)


def tasks_of(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """task -> {instruction, labels}, each as far as all of its rows have the same."""
    found: dict[str, dict[str, Any]] = {}
    for record in records:
        mine = {"instruction": record.instruction, "labels": list(record.labels)}
        held = found.setdefault(record.task, mine)
        found[record.task] = {key: value if mine[key] == value else type(value)() for key, value in held.items()}
    return dict(sorted(found.items()))
