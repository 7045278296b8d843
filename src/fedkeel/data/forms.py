"""The forms that rows come in: what each makes of a row's keys. A form is a function with a line in `tables.FORMS`."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedkeel.types import FedKeelError

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
TURN_KEYS = ("role", "from", "content", "value", "weight", "train", "tool_calls", "function_call")
_WHOSE = {"user": "a user's", "assistant": "an assistant's"}
SITE_BYTES = 120  # of a site's name


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
    """What a form makes of a row, see `types.Record`. used: the keys that it looked at. unused: what lies within these and was
    not, in words."""

    output: str
    input: str = ""
    instruction: str = ""
    labels: tuple[str, ...] = ()
    messages: tuple[tuple[str, str], ...] = ()
    unlearnt: tuple[int, ...] = ()
    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def text_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """The text under a key as it stands there; empty where there is none. Raises DataError for what is neither text nor a
    number, or no text that could be written."""
    return _text(row.get(key), place, key)


def name_of(row: Mapping[str, Any], key: str, place: str) -> str:
    """As `text_of`, without white space around it: a name, such as a label's."""
    return text_of(row, key, place).strip()


def _text(value: Any, place: str, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{place}: {key!r} holds {value}, which is no number; leave the key out where nothing is known")
        try:
            return str(value)
        except ValueError as error:  # Python writes no more than some thousand digits
            raise DataError(f"{place}: {key!r} holds a number of too many digits; write it as text") from error
    if not isinstance(value, str):
        raise DataError(f"{place}: {key!r} holds {type(value).__name__} where text belongs")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: {key!r} holds half of a character (a lone surrogate) at position {error.start}: the file was cut or "
            f"written wrongly"
        ) from error
    return value


def site_of(value: Any, place: str) -> str:
    """The name of the site that holds a row. Raises DataError for one that is missing, or could not name a folder."""
    name = _text(value, place, "site").strip()
    if not name:
        raise DataError(f"{place}: no site is named; every row is some site's")
    if name in (".", "..") or len(name.encode()) > SITE_BYTES or any(c in name for c in "/\\") or not name.isprintable():
        raise DataError(
            f"{place}: {name!r} cannot name a site: at most {SITE_BYTES} bytes, no slash, no control character, and not '.' or "
            f"'..'"
        )
    return name


def _content(turn: Mapping[str, Any], place: str) -> str:
    """What a turn says: a text, or OpenAI's list of texts."""
    if turn.get("tool_calls") or turn.get("function_call"):
        raise DataError(
            f"{place}: a turn calls a tool; FedKeel learns text alone: leave such rows out, or write the call as text"
        )
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return "".join(text_of(part, "text", place) for part in content)
    return _text(content, place, "content")


def _learnt(turn: Mapping[str, Any], place: str) -> bool:
    """Whether an assistant's turn is learnt: OpenAI's `weight` (0 or 1), Axolotl's `train`."""
    for key in ("weight", "train"):
        mark = turn.get(key)
        if mark is not None:
            if mark not in (0, 1):
                raise DataError(f"{place}: {key!r} of a turn is {mark!r}; 0 or 1 belongs here")
            return bool(mark)
    return True


def _turns(row: Mapping[str, Any], place: str) -> tuple[list[tuple[str, str]], list[int]]:
    """(role, text) from `messages` (role, content) or ShareGPT's `conversations` (from, value), and the answers to learn."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise DataError(f"{place}: a list of turns belongs under messages or conversations")
    read: list[tuple[str, str]] = []
    learnt = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise DataError(f"{place}: a turn is {type(turn).__name__} where an object with role and content belongs")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place}: role {role!r} is unknown; one of {', '.join(ROLES)} belongs here")
        if ROLES[role] == "assistant" and _learnt(turn, place):
            learnt.append(len(read))
        read.append((ROLES[role], _content(turn, place)))
    return read, learnt


def _unused(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a chat's turns that nothing is made of."""
    turns = row.get("messages", row.get("conversations")) or ()
    return tuple(sorted({f"{key} of a turn" for turn in turns for key, held in turn.items() if held and key not in TURN_KEYS}))


