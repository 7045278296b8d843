"""What a tokenizer's chat template writes around the answers of a talk; without a template, FedKeel's plain layout.

An answer is what a row says. What a template adds before it, such as an empty block of thought, belongs to the prompt, in
training and in scoring alike; what ends it is supervised with it, and where nothing does, the tokenizer's end token is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from fedkeel.types import FedKeelError

Turns = Sequence[tuple[str, str]]  # (role, text)

PLAIN_ANCHOR = "\nAnswer:"
_ANCHOR = 32  # characters
BLOCK, BLOCK_END = "<think>", "</think>"  # what templates that open a block before the answer name it
_MARK = "\ue000{}\ue001"  # stands for an answer while a template is asked what it writes around one; of no script


@dataclass(frozen=True)
class Frame:
    """What stands around an answer: `prompt` before it, of which `anchor` is the end that does not depend on the row's own
    text; `before` is the white space that belongs to its first token; `tail` ends it."""

    prompt: str
    anchor: str
    before: str = ""
    tail: str = ""


# What a template that writes today's date is told: a row has one prompt, at every site and on every day. It is the day that
# templates of Llama 3 write where nobody tells them one.
TODAY = datetime(2024, 7, 26)
_DAYS = {code: TODAY.strftime(f"%{code}") for code in "aAbBcdDeFHIjmMpSTuUVwWxXyYZ"}
_DAYS |= {f"-{code}": _DAYS[code].lstrip("0") or "0" for code in "dHIjmMSy"}
_CODES = "".join(f"|replace('%{code}', '{told}')" for code, told in _DAYS.items())
# in place of the function of that name, whatever a template gives it; the last braces keep a newline that follows
_DATED = f"{{%- macro strftime_now(format) -%}}{{{{ format{_CODES} }}}}{{%- endmacro %}}{{{{ '' }}}}"


class FrameError(FedKeelError):
    """What a template cannot be followed in; the text does not name the row."""


class Template:
    """Of one tokenizer. What it raises is FrameError."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # the frame of a task's instruction rows is asked for with every row and label
        self._around = lru_cache(1024)(self._asked)

    @property
    def there(self) -> bool:
        """Whether the tokenizer has one."""
        return self._tokenizer.chat_template is not None

    @cached_property
    def _marks(self) -> dict[str, int]:
        """Tokens that no text is split into: what templates end turns with."""
        added = {str(token): number for number, token in self._tokenizer.added_tokens_decoder.items()}
        return added | dict(zip(self._tokenizer.all_special_tokens, self._tokenizer.all_special_ids, strict=True))

    def mark_of(self, tail: str) -> int | None:
        """The token that ends an answer in `tail`; None where `tail` has none."""
        return next((number for mark, number in self._marks.items() if tail.endswith(mark)), None)

    def ended(self, ids: Sequence[int], tail: str) -> list[int]:
        """An answer's tokens, `tail` included, with an end that a model can learn; there must be one."""
        if self.mark_of(tail) is not None:
            return list(ids)
        if self._tokenizer.eos_token_id is None:
            raise FrameError(
                f"nothing ends an answer: the tokenizer of {self._tokenizer.name_or_path} has no end token, and no chat "
                f"template that closes a turn with a token of its own; set model.chat_template, or another base"
            )
        return [*ids, self._tokenizer.eos_token_id]

    def _tail(self, text: str) -> str:
        """What follows an answer, up to the first mark in it."""
        places = [(text.find(mark), mark) for mark in self._marks if mark in text]
        if not places:
            return text.rstrip()
        at, mark = min(places, key=lambda p: (p[0], -len(p[1])))
        return text[: at + len(mark)]

    @cached_property
    def _dated(self) -> str:
        """The template with one day in place of today; empty where it writes no date."""
        text = str(self._tokenizer.chat_template)
        return f"{_DATED}{text}" if "strftime_now" in text else ""

    def _render(self, turns: Turns, ask: bool) -> str:
        from jinja2 import TemplateError

        messages = [{"role": role, "content": text} for role, text in turns]
        try:
            asked = {"chat_template": self._dated} if self._dated else {}
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **asked))
        except (TemplateError, TypeError, LookupError) as error:
            roles, first = ", ".join(role for role, _ in turns) or "nobody", turns[0][1][:60] if turns else ""
            raise FrameError(
                f"the chat template of {self._tokenizer.name_or_path} refuses turns by {roles} (the first: {first!r}): {error}"
            ) from error

    def _asked(self, turns: tuple[tuple[str, str], ...]) -> tuple[str, str, str]:
        """(prompt, lead, rest): what the template asks `turns` with, puts before an answer beyond that, and behind it."""
        if not turns:
            raise FrameError("nothing is asked before its answer")
        mark = _MARK.format(0)
        head, found, rest = self._render([*turns, ("assistant", mark)], False).rpartition(mark)
        asked = self._render(turns, True)
        if not found or not (head.startswith(asked) or asked.startswith(head)):
            what = "rewrites earlier turns when an answer is added" if found else "does not show an answer as it is"
            raise FrameError(
                f"the chat template of {self._tokenizer.name_or_path} {what}, so the answer cannot be told from the prompt; "
                f"set model.chat_template, or use instruction rows"
            )
        prompt = asked if head.startswith(asked) else head  # a block that only the question opens stays out
        opened = prompt.rfind(BLOCK)
        if opened >= 0 and head[opened:].rstrip().endswith(BLOCK_END):  # the question opens what the answer closes empty
            prompt = prompt[:opened]
        return prompt, head[len(prompt) :], rest

    def frame(self, turns: Turns, answer: str) -> Frame:
        """Around an answer to `turns`, which the template must not refuse or rewrite. answer: if it opens the block that the
        template would put before it, that is the row's own."""
        prompt, lead, rest = self._around(tuple(turns))
        lead, before = _parted(lead, answer)
        prompt, said = prompt + lead, turns[-1][1]
        anchor = prompt.rpartition(said)[2] if said else ""  # nothing may be left of a text that was shortened
        return Frame(prompt, anchor or prompt[-_ANCHOR:], before, self._tail(rest))

    def talk(self, messages: Turns) -> list[tuple[int, str, str, str]]:
        """(turn, read, answer, tail) in order: pieces of a whole talk as the template writes it, of which all answers are
        learnt; the texts read before the last are the prompt of `frame`.

        A template that writes an earlier answer otherwise than it stands in the row (thoughts left out, space trimmed) leaves
        the last answer alone to be learnt, behind the prompt that scoring has.
        """
        answers = [n for n, (role, _) in enumerate(messages) if role == "assistant"]
        last = answers[-1]
        prompt, lead, rest = self._around(tuple(messages[:last]))
        tail, (added, before) = self._tail(rest), _parted(lead, messages[last][1])
        alone = [(last, prompt + added, before + messages[last][1], tail)]
        marks = {n: _MARK.format(n) for n in answers}
        text = self._render([(role, marks.get(n, said)) for n, (role, said) in enumerate(messages)], False)
        pieces, done = [], ""
        for n in answers:
            read, found, text = text.partition(marks[n])
            if not found or (n == last and done + read != prompt + lead):
                return alone
            added, before = _parted(lead, messages[n][1])
            if read.endswith(lead):  # an earlier answer may be written without
                read = read.removesuffix(lead) + added
            else:
                before = ""
            ended = tail if text.startswith(tail) else ""
            text = text.removeprefix(ended)
            pieces.append((n, read, before + messages[n][1], ended))
            done += read + before + messages[n][1] + ended
        return pieces


def _parted(lead: str, answer: str) -> tuple[str, str]:
    """(what of `lead` belongs to the prompt, what to the answer's first token): a block to the one, white space to the other. A
    block that the answer opens itself is dropped."""
    if not lead.strip():
        return "", lead
    if answer.lstrip().startswith(lead.split()[0]):
        return "", ""
    text = lead.rstrip(" ")
    return text, lead[len(text) :]
