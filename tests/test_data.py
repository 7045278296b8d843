"""Masks, prompts and batches against hand-worked cases and against the tokenizer's own reading of the whole text."""

from __future__ import annotations

import dataclasses
import re
from itertools import groupby

import numpy as np
import pytest
import torch
from shapes import ENDS, tokenizer

from fedkeel.data.batches import Batch, batch_indices, batches_per_epoch, collate
from fedkeel.data.format import Example, Formatter
from fedkeel.data.forms import DataError
from fedkeel.types import Record

TEMPLATED = ["llama2", "llama3", "chatml"]
ROWS = [
    Record("plain", "qa", "train", "Paris", "Answer the question.", "what is the capital of France?"),
    Record("accents", "qa", "train", "für 42 € – naïve", "Translate into German.", "for 42 euros"),
    Record("lines", "code", "train", "def add(a, b):\n    return a + b", "Write code.", "add two numbers\nin Python"),
    Record("bracket", "code", "train", "[1, 2]", "", "a list"),
    Record("options", "topic", "train", "no", "Classify.", "The film was long.", labels=("no", "yes, or so")),
    Record("alone", "title", "train", "A title", "Write a title."),
    # the probe word of the code, in every place where it could be mistaken
    Record("x", "x", "train", "x", "x", "x x"),
]
CHAT = Record(
    "chat",
    "talk",
    "train",
    "It rains, so stay at home.",
    messages=(
        ("user", "How are you today?"),
        ("assistant", "I am fine, thank you."),
        ("user", "And you?\n\nReally?"),
        ("assistant", "Yes — 100 %."),
        ("user", "And what about the weather?"),
        ("assistant", "It rains, so stay at home."),
    ),
)


def formatter(shape: str, kind: str = "causal", max_length: int = 256, **options: object) -> Formatter:
    return Formatter(tokenizer(shape), kind, max_length, **options)


def text_of(shape: str, ids: tuple[int, ...] | list[int]) -> str:
    return tokenizer(shape).decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def content_of(record: Record) -> str:
    options = "Options: " + ", ".join(record.labels) if record.labels else ""
    return "\n".join(part for part in (record.instruction, record.input, options) if part)


def whole(shape: str, record: Record) -> list[int]:
    """The slow twin: prompt and answer as one text, tokenised at once."""
    words = tokenizer(shape)
    if words.chat_template is None:
        bos = [words.bos_token_id] if shape != "gpt2" else []
        text = content_of(record) + "\nAnswer: " + record.output
        return [*bos, *words(text, add_special_tokens=False)["input_ids"], words.eos_token_id]
    turns = record.messages or (("user", content_of(record)), ("assistant", record.output))
    text = words.apply_chat_template([{"role": r, "content": t} for r, t in turns], tokenize=False)
    return words(text.rstrip(), add_special_tokens=False)["input_ids"]


