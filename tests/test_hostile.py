"""Hostile bytes against the decoder: what a receiver makes of them is finite and of the right shape, or an EnvelopeError.

The sender is taken to know the format, to have a valid message before him and to make every checksum right. FEDKEEL_FUZZ is
the number of examples for each property; the default is for every day, `FEDKEEL_FUZZ=25000` makes over 100,000 cases.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from builders import crafted, numbers, safetensors_body
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from fedkeel.exchange.codecs import CodecError, EnvelopeError, make_codec, open_envelope, seal
from fedkeel.exchange.codecs.envelope import DTYPES, MAX_DIMENSIONS, MAX_NAME

EXAMPLES = int(os.environ.get("FEDKEEL_FUZZ", "400"))

SPECS = ("fp32", "bf16", "fp16", "int8", "int4", "topk=0.1", "topk=0.02+bf16", "topk=0.1+int8", "topk=0.02+int4")
# both factors, an odd count for the half byte, an uneven mask, and with a share of 0.02 places as numbers
SHAPES: dict[str, tuple[int, ...]] = {"m.a": (2, 9), "m.b": (5, 3), "head": (7,), "long": (1, 70), "dot": ()}
HEADER = {"kind": "update", "round": 3}


def message(spec: str) -> bytes:
    tensors = {name: numbers(i, math.prod(shape)).view(shape) for i, (name, shape) in enumerate(SHAPES.items())}
    return seal(HEADER, make_codec(spec).encode(tensors, 1))


MESSAGES = {spec: message(spec) for spec in SPECS}


def taken_apart(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON of a message and the bytes of its tensors."""
    size = int.from_bytes(payload[36:44], "little")
    return json.loads(payload[44 : 44 + size]), payload[44 + size :]


def right(tensors: dict[str, Tensor]) -> bool:
    return {name: tuple(t.shape) for name, t in tensors.items()} == SHAPES and all(
        t.dtype == torch.float32 and bool(torch.isfinite(t).all()) for t in tensors.values()
    )


def outcome(payload: bytes, spec: str) -> str:
    """`refused` or `taken`, by a receiver who expects a message of `spec`; anything else than both fails the test.

    The codec faces what came also without the envelope's comparison with the wire, so that it is not shielded by it.
    """
    codec = make_codec(spec)
    wire = codec.wire(SHAPES)
    try:
        _, sent = open_envelope(payload)
    except EnvelopeError:
        with pytest.raises(EnvelopeError):
            open_envelope(payload, expected=wire)
        return "refused"
    assert sum(t.numel() * t.element_size() for t in sent.values()) <= len(payload)
    assert all(bool(torch.isfinite(t.float()).all()) for t in sent.values())
    try:
        decoded = codec.decode(sent, SHAPES)
    except CodecError:
        decoded = {}
    assert not decoded or right(decoded)
    try:
        _, expected = open_envelope(payload, expected=wire)
    except EnvelopeError:
        assert not decoded, "the codec takes what the envelope knows to be no message of its own"
        return "refused"
    if not decoded:
        with pytest.raises(CodecError):
            codec.decode(expected, SHAPES)
        return "refused"
    return "taken"


def fuzz(cases: SearchStrategy[Any], check: Callable[[Any], str]) -> Counter[str]:
    """How often `check` of a case gave what, over EXAMPLES cases (the same ones in every run)."""
    seen: Counter[str] = Counter()

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def every(case: Any) -> None:
        seen[check(case)] += 1

    every()
    return seen


