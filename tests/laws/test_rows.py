"""Any rows whatever: read as they stand, refused with file and line, or counted; never a traceback, never another text."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shapes import tokenizer

from fedkeel.data.format import Formatter
from fedkeel.data.forms import DataError
from fedkeel.data.sources import load_records
from fedkeel.data.splits import held_apart
from fedkeel.recipe.schema import Data
from fedkeel.types import Record

SAID = ["", " ", "yes", "no_yes", "no yes", "\ud800", "\x00", "<|im_end|>", "[x]", "../a", " a\n", "b"]
TEXT = st.text(max_size=12) | st.sampled_from(SAID)
ODD = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | TEXT
ANY = st.recursive(ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=2), max_leaves=4)
ROLE = st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool", "developer"]) | ODD
TURN = st.fixed_dictionaries(
    {"role": ROLE, "content": TEXT | ANY}, optional={"weight": st.sampled_from([0, 1, 2, None]), "tool_calls": ANY}
)
SPLIT = st.sampled_from(["train", "test", "val", "dev", "nonsense", None]) | ANY
COMMON = {"split": SPLIT, "id": ANY, "task": TEXT | ANY, "ward": TEXT | ANY, "other": ANY}
ROW = st.one_of(
    st.fixed_dictionaries({"text": TEXT | ANY, "label": TEXT | ANY}, optional=COMMON),
    st.fixed_dictionaries(
        {"output": TEXT | ANY}, optional={"instruction": TEXT | ANY, "input": TEXT, "history": ANY, "system": TEXT, **COMMON}
    ),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4) | ANY}, optional={"system": TEXT, **COMMON}),
    st.dictionaries(st.sampled_from(["text", "label", "output", "input", "messages", "x"]) | TEXT, ANY, max_size=5),
)

WELL = st.sampled_from([t for t in SAID if t != "\ud800" and t.strip()]) | st.text(
    st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(str.strip)
MORE = {
    "split": st.sampled_from(["train", "test", "val", "dev", None]),
    "id": st.integers(0, 3),
    "task": st.sampled_from(["a", "b"]),
    "other": st.none() | st.booleans() | st.integers() | WELL,
}
SITE = {"ward": st.sampled_from(["north", "[x]", "ward 3"])}
TALK = st.lists(st.tuples(WELL, WELL), min_size=1, max_size=3).map(
    lambda pairs: [{"role": r, "content": t} for pair in pairs for r, t in zip(("user", "assistant"), pair, strict=True)]
)
GOOD_ROW = st.one_of(
    st.fixed_dictionaries({"text": WELL, "label": st.sampled_from(["yes", "no_yes", " b "]), **SITE}, optional=MORE),
    st.fixed_dictionaries(
        {"output": WELL, "instruction": WELL, **SITE},
        optional={"input": WELL | st.none(), "history": st.lists(st.tuples(WELL, WELL), max_size=2), "system": WELL, **MORE},
    ),
    st.fixed_dictionaries({"messages": TALK, **SITE}, optional={"system": WELL, **MORE}),
)


def texts(row: dict[str, Any]) -> list[str]:
    """Every text of a row, and every number as it is written."""
    found: list[str] = []

    def walk(value: Any) -> None:
        if isinstance(value, str | int | float):
            found.append(str(value))
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
            walk(inner)

    walk(row)
    return found


def comes_from(record: Record, row: dict[str, Any]) -> bool:
    """Whether all that is read and learnt stands in the row: as it is, joined by line ends, or a label without underscores."""
    stands = texts(row)
    words = {t.strip().replace("_", " ") for t in stands}
    joined = {f"{a}\n{b}" for a in stands for b in stands} | {a + b for a in stands for b in stands}

    def known(text: str) -> bool:
        return text in stands or text in joined

    asked = [record.input, *(text for _, text in record.messages)]
    given_instruction = record.instruction in ("", "Classify the text.") or known(record.instruction)
    return given_instruction and all(known(t) for t in asked if t) and (known(record.output) or record.output in words)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(ROW, min_size=1, max_size=2), st.booleans())
def test_any_rows_are_read_refused_or_counted(rows: list[dict[str, Any]], sites: bool) -> None:
    check(rows, sites)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(GOOD_ROW, min_size=1, max_size=4), st.booleans())
def test_rows_in_order_are_read_as_they_stand(rows: list[dict[str, Any]], sites: bool) -> None:
    read = check([{**row, "split": "train"} if n == 0 else row for n, row in enumerate(rows)], sites)
    assert read


def check(rows: list[dict[str, Any]], sites: bool) -> bool:
    """Whether the rows were read; an AssertionError for anything that is neither that nor an error in its place."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = Data(source="files", root=folder, files=("rows.jsonl",), site_column="ward" if sites else "")
        try:
            found = load_records(config, 1)
        except DataError as error:
            told = str(error)
            assert told.startswith((f"{path}:", "no training row in ")), told
            return False
    assert len(found) == len(rows)
    assert len({r.id for r in found}) == len(found)
    for record in found:
        assert record.split in ("train", "validation", "test")
        assert any(comes_from(record, row) for row in rows), record
        assert bool(record.site) == sites
    kept, notes = held_apart(found)
    assert len(kept) + sum(int(note.split()[0]) for note in notes) == len(found)
    refused: list[tuple[Record, str]] = []
    for shape in ("chatml", "llama2-plain"):
        made = Formatter(tokenizer(shape), "causal", 64)
        for record in kept:
            try:
                (example,) = made.encode_all([record]) or [None]
            except DataError as error:
                refused.append((record, str(error)))
                continue
            if example is None:
                assert made.counts["dropped"]
                made.counts["dropped"] = 0
            else:
                assert example.positions
                assert len(example.ids) <= 64
    assert all(f"row {record.id} (task {record.task})" in told for record, told in refused)
    return True