def runs(example: Example) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens that are all supervised, or all not."""
    pairs = zip(example.supervised, example.ids, strict=True)
    return [(flag, [token for _, token in group]) for flag, group in groupby(pairs, key=lambda p: p[0])]


@pytest.mark.parametrize("record", ROWS, ids=lambda r: r.id)
@pytest.mark.parametrize("shape", ENDS)
def test_the_answer_and_its_end_are_supervised_and_nothing_else(shape: str, record: Record) -> None:
    made = formatter(shape)
    example = made.encode(record)
    answer = made.answer_ids(record, record.output)
    prompt = made.prompt_ids(record, len(answer))
    assert example.ids == (*prompt, *answer) == tuple(whole(shape, record))
    assert example.supervised == (False,) * len(prompt) + (True,) * len(answer)
    assert example.positions == len(answer)
    # what stands in front of an answer behind "Answer:" or "[/INST]" is one space, which belongs to its first token
    assert text_of(shape, answer).removeprefix(" ") == record.output + ENDS[shape]
    assert text_of(shape, prompt).count(content_of(record)) >= 1
    assert made.counts == {"truncated": 0}


@pytest.mark.parametrize("shape", ENDS)
def test_every_label_is_scored_by_the_tokens_that_training_saw(shape: str) -> None:
    made = formatter(shape)
    row = dataclasses.replace(ROWS[0], labels=("Paris", "Rome", "a third, longer label"))
    for label in row.labels:
        example = made.encode(dataclasses.replace(row, output=label))
        scored = made.prompt_ids(row, 0) + made.answer_ids(row, label)
        assert example.ids == scored


@pytest.mark.parametrize("shape", ENDS)
def test_an_answer_ends_in_the_one_token_that_stops_generation(shape: str) -> None:
    end = tokenizer(shape).convert_tokens_to_ids(ENDS[shape].strip())
    assert {formatter(shape).answer_ids(row, row.output)[-1] for row in ROWS} == {end}


@pytest.mark.parametrize("shape", TEMPLATED)
def test_every_assistant_turn_of_a_chat_is_supervised_with_its_end(shape: str) -> None:
    made = formatter(shape)
    example = made.encode(CHAT)
    assert list(example.ids) == whole(shape, CHAT)
    answers = [text_of(shape, ids).removeprefix(" ") for supervised, ids in runs(example) if supervised]
    assert answers == [text + ENDS[shape] for role, text in CHAT.messages if role == "assistant"]
    asked = [text_of(shape, ids) for supervised, ids in runs(example) if not supervised]
    assert len(asked) == 3
    for (_, question), prompt in zip(CHAT.messages[::2], asked, strict=True):
        assert question in prompt
    last = made.answer_ids(CHAT, CHAT.output)
    assert made.prompt_ids(CHAT, len(last)) + last == example.ids


@pytest.mark.parametrize("shape", ["llama3", "chatml"])
def test_a_system_turn_is_read_and_never_supervised(shape: str) -> None:
    row = dataclasses.replace(CHAT, messages=(("system", "Be short."), *CHAT.messages))
    first = runs(formatter(shape).encode(row))[0]
    assert first[0] is False
    assert "Be short." in text_of(shape, first[1])
    assert "How are you today?" in text_of(shape, first[1])


@pytest.mark.parametrize("shape", TEMPLATED)
def test_a_chat_is_cut_behind_the_last_answer_that_fits(shape: str) -> None:
    full = formatter(shape).encode(CHAT)
    ends = [i + 1 for i, flag in enumerate(full.supervised) if flag and not (*full.supervised, False)[i + 1]]
    assert len(ends) == 3
    for room, kept in ((ends[2], 3), (ends[2] - 1, 2), (ends[1], 2), (ends[1] - 1, 1), (ends[0], 1)):
        made = formatter(shape, max_length=room)
        example = made.encode(CHAT)
        assert example.ids == full.ids[: ends[kept - 1]]
        assert example.supervised == full.supervised[: ends[kept - 1]]
        assert made.counts["truncated"] == (kept < 3)


@pytest.mark.parametrize("shape", TEMPLATED)
def test_a_chat_of_which_no_answer_fits_is_left_out_and_counted(shape: str) -> None:
    short = dataclasses.replace(CHAT, id="short", output="No.", messages=(("user", "?"), ("assistant", "No.")))
    room = len(formatter(shape).encode(short).ids)
    made = formatter(shape, max_length=room)
    assert [e.record for e in made.encode_all([CHAT, short])] == ["short"]
    assert (made.counts["dropped"], made.counts["truncated"]) == (1, 0)
    with pytest.raises(DataError, match=r"row chat .*no supervised position within"):
        made.encode(CHAT)


@pytest.mark.parametrize("shape", TEMPLATED)
def test_a_long_chat_prompt_loses_its_earliest_turns_when_it_is_scored(shape: str) -> None:
    """Turns whole and from the front, a system turn and the last question never; then the question is cut; each counted."""
    system = () if shape == "llama2" else (("system", "Be short."),)
    chat = dataclasses.replace(CHAT, messages=(*system, *CHAT.messages))
    wanted = []
    for first in (0, 2, 4):
        part = dataclasses.replace(CHAT, messages=(*system, *CHAT.messages[first:]))
        wanted.append(formatter(shape).prompt_ids(part, 0))
    assert len(wanted[0]) > len(wanted[1]) > len(wanted[2])
    for expected, longer in zip(wanted, [(), *wanted], strict=False):
        for length in (len(expected), len(longer) - 1) if longer else (len(expected), 256):
            made = formatter(shape, max_length=length + 9)
            assert made.prompt_ids(chat, 9) == expected
            assert made.counts["truncated"] == bool(longer)
    made = formatter(shape, max_length=len(wanted[2]) - 3)
    cut = text_of(shape, made.prompt_ids(chat, 0))
    assert ("Be short." in cut) == bool(system)
    assert "And what" in cut
    assert "weather?" not in cut
    assert cut.endswith(text_of(shape, wanted[2])[-8:])
    for too_much in (len(wanted[2]) - 3, 50):
        with pytest.raises(DataError, match="row chat"):
            made.prompt_ids(chat, too_much)


@pytest.mark.parametrize("shape", [*ENDS, "t5"])
def test_an_over_long_input_is_cut_at_its_end_and_counted(shape: str) -> None:
    words = [f"w{i}s" for i in range(200)]
    row = dataclasses.replace(ROWS[0], input=" ".join(words))
    kind = "seq2seq" if shape == "t5" else "causal"
    made = formatter(shape, kind, 96)
    example = made.encode(row)
    answer = made.answer_ids(row, "Paris")
    tail = example.decoder if shape == "t5" else example.ids[-len(answer) :]
    assert tail == answer
    # most of the room is used, none of it is overstepped
    assert 96 - 30 <= len(example.ids) <= 96
    prompt = text_of(shape, example.ids if shape == "t5" else example.ids[: -len(answer)])
    kept = re.findall(r"w\d+s", prompt)
    assert len(kept) > 5
    assert kept == words[: len(kept)]
    assert words[len(kept)] not in prompt
    assert made.counts["truncated"] == 1
    made.encode(dataclasses.replace(row, input="w0"))
    assert made.counts["truncated"] == 1


@pytest.mark.parametrize("shape", ENDS)
def test_an_input_that_just_fits_is_whole(shape: str) -> None:
    length = len(formatter(shape).encode(ROWS[2]).ids)
    for room, cut in ((length, 0), (length - 1, 1)):
        made = formatter(shape, max_length=room)
        example = made.encode(ROWS[2])
        assert made.counts["truncated"] == cut
        assert (list(example.ids) == whole(shape, ROWS[2])) == (not cut)


def test_an_input_without_spaces_is_cut_too() -> None:
    made = formatter("gpt2", max_length=60)
    example = made.encode(dataclasses.replace(ROWS[0], input="é" * 300))
    assert len(example.ids) <= 60
    assert made.counts["truncated"] == 1


def test_the_longer_of_instruction_and_input_is_cut() -> None:
    """A long instruction gives way and the whole input stays in the prompt; the answer is whole, the row is counted."""
    made = formatter("gpt2", max_length=60)
    row = dataclasses.replace(ROWS[0], instruction="word " * 100, input="which animal sings")
    example = made.encode(row)
    text = made.tokenizer.decode(example.ids)
    assert "which animal sings" in text
    assert 1 < text.count("word") < 100
    assert len(example.ids) <= 60
    assert made.counts["truncated"] == 1


def test_a_row_whose_answer_and_frame_leave_no_room_is_an_error_that_names_the_row() -> None:
    row = dataclasses.replace(ROWS[0], instruction="", labels=tuple("abcdefgh"), output="word " * 40)
    with pytest.raises(DataError, match=r"row plain \(task qa\).*max_length = 30"):
        formatter("gpt2", max_length=30).encode(row)


def test_an_answer_that_leaves_no_room_for_a_prompt_is_left_out_and_counted() -> None:
    made = formatter("gpt2", max_length=40)
    long = dataclasses.replace(ROWS[0], id="long", output="word " * 40)
    assert [e.record for e in made.encode_all([long, ROWS[0]])] == ["plain"]
    assert made.counts["dropped"] == 1


@pytest.mark.parametrize(("list_labels", "listed"), [(3, True), (2, False), (0, False), (16, True)])
def test_options_are_listed_up_to_list_labels(list_labels: int, listed: bool) -> None:
    row = dataclasses.replace(ROWS[0], output="b", labels=("a", "b", "c c"))
    for shape in ("gpt2", "chatml"):
        made = formatter(shape, list_labels=list_labels)
        assert text_of(shape, made.prompt_ids(row, 0)).count("\nOptions: a, b, c c") == listed
    said = dataclasses.replace(row, input="Which?\nOptions: a or b or c c")
    assert text_of("gpt2", formatter("gpt2").prompt_ids(said, 0)).count("Options: ") == 1
    single = dataclasses.replace(row, output="a", labels=("a",))
    assert "Options" not in text_of("gpt2", formatter("gpt2").prompt_ids(single, 0))


@pytest.mark.parametrize("record", [ROWS[0], CHAT], ids=["instruction", "chat"])
def test_a_template_that_rewrites_earlier_turns_is_refused(record: Record) -> None:
    with pytest.raises(DataError, match="rewrites earlier turns"):
        formatter("chatml-rewriting").encode(record)


def test_roles_that_a_template_refuses_are_an_error_that_quotes_it() -> None:
    row = dataclasses.replace(CHAT, messages=(("system", "Be short."), *CHAT.messages))
    with pytest.raises(DataError, match="roles must alternate"):
        formatter("llama2").encode(row)


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(DataError, match=r"row chat \(task talk\) is a chat.*no chat template"):
        formatter("gpt2").encode(CHAT)


@pytest.mark.parametrize("shape", ["t5", "roberta"])
def test_an_encoder_decoder_reads_the_prompt_and_writes_the_answer(shape: str) -> None:
    made = formatter(shape, "seq2seq")
    words, row = tokenizer(shape), ROWS[0]
    example = made.encode(row)
    assert list(example.ids) == words(content_of(row))["input_ids"]
    assert example.decoder == made.answer_ids(row, "Paris") == tuple(words("Paris")["input_ids"])
    assert example.decoder[-1] == words.eos_token_id
    assert (example.positions, example.supervised) == (len(example.decoder), ())


def test_an_encoder_decoder_gets_its_end_token_from_a_tokenizer_that_adds_none() -> None:
    made = formatter("gpt2", "seq2seq")
    assert text_of("gpt2", made.encode(ROWS[0]).decoder) == "Paris<|endoftext|>"


def test_a_target_over_max_length_is_cut_and_counted() -> None:
    made = formatter("t5", "seq2seq", 16)
    example = made.encode(Record("r", "t", "train", "word " * 30, "Say it."))
    assert len(example.decoder) == 16
    assert made.counts["truncated"] == 1


def test_an_encoder_decoder_reads_the_turns_of_a_chat() -> None:
    example, words = formatter("t5", "seq2seq").encode(CHAT), tokenizer("t5")
    read = "\n".join(f"{role}: {text}" for role, text in CHAT.messages[:-1])
    assert list(example.ids) == words(read)["input_ids"]
    assert list(example.decoder) == words(CHAT.output)["input_ids"]


def test_a_classifier_row() -> None:
    made = formatter("bert", "classifier", 16, classes=("business", "science", "sport"))
    row = Record("r", "topic", "train", "sport", "Classify.", "The boat turns.", labels=("sport", "science"))
    example = made.encode(row)
    assert text_of("bert", example.ids) == "[CLS] the boat turns. [SEP]"
    assert (example.target, set(example.allowed), example.positions) == (2, {1, 2}, 1)
    assert made.counts["truncated"] == 0
    long = made.encode(dataclasses.replace(row, input="the wind turns " * 20))
    assert len(long.ids) == 16
    assert text_of("bert", long.ids).endswith("[SEP]")
    assert made.counts["truncated"] == 1
    with pytest.raises(DataError, match=r"row r: label 'chess'.*3 known classes"):
        made.encode(dataclasses.replace(row, output="chess"))


@pytest.mark.parametrize("supervised", [(False, False, False), (True, False, False)])
def test_a_row_without_a_supervised_position_is_refused_by_name(supervised: tuple[bool, ...]) -> None:
    # nothing stands before a first token, so supervising it alone is supervising nothing
    with pytest.raises(DataError, match=r"row r7 \(task t\) has no supervised position"):
        collate([Example("ok", "t", (1, 2), (False, True)), Example("r7", "t", (4, 5, 6), supervised)], "causal", 0)


def equal(batch: Batch, inputs: dict[str, list[list[int]]], rows: list[int], columns: list[int], targets: list[int]) -> None:
    assert {name: tensor.tolist() for name, tensor in batch.inputs.items()} == inputs
    assert (batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist()) == (rows, columns, targets)
    assert batch.targets.dtype == batch.rows.dtype == batch.inputs["input_ids"].dtype == torch.int64


def test_collate_of_a_language_model_by_hand() -> None:
    one = Example("a", "t", (11, 12, 13, 14), (False, False, True, True))
    two = Example("b", "t", (21, 22, 23, 24, 25), (True, True, False, False, True))
    equal(
        collate([one, two], "causal", 9),
        {"input_ids": [[11, 12, 13, 14, 9], [21, 22, 23, 24, 25]], "attention_mask": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]},
        rows=[0, 0, 1, 1],
        columns=[1, 2, 0, 3],
        targets=[13, 14, 22, 25],
    )


def test_collate_of_an_encoder_decoder_by_hand() -> None:
    equal(
        collate([Example("a", "t", (11, 12), decoder=(5, 1)), Example("b", "t", (21,), decoder=(6, 7, 1))], "seq2seq", 0),
        {
            "input_ids": [[11, 12], [21, 0]],
            "attention_mask": [[1, 1], [1, 0]],
            "labels": [[5, 1, -100], [6, 7, 1]],
        },
        rows=[0, 0, 1, 1, 1],
        columns=[0, 1, 0, 1, 2],
        targets=[5, 1, 6, 7, 1],
    )


def test_collate_of_a_classifier_by_hand() -> None:
    examples = [Example("a", "t", (2, 8, 3), target=1, allowed=(3, 1)), Example("b", "t", (2, 3), target=0)]
    batch = collate(examples, "classifier", 0, classes=4)
    equal(
        batch,
        {"input_ids": [[2, 8, 3], [2, 3, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]},
        rows=[0, 1],
        columns=[0, 0],
        targets=[1, 0],
    )
    assert batch.allowed is not None
    assert batch.allowed.tolist() == [[False, True, False, True], [True] * 4]


LENGTHS = np.random.default_rng(0).lognormal(3.0, 1.0, 400).astype(int).tolist()


@pytest.mark.parametrize("size", [1, 4, 16, 500])
@pytest.mark.parametrize("rows", [1, 5, 33, 300])
def test_an_epoch_holds_every_row_once(rows: int, size: int) -> None:
    count = batches_per_epoch(rows, size)
    assert count == len([i for i in range(rows) if i % size == 0])
    batches = batch_indices(LENGTHS[:rows], size, 1, "site", range(2 * count))
    for epoch in (batches[:count], batches[count:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(rows))
        assert max(map(len, epoch)) <= size
    if rows >= 33 and count > 1:
        assert batches[:count] != batches[count:]


def test_batches_depend_on_their_arguments_alone() -> None:
    lengths, steps = LENGTHS[:50], range(40)
    batches = batch_indices(lengths, 4, 1, "north", steps)
    np.random.seed(99)
    torch.manual_seed(99)
    assert batch_indices(lengths, 4, 1, "north", steps) == batches
    assert [batch_indices(lengths, 4, 1, "north", range(s, s + 1))[0] for s in steps] == batches
    resumed = batch_indices(lengths, 4, 1, "north", range(17)) + batch_indices(lengths, 4, 1, "north", range(17, 40))
    assert resumed == batches
    assert batch_indices(lengths, 4, 1, "south", steps) != batches
    assert batch_indices(lengths, 4, 2, "north", steps) != batches


def test_rows_of_similar_length_come_together() -> None:
    def padding(batches: list[list[int]]) -> int:
        return sum(max(LENGTHS[i] for i in b) * len(b) - sum(LENGTHS[i] for i in b) for b in batches)

    order = np.random.default_rng(1).permutation(len(LENGTHS)).tolist()
    at_random = padding([order[i : i + 8] for i in range(0, len(order), 8)])
    grouped = padding(batch_indices(LENGTHS, 8, 1, "site", range(len(LENGTHS) // 8)))
    assert grouped < at_random / 3