NASTY_NUMBERS = [
    0,
    -1,
    1,
    2,
    True,
    False,
    1.0,
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    2**31,
    2**32,
    2**50,
    2**63,
    2**64,
    10**400,
]
NASTY_NAMES = [
    "",
    "/m.a",
    "../m.a",
    "m/../../x",
    "m\\a",
    "m\0a",
    "m\na",
    "\u202em",
    "\ud800",
    "m.a",
    "m.A",
    "m.a#scale",
    "m.a#mask",
    "m.a#index",
    "m.a#",
    "#",
    "__metadata__",
    "x" * MAX_NAME,
    "x" * (MAX_NAME + 1),
    "é",
    "con",
    "m.a ",
    "CON:",
]
names = st.sampled_from(NASTY_NAMES) | st.text(max_size=12)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | names | st.sampled_from(NASTY_NUMBERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
specs = st.sampled_from(SPECS)


# ------------------------------------------------------------------------------------------------------------- any bytes


def test_the_valid_messages_are_taken() -> None:
    for spec, payload in MESSAGES.items():
        assert outcome(payload, spec) == "taken"
    # and between them they hold all that a codec sends beside a tensor
    beside = {name.partition("#")[2] for payload in MESSAGES.values() for name in open_envelope(payload)[1]}
    assert beside == {"", "scale", "mask", "index"}


def test_a_message_of_another_codec_is_refused() -> None:
    for spec, payload in MESSAGES.items():
        assert [other for other in SPECS if outcome(payload, other) == "taken"] == [spec]


def test_random_bytes_are_refused() -> None:
    """As they are, after the magic, under a right checksum, and in the places of JSON, of the header and of tensors."""

    def payload_of(form: int, noise: bytes) -> bytes:
        forms = [noise, b"FKL1" + noise, crafted(noise), crafted(safetensors_body(noise)), crafted(safetensors_body({}, noise))]
        return forms[form]

    cases = st.tuples(st.integers(0, 4), st.binary(max_size=300), specs)
    assert set(fuzz(cases, lambda case: outcome(payload_of(case[0], case[1]), case[2]))) == {"refused"}


def test_any_json_is_refused() -> None:
    """In the place of the message's JSON, of its header, and of one tensor's description."""

    def payload_of(place: int, value: Any) -> bytes:
        whole = (
            {"__metadata__": {"fedkeel": json.dumps(value)}} if place == 1 else {"__metadata__": {"fedkeel": "{}"}, "x": value}
        )
        return crafted(safetensors_body(value if place == 0 else whole))

    cases = st.tuples(st.integers(0, 2), junk, specs)
    assert set(fuzz(cases, lambda case: outcome(payload_of(case[0], case[1]), case[2]))) == {"refused"}


# Edits of bytes: (what, where as a share of the length, with what). They may fall on the length, the JSON or the tensors.
edits = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "overwrite", "truncate", "append"]),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=9)
    | st.sampled_from([b"\0" * 8, b"\xff" * 8, b"\xff\xff\xff\x7f", b'"', b"{", b"}", b"[", b"9"]),
)


def edited(body: bytes, edit: tuple[str, float, bytes]) -> bytes:
    what, share, piece = edit
    at = int(share * len(body))
    before, after = body[:at], body[at:]
    if what == "flip":
        return before + bytes([after[0] ^ 1 << piece[0] % 8]) + after[1:] if after else body
    return {
        "cut": before + after[len(piece) :],
        "insert": before + piece + after,
        "overwrite": before + piece + after[len(piece) :],
        "truncate": before,
        "append": body + piece,
    }[what]


def test_a_message_with_its_bytes_edited_is_taken_or_refused() -> None:
    def check(case: tuple[str, list[tuple[str, float, bytes]]]) -> str:
        spec, todo = case
        body = MESSAGES[spec][36:]
        for edit in todo:
            body = edited(body, edit)
        # without a repaired checksum nothing but the message itself gets any further
        assert outcome(MESSAGES[spec][:36] + body, spec) == ("taken" if body == MESSAGES[spec][36:] else "refused")
        return outcome(crafted(body), spec)

    seen = fuzz(st.tuples(specs, st.lists(edits, min_size=1, max_size=3)), check)
    assert set(seen) == {"taken", "refused"}


# -------------------------------------------------------------------------------------------------------- the description


# One change of the JSON that describes the tensors; it stays an object, so that the change is what the parser meets.
numbers_or_junk = st.sampled_from(NASTY_NUMBERS) | st.integers(-10, 100) | junk
changes = st.one_of(
    st.tuples(
        st.just("type"), st.integers(0, 30), st.sampled_from([*DTYPES, "F64", "I64", "BOOL", "F8_E4M3", "f32", ""]) | junk
    ),
    st.tuples(st.just("size"), st.integers(0, 30), st.tuples(st.integers(0, 3), numbers_or_junk)),
    st.tuples(st.just("shape"), st.integers(0, 30), st.lists(numbers_or_junk, max_size=MAX_DIMENSIONS + 2) | junk),
    st.tuples(st.just("reshape"), st.integers(0, 30), st.permutations([0, 1, 2])),
    st.tuples(st.just("place"), st.integers(0, 30), st.tuples(st.integers(0, 1), numbers_or_junk)),
    st.tuples(st.just("places"), st.integers(0, 30), st.lists(numbers_or_junk, max_size=3) | junk),
    st.tuples(st.just("swap"), st.integers(0, 30), st.integers(0, 30)),
    st.tuples(st.just("rename"), st.integers(0, 30), names),
    st.tuples(st.just("drop"), st.integers(0, 30), st.none()),
    st.tuples(st.just("twice"), st.integers(0, 30), st.booleans()),
    st.tuples(st.just("field"), st.integers(0, 30), st.tuples(names, junk)),
    st.tuples(st.just("replace"), st.integers(0, 30), junk),
    st.tuples(st.just("add"), names, st.tuples(st.sampled_from([*DTYPES]), st.lists(numbers_or_junk, max_size=3))),
    st.tuples(st.just("metadata"), st.none(), junk),
)


