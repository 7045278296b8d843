"""Laws of codecs, over the table of all codecs, and of the envelope: whatever arrives, it is right or an EnvelopeError."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from builders import crafted, numbers, safetensors_body
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.codecs import CODECS, EnvelopeError, open_envelope, seal

ALL_CODECS = pytest.mark.parametrize("name", CODECS)
# Stated relative error of a normal number, and the type's range. A codec without a line here fails.
BOUNDS = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11}
NORMAL = {"fp32": (-126, 127), "bf16": (-126, 127), "fp16": (-14, 15)}
# half of the smallest subnormal
SMALLEST = {"fp32": 2**-150, "bf16": 2**-134, "fp16": 2**-25}
TRAVELS_AS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def round_trip(name: str, tensor: Tensor) -> Tensor:
    return CODECS[name].decode(CODECS[name].encode({"x": tensor}))["x"]


def test_every_codec_states_its_bound() -> None:
    assert BOUNDS.keys() == NORMAL.keys() == SMALLEST.keys() == TRAVELS_AS.keys() == CODECS.keys()


@ALL_CODECS
def test_a_round_trip_keeps_normal_numbers_within_the_stated_bound(name: str) -> None:
    low, high = NORMAL[name]
    generator = torch.Generator().manual_seed(1)
    exponent = torch.rand(50_000, generator=generator, dtype=torch.float64) * (high - low - 0.01) + low
    sign = torch.rand(50_000, generator=generator).sub(0.5).sign().double()
    sent = (sign * 2**exponent).float()
    error = ((round_trip(name, sent).double() - sent.double()) / sent.double()).abs().max()
    assert error <= BOUNDS[name]
    # to nearest, and no finer than stated: the bound is nearly met
    assert error >= 0.95 * BOUNDS[name]


@ALL_CODECS
def test_a_round_trip_of_what_came_back_changes_no_bit(name: str) -> None:
    once = round_trip(name, numbers(2, 300))
    assert torch.equal(round_trip(name, once), once)


@ALL_CODECS
def test_zero_and_tiny_numbers_stay_within_half_the_smallest_step(name: str) -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-38, -3e-39, 1e-45, 6e-8, -2.9e-8])
    assert (round_trip(name, tiny).double() - tiny.double()).abs().max() <= max(SMALLEST[name], BOUNDS[name] * 6e-8)
    assert round_trip(name, tiny)[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "step"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_ties_go_to_even(name: str, step: float) -> None:
    sent = torch.tensor([1 + step / 2, 1 + 3 * step / 2])
    assert round_trip(name, sent).tolist() == [1.0, 1 + 2 * step]


@ALL_CODECS
def test_what_travels_is_contiguous_and_what_comes_back_is_a_float32_copy(name: str) -> None:
    sent = numbers(3, 4, 6).T.requires_grad_()
    encoded = CODECS[name].encode({"x": sent})
    assert encoded["x"].dtype == TRAVELS_AS[name]
    assert encoded["x"].is_contiguous()
    assert not encoded["x"].requires_grad
    decoded = CODECS[name].decode(encoded)
    assert decoded["x"].dtype == torch.float32
    assert decoded["x"].shape == (6, 4)
    encoded["x"].zero_()
    assert decoded["x"].abs().min() > 0


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [("fp16", 65504.0, 65520.0), ("fp16", -65519.0, -1e30), ("bf16", 3.38e38, 3.4e38), ("fp32", 3.4e38, 1e300)],
)
def test_a_value_that_does_not_fit_is_an_error_that_names_the_tensor(name: str, fits: float, too_large: float) -> None:
    CODECS[name].encode({"fine": torch.tensor([fits], dtype=torch.float64)})
    with pytest.raises(ValueError, match=r"layer\.3\.q\.b: a value does not fit"):
        CODECS[name].encode({"fine": torch.ones(2), "layer.3.q.b": torch.tensor([1.0, too_large], dtype=torch.float64)})


@ALL_CODECS
def test_decoding_another_type_than_was_promised_is_an_error(name: str) -> None:
    for dtype in (torch.float64, torch.int32, *(set(TRAVELS_AS.values()) - {TRAVELS_AS[name]})):
        with pytest.raises(ValueError, match=r"layer\.3\.q\.b: torch"):
            CODECS[name].decode({"layer.3.q.b": torch.ones(2).to(dtype)})


# ---------------------------------------------------------------------------------------------------------------- envelope

HEADER = {"kind": "update", "round": 3, "site": 'Zürich "1"', "stats": {"loss": 0.1}, "tasks": ["a", None, True]}
TENSORS = {"m.b": torch.tensor([[1.5, -2.0]]), "m.a": torch.tensor([1.0, 3.0], dtype=torch.bfloat16)}
SMALL = seal(HEADER, TENSORS)


def opens_or_refuses(payload: bytes) -> bool:
    """True if it opens; any other exception than EnvelopeError goes through and fails the test."""
    try:
        open_envelope(payload)
    except EnvelopeError:
        return False
    return True


def test_header_and_tensors_come_back_bit_for_bit() -> None:
    tensors = {
        "floats": numbers(1, 3, 4),
        "transposed": numbers(2, 3, 4).T,
        "half": numbers(3, 5).half(),
        "brain": numbers(4, 5).bfloat16(),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(-0.0),
    }
    header, got = open_envelope(seal(HEADER, tensors))
    assert header == HEADER
    assert list(got) == sorted(tensors)
    for name, tensor in got.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert tensor.view(torch.uint8 if tensor.dim() else tensor.dtype).equal(
            tensors[name].contiguous().view(torch.uint8 if tensor.dim() else tensor.dtype)
        )
    assert math.copysign(1, got["one"].item()) == -1


def test_bytes_do_not_depend_on_the_order_of_keys() -> None:
    again = seal(dict(reversed(HEADER.items())), dict(reversed(TENSORS.items())))
    assert again == SMALL
    assert SMALL[:4] == b"FKL1"


def test_a_header_that_json_cannot_hold_is_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        seal({"loss": float("nan")}, {})


def test_every_truncation_and_extension_is_refused() -> None:
    assert opens_or_refuses(SMALL)
    for length in range(len(SMALL)):
        with pytest.raises(EnvelopeError):
            open_envelope(SMALL[:length])
    with pytest.raises(EnvelopeError, match="checksum"):
        open_envelope(SMALL + b"\0")


def test_every_single_bit_flip_is_refused() -> None:
    for position in range(len(SMALL)):
        for bit in range(8):
            flipped = bytearray(SMALL)
            flipped[position] ^= 1 << bit
            with pytest.raises(EnvelopeError, match="begins with" if position < 4 else "checksum"):
                open_envelope(bytes(flipped))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(noise: bytes) -> None:
    for payload in (noise, b"FKL1" + noise, crafted(noise)):
        with pytest.raises(EnvelopeError):
            open_envelope(payload)


def test_an_altered_body_under_a_right_checksum_opens_or_is_refused() -> None:
    """A hostile sender can always make the checksum right: every byte of the body altered in three ways."""
    body = SMALL[36:]
    outcomes = set()
    for position in range(len(body)):
        for flip in (0x01, 0x20, 0x80):
            altered = bytearray(body)
            altered[position] ^= flip
            outcomes.add(opens_or_refuses(crafted(bytes(altered))))
    assert outcomes == {True, False}
    for length in range(len(body)):
        assert not opens_or_refuses(crafted(body[:length]))


def body_of(tensor: dict[str, Any], data: bytes = b"") -> bytes:
    return safetensors_body({"__metadata__": {"fedkeel": "{}"}, "x": {"data_offsets": [0, len(data)], **tensor}}, data)


HOSTILE = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "a giant header size": b"\xff" * 8 + b"{}",
    "a header size beyond the body": (10**6).to_bytes(8, "little") + b"{}",
    "no metadata": safetensors_body({}),
    "metadata of another program": safetensors_body({"__metadata__": {"format": "pt"}}),
    "metadata is a list": safetensors_body({"__metadata__": ["fedkeel"]}),
    "metadata is a number": safetensors_body({"__metadata__": {"fedkeel": 3}}),
    "metadata is no JSON": safetensors_body({"__metadata__": {"fedkeel": "{'kind'}"}}),
    "the header is a list": safetensors_body({"__metadata__": {"fedkeel": "[]"}}),
    "the header is a text": safetensors_body({"__metadata__": {"fedkeel": '"update"'}}),
    "the header is null": safetensors_body({"__metadata__": {"fedkeel": "null"}}),
    "the JSON is a list": safetensors_body([]),
    "the JSON is null": safetensors_body(None),
    "the JSON is no UTF-8": safetensors_body(b'{"\xff": 1}'),
    "JSON nested deep": safetensors_body(b"[" * 200_000),
    "a header nested deep": safetensors_body({"__metadata__": {"fedkeel": "[" * 200_000}}),
    "a giant integer": safetensors_body({"__metadata__": {"fedkeel": "9" * 5000}}),
    "an unknown type": body_of({"dtype": "F7", "shape": [1]}, b"\0"),
    "a type without a test for NaN": body_of({"dtype": "F8_E4M3", "shape": [1]}, b"\x7f"),
    "a shape that its data do not fill": body_of({"dtype": "F32", "shape": [3]}, b"\0" * 4),
    "a shape whose strides overflow": body_of({"dtype": "F32", "shape": [0, 2**62, 2**62]}),
    "a shape over 2^63": body_of({"dtype": "F32", "shape": [0, 2**63]}),
    "a negative shape": body_of({"dtype": "F32", "shape": [-1]}, b"\0" * 4),
    "more dimensions than torch has": body_of({"dtype": "F32", "shape": [1] * 100}, b"\0" * 4),
    "data beyond the end": body_of({"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}, b"\0" * 4),
    "data from behind": body_of({"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}, b"\0" * 4),
    "data that no tensor owns": safetensors_body({"__metadata__": {"fedkeel": "{}"}}, b"\0" * 4),
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_body_under_a_right_checksum_is_refused(body: bytes) -> None:
    with pytest.raises(EnvelopeError):
        open_envelope(crafted(body))


def test_the_crafted_bodies_are_refused_for_what_is_wrong_with_them() -> None:
    """The same builder with nothing wrong opens, so the table above tests what its names say."""
    header, tensors = open_envelope(crafted(body_of({"dtype": "F32", "shape": [1]}, b"\0\0\x80?")))
    assert header == {}
    assert tensors["x"].tolist() == [1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", TRAVELS_AS.values())
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(value: float, dtype: torch.dtype) -> None:
    payload = seal({}, {"a.fine": torch.ones(3), "m.bad": torch.tensor([0.0, value]).to(dtype)})
    with pytest.raises(EnvelopeError, match=r"^m\.bad holds a value that is not finite"):
        open_envelope(payload)


def test_a_message_over_the_limit_is_refused() -> None:
    assert open_envelope(SMALL, limit=len(SMALL))[0] == HEADER
    with pytest.raises(EnvelopeError, match=f"{len(SMALL)} bytes, over the limit of {len(SMALL) - 1}"):
        open_envelope(SMALL, limit=len(SMALL) - 1)


def test_the_body_is_a_plain_safetensors_file() -> None:
    """Layout by hand, so that another program can read it: 8 bytes of length, JSON, data."""
    body = SMALL[36:]
    size = int.from_bytes(body[:8], "little")
    described = json.loads(body[8 : 8 + size])
    assert json.loads(described["__metadata__"]["fedkeel"]) == HEADER
    assert described["m.b"]["shape"] == [1, 2]
    start, end = described["m.b"]["data_offsets"]
    assert torch.frombuffer(bytearray(body[8 + size :][start:end]), dtype=torch.float32).tolist() == [1.5, -2.0]
