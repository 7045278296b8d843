"""From records to batches: prompts, masks, lengths, order.

Everything is a supervised position (method.md §1): the answer's tokens of a language model, the decoder's tokens of an
encoder-decoder, or the one class of a classifier row. Prompt and answer are tokenised apart, the answer behind a short
anchor (the end of every prompt), so that the border between them is exact for any tokenizer, and so that scoring sees the
very tokens that training saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any

from fedkeel.data.forms import DataError
from fedkeel.data.template import PLAIN_ANCHOR, Frame, FrameError, Template
from fedkeel.types import Record


def _named(record: Record) -> str:
    return f"row {record.id} (task {record.task})"


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    """What cannot be framed becomes an error of this row."""
    try:
        yield
    except FrameError as error:
        raise DataError(f"{_named(record)}: {error}") from error


def _without_a_turn(record: Record) -> Record | None:
    """A chat without its earliest turns, up to the next question; None if only the last question is left, or it is no chat."""
    first = 1 if record.messages and record.messages[0][0] == "system" else 0
    later = [n for n, (role, _) in enumerate(record.messages[:-1]) if role == "user" and n > first]
    if not later:
        return None
    return replace(record, messages=(*record.messages[:first], *record.messages[later[0] :]))


@dataclass(frozen=True)
class Example:
    """One encoded row.

    ids: the tokens that the model (an encoder-decoder: its encoder) reads. supervised: one flag a token of `ids`, whether
    it is to be predicted; all False for the two other kinds. decoder: target tokens of an encoder-decoder, its end token
    included. target, allowed: class index and candidate class indices of a classifier row. label: the answer of a
    classification row, of whatever kind the model is; empty for free text. labels, options: its candidate answers, and the
    tokens of each as the model would say it, of a classifier its class index.
    """

    record: str
    task: str
    ids: tuple[int, ...]
    supervised: tuple[bool, ...] = ()
    decoder: tuple[int, ...] = ()
    target: int = -1
    allowed: tuple[int, ...] = ()
    label: str = ""
    labels: tuple[str, ...] = ()
    options: tuple[tuple[int, ...], ...] = ()

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens of a classification row's answer, or its class index."""
        if self.target >= 0:
            return (self.target,)
        return self.decoder or self.ids[len(self.ids) - sum(self.supervised) :]

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before a classification row's answer."""
        return self.ids[: len(self.ids) - sum(self.supervised)]

    @property
    def positions(self) -> int:
        """How many positions this row supervises; a first token has nothing before it to be predicted from."""
        return sum(self.supervised[1:]) + len(self.decoder) + (self.target >= 0)

    @property
    def length(self) -> int:
        """What the row costs, in tokens."""
        return len(self.ids) + len(self.decoder)


