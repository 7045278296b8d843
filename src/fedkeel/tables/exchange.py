"""What travels: codecs, and the steps of the channel before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedkeel.tables.entry import Entry, Table


@dataclass(frozen=True)
class Codec(Entry):
    """A codec of tensors, see `codecs.chain.Codec`: code is called with `given`, or with the number behind `=` in a spec.

    argument: (low, high), both left out, of that number; None where there is none. outer: another may follow it behind a `+`,
    for the values that it keeps. sketch: how an argument is written in help. bits: of the whole numbers behind masks that take
    its place, see `exchange.summands`; 0: none do.
    """

    given: tuple[Any, ...] = ()
    argument: tuple[float, float] | None = None
    outer: bool = False
    sketch: str = ""
    bits: int = 0


_CODECS = "fedkeel.exchange.codecs"
CODECS = Table(
    "codec",
    {
        "fp32": Codec(f"{_CODECS}.cast:Cast", given=("float32",)),
        "bf16": Codec(f"{_CODECS}.cast:Cast", given=("bfloat16",)),
        "fp16": Codec(f"{_CODECS}.cast:Cast", given=("float16",)),
        "int8": Codec(f"{_CODECS}.quantize:Quantize", given=(8,), bits=8),
        "int4": Codec(f"{_CODECS}.quantize:Quantize", given=(4,), bits=4),
        "topk": Codec(f"{_CODECS}.sparse:Sparse", argument=(0.0, 1.0), outer=True, sketch="SHARE"),
    },
)


def codec_parts(spec: str) -> list[tuple[Codec, tuple[Any, ...]]]:
    """The codecs that a spec such as `int4` or `topk=0.1+int4` names, each with what its code is called with.

    Raises ValueError with what is wrong and what would be right.
    """
    parts = [_codec_part(part) for part in spec.split("+")]
    if len(parts) > 2 or (len(parts) == 2 and not (parts[0][0].outer and not parts[1][0].outer)):
        raise ValueError(f"{spec!r}: {codec_grammar()}")
    return parts


def _codec_part(part: str) -> tuple[Codec, tuple[Any, ...]]:
    name, equals, text = part.partition("=")
    entry = CODECS.get(name)
    if entry is None or bool(equals) != (entry.argument is not None):
        raise ValueError(f"{part!r}: {codec_grammar()}")
    if entry.argument is None:
        return entry, entry.given
    low, high = entry.argument
    try:
        value = float(text)
    except ValueError:
        value = low
    if not low < value < high:
        raise ValueError(f"{part!r}: {codec_grammar()}")
    return entry, (value,)


def codec_grammar() -> str:
    """What a codec's spec may be, in words."""
    plain = [name for name, entry in CODECS.items() if entry.argument is None]
    told = ", ".join(plain)
    for name, entry in CODECS.items():
        if entry.argument is not None:
            low, high = entry.argument
            told += f", or {name}={entry.sketch} with {low:g} < {entry.sketch} < {high:g}"
            told += f", or {name}={entry.sketch}+ one of the others" if entry.outer else ""
    return f"one of {told} belongs here"


@dataclass(frozen=True)
class Step(Entry):
    """A step of the channel that an update goes through before its codec: (recipe) -> `exchange.channel.Step`, or None where
    the recipe does not ask for it."""


STEPS = Table(
    "step of the channel",
    {
        "clip": Step("fedkeel.exchange.clip:clip"),
        "noise": Step("fedkeel.exchange.noise:noise"),
        "residual": Step("fedkeel.exchange.channel:feedback"),
    },
)
