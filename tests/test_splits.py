"""Held-out rows are never trained on: not under another name of a split, not at another site, not written otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_run import go

import fedkeel.runs.prepare
from fedkeel.data.sources import load_records
from fedkeel.data.splits import asked, held_apart, split_of
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Data
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.prepare import prepare
from fedkeel.types import Record


@pytest.mark.parametrize(
    ("split", "names"),
    {
        "train": ["train", "Train", "training", "train_sft", "train-clean", "TRAIN.0", " train "],
        "validation": ["validation", "valid", "val", "dev", "eval", "evaluation", "validation_matched", "dev-clean", "val2"],
        "test": ["test", "Testing", "test_sft", "test_unmatched", "held_out", "held-out", "heldout"],
        None: ["unsupervised", "extra", "holdout", "all", "", "trains", "latest", "1"],
    }.items(),
)
def test_splits_under_their_usual_names(split: str | None, names: list[str]) -> None:
    assert {name: split_of(name) for name in names} == dict.fromkeys(names, split)


def row(text: str, site: str = "", split: str = "train", **more: Any) -> Record:
    return Record(f"{text}-{site}-{split}", "t", split, more.pop("output", "yes"), "Say it.", text, site, **more)


def test_what_a_row_asks() -> None:
    same = [
        row("The  Boat"),
        row("the boat\n", "b", output="no"),
        row("the\u200b bo\u00adat"),
        row("the boat", split="test", labels=("a",)),
    ]
    assert len({asked(r) for r in same}) == 1
    other = [
        row("the boats"),
        Record("1", "u", "", "yes", "Say it.", "the boat"),
        Record("2", "t", "", "yes", "Say that.", "the boat"),
        Record("3", "t", "", "yes", "Say it.", "", messages=(("user", "the boat"), ("assistant", "yes"))),
        # without a text of its own, a row is its instruction and answer: one instruction may have many
        Record("4", "t", "", "yes", "Say it."),
        Record("5", "t", "", "no", "Say it."),
    ]
    assert len({asked(r) for r in [*same, *other]}) == 7


def test_rows_that_ask_what_a_held_out_row_asks_are_left_out_and_counted() -> None:
    rows = [
        row("one", "a"),
        row("One ", "b"),
        row("one", "c", "validation"),
        row("one", "c", "test"),
        row("two", "a", "validation"),
        row("TWO", "a"),
        row("three", "a"),
        row("three", "b"),
    ]
    kept, notes = held_apart(rows)
    assert [r.id for r in kept] == ["one-c-test", "two-a-validation", "three-a-train", "three-b-train"]
    assert notes == [
        "2 train rows left out: a test row, of whatever site, asks the same",
        "1 train row left out: a validation row, of whatever site, asks the same",
        "1 validation row left out: a test row, of whatever site, asks the same",
    ]


def talk(*said: str, split: str = "train", unlearnt: tuple[int, ...] = ()) -> Record:
    turns = tuple((("user", "assistant")[n % 2], text) for n, text in enumerate(said))
    return Record("-".join(said), "t", split, said[-1], messages=turns, unlearnt=unlearnt)


def test_a_talk_whose_earlier_answer_is_a_held_out_row_is_left_out() -> None:
    rows = [
        talk("one?", "1", split="test"),
        talk("two?", "2", "more?", "3", split="validation"),
        talk("One?", "1", "then?", "2"),
        talk("one?", "1", "then?", "2", unlearnt=(1,)),  # read, and not taught
        talk("one?", "another", "then?", "2"),
        talk("two?", "2"),  # is the beginning of a held-out talk, whose last answer alone is scored
        talk("two?", "2", "more?", "3", "still?", "4"),
    ]
    kept, notes = held_apart(rows)
    assert kept == [*rows[:2], *rows[3:6]]
    assert notes == [
        "1 train row left out: a test row, of whatever site, asks the same",
        "1 train row left out: a validation row, of whatever site, asks the same",
    ]


def load(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[Record]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return load_records(Data(source="jsonl", root=str(folder), files=("rows.jsonl",), **options), 1)


def test_one_text_has_one_split_at_every_site_and_under_every_id(tmp_path: Path) -> None:
    texts = [f"text {n}" for n in range(200)]
    rows = [
        {
            "id": f"{site}-{n}",
            "ward": site,
            "input": t.upper() if site == "b" else t,
            "output": f"{site} says {n}",
            "split": None,
        }
        for site in "abc"
        for n, t in enumerate(texts)
    ]
    found = load(tmp_path, rows, site_column="ward", test_share=0.2, validation_share=0.2)
    by_text: dict[str, set[str]] = {}
    for r in found:
        by_text.setdefault(r.input.lower(), set()).add(r.split)
    assert len(by_text) == 200
    assert all(len(splits) == 1 for splits in by_text.values())
    counts = {s: sum(splits == {s} for splits in by_text.values()) for s in ("train", "validation", "test")}
    assert counts["test"] == pytest.approx(40, abs=20)
    assert counts["validation"] == pytest.approx(40, abs=20)


def test_a_run_trains_on_none_and_says_so(tmp_path: Path, tiny_overrides: list[str]) -> None:
    from tiny import tiny_rows

    rows = tiny_rows()
    tested = [r for r in rows if r["split"] == "test"]
    copied = [{**r, "split": "train", "department": "ward-0", "id": f"copy-{n}"} for n, r in enumerate(tested)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*rows, *copied]))
    (tmp_path / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    overrides = [*tiny_overrides, f"data.root={tmp_path}", "federation.rounds=1", "evaluation.baselines=[]"]
    ready = prepare(load_recipe(None, overrides))
    plain = prepare(load_recipe(None, tiny_overrides))
    assert f"{len(tested)} train rows left out: a test row, of whatever site, asks the same" in ready.notes
    assert {n: len(h["train"]) for n, h in ready.sites.rows.items()} == {
        n: len(h["train"]) for n, h in plain.sites.rows.items()
    }
    assert fedkeel.runs.prepare.held_apart is held_apart
    assert go(overrides)[1].state().finished


def test_a_source_whose_training_rows_all_stand_in_test_says_so(tmp_path: Path, tiny_overrides: list[str]) -> None:
    rows = [
        {"department": "w", "instruction": "Add.", "input": f"{n}", "output": "x", "split": split}
        for n in range(4)
        for split in ("train", "test")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = load_recipe(None, [*tiny_overrides, f"data.root={tmp_path}", 'data.tasks_file=""'])
    with pytest.raises(ConfigError, match="no training row is left: 4 train rows left out: a test row, of whatever site, asks"):
        prepare(recipe)


def test_chats_that_all_ask_the_same_are_dealt_by_their_answers(tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": "Write a poem."}, {"role": "assistant", "content": f"poem {n}"}] for n in range(100)]
    found = load(tmp_path, [{"messages": m} for m in turns], test_share=0.3)
    assert {r.split for r in found} == {"train", "validation", "test"}
