"""The forms that rows come in: what each makes of a row's keys. A form is a function with a line in `tables.FORMS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedkeel.types import FedKeelError

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class DataError(FedKeelError):
    """A row or file that cannot be used; the text names the file and line."""


@dataclass(frozen=True)
class About:
    """What is known of a row beside its keys. place: `file:line`. instruction, labels: of its task, empty where none are
    listed."""

    place: str
    instruction: str = ""
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What a form makes of a row, see `types.Record`."""

    output: str
    input: str = ""
    instruction: str = ""
    labels: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()


def text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under a key; empty where there is none. Raises DataError for anything that is neither text nor a number."""
    return _text(row.get(key), place, key)


def _text(value: Any, place: str, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: {key!r} holds {type(value).__name__} where text belongs")
    return value.strip()


def _messages(row: Mapping[str, Any], place: str) -> tuple[tuple[str, str], ...]:
    """Chat turns from `messages` (role, content) or ShareGPT's `conversations` (from, value)."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise DataError(f"{place}: a list of turns belongs under messages or conversations")
    read = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise DataError(f"{place}: a turn is {type(turn).__name__} where an object with role and content belongs")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place}: role {role!r} is unknown; one of {', '.join(ROLES)} belongs here")
        read.append((ROLES[role], _text(turn.get("content", turn.get("value")), place, "content")))
    while read and read[-1][0] != "assistant":
        read.pop()  # nothing to learn from what follows the last answer
    if not read or not read[-1][1]:
        raise DataError(f"{place}: a conversation without an assistant's answer has nothing to train on")
    return tuple(read)


@lru_cache(maxsize=1024)
def spoken(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Labels as words. Remembered: a task's labels are the same in each of its rows, and there may be hundreds."""
    return tuple(label.replace("_", " ") for label in labels)


def chat(row: Mapping[str, Any], about: About) -> Parts:
    """`messages` (role, content) or ShareGPT's `conversations` (from, value): the last answer is what is learnt."""
    messages = _messages(row, about.place)
    return Parts(messages[-1][1], instruction=about.instruction, messages=messages)


def classification(row: Mapping[str, Any], about: About) -> Parts:
    """`text`, `label`. Underscores of a label become spaces: a label is scored by its words."""
    (label,) = spoken((text_of(row, "label", about.place),))
    text = text_of(row, "text", about.place)
    return Parts(label, text, about.instruction or "Classify the text.", spoken(about.labels))


def instruction(row: Mapping[str, Any], about: About) -> Parts:
    """`instruction`, `input`, `output`, as in Alpaca; one of the first two may be missing."""
    text, output = text_of(row, "input", about.place), text_of(row, "output", about.place)
    return Parts(output, text, about.instruction, about.labels)