def changed(pairs: list[tuple[str, Any]], change: tuple[str, Any, Any]) -> list[tuple[str, Any]]:
    """Names and descriptions, in order and perhaps twice, after one change; earlier ones may have left anything there."""
    what, which, value = change
    pairs = list(pairs)
    if what == "metadata":
        return [("__metadata__", value), *pairs[1:]]
    if what == "add":
        return [*pairs, (which, {"dtype": value[0], "shape": value[1], "data_offsets": [0, 4]})]
    if len(pairs) < 2:
        return pairs
    at = 1 + which % (len(pairs) - 1)
    name, entry = pairs[at]
    if what == "rename":
        return [*pairs[:at], (value, entry), *pairs[at + 1 :]]
    if what == "drop":
        return [*pairs[:at], *pairs[at + 1 :]]
    if what == "twice":
        return [*pairs, pairs[at]] if value else [*pairs[:at], pairs[at], *pairs[at:]]
    if what == "swap":
        other = 1 + value % (len(pairs) - 1)
        pairs[at], pairs[other] = (name, pairs[other][1]), (pairs[other][0], entry)
        return pairs
    if what == "replace" or not isinstance(entry, dict):
        return [*pairs[:at], (name, value), *pairs[at + 1 :]]
    entry = dict(entry)
    if what == "field":
        entry[value[0]] = value[1]
    elif what == "type":
        entry["dtype"] = value
    elif what == "shape":
        entry["shape"] = value
    elif what == "places":
        entry["data_offsets"] = value
    else:
        key = "data_offsets" if what == "place" else "shape"
        numbers_there = list(entry[key]) if isinstance(entry.get(key), list) else []
        if what == "reshape":  # the same count of numbers in another order of dimensions
            numbers_there = [numbers_there[i] if i < len(numbers_there) else 1 for i in value]
        elif numbers_there:
            numbers_there[value[0] % len(numbers_there)] = value[1]
        entry[key] = numbers_there
    return [*pairs[:at], (name, entry), *pairs[at + 1 :]]


def written(pairs: list[tuple[str, Any]]) -> bytes:
    """JSON that may hold a key twice."""
    return ("{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs) + "}").encode()


def test_a_message_with_its_description_changed_is_taken_or_refused() -> None:
    def check(case: tuple[str, list[tuple[str, Any, Any]]]) -> str:
        spec, todo = case
        described, data = taken_apart(MESSAGES[spec])
        # where the tensors lie, in the order of the file: that is what most changes are about
        pairs = sorted(described.items(), key=lambda item: item[1].get("data_offsets", [-1]))
        for change in todo:
            pairs = changed(pairs, change)
        return outcome(crafted(safetensors_body(written(pairs), data)), spec)

    seen = fuzz(st.tuples(specs, st.lists(changes, min_size=1, max_size=3)), check)
    # not vacuous: a change may put there what was there before, or exchange tensors of one type and shape
    assert set(seen) == {"taken", "refused"}


# -------------------------------------------------------------------------------------------------------------- the values


NASTY_VALUES = [
    *(struct.pack("<f", v) for v in (math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, -1.0, -0.0, 1e-45, 3e36)),
    *(struct.pack("<i", v) for v in (-1, 2**31 - 1, -(2**31), 69, 70, 71, 0)),
    b"\x80\x7f",
    b"\xc0\x7f",
    b"\x00\x7c",
    b"\x00\x7e",
    b"\x80\xff",
    b"\x80",
    b"\x08",
    b"\x88",
    b"\x01",
    b"\xff",
    b"\x00",
]


def test_a_message_with_its_values_overwritten_is_taken_or_refused() -> None:
    """Values of every tensor by its own name, at multiples of its own width: codes, scales, places, masks and halves."""

    def check(case: tuple[str, list[tuple[int, int, bytes]]]) -> str:
        spec, todo = case
        described, data = taken_apart(MESSAGES[spec])
        tensors = sorted(name for name in described if name != "__metadata__")
        for which, at, piece in todo:
            begin, end = described[tensors[which % len(tensors)]]["data_offsets"]
            width = DTYPES[described[tensors[which % len(tensors)]]["dtype"]].itemsize
            place = begin + at * width % (end - begin)
            piece = piece[: end - place]
            data = data[:place] + piece + data[place + len(piece) :]
        return outcome(crafted(safetensors_body(described, data)), spec)

    values = st.sampled_from(NASTY_VALUES) | st.binary(min_size=1, max_size=4)
    todo = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 80), values), min_size=1, max_size=4)
    assert set(fuzz(st.tuples(specs, todo), check)) == {"taken", "refused"}


def test_all_values_drawn_at_random_are_taken_or_refused() -> None:
    """The description is the message's own, every byte of the tensors is new: what a codec makes of any code."""

    def check(case: tuple[str, int, float]) -> str:
        spec, seed, density = case
        described, data = taken_apart(MESSAGES[spec])
        bits = torch.rand(8, len(data), generator=torch.Generator().manual_seed(seed)) < density
        noise = (bits << torch.arange(8).view(8, 1)).sum(0).to(torch.uint8)
        return outcome(crafted(safetensors_body(described, bytes(noise.tolist()))), spec)

    cases = st.tuples(specs, st.integers(0, 2**32), st.sampled_from([0.0, 0.02, 0.1, 0.5, 0.98, 1.0]))
    assert set(fuzz(cases, check)) == {"taken", "refused"}