def _with_system(row: Mapping[str, Any], turns: list[tuple[str, str]], place: str) -> list[tuple[str, str]]:
    """A row's own `system` as the first turn. Raises DataError where a turn says another."""
    system = text_of(row, "system", place)
    first = turns[0] if turns else ("", "")
    if not system or first == ("system", system):
        return turns
    if first[0] == "system":
        raise DataError(f"{place}: the row's 'system' is another than its first turn")
    return [("system", system), *turns]


@lru_cache(maxsize=1024)
def spoken(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Labels as words. Remembered: a task's labels are the same in each of its rows, and there may be hundreds."""
    return tuple(label.replace("_", " ") for label in labels)


def alike(label: str) -> str:
    """What labels that nobody could tell apart have in common: words, white space and composition of letters aside, and 1 is
    1.0, as a table writes whole numbers once one of its cells is empty."""
    words = " ".join(unicodedata.normalize("NFC", spoken((label,))[0]).split())
    return words.removesuffix(".0") if words.removesuffix(".0").lstrip("+-").isdigit() else words


def chat(row: Mapping[str, Any], about: About) -> Parts:
    """`messages` (role, content) or ShareGPT's `conversations` (from, value), and perhaps `system`: the last answer that is
    learnt is the row's; what follows it goes."""
    turns, learnt = _turns(row, about.place)
    if not learnt or not turns[learnt[-1]][1].strip():
        raise DataError(f"{about.place}: a conversation without an assistant's answer has nothing to train on")
    turns = turns[: learnt[-1] + 1]
    for at, (role, said) in enumerate(turns):
        if not said.strip() and (role == "user" or at in learnt):
            hint = '; mark it with "weight": 0' if at in learnt else ", under content or value"
            raise DataError(f"{about.place}: turn {at + 1} is {_WHOSE[role]} and says nothing{hint}")
    messages = _with_system(row, turns, about.place)
    if all(role != "user" for role, _ in messages):
        raise DataError(f"{about.place}: a conversation in which nobody asks has no prompt")
    more = len(messages) - learnt[-1] - 1
    answers = {n for n, (role, _) in enumerate(messages) if role == "assistant"}
    return Parts(
        messages[-1][1],
        instruction=about.instruction,
        messages=tuple(messages),
        unlearnt=tuple(sorted(answers - {n + more for n in learnt})),
        used=("messages", "conversations", "system"),
        unused=_unused(row),
    )


def classification(row: Mapping[str, Any], about: About) -> Parts:
    """`text`, `label`. Underscores of a label become spaces: a label is scored by its words."""
    (label,) = spoken((name_of(row, "label", about.place),))
    text = text_of(row, "text", about.place)
    return Parts(
        label, text, about.instruction or "Classify the text.", spoken(about.labels), used=("text", "label", "instruction")
    )


def instruction(row: Mapping[str, Any], about: About) -> Parts:
    """`instruction`, `input`, `output`, as in Alpaca; one of the first two may be missing. With `system` or `history` (pairs of
    what was asked and said before) it is a chat."""
    place = about.place
    text, output = text_of(row, "input", place), text_of(row, "output", place)
    if about.labels and output.strip() in about.labels:
        output = output.strip()
    before: list[tuple[str, str]] = []
    history = row.get("history", [])
    if not isinstance(history, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in history):
        raise DataError(f"{place}: 'history' is no list of pairs [asked, said]")
    for asked, said in history:
        pair = _text(asked, place, "history"), _text(said, place, "history")
        if not all(text.strip() for text in pair):
            raise DataError(f"{place}: in 'history' somebody says nothing; a pair is [asked, said]")
        before += zip(("user", "assistant"), pair, strict=True)
    before = _with_system(row, before, place)
    used = ("instruction", "input", "output", "system", "history")
    if not before:
        return Parts(output, text, about.instruction, about.labels, used=used)
    if about.labels:
        raise DataError(f"{place}: a row of a task with labels has 'system' or 'history'; say it in 'instruction' or 'input'")
    asks = "\n".join(part for part in (about.instruction, text) if part)
    if not asks.strip():
        raise DataError(f"{place}: the row has neither instruction nor input")
    messages = (*before, ("user", asks), ("assistant", output))
    said_before = tuple(n for n, (role, _) in enumerate(messages[:-1]) if role == "assistant")
    return Parts(output, instruction=about.instruction, messages=messages, unlearnt=said_before, used=used)
