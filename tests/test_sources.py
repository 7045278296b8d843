"""Every form of a row, every way that it can be wrong, and what must not depend on the order of lines."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fedkeel.data.forms import DataError
from fedkeel.data.readers import FILE_SITE, read_csv, read_json_lines
from fedkeel.data.sources import files, load_records, to_record
from fedkeel.recipe.schema import Data
from fedkeel.types import Record

Row = dict[str, Any]
ANSWERED = {"task": "sums", "split": "train", "instruction": "Add.", "input": "1 + 1", "output": "2"}


def write(folder: Path, rows: list[Row], name: str = "rows.jsonl") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / name
    if path.suffix == ".gz":
        with gzip.open(path, "wt", encoding="utf-8") as out:
            out.write(text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, rows: list[Row], about: Row | None = None, seed: int = 1, **options: Any) -> list[Record]:
    """Rows through a file, as a recipe would read them. about: the content of the tasks file."""
    write(folder, rows)
    if about is not None:
        (folder / "tasks.json").write_text(json.dumps(about))
        options["tasks_file"] = "tasks.json"
    return load_records(Data(source="jsonl", root=str(folder), **{"files": ("rows.jsonl",), **options}), seed)


def without_id(record: Record) -> Record:
    assert record.id
    return dataclasses.replace(record, id="")


def test_an_instruction_row(tmp_path: Path) -> None:
    expected = Record("", "sums", "train", "2", "Add.", "1 + 1", references=("2",))
    assert [without_id(r) for r in load(tmp_path, [ANSWERED])] == [expected]


def test_an_alpaca_row_has_no_task_and_perhaps_no_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": " red \n", "split": "train"},
        {"instruction": "Name a fish.", "output": "cod", "split": "valid"},
        {"input": "1 + 1 =", "output": 2, "split": "dev"},
    ]
    found = {r.output: without_id(r) for r in load(tmp_path, rows)}
    assert found == {
        " red \n": Record("", "default", "train", " red \n", "Name a colour.", references=(" red \n",)),
        "cod": Record("", "default", "validation", "cod", "Name a fish.", references=("cod",)),
        "2": Record("", "default", "validation", "2", "", "1 + 1 =", references=("2",)),
    }


def test_a_chat_in_both_spellings_is_the_same_record(tmp_path: Path) -> None:
    pairs = [
        ("system", "Be kind."),
        ("user", "Hello?"),
        ("assistant", "Hi."),
        ("user", "Bye."),
        ("assistant", "Bye!"),
        ("user", "?"),
    ]
    share = {"system": "system", "user": "human", "assistant": "gpt"}
    messages = {"messages": [{"role": r, "content": t} for r, t in pairs], "split": "train"}
    sharegpt = {"conversations": [{"from": share[r], "value": t} for r, t in pairs], "split": "train"}
    one, two = load(tmp_path, [messages])[0], load(tmp_path, [sharegpt])[0]
    # what the user said after the last answer teaches nothing
    assert without_id(one) == Record("", "default", "train", "Bye!", references=("Bye!",), messages=tuple(pairs[:-1]))
    assert one == two


def test_text_and_label_rows_get_the_labels_of_their_task(tmp_path: Path) -> None:
    rows = [
        {"task": "intent", "text": "where is my card", "label": "card_arrival", "split": "train"},
        {"task": "intent", "text": "top up", "label": "top_up_failed", "split": "train"},
        {"task": "stars", "text": "fine", "label": 4, "split": "test"},
        {"task": "stars", "text": "bad", "label": 1, "split": "train"},
        ANSWERED,
    ]
    found = {r.input: r for r in load(tmp_path, rows)}
    assert found["where is my card"].output == "card arrival"
    assert found["where is my card"].labels == found["top up"].labels == ("card arrival", "top up failed")
    assert found["fine"].labels == ("1", "4")
    assert found["fine"].instruction == "Classify the text."
    assert found["1 + 1"].labels == ()


def test_the_tasks_file_gives_instruction_labels_and_references(tmp_path: Path) -> None:
    tasks = {
        "tasks": {
            "intent": {"instruction": "What is asked?", "labels": ["top_up", "card_arrival"]},
            "yes": {"labels": ["no", "yes"]},
        },
        "references": {"q1": ["Paris", "the city of Paris"], "0": ["zero", "nought"]},
    }
    rows = [
        {"task": "intent", "text": "my card?", "label": "card_arrival", "split": "train"},
        {"task": "yes", "instruction": "Wet?", "input": "rain", "output": "yes", "split": "train"},
        {"id": "q1", "task": "qa", "instruction": "Capital?", "input": "France", "output": "Paris", "split": "test"},
        {"id": 0, "task": "qa", "instruction": "Number?", "input": "none", "output": "zero", "split": "test"},
    ]
    found = {r.input: r for r in load(tmp_path, rows, tasks)}
    # in the file's order, which is the order that a prompt lists them in
    assert found["my card?"].labels == ("top up", "card arrival")
    assert found["my card?"].instruction == "What is asked?"
    assert found["rain"].labels == ("no", "yes")
    assert (found["France"].id, found["France"].references) == ("q1", ("Paris", "the city of Paris"))
    assert (found["none"].id, found["none"].references) == ("0", ("zero", "nought"))
    bare = {r.input: r for r in load(tmp_path, rows, tasks["tasks"])}
    assert bare["my card?"] == found["my card?"]
    only = {r.input: r for r in load(tmp_path, [*rows[2:3], ANSWERED], {"references": tasks["references"]})}
    assert only["France"] == found["France"]


def test_the_recipe_gives_the_instruction_that_a_row_lacks(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "b", "split": "train"},
        {"instruction": "Mine.", "input": "i", "output": "o", "split": "train"},
    ]
    found = {r.output: r.instruction for r in load(tmp_path, rows, instruction="From the recipe.")}
    assert found == {"b": "From the recipe.", "o": "Mine."}


def test_a_label_beside_an_instruction_is_no_list_of_answers(tmp_path: Path) -> None:
    rows = [dict(ANSWERED, output=str(i), input=f"{i} + 0", label="easy") for i in range(3)]
    assert [r.labels for r in load(tmp_path, rows)] == [(), (), ()]


def test_plain_and_gzip_read_the_same_in_any_order(tmp_path: Path) -> None:
    rows = [dict(ANSWERED, input=f"{i} + é", split=None) for i in range(40)]
    for row in rows[:20]:
        del row["split"]
    plain = load(tmp_path, rows)
    assert len(plain) == 40
    shuffled = random.Random(4).sample(rows, len(rows))
    write(tmp_path, shuffled[:13], "b.jsonl.gz")
    write(tmp_path, shuffled[13:], "a.jsonl")
    (tmp_path / "a.jsonl").write_text((tmp_path / "a.jsonl").read_text().replace("\n", "\n\n"))
    for names in (("a.jsonl", "b.jsonl.gz"), ("b.jsonl.gz", "a.jsonl")):
        assert load(tmp_path, [], files=names) == plain


def test_rows_with_one_id_are_told_apart_in_any_order(tmp_path: Path) -> None:
    """The same id in two rows: each keeps its own text whatever comes first."""
    rows = [dict(ANSWERED, id="7", instruction=f"Way {i}.") for i in range(6)]
    rows += [
        {"id": "7", "split": "train", "messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "2"}]}
        for i in range(4)
    ]
    found = load(tmp_path, rows)
    assert {r.id for r in found} == {"7"} | {f"7~{n}" for n in range(2, 11)}
    assert load(tmp_path, rows[::-1]) == found


def test_a_row_that_stands_twice_is_kept_twice_in_one_split(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{i}", "output": "2"} for i in range(60)]
    found = load(tmp_path, rows * 3, validation_share=0.3, test_share=0.3)
    assert len({r.id for r in found}) == len(found) == 180
    once = {r.input: r for r in load(tmp_path, rows, validation_share=0.3, test_share=0.3)}
    for record in found:
        first, tilde, copy = record.id.partition("~")
        assert first == once[record.input].id
        assert (tilde, copy) in {("", ""), ("~", "2"), ("~", "3")}
        # else a test row would have been trained on
        assert record.split == once[record.input].split


def test_splits_by_hash_have_their_shares_and_ignore_other_rows(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": f"{i}", "output": "2"} for i in range(2000)]
    found = load(tmp_path, rows, validation_share=0.1, test_share=0.25)
    shares = Counter(r.split for r in found)
    # five standard deviations of a binomial draw
    assert abs(shares["test"] - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5
    assert abs(shares["validation"] - 200) < 5 * (2000 * 0.1 * 0.9) ** 0.5
    split = {r.input: r.split for r in found}
    fewer = load(tmp_path, rows[::-3], validation_share=0.1, test_share=0.25)
    assert all(split[r.input] == r.split for r in fewer)
    other = {r.input: r.split for r in load(tmp_path, rows, seed=2, validation_share=0.1, test_share=0.25)}
    assert other != split
    assert {r.split for r in load(tmp_path, rows[:50], validation_share=0.0, test_share=0.0)} == {"train"}


def test_a_row_keeps_the_split_that_it_names(tmp_path: Path) -> None:
    names = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
    rows = [dict(ANSWERED, input=name, split=name) for name in names]
    assert {r.input: r.split for r in load(tmp_path, rows, test_share=0.5)} == names


def test_tasks_keeps_only_these(tmp_path: Path) -> None:
    rows = [dict(ANSWERED, task=t, input=t) for t in "abc"] + [{"instruction": "No task.", "output": "o", "split": "train"}]
    assert [r.task for r in load(tmp_path, rows, tasks=("c",))] == ["c"]
    assert sorted(r.task for r in load(tmp_path, rows, tasks=("a", "default"))) == ["a", "default"]
    with pytest.raises(DataError, match=r"data\.tasks names \['d'\]"):
        load(tmp_path, rows, tasks=("a", "d"))


def test_drop_labels_leaves_out_rows_and_candidates(tmp_path: Path) -> None:
    labelled = [{"text": f"t{i}", "label": label, "split": "train"} for i, label in enumerate(["a_b", "c", "d", "a_b"])]
    for dropped in ("a_b", "a b"):  # by its words, as it is scored
        found = load(tmp_path, labelled, drop_labels=(dropped,))
        assert {(r.output, r.labels) for r in found} == {("c", ("c", "d")), ("d", ("c", "d"))}
    assert [
        r.output for r in load(tmp_path, [{**r, "label": f" {r['label']} "} for r in labelled[:2]], drop_labels=("a_b",))
    ] == ["c"]
    asked = [dict(ANSWERED, task="t", input=f"t{i}", output=label) for i, label in enumerate(["a_b", "c", "d", "a_b"])]
    found = load(tmp_path, asked, {"t": {"labels": ["d", "c", "a_b"]}}, drop_labels=("a_b",))
    assert {(r.output, r.labels) for r in found} == {("c", ("d", "c")), ("d", ("d", "c"))}


def test_site_column_names_the_site(tmp_path: Path) -> None:
    rows = [dict(ANSWERED, input=str(i), ward=w) for i, w in enumerate(["north", "south", 3])]
    assert {r.input: r.site for r in load(tmp_path, rows, site_column="ward")} == {"0": "north", "1": "south", "2": "3"}
    assert {r.site for r in load(tmp_path, rows)} == {""}


def without(key: str) -> Row:
    return {k: v for k, v in ANSWERED.items() if k != key}


def chat(*turns: Any) -> Row:
    return {"messages": list(turns), "split": "train"}


BAD_ROWS: dict[str, tuple[Row | str, str]] = {
    "not JSON": ('{"instruction": "Add."', "not JSON"),
    "a list": ("[1, 2]", "list where a JSON object belongs"),
    "an empty output": (dict(ANSWERED, output="  "), "no output"),
    "a null output": (dict(ANSWERED, output=None), "are of no known form (['output'] are null)"),
    "no output": (without("output"), "keys ['input', 'instruction', 'split', 'task'] are of no known form"),
    "no known keys": ({"question": "?", "answer": "!"}, "['answer', 'question'] are of no known form"),
    "a label of no list": ({"task": "topic", "text": "x", "label": "chess"}, "'chess' is not among the labels"),
    "an output of no list": (dict(ANSWERED, task="topic", output="chess"), "'chess' is not among the labels"),
    "an unknown split": (dict(ANSWERED, split="holdout"), "split 'holdout' is unknown; one of train, validation"),
    "a split that is no text": (dict(ANSWERED, split=["train"]), "'split' holds list"),
    "a number for text": (dict(ANSWERED, input={"a": 1}), "'input' holds dict where text belongs"),
    "neither input nor instruction": (dict(ANSWERED, instruction="", input=" "), "neither instruction nor input"),
    "an unknown role": (chat({"role": "tool", "content": "x"}), "role 'tool' is unknown; one of user, human, assistant"),
    "a role that is no text": (chat({"role": ["user"], "content": "x"}), "role ['user'] is unknown"),
    "no assistant turn": (chat({"role": "user", "content": "x"}), "without an assistant's answer"),
    "an empty answer": (chat({"role": "assistant", "content": ""}), "without an assistant's answer"),
    "turns of text": (chat("hello"), "a turn is str"),
    "no list of turns": ({"messages": "hello"}, "a list of turns belongs"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_an_error_that_names_file_line_and_fault(tmp_path: Path, name: str) -> None:
    bad, says = BAD_ROWS[name]
    path = write(tmp_path, [ANSWERED, dict(ANSWERED, input="2 + 0")])
    with path.open("a") as out:
        out.write("\n" + (bad if isinstance(bad, str) else json.dumps(bad)) + "\n")
    (tmp_path / "tasks.json").write_text(json.dumps({"topic": {"labels": ["sport", "science"]}}))
    config = Data(source="jsonl", root=str(tmp_path), files=("rows.jsonl",), tasks_file="tasks.json")
    with pytest.raises(DataError) as caught:
        load_records(config, 1)
    assert str(caught.value).startswith(f"{path}:4: ")
    assert says in str(caught.value)
    assert "labels" not in says or "tasks.json" in str(caught.value)


def test_a_missing_site_column_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: no value in column 'ward'"):
        load(tmp_path, [dict(ANSWERED, ward="north"), ANSWERED], site_column="ward")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"data file not found: {re.escape(str(tmp_path / 'gone.jsonl'))}"):
        list(read_json_lines(tmp_path / "gone.jsonl"))


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "not gzip", "not UTF-8"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = write(tmp_path, [dict(ANSWERED, input=str(random.Random(i).random())) for i in range(300)], "rows.jsonl.gz")
    whole = path.read_bytes()
    middle = len(whole) // 2
    if damage == "truncated":
        path.write_bytes(whole[:middle])
    elif damage == "overwritten":
        path.write_bytes(whole[:40] + b"\xff" * 40 + whole[80:])
    elif damage == "not gzip":
        path.write_bytes(b'{"instruction": "Add."}')
    else:
        path = tmp_path / "rows.jsonl"
        path.write_bytes('{"input": "é"}'.encode("latin-1"))
    told = ":1: no UTF-8 text; save the file as UTF-8" if damage == "not UTF-8" else ".* cannot be read"
    with pytest.raises(DataError, match=f"{re.escape(str(path))}{told}"):
        list(read_json_lines(path))


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"tasks": ["a"]}', '{"topic": ["sport", "science"]}', '{"references": {"q": "Paris"}}']
)
def test_a_bad_tasks_file_is_named(tmp_path: Path, text: str) -> None:
    write(tmp_path, [ANSWERED])
    (tmp_path / "tasks.json").write_text(text)
    config = Data(source="jsonl", root=str(tmp_path), files=("rows.jsonl",), tasks_file="tasks.json")
    with pytest.raises(DataError, match=r"tasks\.json \(data\.tasks_file\)"):
        load_records(config, 1)


def test_a_source_without_a_training_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no training row in .*2 rows read"):
        load(tmp_path, [dict(ANSWERED, split="test"), dict(ANSWERED, split="dev")])


def hub(folder: Path, **options: Any) -> list[Record]:
    return load_records(Data(source="hub", dataset=str(folder), **options), 1)


def test_a_local_folder_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedkeel[hub]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{k: v for k, v in dict(ANSWERED, input=f"{i}").items() if k != "split"} for i in range(40)]
    write(folder, rows[:30], "train.jsonl")
    write(folder, rows[30:], "test.jsonl")
    found = hub(folder)
    assert {(r.input, r.split) for r in found} == {(str(i), "train" if i < 30 else "test") for i in range(40)}
    # a set of one split has not been divided: its rows get their splits by hash
    (folder / "test.jsonl").unlink()
    alone = Counter(r.split for r in hub(folder, validation_share=0.3, test_share=0.3))
    assert sum(alone.values()) == 30
    assert all(alone[split] > 2 for split in ("train", "validation", "test"))


def test_class_names_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra fedkeel[hub]")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["World", "Sci_Tech"])})
    made = {
        split: datasets.Dataset.from_dict({"text": [f"{split} a", f"{split} b"], "label": labels}, features=features)
        for split, labels in {"train": [1, 0], "test": [0, -1]}.items()
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset: datasets.DatasetDict(made))
    # −1 is how data sets write that a label is withheld
    with pytest.raises(DataError, match=r"ag\[test\]\[1\]: .*no known form \(\['label'\] are null\)"):
        hub(Path("ag"))
    made["test"] = made["test"].select([0])
    found = {r.input: r for r in hub(Path("ag"))}
    assert {text: r.output for text, r in found.items()} == {"train a": "Sci Tech", "train b": "World", "test a": "World"}
    assert {r.labels for r in found.values()} == {("Sci Tech", "World")}


def test_a_hub_data_set_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the extra fedkeel[hub]")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty' cannot be loaded"):
        hub(tmp_path / "empty")


# ------------------------------------------------------------------------------------------ rows as people have them


def test_a_null_of_a_table_is_an_absent_key(tmp_path: Path) -> None:
    """What `df.to_json(orient="records", lines=True)` makes of a frame with rows of several forms."""
    keys = ("text", "label", "instruction", "input", "output", "messages", "split", "id", "task", "system", "history")
    rows = [
        {"text": "a", "label": "x", "task": "topic"},
        {"instruction": "Add.", "output": "2"},
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]},
    ]
    full = [{key: row.get(key) for key in keys} for row in rows]
    assert [without_id(r) for r in load(tmp_path, full)] == [without_id(r) for r in load(tmp_path, rows)]
    assert {r.id for r in load(tmp_path, full)} == {r.id for r in load(tmp_path, rows)}


def test_text_is_taken_as_it_stands(tmp_path: Path) -> None:
    code = "    return x\n\n"
    (found,) = load(tmp_path, [{"instruction": " Go on.\n", "input": "def f(x):\n", "output": code, "split": "train"}])
    assert (found.instruction, found.input, found.output) == (" Go on.\n", "def f(x):\n", code)
    (labelled,) = load(tmp_path, [{"text": " a ", "label": " x\n", "split": " train"}])
    assert (labelled.input, labelled.output, labelled.split) == (" a ", "x", "train")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(ANSWERED) + "\n"
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "tasks.json").write_text("\ufeff{}", encoding="utf-8")
    config = Data(source="jsonl", root=str(tmp_path), files=("rows.jsonl",), tasks_file="tasks.json")
    assert [r.output for r in load_records(config, 1)] == [ANSWERED["output"]]


TURNS = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
AGAIN = [{"role": "user", "content": "??"}, {"role": "assistant", "content": "!!"}]


def chat_of(tmp_path: Path, row: Row) -> Record:
    (found,) = load(tmp_path, [{**row, "split": "train"}])
    return found


def test_a_system_turn_beside_the_turns(tmp_path: Path) -> None:
    expected = (("system", "Be kind."), ("user", "?"), ("assistant", "!"))
    system = {"role": "developer", "content": "Be kind."}
    for row in ({"system": "Be kind.", "messages": TURNS}, {"messages": [system, *TURNS]}):
        assert chat_of(tmp_path, row).messages == expected
    assert chat_of(tmp_path, {"system": "Be kind.", "messages": [system, *TURNS]}).messages == expected
    assert chat_of(tmp_path, {"system": "Be kind.", "instruction": "?", "output": "!"}).messages == expected
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the row's 'system' is another than its first turn"):
        chat_of(tmp_path, {"system": "Be short.", "messages": [system, *TURNS]})


def test_what_was_said_before_an_instruction_is_read_and_not_learnt(tmp_path: Path) -> None:
    row = {"history": [["One?", "One."], ["Two?", "Two."]], "instruction": "Three?", "input": "3", "output": "Three."}
    found = chat_of(tmp_path, row)
    assert found.messages == (
        ("user", "One?"),
        ("assistant", "One."),
        ("user", "Two?"),
        ("assistant", "Two."),
        ("user", "Three?\n3"),
        ("assistant", "Three."),
    )
    assert found.unlearnt == (1, 3)
    assert found.output == "Three."
    with pytest.raises(DataError, match=r"'history' is no list of pairs"):
        chat_of(tmp_path, {**row, "history": ["One?"]})


@pytest.mark.parametrize(("key", "no", "yes"), [("weight", 0, 1), ("train", False, True), ("weight", 0.0, 1.0)])
def test_marks_of_turns_are_kept_to(tmp_path: Path, key: str, no: Any, yes: Any) -> None:
    marked = [{**t, key: no} if t["role"] == "assistant" else t for t in TURNS]
    assert chat_of(tmp_path, {"messages": [*marked, *AGAIN]}).unlearnt == (1,)
    assert chat_of(tmp_path, {"messages": [*AGAIN, *marked]}).messages == (("user", "??"), ("assistant", "!!"))
    kept = [{**t, key: yes} for t in TURNS]
    assert chat_of(tmp_path, {"messages": [*kept, *AGAIN], "system": "x"}).unlearnt == ()
    assert chat_of(tmp_path, {"messages": [*marked, *AGAIN], "system": "x"}).unlearnt == (2,)
    with pytest.raises(DataError, match="nothing to train on"):
        chat_of(tmp_path, {"messages": marked})
    with pytest.raises(DataError, match="0 or 1 belongs here"):
        chat_of(tmp_path, {"messages": [TURNS[0], {**TURNS[1], key: 0.5}]})


def test_a_list_of_texts_is_what_a_turn_says(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert chat_of(tmp_path, {"messages": [{"role": "user", "content": parts}, TURNS[1]]}).messages[0] == ("user", "one two")


def test_keys_of_a_chat_that_nothing_is_made_of_are_named(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "!", "reasoning_content": "Hm.", "weight": 1, "tool_calls": None}
    asks = {"role": "user", "content": "?", "name": "Bo", "images": []}
    found = chat_of(tmp_path, {"messages": [asks, thought], "instruction": "In German.", "system": "Be kind."})
    assert found.ignored == ("instruction", "name of a turn", "reasoning_content of a turn")
    assert chat_of(tmp_path, {"system": "Be kind.", "instruction": "?", "output": "!"}).ignored == ()


ODD_ROWS: dict[str, tuple[str, str]] = {
    "NaN": ('{"instruction": "Add.", "output": NaN}', "NaN is no number of JSON"),
    "infinity": ('{"instruction": -Infinity, "output": "x"}', "-Infinity is no number of JSON"),
    "a large number": ('{"instruction": "x", "output": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    "a number beyond floats": ('{"instruction": "x", "output": 1e999}', "'output' holds inf, which is no number"),
    "deep nesting": ('{"output": ' + "[" * 100000 + "}", "cannot be read as JSON"),
    "a key that stands twice": (
        '{"instruction": "x", "output": "one", "output": "two"}',
        "cannot be read as JSON: key 'output' stands twice in one object",
    ),
    "a key of a turn that stands twice": (
        '{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "x"}]}',
        "key 'content' stands twice",
    ),
    "half a character": (
        '{"instruction": "x", "output": "\\ud83d"}',
        "holds half of a character (a lone surrogate) at position 0",
    ),
    "half a character in a turn": (
        '{"messages": [{"role": "user", "content": "a\\udc00"}, {"role": "assistant", "content": "x"}]}',
        "half of a character (a lone surrogate) at position 1",
    ),
    "a call of a tool": (
        '{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": null, "tool_calls": [{"id": 1}]}]}',
        "a turn calls a tool",
    ),
    "an empty answer in between": (
        json.dumps({"messages": [TURNS[0], {"role": "assistant", "content": " "}, *AGAIN]}),
        'turn 2 is an assistant\'s and says nothing; mark it with "weight": 0',
    ),
    "a question without content": (
        '{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "x"}]}',
        "turn 1 is a user's and says nothing, under content or value",
    ),
    "a misspelt content": (
        json.dumps({"messages": [*TURNS, {"role": "user", "text": "?"}, AGAIN[1]]}),
        "turn 3 is a user's and says nothing, under content or value",
    ),
    "a history of nulls": (
        '{"instruction": "x", "output": "y", "history": [["?", null]]}',
        "in 'history' somebody says nothing; a pair is [asked, said]",
    ),
    "nobody asks": ('{"messages": [{"role": "assistant", "content": "x"}]}', "nobody asks"),
    "a picture": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}, {"role": "assistant", "content": "x"}]}',
        "'content' holds list where text belongs",
    ),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_an_odd_row_is_named_too(tmp_path: Path, name: str) -> None:
    line, says = ODD_ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ANSWERED) + "\n" + line + "\n")
    with pytest.raises(DataError) as caught:
        load_records(Data(source="jsonl", root=str(tmp_path), files=("rows.jsonl",)), 1)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["../../pwned", "a/b", "..", ".", "a\\b", "a\nb", "a\x00", "x" * 121, "é" * 61, " ", "", None])
def test_a_site_that_could_not_name_a_folder_is_refused(tmp_path: Path, name: str | None) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: (column 'ward': |no value in column 'ward')"):
        load(tmp_path, [dict(ANSWERED, ward=name)], site_column="ward")


def test_a_site_may_have_any_other_name(tmp_path: Path) -> None:
    names = ["[red]Ward[x]", "Klinikum München, Haus 2", "病院", "...", "a b", "7"]
    found = load(tmp_path, [dict(ANSWERED, ward=n, input=n) for n in [*names, 8]], site_column="ward")
    assert {r.site for r in found} == {*names, "8"}


def test_labels_that_are_the_same_words_are_refused(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "new_york"}, {"text": "b", "label": "new york"}]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: labels 'new_york' and 'new york' of task 'default' are the same words"
    ):
        load(tmp_path, rows)
    (tmp_path / "tasks.json").write_text(json.dumps({"default": {"labels": ["new_york", "boston", "new york"]}}))
    with pytest.raises(DataError, match=r"tasks\.json.*labels \['new_york', 'new york'\] of task 'default' are the same words"):
        load(tmp_path, rows[:1], tasks_file="tasks.json")


@pytest.mark.parametrize(
    ("one", "other"), [(1, 1.0), ("-2", "-2.0"), ("caf\u00e9", "cafe\u0301"), ("new york", "new  york"), ("a b", "a\u00a0b")]
)
def test_labels_that_nobody_could_tell_apart_are_refused(tmp_path: Path, one: Any, other: Any) -> None:
    rows = [{"text": "a", "label": one}, {"text": "b", "label": other}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: labels .* of task 'default' are the same words"):
        load(tmp_path, rows)
    (tmp_path / "tasks.json").write_text(json.dumps({"default": {"labels": [one, "x", other]}}))
    with pytest.raises(DataError, match=r"tasks\.json.*labels \[.*\] of task 'default' are the same words"):
        load(tmp_path, rows[:1], tasks_file="tasks.json")


def test_labels_that_can_be_told_apart_stay(tmp_path: Path) -> None:
    labels = ["1", "1.5", "10", "-1", "v1.0", "v1", "Yes", "yes", "0", "cafe"]
    rows = [{"text": f"t{n}", "label": label, "split": "train"} for n, label in enumerate(labels)]
    assert {r.labels for r in load(tmp_path, rows)} == {tuple(sorted(labels))}


def test_keys_that_nothing_is_made_of_are_named(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "label": "x", "ward": "n", "source": "web", "split": "train"},
        {"instruction": "Add.", "output": "2", "system": None, "score": 3, "text": "t"},
    ]
    found = {r.output: r.ignored for r in load(tmp_path, rows, site_column="")}
    assert found == {"x": ("source", "ward"), "2": ("score", "text")}


def test_a_file_that_is_a_site_has_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nhello,yes\n")
    (tmp_path / "b.csv").write_text("text,label\n\n")
    config = Data(source="files", root=str(tmp_path), files=("*.csv",), site_from="file")
    with pytest.raises(DataError, match=r"b\.csv holds no row, and is a site"):
        files(config)
    assert len(files(dataclasses.replace(config, site_from="column"))) == 1  # there it is a part of all rows, and an empty one


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"text": "a", "category": "b"}, "messages: 'label' is missing or empty"),
        ({"Text": "a", " label": "b"}, "messages: 'Text' is not 'text' and ' label' is not 'label'"),
        ({"instruction": "a", "answer": "b"}, "messages: 'output' is missing or empty"),
        ({"x": "a"}, "messages"),
    ],
)
def test_a_row_of_no_form_is_told_what_it_lacks(row: dict[str, str], hint: str) -> None:
    with pytest.raises(DataError) as caught:
        to_record({**row, FILE_SITE: "s"}, "here", {}, Data())
    assert str(caught.value).endswith(hint)
    assert FILE_SITE not in str(caught.value)


def test_the_line_of_what_is_no_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text,label\nhello,yes\nM\u00fcll,no\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.csv:3: no UTF-8 text"):
        list(read_csv(path))
