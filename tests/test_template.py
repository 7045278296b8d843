"""What chat templates write around an answer: the answer is what the row says, and something ends it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from shapes import tokenizer

from fedkeel.data.format import Example, Formatter
from fedkeel.data.forms import DataError
from fedkeel.types import Record

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# an empty block of thought before the last answer, as Qwen 3 writes it, none before earlier ones
EMPTY_THOUGHT = (
    TURN + "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}" + ASK
)
# the prompt opens a block that no answer has, as DeepSeek R1's
OPENED = (
    TURN + "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
WRITTEN_END = "{% for m in messages %}## {{ m['role'] }}\n{{ m['content'] }}\n## end\n{% endfor %}" + (
    "{% if add_generation_prompt %}## assistant\n{% endif %}"
)
# a turn's end, then the text's end where nothing is asked any more, as Phi 3 writes it
TWO_ENDS = (
    TURN + "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% else %}<|endoftext|>{% endif %}"
)
NO_PROMPT = TURN + "{{ m['content'] }}<|im_end|>\n{% endfor %}"
LEADING_WORDS = (
    TURN + "{% if m['role'] == 'assistant' %}Final answer: {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}" + ASK
)
# words of the template stand before the token that ends a turn
QUOTED = (
    TURN
    + "{% if m['role'] == 'assistant' %}\"{{ m['content'] }}\"{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    + ASK
)

ROW = Record("r", "t", "train", "Paris", "Answer.", "the capital of France?")
TALK = Record(
    "talk", "t", "train", "Two.",
    messages=(("user", "One?"), ("assistant", "One."), ("user", "Two?"), ("assistant", "Two.")),
)  # fmt: skip


def formatter(template: str, **changed: Any) -> Formatter:
    words = copy.deepcopy(tokenizer("chatml"))
    words.chat_template = template
    for name, value in changed.items():
        setattr(words, name, value)
    return Formatter(words, "causal", 256)


def parts(made: Formatter, example: Example) -> list[str]:
    """The texts of an example, in turn unsupervised and supervised."""
    found: list[list[int]] = [[]]
    state = False
    for token, flag in zip(example.ids, example.supervised, strict=True):
        if flag != state:
            found.append([])
            state = flag
        found[-1].append(token)
    return [made.tokenizer.decode(ids, skip_special_tokens=False) for ids in found]


Q = "<|im_start|>user\nAnswer.\nthe capital of France?<|im_end|>\n<|im_start|>assistant\n"
CASES = {
    "empty thought": (EMPTY_THOUGHT, [Q + "<think>\n\n</think>\n\n", "Paris<|im_end|>"]),
    "opened by the prompt": (OPENED, [Q, "Paris<|im_end|>"]),
    "endless": (ENDLESS, ["user: Answer.\nthe capital of France?\nassistant:", " Paris<|im_end|>"]),
    "a written end": (
        WRITTEN_END,
        ["## user\nAnswer.\nthe capital of France?\n## end\n## assistant\n", "Paris\n## end<|im_end|>"],
    ),
    "two ends": (TWO_ENDS, [Q, "Paris<|im_end|>"]),
    "no prompt": (NO_PROMPT, [Q, "Paris<|im_end|>"]),
    "quoted": (QUOTED, [Q + '"', 'Paris"<|im_end|>']),
    "leading words": (LEADING_WORDS, [Q + "Final answer:", " Paris<|im_end|>"]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_what_the_row_says_and_is_ended(name: str) -> None:
    template, expected = CASES[name]
    made = formatter(template)
    example = made.encode(ROW)
    assert parts(made, example) == expected
    answer = made.answer_ids(ROW, "Paris")
    assert made.prompt_ids(ROW, 9) + answer == example.ids
    # what is generated up to the end is the answer, whatever comes behind
    assert made.said(ROW, [*answer, *answer]) == "Paris"
    assert answer[-1] in made.ends(ROW)
    # a label that another begins with is told apart, as its end is scored
    one, other = made.answer_ids(ROW, "in"), made.answer_ids(ROW, "in part")
    assert one != other[: len(one)]


def test_the_end_of_a_turn_is_not_the_end_of_the_text() -> None:
    made = formatter(TWO_ENDS, eos_token="<|endoftext|>")
    end, eos = (made.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert made.answer_ids(ROW, "Paris")[-1] == end
    assert set(made.ends(ROW)) == {end, eos}


def test_a_row_that_writes_the_block_itself_has_no_second_one() -> None:
    made = formatter(EMPTY_THOUGHT)
    thought = Record("r", "t", "train", "<think>\nFrance.\n</think>\n\nParis", "Answer.", "the capital of France?")
    example = made.encode(thought)
    assert parts(made, example) == [Q, "<think>\nFrance.\n</think>\n\nParis<|im_end|>"]
    assert made.prompt_ids(thought, 9) + made.answer_ids(thought, thought.output) == example.ids


TURNS = [
    "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
]


@pytest.mark.parametrize(("template", "lead"), [(EMPTY_THOUGHT, "<think>\n\n</think>\n\n"), (OPENED, ""), (NO_PROMPT, "")])
def test_every_answer_of_a_talk_is_learnt_as_the_template_writes_it(template: str, lead: str) -> None:
    made = formatter(template)
    example = made.encode(TALK)
    assert parts(made, example) == [TURNS[0], "One.<|im_end|>", "\n" + TURNS[1] + lead, "Two.<|im_end|>"]
    assert made.prompt_ids(TALK, 9) + made.answer_ids(TALK, "Two.") == example.ids
    whole = made.tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in TALK.messages], tokenize=False)
    assert made.tokenizer.decode(example.ids) == whole.rstrip()


def test_a_talk_may_begin_with_the_assistant() -> None:
    made = formatter(NO_PROMPT)
    talk = Record("r", "t", "train", "One.", messages=(("assistant", "Hello."), *TALK.messages[:2]))
    assert parts(made, made.encode(talk)) == ["<|im_start|>assistant\n", "Hello.<|im_end|>", "\n" + TURNS[0], "One.<|im_end|>"]
    alone = Record("r", "t", "train", "Hello.", messages=(("assistant", "Hello."),))
    with pytest.raises(DataError, match=r"row r \(task t\): nothing is asked before its answer"):
        made.encode(alone)


def test_an_answer_that_nothing_ends_is_refused() -> None:
    for made in (formatter(ENDLESS, eos_token=None), formatter("", chat_template=None, eos_token=None)):
        with pytest.raises(DataError, match=r"row r \(task t\): nothing ends an answer"):
            made.encode(ROW)
    assert parts(formatter(NO_PROMPT, eos_token=None), formatter(NO_PROMPT, eos_token=None).encode(ROW)) == [
        Q,
        "Paris<|im_end|>",
    ]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'] | upper }}", "does not show an answer as it is"),
        ("{{ raise_exception('no chat here') }}", "no chat here"),
        ("{{ messages[7]['content'] }}", "refuses turns by user, assistant"),
        (
            NO_PROMPT.replace("{{ m['content'] }}", "{{ m['content'] }}{% if not loop.last %} (earlier){% endif %}"),
            "rewrites earlier",
        ),
    ],
)
def test_a_template_that_cannot_be_followed_is_an_error_that_names_the_row(template: str, words: str) -> None:
    with pytest.raises(DataError, match=r"row r \(task t\).*" + words):
        formatter(template).encode(ROW)


# the prompt opens a block, and the answer closes it empty, as Qwen 3's thinking models do
OPENED_AND_CLOSED = (
    TURN + "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def test_a_block_that_the_prompt_opens_and_the_answer_closes() -> None:
    made = formatter(OPENED_AND_CLOSED)
    assert parts(made, made.encode(ROW)) == [Q + "<think>\n\n</think>\n\n", "Paris<|im_end|>"]
    thought = Record("r", "t", "train", "<think>\nFrance.\n</think>\n\nParis", "Answer.", "the capital of France?")
    assert parts(made, made.encode(thought)) == [Q, "<think>\nFrance.\n</think>\n\nParis<|im_end|>"]


# earlier answers lose their thoughts, as in Qwen 3 and DeepSeek R1
FORGETS = (
    TURN + "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] | trim }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}" + ASK
)


def test_an_earlier_answer_that_is_written_otherwise_is_not_learnt() -> None:
    """Then training reads what scoring reads; such talks are counted."""
    made = formatter(FORGETS)
    assert len(parts(made, made.encode(TALK))) == 4
    assert not made.counts["last only"]
    turns = (("user", "One?"), ("assistant", "<think>1</think> One."), ("user", "Two?"), ("assistant", "<think>2</think> Two."))
    talk = Record("talk", "t", "train", "<think>2</think> Two.", messages=turns)
    example = made.encode(talk)
    assert parts(made, example) == [TURNS[0] + "One.<|im_end|>\n" + TURNS[1], "<think>2</think> Two.<|im_end|>"]
    assert made.counts["last only"] == 1
    assert made.prompt_ids(talk, 9) + made.answer_ids(talk, talk.output) == example.ids


def test_an_answer_that_holds_what_ends_one_is_refused() -> None:
    made = formatter(TWO_ENDS, eos_token="<|endoftext|>")
    for mark in ("<|im_end|>", "<|endoftext|>"):
        told = rf"row . \(task t\): its answer holds {re.escape(repr(mark))}, the token that ends an answer"
        with pytest.raises(DataError, match=told):
            made.encode(replace(ROW, output=f"Paris{mark}"))
        with pytest.raises(DataError, match=told):
            made.encode(replace(ROW, labels=("Paris", f"in {mark} part")))
        turns = (*TALK.messages[:1], ("assistant", f"One.{mark}"), *TALK.messages[2:])
        with pytest.raises(DataError, match=told.replace("row .", "row talk")):
            made.encode(replace(TALK, messages=turns))
        assert made.encode(replace(TALK, messages=turns, unlearnt=(1,))).positions
    assert made.encode(replace(ROW, input="<|im_end|>", output="<|im_start|>")).positions


@pytest.mark.parametrize("form", ["{{ strftime_now('%d %b %Y') }}", "{% set f = '%d %b %Y' %}{{ strftime_now(f) }}"])
def test_a_template_that_writes_the_date_writes_one_date(form: str) -> None:
    dated = form + "|" + NO_PROMPT + ASK
    made = formatter(dated)
    assert made.tokenizer.decode(made.prompt_ids(ROW, 4)).startswith("26 Jul 2024|")
    assert made.encode(ROW).answer == formatter(NO_PROMPT + ASK).encode(ROW).answer


@pytest.mark.parametrize("written", ["%Y-%m-%d %H:%M", "%-d/%-m/%y (%A)", "no code"])
def test_the_date_is_written_as_strftime_does(written: str) -> None:
    made = formatter("{% set when = strftime_now('" + written + "') %}\n{{ when }}|" + NO_PROMPT + ASK)
    text = made.tokenizer.decode(made.prompt_ids(ROW, 4))
    assert text.startswith(datetime(2024, 7, 26).strftime(written) + "|")