@dataclass
class Formatter:
    """Turns records into examples for one tokenizer and one kind of model.

    classes: the texts that a classifier can answer, in order; unused by the other kinds. counts: how many rows were
    shortened (`truncated`) or left out (`dropped`) because they were over `max_length` tokens, or learnt in their last answer
    alone (`last only`, see `Template.talk`).
    """

    tokenizer: Any
    kind: str
    max_length: int
    list_labels: int = 16
    classes: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    _answers: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)
    _tries: dict[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    @cached_property
    def _class_index(self) -> dict[str, int]:
        return {text: index for index, text in enumerate(self.classes)}

    @cached_property
    def _bos(self) -> tuple[int, ...]:
        """The beginning-of-text token, if this tokenizer puts one before a text of its own accord."""
        bos = self.tokenizer.bos_token_id
        return (bos,) if bos is not None and self.tokenizer("a")["input_ids"][:1] == [bos] else ()

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _content(self, record: Record, text: str) -> str:
        parts = [record.instruction, text]
        if 1 < len(record.labels) <= self.list_labels and "\nOptions: " not in f"\n{text}":
            parts.append("Options: " + ", ".join(record.labels))
        return "\n".join(p for p in parts if p)

    @cached_property
    def _template(self) -> Template:
        return Template(self.tokenizer)

    def _frame(self, record: Record, text: str) -> Frame:
        """Around an answer to `record`, its input replaced by `text`. Raises DataError, see `Template.frame`."""
        if self.kind != "causal":
            talk = "\n".join(f"{role}: {said}" for role, said in record.messages[:-1])
            return Frame(talk or self._content(record, text), "")
        if not self._template.there and not record.messages:
            return Frame(self._content(record, text) + PLAIN_ANCHOR, PLAIN_ANCHOR, " ")
        self._needs_template(record)
        turns = record.messages[:-1] if record.messages else (("user", self._content(record, text)),)
        with _naming(record):
            return self._template.frame(turns, record.output)

    def _needs_template(self, record: Record) -> None:
        if not self._template.there:
            raise DataError(
                f"{_named(record)} is a chat, but the tokenizer of {self.tokenizer.name_or_path} has no chat template; "
                f"set model.chat_template, use instruction rows, or a base with a template"
            )

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.kind == "causal":
            bos = () if self._template.there else self._bos
            return [*bos, *self._ids(prompt)]
        return self.tokenizer(prompt)["input_ids"]

    def answer_ids(self, record: Record, answer: str) -> tuple[int, ...]:
        """The tokens of `answer` behind this record's prompt, with the token(s) that end a turn or a text."""
        return self._behind_frame(self._around(record), record, answer)

    def label_ids(self, record: Record) -> tuple[tuple[int, ...], ...]:
        """`answer_ids` of each of a row's labels; one object for all rows that have the same."""
        frame = self._around(record)
        found = tuple(self._behind_frame(frame, record, label) for label in record.labels)
        return self._tries.setdefault(found, found)

    def _around(self, record: Record) -> Frame:
        """As `_frame`, and the same for all instruction rows but those whose answer opens a block itself."""
        return self._frame(record, "" if record.messages else "x")

    def _behind_frame(self, frame: Frame, record: Record, answer: str) -> tuple[int, ...]:
        key = (frame.anchor, frame.before, frame.tail, answer)
        if key not in self._answers:
            self._check_ends(record, answer)
            with _naming(record):
                self._answers[key] = tuple(self._encode_answer(frame, answer))
        return self._answers[key]

    def ends(self, record: Record) -> list[int]:
        """The tokens that end an answer behind this record's prompt: the end of a text, and of a turn if that has a marker."""
        own = self._template.mark_of(self._around(record).tail)
        return sorted({end for end in (own, self.tokenizer.eos_token_id) if end is not None})

    def said(self, record: Record, tokens: Sequence[int]) -> str:
        """The answer's text in generated `tokens`: up to the first end, without marks of the template."""
        ends = set(self.ends(record))
        kept = list(takewhile(lambda token: token not in ends, tokens))
        text = str(self.tokenizer.decode(kept, skip_special_tokens=True)).strip()
        tail = self._around(record).tail
        mark = self._template.mark_of(tail)
        if mark is not None:  # it ended the answer, and is not in the text
            tail = tail.removesuffix(str(self.tokenizer.convert_ids_to_tokens(mark)))
        tail = tail.strip()
        return text.removesuffix(tail).rstrip() if tail else text

    def _check_ends(self, record: Record, answer: str) -> None:
        """Raise DataError for an answer that holds what ends one: nothing behind it would ever be said."""
        mark = next((m for m in self.tokenizer.convert_ids_to_tokens(self.ends(record)) if m in answer), None)
        if mark is not None:
            raise DataError(
                f"{_named(record)}: its answer holds {mark!r}, the token that ends an answer with this base; leave it out, as "
                f"FedKeel adds it behind every answer"
            )

    def _encode_answer(self, frame: Frame, answer: str) -> list[int]:
        if self.kind == "seq2seq":
            ids, end = self.tokenizer(text_target=answer)["input_ids"], self.tokenizer.eos_token_id
            return ids if ids[-1:] == [end] else self._template.ended(ids, "")
        return self._template.ended(self._behind(frame.anchor, frame.before + answer + frame.tail), frame.tail)

    def _behind(self, anchor: str, text: str) -> list[int]:
        """The tokens of `text` as they come behind `anchor`; on their own if a token would straddle the border."""
        head, joint = self._ids(anchor), self._ids(anchor + text)
        return joint[len(head) :] if joint[: len(head)] == head and len(joint) > len(head) else self._ids(text)

    def prompt_ids(self, record: Record, room: int) -> tuple[int, ...]:
        """The tokens of the prompt, shortened and counted until `room` tokens are left for the answer: the earliest turns of a
        chat go first, a system turn and the last question stay; then input, instruction or last question, whichever is longer,
        is cut at its end. Raises DataError if not even an empty row fits.
        """
        budget = self.max_length - (room if self.kind == "causal" else 0)
        ids = self._prompt_ids(self._frame(record, record.input).prompt)
        self.counts["truncated"] += len(ids) > budget
        while len(ids) > budget:
            shorter = _without_a_turn(record) or self._with_less_text(record, len(ids) - budget)
            if shorter is None:
                raise DataError(
                    f"{_named(record)}: its answer and the prompt's frame alone take {len(ids) + room} tokens, over "
                    f"data.max_length = {self.max_length}; raise data.max_length or set data.list_labels = 0"
                )
            record = shorter
            ids = self._prompt_ids(self._frame(record, record.input).prompt)
        return tuple(ids)

    def _with_less_text(self, record: Record, over: int) -> Record | None:
        """About `over` tokens of text less; None if none is left."""
        # The longer of the two gives way: an input must not vanish behind an instruction, nor the other way round.
        part = max(("input", "instruction"), key=lambda name: len(getattr(record, name)))
        text = record.messages[-2][1] if record.messages else getattr(record, part)
        if not text:
            return None
        # Cut by tokens' share of the characters; the caller's loop mends what the estimate misses.
        keep = max(0, int(len(text) * (1 - over / max(1, len(self._ids(text))))) - 1)
        shorter = text[:keep].rpartition(" ")[0] or text[: keep // 2]
        if record.messages:
            asked = (record.messages[-2][0], shorter)
            return replace(record, messages=(*record.messages[:-2], asked, record.messages[-1]))
        return replace(record, input=shorter) if part == "input" else replace(record, instruction=shorter)

    def encode(self, record: Record) -> Example:
        """A training example. Raises DataError, naming the row, if it has no position to learn from."""
        if self.kind == "classifier":
            if record.output not in self._class_index:
                raise DataError(f"row {record.id}: label {record.output!r} is not among the {len(self.classes)} known classes")
            text = record.input or record.instruction
            full = self.tokenizer(text)["input_ids"]
            ids = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
            self.counts["truncated"] += len(full) > len(ids)
            allowed = tuple(self._class_index[v] for v in record.labels)
            target = self._class_index[record.output]
            return Example(
                record.id,
                record.task,
                tuple(ids),
                target=target,
                allowed=allowed,
                label=record.output,
                labels=record.labels,
                options=tuple((index,) for index in allowed),
            )
        if record.messages and self.kind == "causal":
            example = self._encode_chat(record)
        else:
            label, options = (record.output, self.label_ids(record)) if record.labels else ("", ())
            answer = self.answer_ids(record, record.output)
            prompt = self.prompt_ids(record, len(answer))
            if self.kind == "seq2seq":
                self.counts["truncated"] += len(answer) > self.max_length
                return Example(
                    record.id,
                    record.task,
                    prompt,
                    decoder=answer[: self.max_length],
                    label=label,
                    labels=record.labels,
                    options=options,
                )
            flags = (False,) * len(prompt) + (True,) * len(answer)
            example = Example(
                record.id, record.task, (*prompt, *answer), flags, label=label, labels=record.labels, options=options
            )
        if not example.positions:
            raise DataError(f"row {record.id} (task {record.task}) has no supervised position within {self.max_length} tokens")
        return example

    def given(self, record: Record, room: int) -> Example:
        """A held-out row of free text: the prompt that leaves `room` tokens, then the row's own answer, cut to fit."""
        prompt, answer = self.prompt_ids(record, room), self.answer_ids(record, record.output)
        kept = answer[: max(1, self.max_length - len(prompt))]
        if self.kind == "seq2seq":
            return Example(record.id, record.task, prompt, decoder=kept)
        return Example(record.id, record.task, (*prompt, *kept), (False,) * len(prompt) + (True,) * len(kept))

    def _encode_chat(self, record: Record) -> Example:
        """Every assistant turn that is learnt supervised, its end marker included; cut behind the last answer that fits."""
        self._needs_template(record)
        with _naming(record):
            pieces = self._template.talk(record.messages)
        ids: list[int] = []
        flags: list[bool] = []
        done = ""
        self.counts["last only"] += len(pieces) < sum(role == "assistant" for role, _ in record.messages)
        for turn, read, answer, tail in pieces:
            if turn not in record.unlearnt:
                self._check_ends(record, answer)
            # behind all that went before, so that the pieces are the tokens of the whole chat
            before, after = self._behind(done, read), self._behind(done + read, answer + tail)
            if turn == pieces[-1][0]:
                with _naming(record):
                    after = self._template.ended(after, tail)
            if len(ids) + len(before) + len(after) > self.max_length:
                self.counts["truncated"] += bool(ids)
                break
            ids += [*before, *after]
            flags += [False] * len(before) + [turn not in record.unlearnt] * len(after)
            done += read + answer + tail
        return Example(record.id, record.task, tuple(ids), tuple(flags))

    def encode_all(self, records: Sequence[Record]) -> list[Example]:
        """Training examples; a row whose answer takes over half of max_length is left out and counted as `dropped`, and so
        is a chat of which no answer fits."""
        examples = []
        for record in records:
            if record.messages and self.kind == "causal":
                example = self._encode_chat(record)
                if not example.positions:
                    self.counts["dropped"] += 1
                    continue
            elif self.kind == "causal" and len(self.answer_ids(record, record.output)) > self.max_length // 2:
                self.counts["dropped"] += 1
                continue
            else:
                example = self.encode(record)
            examples.append(example)
        return examples
