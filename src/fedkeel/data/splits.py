"""Which rows are trained on and which held out: by the names that data sets use, else by what a row asks, and never both."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from fedkeel.recipe.schema import Data
from fedkeel.rng import derive
from fedkeel.types import Record

NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst", "heldout"),
}
_SPLIT_OF = {name: split for split, names in NAMES.items() for name in names}
_UNSEEN = dict.fromkeys((0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF))  # characters that a reader does not see
HELD_OUT = ("test", "validation")  # where a row is in several, it is in the first of these


def split_of(name: str) -> str | None:
    """What a data set's name for a split means: `train`, `validation` or `test`, as in `val`, `test_sft` or `Train`; None where
    it says neither."""
    word = re.split(r"[^a-z]+", name.strip().lower().replace("held-out", "heldout").replace("held_out", "heldout"))[0]
    return _SPLIT_OF.get(word)


def asked(record: Record) -> str:
    """What a row asks, spelling and white space aside: the same for rows whose answer one could look up in the other.

    That is its task and instruction with its text; of a row without a text of its own, and of a chat, whose question may be
    that of many, the turns before its answer and the answer.
    """
    turns = [f"{role}: {text}" for role, text in record.messages[:-1]]
    parts = [record.task, record.instruction, record.input, *turns] + ([] if record.input else [record.output])
    folded = (unicodedata.normalize("NFKC", part.translate(_UNSEEN)).casefold() for part in parts)
    return "\n".join(" ".join(part.split()) for part in folded)


def _learnt(record: Record) -> list[str]:
    """What each answer asks that a training row teaches: a talk's earlier ones may be a row of their own elsewhere."""
    earlier = [
        replace(record, messages=record.messages[: n + 1], output=said)
        for n, (role, said) in enumerate(record.messages[:-1])
        if role == "assistant" and n not in record.unlearnt
    ]
    return [asked(row) for row in (record, *earlier)]


def with_splits(records: Iterable[Record], config: Data, seed: int) -> Iterator[Record]:
    """Rows without a split get one from a hash of what they ask, wherever they lie and however often they stand there."""
    for record in records:
        if record.split:
            yield record
            continue
        share = derive(seed, "split", asked(record)) / 2**63
        if share < config.test_share:
            yield replace(record, split="test")
        elif share < config.test_share + config.validation_share:
            yield replace(record, split="validation")
        else:
            yield replace(record, split="train")


def held_apart(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Without the rows that ask what a held-out row asks, at whatever site, and notes that count them. Of a training row every
    answer that it teaches counts."""
    found: dict[str, set[str]] = {}
    for record in records:
        if record.split in HELD_OUT:
            found.setdefault(asked(record), set()).add(record.split)
    kept, left_out = [], Counter[tuple[str, str]]()
    for record in records:
        asks = _learnt(record) if record.split == "train" else [asked(record)]
        held = {split for one in asks for split in found.get(one, ())}
        first = next((split for split in HELD_OUT if split in held), record.split)
        if first == record.split:
            kept.append(record)
        else:
            left_out[record.split, first] += 1
    return kept, [
        f"{count} {split} row{'s' * (count > 1)} left out: a {first} row, of whatever site, asks the same"
        for (split, first), count in sorted(left_out.items())
    ]
