"""From records to batches: prompts, masks, lengths, order.

Everything is a supervised position (method.md §1): the answer's tokens of a language model, the decoder's tokens of an
encoder-decoder, or the one class of a classifier row. Prompt and answer are tokenised apart, the answer behind a short
anchor (the end of every prompt), so that the border between them is exact for any tokenizer, and so that scoring sees the
very tokens that training saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedkeel.data.forms import DataError
from fedkeel.types import Record

PLAIN_ANCHOR = "\nAnswer:"


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
    shortened (`truncated`) or left out (`dropped`) because they were over `max_length` tokens.
    """

    tokenizer: Any
    kind: str
    max_length: int
    list_labels: int = 16
    classes: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    _answers: dict[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
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

    def _render(self, turns: Sequence[tuple[str, str]], generate: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
        except TemplateError as error:
            roles, first = ", ".join(role for role, _ in turns) or "nobody", turns[0][1][:60] if turns else ""
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path} refuses turns by {roles} (the first: {first!r}): {error}"
            ) from error

    def _content(self, record: Record, text: str) -> str:
        parts = [record.instruction, text]
        if 1 < len(record.labels) <= self.list_labels and "\nOptions: " not in f"\n{text}":
            parts.append("Options: " + ", ".join(record.labels))
        return "\n".join(p for p in parts if p)

    def _prompt(self, record: Record, text: str) -> tuple[str, str]:
        """(whole prompt, anchor): the anchor is what stands between the row's own text and the answer."""
        if self.kind != "causal":
            turns = "\n".join(f"{role}: {said}" for role, said in record.messages[:-1])
            return turns or self._content(record, text), ""
        if record.messages:
            prompt = self._render(record.messages[:-1], True)
            return prompt, prompt[-32:]
        content = self._content(record, text)
        if self.tokenizer.chat_template is None:
            return content + PLAIN_ANCHOR, PLAIN_ANCHOR
        prompt = self._render([("user", content)], True)
        after = prompt.rpartition(content)[2] if content else ""  # nothing may be left of a text that was shortened
        return prompt, after or prompt[-32:]

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.kind == "causal":
            bos = self._bos if self.tokenizer.chat_template is None else ()
            return [*bos, *self._ids(prompt)]
        return self.tokenizer(prompt)["input_ids"]

    def answer_ids(self, record: Record, answer: str) -> tuple[int, ...]:
        """The tokens of `answer` behind this record's prompt, with the token(s) that end a turn or a text."""
        return self._behind_anchor(self._anchor(record), answer)

    def _anchor(self, record: Record) -> str:
        return self._prompt(record, "" if record.messages else "x")[1]

    def _behind_anchor(self, anchor: str, answer: str) -> tuple[int, ...]:
        key = (anchor, answer)
        if key not in self._answers:
            self._answers[key] = tuple(self._encode_answer(anchor, answer))
        return self._answers[key]

    def ends(self, record: Record) -> list[int]:
        """The tokens that end an answer behind this record's prompt: the end of a text, and of a turn if that has a marker."""
        lasts = {self.answer_ids(record, probe)[-1] for probe in ("x", "y")}  # the same whatever the answer
        own = lasts if len(lasts) == 1 else set()
        return sorted(own | {end for end in [self.tokenizer.eos_token_id] if end is not None})

    def _encode_answer(self, anchor: str, answer: str) -> list[int]:
        if self.kind == "seq2seq":
            ids = self.tokenizer(text_target=answer)["input_ids"]
            end = self.tokenizer.eos_token_id
            return ids if end is None or ids[-1:] == [end] else [*ids, end]
        if self.tokenizer.chat_template is None:
            end = self.tokenizer.eos_token_id
            return [*self._behind(anchor, " " + answer), *([] if end is None else [end])]
        probe = [("user", "x")]
        before, after = self._render(probe, True), self._render([*probe, ("assistant", answer)], False)
        return self._behind(anchor, self._added(before, after).rstrip())

    def _added(self, before: str, after: str) -> str:
        if not after.startswith(before):
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path} rewrites earlier turns when an answer is added, so the "
                f"answer cannot be told from the prompt; set another template or use instruction rows"
            )
        return after[len(before) :]

    def _behind(self, anchor: str, text: str) -> list[int]:
        """The tokens of `text` as they come behind `anchor`; on their own if a token would straddle the border."""
        head, joint = self._ids(anchor), self._ids(anchor + text)
        return joint[len(head) :] if joint[: len(head)] == head and len(joint) > len(head) else self._ids(text)

    def prompt_ids(self, record: Record, room: int) -> tuple[int, ...]:
        """The tokens of the prompt; input or instruction, whichever is longer, is cut at its end until `room` tokens are
        left for the answer. A chat is cut at its beginning instead. Raises DataError if not even an empty row fits.
        """
        budget = self.max_length - (room if self.kind == "causal" else 0)
        if record.messages:
            if budget < 1:
                raise DataError(
                    f"row {record.id} (task {record.task}): data.max_length = {self.max_length} leaves no room for a prompt "
                    f"before {room} tokens of an answer; raise data.max_length"
                )
            return tuple(self._prompt_ids(self._prompt(record, "")[0])[-budget:])
        ids = self._prompt_ids(self._prompt(record, record.input)[0])
        self.counts["truncated"] += len(ids) > budget
        while len(ids) > budget:
            # The longer of the two gives way: an input must not vanish behind an instruction, nor the other way round.
            part = max(("input", "instruction"), key=lambda name: len(getattr(record, name)))
            text = getattr(record, part)
            if not text:
                raise DataError(
                    f"row {record.id} (task {record.task}): its answer and the prompt's frame alone take {len(ids) + room} "
                    f"tokens, over data.max_length = {self.max_length}; raise data.max_length or set data.list_labels = 0"
                )
            # Cut by tokens' share of the characters; the loop mends what the estimate misses.
            keep = max(0, int(len(text) * (1 - (len(ids) - budget) / max(1, len(self._ids(text))))) - 1)
            shorter = text[:keep].rpartition(" ")[0] or text[: keep // 2]
            record = replace(record, **{part: shorter})
            ids = self._prompt_ids(self._prompt(record, record.input)[0])
        return tuple(ids)

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
            anchor = self._anchor(record)
            label, options = (record.output, self._options(anchor, record.labels)) if record.labels else ("", ())
            answer = self._behind_anchor(anchor, record.output)
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

    def _options(self, anchor: str, labels: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each label behind a prompt that ends in `anchor`; one object for all rows that have the same."""
        found = tuple(self._behind_anchor(anchor, label) for label in labels)
        return self._tries.setdefault(found, found)

    def given(self, record: Record, room: int) -> Example:
        """A held-out row of free text: the prompt that leaves `room` tokens, then the row's own answer, cut to fit."""
        prompt, answer = self.prompt_ids(record, room), self.answer_ids(record, record.output)
        kept = answer[: max(1, self.max_length - len(prompt))]
        if self.kind == "seq2seq":
            return Example(record.id, record.task, prompt, decoder=kept)
        return Example(record.id, record.task, (*prompt, *kept), (False,) * len(prompt) + (True,) * len(kept))

    def _encode_chat(self, record: Record) -> Example:
        """Every assistant turn supervised, its end marker included; cut behind the last answer that fits."""
        if self.tokenizer.chat_template is None:
            raise DataError(
                f"row {record.id} is a chat, but the tokenizer of {self.tokenizer.name_or_path} has no chat template; "
                f"use instruction rows or a base with a template"
            )
        ids: list[int] = []
        flags: list[bool] = []
        done = ""
        for turn, (role, _) in enumerate(record.messages):
            if role != "assistant":
                continue
            prompt = self._render(record.messages[:turn], True)
            answer = self._added(prompt, self._render(record.messages[: turn + 1], False)).rstrip()
            # behind all that went before, so that the pieces are the tokens of the whole chat
            before, after = self._behind(done, self._added(done, prompt)), self._behind(prompt, answer)
            if len(ids) + len(before) + len(after) > self.max_length:
                self.counts["truncated"] += bool(ids)
                break
            ids += [*before, *after]
            flags += [False] * len(before) + [True] * len(after)
            done = prompt + answer
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
