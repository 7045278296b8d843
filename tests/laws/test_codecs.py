"""Laws of codecs, over the table of all codecs and some chains, and of the envelope: what arrives is right or refused."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from builders import crafted, numbers, safetensors_body, with_residual
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.exchange.codecs import Codec, CodecError, EnvelopeError, envelope, make_codec, open_envelope, quantize, seal
from fedkeel.exchange.codecs.envelope import DTYPES, HEADER_LIMIT, MAX_DIMENSIONS, MAX_NAME
from fedkeel.exchange.codecs.quantize import Quantize
from fedkeel.exchange.codecs.sparse import Sparse
from fedkeel.rng import derive
from fedkeel.tables import CODECS

CASTS = ("fp32", "bf16", "fp16")
ROUNDED = ("int8", "int4")
CHAINS = ("topk=0.1+fp32", "topk=0.3+bf16", "topk=0.1+fp16", "topk=0.3+int8", "topk=0.1+int4")
SPECS = (*(name for name, entry in CODECS.items() if entry.argument is None), "topk=0.1", "topk=0.01", "topk=0.5", *CHAINS)
DRAWN = tuple(spec for spec in SPECS if spec.endswith(ROUNDED))
ALL_CODECS = pytest.mark.parametrize("spec", SPECS)
ALL_CASTS = pytest.mark.parametrize("name", CASTS)
# Stated relative error of a normal number, and the type's range.
BOUNDS = {"fp32": 0.0, "bf16": 2**-8, "fp16": 2**-11}
NORMAL = {"fp32": (-126, 127), "bf16": (-126, 127), "fp16": (-14, 15)}
# half of the smallest subnormal
SMALLEST = {"fp32": 2**-150, "bf16": 2**-134, "fp16": 2**-25}
TRAVELS_AS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LARGEST = float(np.finfo(np.float32).max)

# both factors of an adapter, a square, odd sizes, one dimension, none, three, and one long enough for places as numbers
SHAPES = {
    "m.a": (3, 14),
    "m.b": (10, 3),
    "square": (5, 5),
    "vector": (7,),
    "one": (1,),
    "scalar": (),
    "cube": (2, 3, 5),
    "tall": (5, 2, 3),
    "long": (1, 700),
    "mask": (4, 9),
}


def shaped(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers; also for a shape of no dimensions."""
    return numbers(seed, math.prod(shape)).view(shape)


def filled(kind: str) -> dict[str, Tensor]:
    """Float32 tensors of SHAPES with values of one kind."""
    drawn = {name: shaped(7 + i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
    spread = {name: 2.0 ** (40 * shaped(50 + i, shape)).clamp(-149, 127) for i, (name, shape) in enumerate(SHAPES.items())}
    made: dict[str, dict[str, Tensor]] = {
        "normal": drawn,
        "zeros": {name: torch.zeros(shape) for name, shape in SHAPES.items()},
        "equal": {name: t.sign() * 0.3 for name, t in drawn.items()},
        "whole": {name: (9 * t).round().clamp(-126, 126) for name, t in drawn.items()},
        "huge": {name: (t * 2e38).clamp(-LARGEST, LARGEST) for name, t in drawn.items()},
        "largest": {name: t.sign() * LARGEST for name, t in drawn.items()},
        "tiny": {name: t * 1e-43 for name, t in drawn.items()},
        "smallest": {name: t.sign() * 2.0**-149 for name, t in drawn.items()},
        "of every size": {name: t * drawn[name].sign() for name, t in spread.items()},
    }
    return made[kind]


KINDS = ("normal", "zeros", "equal", "whole", "huge", "largest", "tiny", "smallest", "of every size")
OVER_FP16 = ("huge", "largest", "of every size")


def can_send(spec: str, kind: str) -> bool:
    """Whether the kind is inside the type that the values travel as; bfloat16 ends 2^-8 below float32's end."""
    return not (spec.endswith("fp16") and kind in OVER_FP16) and not (spec.endswith("bf16") and kind in ("huge", "largest"))


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items()}


def trip(codec: Codec, tensor: Tensor, key: int = 0) -> Tensor:
    """One tensor there and back."""
    return codec.decode(codec.encode({"x": tensor}, key), {"x": tuple(tensor.shape)})["x"]


def same_bits(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        (one[n].dtype, one[n].shape) == (other[n].dtype, other[n].shape)
        and one[n].contiguous().flatten().view(torch.uint8).equal(other[n].contiguous().flatten().view(torch.uint8))
        for n in one
    )


# ------------------------------------------------------------------------------------------------------------------- specs


@ALL_CODECS
def test_the_name_of_a_codec_is_its_spec(spec: str) -> None:
    assert make_codec(spec).name == spec
    assert make_codec(make_codec(spec).name) == make_codec(spec)


def test_specs_of_one_meaning_have_one_name() -> None:
    assert {make_codec(spec).name for spec in ("topk=0.1", "topk=.1", "topk=0.10", "topk=1e-1")} == {"topk=0.1"}
    assert make_codec("topk=1e-05+int8").name == "topk=1e-05+int8"


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        *((name, name) for name in ("", "gzip", "FP32", "int2", "int8=3", "topk", "topk=many", "topk=0", "topk=1")),
        *((name, name) for name in ("topk=-0.1", "topk=nan", "topk=inf", "topk=1e-400")),
        *((name, name) for name in ("int8+int4", "bf16+int8")),
        ("int8+topk=0.1", "int8+topk=0.1"),
        ("topk=0.1+topk=0.5", "topk=0.1+topk=0.5"),
        ("topk=0.1+int8+int4", "topk=0.1+int8+int4"),
        ("topk=0.1+", ""),
        ("+int8", ""),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused_with_all_that_would_make_sense(spec: str, part: str) -> None:
    with pytest.raises(CodecError) as caught:
        make_codec(spec)
    assert str(caught.value) == (
        f"codec {spec!r}: {part!r}: one of fp32, bf16, fp16, int8, int4, or topk=SHARE with 0 < SHARE < 1, or topk=SHARE+ one "
        "of the others belongs here"
    )


def test_only_what_errs_on_no_side_is_called_unbiased() -> None:
    assert {spec for spec in SPECS if make_codec(spec).unbiased} == {"fp32", "int8", "int4"}


# ------------------------------------------------------------------------------------------------------- laws of all codecs


@ALL_CODECS
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_trip_stays_within_the_bound_and_on_the_promised_wire(spec: str, kind: str) -> None:
    codec, tensors = make_codec(spec), filled(kind)
    if not can_send(spec, kind):
        with pytest.raises(CodecError, match=r"a value does not fit b?float16"):
            codec.encode(tensors, 3)
        return
    encoded = codec.encode(tensors, 3)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in encoded.items()} == codec.wire(SHAPES)
    assert all(t.is_contiguous() for t in encoded.values())
    decoded = codec.decode(encoded, SHAPES)
    assert shapes_of(decoded) == SHAPES
    for name, tensor in tensors.items():
        assert decoded[name].dtype == torch.float32
        bound = codec.bound(tensor)
        assert bound.shape == tensor.shape
        assert ((decoded[name].double() - tensor.double()).abs() <= bound.double()).all(), name


@ALL_CODECS
def test_the_bound_is_nearly_met(spec: str) -> None:
    """A bound of twice the size would be of no use, so some entry comes near to its own."""
    codec, sent = make_codec(spec), numbers(1, 40, 700)
    error, bound = (trip(codec, sent).double() - sent.double()).abs(), codec.bound(sent).double()
    if spec == "fp32":
        assert bound.max() == 0
    else:
        assert (error / bound.clamp_min(1e-300)).max() > 0.95


@ALL_CODECS
def test_the_same_key_gives_the_same_bits_in_whatever_order_and_company(spec: str) -> None:
    codec, tensors = make_codec(spec), filled("normal")
    encoded = codec.encode(tensors, 12345)
    assert same_bits(codec.encode(tensors, 12345), encoded)
    assert same_bits(codec.encode(dict(reversed(tensors.items())), 12345), encoded)
    strided = {name: t.unsqueeze(-1).expand(*t.shape, 2)[..., 0] for name, t in tensors.items()}
    assert same_bits(codec.encode(strided, 12345), encoded)
    for name in tensors:
        alone = codec.encode({name: tensors[name]}, 12345)
        assert same_bits(alone, {n: encoded[n] for n in alone})


@pytest.mark.parametrize("spec", DRAWN)
def test_other_keys_and_other_names_draw_other_numbers(spec: str) -> None:
    codec, tensor = make_codec(spec), numbers(5, 60, 90)
    twice = codec.encode({"x": tensor, "y": tensor}, 1)
    again = codec.encode({"x": tensor}, 2)
    assert not twice["x"].equal(twice["y"])
    assert not twice["x"].equal(again["x"])
    # and independent ones: the errors do not correlate
    errors = [trip(codec, tensor, key) - tensor for key in (1, 2)]
    errors.append(codec.decode(codec.encode({"y": tensor}, 1), {"y": (60, 90)})["y"] - tensor)
    drawn = trip(codec, tensor) != 0
    errors = [error[drawn] for error in errors]
    correlation = torch.corrcoef(torch.stack(errors)) - torch.eye(3)
    assert correlation.abs().max() < 4 / len(errors[0]) ** 0.5


@pytest.mark.parametrize("spec", sorted(set(SPECS) - set(DRAWN)))
def test_what_draws_nothing_does_not_depend_on_the_key(spec: str) -> None:
    codec, tensors = make_codec(spec), filled("normal")
    assert same_bits(codec.encode(tensors, 1), codec.encode(tensors, 2))


@pytest.mark.parametrize("spec", sorted(set(SPECS) - set(DRAWN)))
def test_a_round_trip_of_what_came_back_changes_no_bit(spec: str) -> None:
    codec, once = make_codec(spec), trip(make_codec(spec), numbers(2, 300))
    assert same_bits({"x": trip(codec, once)}, {"x": once})


@ALL_CODECS
def test_what_travels_has_no_graph_and_what_comes_back_has_memory_of_its_own(spec: str) -> None:
    codec, sent = make_codec(spec), numbers(3, 4, 6).T.requires_grad_()
    encoded = codec.encode({"x": sent}, 0)
    assert not any(t.requires_grad for t in encoded.values())
    decoded = codec.decode(encoded, {"x": (6, 4)})["x"]
    before = decoded.clone()
    assert decoded.data_ptr() % 64 == 0
    for tensor in encoded.values():
        tensor.zero_()
    assert decoded.equal(before)


@ALL_CODECS
def test_what_travels_comes_through_an_envelope_that_expects_it(spec: str) -> None:
    codec, tensors = make_codec(spec), filled("normal")
    wire, encoded = codec.wire(SHAPES), codec.encode(tensors, 9)
    payload = seal({}, encoded)
    _, arrived = open_envelope(payload, expected=wire)
    assert same_bits(codec.decode(arrived, SHAPES), codec.decode(encoded, SHAPES))
    size = int.from_bytes(payload[36:44], "little")
    data = sum(dtype.itemsize * math.prod(shape) for dtype, shape in wire.values())
    assert len(payload) == 4 + 32 + 8 + size + data


@ALL_CODECS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e300])
def test_a_value_that_cannot_be_sent_is_an_error_that_names_the_tensor(spec: str, value: float) -> None:
    bad = torch.tensor([1.0, value, 2.0], dtype=torch.float64)
    with pytest.raises(
        CodecError, match=r"^layer\.3\.q\.b: a value " + ("does not fit" if value == 1e300 else "is not finite")
    ):
        make_codec(spec).encode({"fine": torch.ones(2), "layer.3.q.b": bad}, 0)


@ALL_CODECS
def test_a_tensor_without_numbers_cannot_be_sent(spec: str) -> None:
    with pytest.raises(CodecError, match=r"^x: a tensor of shape \(3, 0\) holds no numbers"):
        make_codec(spec).encode({"x": torch.zeros(3, 0)}, 0)
    with pytest.raises(CodecError, match=r"^x: a tensor of shape \(0,\) holds no numbers"):
        make_codec(spec).wire({"x": (0,)})


@pytest.mark.parametrize("spec", ["int8", "int4", "topk=0.1", "topk=0.1+int4"])
def test_a_name_that_could_be_taken_for_what_travels_beside_it_is_refused(spec: str) -> None:
    with pytest.raises(CodecError, match=r"^x#scale: a tensor's name holds no '#'"):
        make_codec(spec).encode({"x": torch.ones(2), "x#scale": torch.ones(2)}, 0)


@ALL_CODECS
def test_decoding_anything_else_than_the_wire_is_an_error_that_names_the_tensor(spec: str) -> None:
    codec, tensors = make_codec(spec), filled("normal")
    encoded = codec.encode(tensors, 0)
    for name, tensor in encoded.items():
        spoilt = [t for t in (torch.float64, torch.int64, torch.bfloat16, torch.uint8, torch.int8) if t != tensor.dtype]
        others = [tensor.to(dtype) for dtype in spoilt] + [torch.cat([tensor.flatten()] * 2), tensor.unsqueeze(0)]
        for other in others:
            with pytest.raises(CodecError) as caught:
                codec.decode(encoded | {name: other}, SHAPES)
            assert str(caught.value).startswith(f"{name}: ")
            assert "where the codec sends" in str(caught.value)
        with pytest.raises(CodecError, match="missing"):
            codec.decode({n: t for n, t in encoded.items() if n != name}, SHAPES)
    with pytest.raises(CodecError, match=r"^more: not a tensor that the codec sends"):
        codec.decode(encoded | {"more": torch.ones(2)}, SHAPES)


# -------------------------------------------------------------------------------------------------------------------- casts


@ALL_CASTS
def test_a_cast_keeps_normal_numbers_within_the_stated_bound(name: str) -> None:
    low, high = NORMAL[name]
    generator = torch.Generator().manual_seed(1)
    exponent = torch.rand(50_000, generator=generator, dtype=torch.float64) * (high - low - 0.01) + low
    sign = torch.rand(50_000, generator=generator).sub(0.5).sign().double()
    sent = (sign * 2**exponent).float()
    error = ((trip(make_codec(name), sent).double() - sent.double()) / sent.double()).abs().max()
    assert error <= BOUNDS[name]
    # to nearest, and no finer than stated: the bound is nearly met
    assert error >= 0.95 * BOUNDS[name]


@ALL_CASTS
def test_zero_and_tiny_numbers_stay_within_half_the_smallest_step(name: str) -> None:
    tiny = torch.tensor([0.0, -0.0, 1e-38, -3e-39, 1e-45, 6e-8, -2.9e-8])
    assert (trip(make_codec(name), tiny).double() - tiny.double()).abs().max() <= max(SMALLEST[name], BOUNDS[name] * 6e-8)
    assert trip(make_codec(name), tiny)[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("name", "step"), [("bf16", 2**-7), ("fp16", 2**-10)])
def test_ties_go_to_even(name: str, step: float) -> None:
    sent = torch.tensor([1 + step / 2, 1 + 3 * step / 2])
    assert trip(make_codec(name), sent).tolist() == [1.0, 1 + 2 * step]


@pytest.mark.parametrize(
    ("name", "fits", "too_large"),
    [("fp16", 65504.0, 65520.0), ("fp16", -65519.0, -1e30), ("bf16", 3.38e38, 3.4e38), ("fp32", 3.4e38, 1e300)],
)
def test_a_value_that_does_not_fit_is_refused_and_the_last_that_does_is_not(name: str, fits: float, too_large: float) -> None:
    codec = make_codec(name)
    codec.encode({"fine": torch.tensor([fits], dtype=torch.float64)}, 0)
    with pytest.raises(CodecError, match=r"layer\.3\.q\.b: a value does not fit"):
        codec.encode({"fine": torch.ones(2), "layer.3.q.b": torch.tensor([1.0, too_large], dtype=torch.float64)}, 0)


@pytest.mark.parametrize("spec", ["fp32", "bf16", "fp16", "topk=0.5", "topk=0.5+bf16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_not_decoded(spec: str, value: float) -> None:
    codec = make_codec(spec)
    encoded = codec.encode({"x": numbers(1, 8)}, 0)
    encoded["x"][1] = value
    with pytest.raises(CodecError, match=r"^x: a value is not finite"):
        codec.decode(encoded, {"x": (8,)})


# ----------------------------------------------------------------------------------------------------------- whole numbers


def slow_uniform(key: int, counter: int) -> Fraction:
    """SplitMix64 in Python's integers: what `rng.counter_uniform` does in torch's."""
    mask = 2**64 - 1
    x = (counter * 0x9E3779B97F4A7C15 + key) & mask
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
    x ^= x >> 31
    return (Fraction(x >> 41) + Fraction(1, 2)) / 2**23


def slow_scale(top: Fraction, levels: int) -> Fraction:
    """The least number of 17 significant bits, as float32 has them, that is no less than top / levels."""
    least = top / levels
    exponent = -126
    while Fraction(2) ** (exponent + 1) <= least:
        exponent += 1
    unit = Fraction(2) ** (exponent - 16)
    return min(math.ceil(least / unit), math.floor(Fraction(LARGEST) / levels / unit)) * unit


def slow_quantize(tensor: Tensor, name: str, levels: int, key: int) -> tuple[list[int], list[float]]:
    """Whole numbers in row-major order and scales, in exact fractions: the obvious twin of `Quantize.encode`."""
    flat = [Fraction(v) for v in tensor.flatten().tolist()]
    last = tensor.shape[-1] if tensor.dim() else 1
    leading = len(flat) // last
    rows = [i // last if last >= leading else i % last for i in range(len(flat))]
    tops = [max(abs(v) for v, row in zip(flat, rows, strict=True) if row == wanted) for wanted in range(min(leading, last))]
    scales = [slow_scale(top, levels) if top else Fraction(0) for top in tops]
    own = derive(key, "quantize", name)
    whole = []
    for i, (value, row) in enumerate(zip(flat, rows, strict=True)):
        step = value / scales[row] if scales[row] else Fraction(0)
        whole.append(max(-levels, min(levels, math.floor(step + slow_uniform(own, i)))))
    return whole, [float(s) for s in scales]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_and_scales_are_those_of_the_slow_twin(bits: int, kind: str) -> None:
    codec = make_codec(f"int{bits}")
    for name, tensor in filled(kind).items():
        encoded = codec.encode({name: tensor}, 77)
        whole, scales = slow_quantize(tensor, name, 127 if bits == 8 else 7, 77)
        assert encoded[f"{name}#scale"].tolist() == scales
        if bits == 8:
            assert encoded[name].shape == tensor.shape
            assert encoded[name].flatten().tolist() == whole
        else:
            padded = [n % 16 for n in whole] + [0] * (len(whole) % 2)
            assert encoded[name].tolist() == [low + 16 * high for low, high in zip(padded[::2], padded[1::2], strict=True)]
        # scale · q is a float32 number, so what comes back is exactly that
        decoded = codec.decode(encoded, {name: tuple(tensor.shape)})[name]
        grid = np.array(whole, dtype=np.float64).reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
        by_column = grid.shape[0] > grid.shape[1]
        exact = grid * (np.array(scales)[None, :] if by_column else np.array(scales)[:, None])
        assert decoded.double().numpy().flatten().tolist() == exact.flatten().tolist()


def test_both_factors_of_an_adapter_have_a_scale_for_each_rank() -> None:
    wire = make_codec("int8").wire({"a": (4, 64), "b": (96, 4), "square": (6, 6), "flat": (50,), "cube": (2, 3, 5), "dot": ()})
    assert {n: shape for n, (_, shape) in wire.items() if n.endswith("#scale")} == {
        "a#scale": (4,),
        "b#scale": (4,),
        "square#scale": (6,),
        "flat#scale": (1,),
        "cube#scale": (5,),
        "dot#scale": (1,),
    }
    # one large number spoils the precision of its own row only
    factor = numbers(1, 4, 64)
    factor[2, 5] = 1e6
    lost = (trip(make_codec("int8"), factor) - factor).abs().amax(1)
    assert lost[[0, 1, 3]].max() < 0.05
    lost = (trip(make_codec("int8"), factor.T) - factor.T).abs().amax(0)
    assert lost[[0, 1, 3]].max() < 0.05


def test_four_bits_are_packed_as_worked_by_hand() -> None:
    """Largest 7, so the scale is 1 and whole numbers stay: 7 1 −1 −7 0 3 2 → nibbles 7 1 F 9 0 3 2 and 0 to fill."""
    encoded = make_codec("int4").encode({"x": torch.tensor([7.0, 1.0, -1.0, -7.0, 0.0, 3.0, 2.0])}, 5)
    assert encoded["x#scale"].tolist() == [1.0]
    assert bytes(encoded["x"].tolist()) == bytes([0x17, 0x9F, 0x30, 0x02])
    decoded = make_codec("int4").decode(encoded, {"x": (7,)})
    assert decoded["x"].tolist() == [7.0, 1.0, -1.0, -7.0, 0.0, 3.0, 2.0]


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_rows_of_zeros_come_back_as_zeros(spec: str) -> None:
    sent = numbers(1, 3, 8)
    sent[1] = 0.0
    encoded = make_codec(spec).encode({"x": sent}, 0)
    assert encoded["x#scale"][1] == 0
    assert make_codec(spec).bound(sent)[1].tolist() == [0.0] * 8
    assert trip(make_codec(spec), sent)[1].tolist() == [0.0] * 8
    # a row of nothing but the smallest number has a scale above 0: it is not lost in the mean
    assert make_codec(spec).encode({"x": torch.tensor([2.0**-149])}, 0)["x#scale"].item() == 2.0**-142


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_the_largest_float_never_rounds_up_over_the_last_level(spec: str) -> None:
    """There x / scale is a hair over L, and one draw in thousands would make it L + 1."""
    sent = torch.full((400_000,), LARGEST)
    got = trip(make_codec(spec), sent)
    assert got.unique().numel() == 1
    assert 0 <= LARGEST - got[0].item() <= LARGEST * 2**-16


DRAWS = 512


def mean_misses(spec: str, sent: Tensor) -> Tensor:
    """Which entries' mean over DRAWS keys is further from the entry than four standard deviations of that mean."""
    codec = make_codec(spec)
    total = torch.zeros(sent.shape, dtype=torch.float64)
    for key in range(DRAWS):
        total += trip(codec, sent, key)
    step = codec.bound(sent).double()
    share = (sent.double() / step.clamp_min(1e-300)).frac().abs()
    # an entry goes up with the probability `share` of a step; and the draws resolve 2^-24 of one
    allowed = 4 * step * (share * (1 - share) / DRAWS).sqrt() + step * 2**-24
    return (total / DRAWS - sent.double()).abs() > allowed


UNBIASED = {
    "normal": numbers(1, 3, 7),
    "by column": numbers(2, 7, 3) * 1e-3,
    "whole numbers": torch.tensor([[-7.0, 3.0, 0.0, 1.0, 7.0]]),
    "subnormal": numbers(3, 9) * 1e-42,
}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if make_codec(spec).unbiased])
@pytest.mark.parametrize(
    "values", [name if name == "normal" else pytest.param(name, marks=pytest.mark.slow) for name in UNBIASED]
)
def test_what_is_called_unbiased_is_right_in_the_mean(spec: str, values: str) -> None:
    assert not mean_misses(spec, UNBIASED[values]).any()


@pytest.mark.parametrize("spec", ["int8", "int4"])
def test_rounding_to_nearest_would_not_pass_for_unbiased(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above has power: draws that are all ½ make the rounding one to nearest, and it sees that."""
    monkeypatch.setattr(quantize, "counter_uniform", lambda key, counters: torch.full(counters.shape, 0.5))
    assert mean_misses(spec, UNBIASED["normal"]).double().mean() > 0.5


def test_a_draw_is_never_shared_by_two_entries() -> None:
    """Of 20,000 equal entries between two levels about half go up, and neighbours do not go together."""
    sent = torch.full((20_000,), 0.5)
    sent[0] = 7.0  # scale 1
    up = trip(make_codec("int4"), sent)[1:]
    assert set(up.tolist()) == {0.0, 1.0}
    assert abs(up.mean().item() - 0.5) < 4 * 0.5 / 20_000**0.5
    together = (up[1:] == up[:-1]).double().mean().item()
    assert abs(together - 0.5) < 4 * 0.5 / 20_000**0.5


BAD_WHOLE = {
    "a scale below 0": ("int8", "x#scale", [-1.0, 1.0], "a scale is not"),
    "a scale that is NaN": ("int8", "x#scale", [1.0, float("nan")], "a scale is not"),
    "an infinite scale": ("int4", "x#scale", [float("inf"), 1.0], "a scale is not"),
    "a scale too large": ("int8", "x#scale", [3e38, 1.0], "a scale is too large"),
    "a four-bit scale too large": ("int4", "x#scale", [1e38, 1.0], "a scale is too large"),
    "-128": ("int8", "x", [[-128, 0, 0], [0, 0, 0]], "-128 where whole numbers from -127 belong"),
    "-8 in a low half": ("int4", "x", [0x08, 0, 0], "-8 where whole numbers from -7 belong"),
    "-8 in a high half": ("int4", "x", [0, 0, 0x80], "-8 where whole numbers from -7 belong"),
}


@pytest.mark.parametrize(("spec", "name", "values", "told"), BAD_WHOLE.values(), ids=BAD_WHOLE.keys())
def test_whole_numbers_and_scales_that_were_never_sent_are_refused(spec: str, name: str, values: Any, told: str) -> None:
    encoded = make_codec(spec).encode({"x": torch.tensor([[7.0, 3.0, 2.0], [1.0, -7.0, 0.0]])}, 0)
    make_codec(spec).decode(encoded, {"x": (2, 3)})
    with pytest.raises(CodecError) as caught:
        make_codec(spec).decode(encoded | {name: torch.tensor(values).to(encoded[name].dtype)}, {"x": (2, 3)})
    assert str(caught.value).startswith("x: ")
    assert told in str(caught.value)


def test_a_half_byte_after_the_last_number_must_be_0() -> None:
    encoded = make_codec("int4").encode({"x": torch.tensor([7.0, 3.0, 2.0])}, 0)
    encoded["x"][1] += 0x10
    with pytest.raises(CodecError, match=r"^x: the half byte after the last number is not 0"):
        make_codec("int4").decode(encoded, {"x": (3,)})


# ----------------------------------------------------------------------------------------------------------- the largest few


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kept_entries_are_those_of_a_stable_sort(share: float, kind: str) -> None:
    for name, tensor in filled(kind).items():
        flat = tensor.flatten().tolist()
        kept = max(1, math.ceil(Fraction(str(share)) * len(flat)))
        places = sorted(sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[:kept])
        encoded = Sparse(share).encode({name: tensor}, 0)
        assert encoded[name].tolist() == [flat[i] for i in places]
        if 32 * kept <= len(flat):
            assert encoded[f"{name}#index"].tolist() == places
        else:
            marks = np.zeros(len(flat), dtype=np.uint8)
            marks[places] = 1
            assert encoded[f"{name}#mask"].tolist() == np.packbits(marks, bitorder="little").tolist()
        decoded = Sparse(share).decode(encoded, {name: tuple(tensor.shape)})[name]
        assert decoded.flatten().tolist() == [v if i in set(places) else 0.0 for i, v in enumerate(flat)]


@pytest.mark.parametrize(
    ("share", "count", "kept"), [(0.1, 30, 3), (0.07, 100, 7), (0.1, 31, 4), (0.001, 5, 1), (0.99, 10, 10)]
)
def test_the_number_kept_is_the_ceiling_of_the_share_as_a_decimal(share: float, count: int, kept: int) -> None:
    assert Sparse(share).wire({"x": (count,)})["x"] == (torch.float32, (kept,))


@pytest.mark.parametrize(("count", "beside"), [(95, ("x#mask", torch.uint8, (12,))), (96, ("x#index", torch.int32, (3,)))])
def test_places_travel_in_the_smaller_of_two_forms(count: int, beside: tuple[str, torch.dtype, tuple[int, ...]]) -> None:
    name, dtype, shape = beside
    assert Sparse(0.03).wire({"x": (count,)}) == {"x": (torch.float32, (3,)), name: (dtype, shape)}


def test_places_over_what_an_int32_holds_travel_as_a_mask() -> None:
    assert set(Sparse(0.01).wire({"x": (2**31,)})) == {"x", "x#index"}
    assert set(Sparse(0.01).wire({"x": (2**31 + 1,)})) == {"x", "x#mask"}


def test_the_mask_is_packed_as_worked_by_hand() -> None:
    """Of ten entries 1, 3 and 8 are the largest: bits 1 and 3 of the first byte are 2 + 8, bit 0 of the second is 1."""
    sent = torch.tensor([[0.1, -5.0, 0.2, 4.0, 0.0], [0.3, -0.1, 0.2, 6.0, 0.25]])
    encoded = Sparse(0.3).encode({"x": sent}, 0)
    assert encoded["x"].tolist() == [-5.0, 4.0, 6.0]
    assert encoded["x#mask"].tolist() == [0b1010, 0b1]
    assert trip(Sparse(0.3), sent).tolist() == [[0.0, -5.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 6.0, 0.0]]


BAD_PLACES = {
    "below 0": ("index", [-1, 5], "increasing numbers from 0 to under 100"),
    "over the end": ("index", [5, 100], "increasing numbers from 0 to under 100"),
    "twice": ("index", [5, 5], "increasing numbers"),
    "falling": ("index", [6, 5], "increasing numbers"),
    "too far apart for an int32": ("index", [2**31 - 1, -(2**31)], "increasing numbers"),
    "far below 0 and far over": ("index", [-(2**31), 2**31 - 1], "increasing numbers"),
    "too few": ("mask", [0b10, 0], "a mask that does not mark 3 of 10"),
    "too many": ("mask", [0b1111, 0], "a mask that does not mark 3 of 10"),
    "none": ("mask", [0, 0], "a mask that does not mark 3 of 10"),
    "all": ("mask", [255, 255], "a mask that does not mark 3 of 10"),
    "after the last entry": ("mask", [0b11, 0b100], "a mask that does not mark 3 of 10"),
}


@pytest.mark.parametrize(("form", "values", "told"), BAD_PLACES.values(), ids=BAD_PLACES.keys())
def test_places_that_were_never_sent_are_refused(form: str, values: list[int], told: str) -> None:
    codec, sent = (Sparse(0.02), numbers(1, 100)) if form == "index" else (Sparse(0.3), numbers(1, 10))
    encoded = codec.encode({"x": sent}, 0)
    codec.decode(encoded, {"x": tuple(sent.shape)})
    spoilt = torch.tensor(values).to(encoded[f"x#{form}"].dtype)
    with pytest.raises(CodecError, match=f"^x: .*{told}"):
        codec.decode(encoded | {f"x#{form}": spoilt}, {"x": tuple(sent.shape)})


# ------------------------------------------------------------------------------------------------------- chains and residuals


@pytest.mark.parametrize("spec", CHAINS)
def test_a_chain_is_its_two_codecs_one_after_the_other(spec: str) -> None:
    first, second = (make_codec(part) for part in spec.split("+"))
    tensors = filled("normal")
    sparse = first.encode(tensors, 4)
    inner = second.encode({name: sparse[name] for name in tensors}, 4)
    assert same_bits(make_codec(spec).encode(tensors, 4), sparse | inner)
    kept = second.decode(inner, {name: tuple(sparse[name].shape) for name in tensors})
    assert same_bits(make_codec(spec).decode(sparse | inner, SHAPES), first.decode(sparse | kept, SHAPES))


@pytest.mark.parametrize(
    ("spec", "shape", "size"),
    [
        ("fp32", (20, 30), 4 * 600),
        ("bf16", (20, 30), 2 * 600),
        ("int8", (20, 30), 600 + 4 * 20),
        ("int4", (20, 30), 300 + 4 * 20),
        ("int4", (3, 5), 8 + 4 * 3),  # fifteen halves are eight bytes
        ("topk=0.1", (20, 30), 4 * 60 + 75),  # 60 places would take 240 bytes, a mask 75
        ("topk=0.01", (20, 30), 4 * 6 + 4 * 6),  # 6 places take 24
        ("topk=0.1+int4", (20, 30), 30 + 4 + 75),
        ("topk=0.1+bf16", (20, 30), 2 * 60 + 75),
    ],
)
def test_bytes_are_those_counted_by_hand(spec: str, shape: tuple[int, ...], size: int) -> None:
    encoded = make_codec(spec).encode({"x": numbers(1, *shape)}, 0)
    assert sum(t.numel() * t.element_size() for t in encoded.values()) == size


LOSSY = sorted(set(SPECS) - {"fp32"})


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_sent_and_the_last_residual_add_up_to_the_true_updates(spec: str) -> None:
    codec, residual = make_codec(spec), None
    true = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    sent = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for t in range(30):
        update = {name: shaped(1000 * t + i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
        encoded, residual = with_residual(codec, update, residual, key=t)
        decoded = codec.decode(encoded, SHAPES)
        for name in SHAPES:
            assert residual[name].dtype == torch.float32
            true[name] += update[name]
            sent[name] += decoded[name]
    assert residual is not None
    for name in SHAPES:
        # two roundings a time of numbers below 64
        assert (true[name] - sent[name] - residual[name]).abs().max() < 30 * 2 * 64 * 2**-24


def test_the_first_residual_is_what_the_first_message_lost() -> None:
    update = {"x": torch.tensor([3.0, -1.0, 0.5, 2.0])}
    encoded, residual = with_residual(Sparse(0.5), update, None, 0)
    assert encoded["x"].tolist() == [3.0, 2.0]
    assert residual["x"].tolist() == [0.0, -1.0, 0.5, 0.0]
    encoded, residual = with_residual(Sparse(0.5), {"x": torch.tensor([0.25, -1.0, 0.25, 0.0])}, residual, 1)
    assert encoded["x"].tolist() == [-2.0, 0.75]
    assert residual["x"].tolist() == [0.25, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("spec", ["topk=0.1", "topk=0.1+bf16", "topk=0.1+int8"])
def test_with_a_residual_the_mean_of_what_is_sent_tends_to_the_mean_of_the_updates(spec: str) -> None:
    """The difference of the means after T times is the residual over T, and the residual stays bounded: for a codec that
    keeps a share δ of the squared norm at most 2 √(1 − δ) / δ times the longest update (Karimireddy et al., lemma 3)."""
    codec, times, shapes = make_codec(spec), 400, {"x": (10, 20)}
    steady = 0.05 * torch.ones(10, 20)  # always too small to be among the largest
    residual, longest = None, 0.0
    true, sent, without = (torch.zeros(10, 20) for _ in range(3))
    for t in range(times):
        update = {"x": steady + numbers(t, 10, 20) * (numbers(7000 + t, 10, 20) > 1.5)}
        encoded, residual = with_residual(codec, update, residual, key=t)
        true += update["x"] / times
        sent += codec.decode(encoded, shapes)["x"] / times
        without += codec.decode(codec.encode(update, t), shapes)["x"] / times
        longest = max(longest, float(update["x"].norm()))
    allowed = 2 * math.sqrt(0.9) / 0.1 * longest / times
    assert (sent - true).norm() < allowed
    # and on the whole bit by bit, while without a residual the small but steady part is lost for good
    assert (sent.mean() - true.mean()).abs() < 0.1 * 0.05
    assert (without.mean() - true.mean()).abs() > 0.5 * 0.05


def test_a_residual_of_another_shape_is_refused() -> None:
    with pytest.raises(CodecError, match=r"^x: a residual of shape \(1,\) for a tensor of shape \(3,\)"):
        with_residual(Sparse(0.5), {"x": torch.ones(3)}, {"x": torch.zeros(1)}, 0)


def test_a_residual_waits_while_its_tensor_stays_at_home() -> None:
    """As in a rule that sends one factor a round."""
    waits = torch.tensor([4.0, 5.0])
    _sent, residual = with_residual(Sparse(0.5), {"x": torch.tensor([3.0, 1.0])}, {"y": waits}, 0)
    assert residual["x"].tolist() == [0.0, 1.0]
    assert residual["y"] is waits
    _, residual = with_residual(Sparse(0.5), {"y": torch.tensor([1.0, -5.0])}, residual, 1)
    assert {name: t.tolist() for name, t in residual.items()} == {"x": [0.0, 1.0], "y": [0.0, 0.0]}


def test_a_residual_that_grew_over_float32_is_refused() -> None:
    with pytest.raises(CodecError, match=r"^x: a value is not finite"):
        with_residual(Quantize(8), {"x": torch.tensor([LARGEST])}, {"x": torch.tensor([LARGEST])}, 0)


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
        "bytes": torch.tensor([0, 255, 7], dtype=torch.uint8),
        "small": torch.tensor([[-128, 127]], dtype=torch.int8),
        "places": torch.tensor([2**31 - 1, -(2**31)], dtype=torch.int32),
        "large": torch.tensor([2**63 - 1, -(2**63)], dtype=torch.int64),
        "one": torch.tensor(-0.0),
    }
    assert {t.dtype for t in tensors.values()} == set(DTYPES.values())
    header, got = open_envelope(seal(HEADER, tensors))
    assert header == HEADER
    assert list(got) == sorted(tensors)
    assert same_bits(got, tensors)
    assert math.copysign(1, got["one"].item()) == -1


def test_bytes_do_not_depend_on_the_order_of_keys() -> None:
    again = seal(dict(reversed(HEADER.items())), dict(reversed(TENSORS.items())))
    assert again == SMALL
    assert SMALL[:4] == b"FKL1"


def test_a_header_that_json_cannot_hold_is_refused_by_the_sender() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        seal({"loss": float("nan")}, {})


UNSENT = {
    "a type that no codec sends": {"x": torch.ones(2, dtype=torch.float64)},
    "whole numbers that no codec sends": {"x": torch.ones(2, dtype=torch.int16)},
    "truth values": {"x": torch.ones(2, dtype=torch.bool)},
    "no numbers": {"x": torch.ones(0)},
    "no name": {"": torch.ones(1)},
    "a name too long": {"x" * (MAX_NAME + 1): torch.ones(1)},
    "a name from the root": {"/etc/passwd": torch.ones(1)},
    "a name that leads upwards": {"a/../../b": torch.ones(1)},
    "a name with a backslash": {"a\\b": torch.ones(1)},
    "a name with a line break": {"a\nb": torch.ones(1)},
    "a name with a NUL": {"a\0b": torch.ones(1)},
    "a name that is written backwards": {"a\u202eb": torch.ones(1)},
    "too many dimensions": {"x": torch.ones((1,) * (MAX_DIMENSIONS + 1))},
}


@pytest.mark.parametrize("tensors", UNSENT.values(), ids=UNSENT.keys())
def test_what_no_receiver_takes_is_refused_by_the_sender(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(EnvelopeError):
        seal({}, tensors)


@pytest.mark.parametrize(
    "name", ["model.layers.0.q.a", "memory/m.b", "shift/3/m.left", "x#scale", "..a", "a..b", "é" * MAX_NAME]
)
def test_names_that_adapters_have_are_taken(name: str) -> None:
    assert list(open_envelope(seal({}, {name: torch.ones(1)}))[1]) == [name]


def test_as_many_tensors_and_dimensions_as_stated_are_taken_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(i): torch.ones((1,) * MAX_DIMENSIONS) for i in range(6)}
    payload = seal({}, tensors)
    monkeypatch.setattr(envelope, "MAX_TENSORS", 6)
    assert len(open_envelope(payload)[1]) == 6
    monkeypatch.setattr(envelope, "MAX_TENSORS", 5)
    with pytest.raises(EnvelopeError, match="6 tensors; at most 5 are read"):
        open_envelope(payload)


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


ONE = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'


def body_with(entries: bytes, data: bytes) -> bytes:
    """A body whose tensors are described by the JSON in `entries`, as it stands."""
    return safetensors_body(b'{"__metadata__": {"fedkeel": "{}"}, ' + entries + b"}", data)


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
    "metadata of another program beside ours": safetensors_body({"__metadata__": {"fedkeel": "{}", "format": "pt"}}),
    "the JSON is a list": safetensors_body([]),
    "the JSON is null": safetensors_body(None),
    "the JSON is no UTF-8": safetensors_body(b'{"\xff": 1}'),
    "JSON nested deep": safetensors_body(b"[" * 200_000),
    "a header nested deep": safetensors_body({"__metadata__": {"fedkeel": "[" * 200_000}}),
    "a giant integer": safetensors_body({"__metadata__": {"fedkeel": "9" * 5000}}),
    "a key twice": safetensors_body(b'{"__metadata__": {"fedkeel": "{}"}, "__metadata__": {"fedkeel": "{}"}}'),
    "a key twice, once in disguise": body_with(b'"x": %s, "\\u0078": %s' % (ONE, ONE), b"\0" * 8),
    "a tensor twice": body_with(b'"x": %s, "x": %s' % (ONE, ONE), b"\0" * 4),
    "a field twice": body_with(b'"x": {"dtype": "F32", "dtype": "F32", "shape": [1], "data_offsets": [0, 4]}', b"\0" * 4),
    "a key twice in the header": safetensors_body({"__metadata__": {"fedkeel": '{"round": 1, "round": 2}'}}),
    "a key twice deep in the header": safetensors_body({"__metadata__": {"fedkeel": '{"a": [{"b": 1, "b": 1}]}'}}),
    "NaN in the header": safetensors_body({"__metadata__": {"fedkeel": '{"loss": NaN}'}}),
    "-Infinity in the header": safetensors_body({"__metadata__": {"fedkeel": '{"loss": -Infinity}'}}),
    "JSON in UTF-16": safetensors_body('{"__metadata__": {"fedkeel": "{}"}}'.encode("utf-16")),
    "something after the JSON": safetensors_body(b'{"__metadata__": {"fedkeel": "{}"}} {}'),
    "objects nested deep": safetensors_body(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no dtype": body_with(b'"x": {"shape": [1], "data_offsets": [0, 4]}', b"\0" * 4),
    "one field more": body_of({"dtype": "F32", "shape": [1], "strides": [1]}, b"\0" * 4),
    "a tensor that is a list": body_with(b'"x": ["F32", [1], [0, 4]]', b"\0" * 4),
    "a type that is a list": body_of({"dtype": ["F32"], "shape": [1]}, b"\0" * 4),
    "a shape that is a number": body_of({"dtype": "F32", "shape": 1}, b"\0" * 4),
    "a shape with a truth value": body_of({"dtype": "F32", "shape": [True]}, b"\0" * 4),
    "a shape with a float": body_of({"dtype": "F32", "shape": [1.0]}, b"\0" * 4),
    "a shape with a text": body_of({"dtype": "F32", "shape": ["1"]}, b"\0" * 4),
    "a shape of two that are negative": body_of({"dtype": "F32", "shape": [-1, -1]}, b"\0" * 4),
    "a shape whose product wraps to one": body_of({"dtype": "U8", "shape": [2**32 + 1, 2**32]}, b"\0"),
    "a shape with a number of 4,000 digits": body_of({"dtype": "F32", "shape": [10**4000]}, b"\0" * 4),
    "a tensor without numbers": body_of({"dtype": "F32", "shape": [0]}),
    "places that are truth values": body_of({"dtype": "U8", "shape": [1], "data_offsets": [False, True]}, b"\0"),
    "places that are floats": body_of({"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4.0]}, b"\0" * 4),
    "three places": body_of({"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}, b"\0" * 4),
    "a place below 0": body_of({"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}, b"\0" * 4),
    "places over 2^64": body_of({"dtype": "F32", "shape": [1], "data_offsets": [2**64, 2**64 + 4]}, b"\0" * 4),
    "two tensors in one place": body_with(b'"x": %s, "y": %s' % (ONE, ONE), b"\0" * 4),
    "a gap before a tensor": body_of({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, b"\0" * 8),
    "a gap after a tensor": body_of({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, b"\0" * 8),
    "a name from the root": body_with(b'"/x": %s' % ONE, b"\0" * 4),
    "a name that leads upwards": body_with(b'"../x": %s' % ONE, b"\0" * 4),
    "a name with a NUL": body_with(b'"x\\u0000": %s' % ONE, b"\0" * 4),
    "a name of half a character": body_with(b'"x\\ud800": %s' % ONE, b"\0" * 4),
    "double precision": body_of({"dtype": "F64", "shape": [1]}, b"\0" * 8),
    "complex numbers": body_of({"dtype": "C64", "shape": [1]}, b"\0" * 8),
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
    header, tensors = open_envelope(crafted(body_with(b'"x": %s' % ONE, b"\0\0\x80?")))
    assert header == {}
    assert tensors["x"].tolist() == [1.0]


EXPECTED = {"m.a": (torch.bfloat16, (2,)), "m.b": (torch.float32, (1, 2))}
UNEXPECTED = {
    "a tensor more": ({"m.a": EXPECTED["m.a"]}, "m.b: not a tensor that the codec sends"),
    "a tensor less": (EXPECTED | {"m.c": (torch.float32, (1,))}, "m.c: missing"),
    "another type": (EXPECTED | {"m.a": (torch.float16, (2,))}, r"m.a: bfloat16 (2,) where the codec sends float16 (2,)"),
    "another shape": (EXPECTED | {"m.b": (torch.float32, (2, 1))}, r"m.b: float32 (1, 2) where the codec sends float32 (2, 1)"),
    "a dimension more": (EXPECTED | {"m.b": (torch.float32, (1, 2, 1))}, "m.b: float32 (1, 2) where the codec sends"),
    "nothing expected": ({}, "m.a: not a tensor that the codec sends"),
}


@pytest.mark.parametrize(("expected", "told"), UNEXPECTED.values(), ids=UNEXPECTED.keys())
def test_other_tensors_than_expected_are_refused_before_one_is_built(
    expected: Any, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same_bits(open_envelope(SMALL, expected=EXPECTED)[1], TENSORS)
    monkeypatch.delattr(torch, "frombuffer")
    for wanted in (expected, lambda header: expected):
        with pytest.raises(EnvelopeError) as caught:
            open_envelope(SMALL, expected=wanted)
        assert str(caught.value) == told or str(caught.value).startswith(told)


def test_what_is_expected_may_follow_from_the_header() -> None:
    seen = []

    def expected(header: dict[str, Any]) -> Any:
        seen.append(header)
        if header["round"] == 4:
            raise EnvelopeError("a message of round 4")
        return EXPECTED

    assert open_envelope(SMALL, expected=expected)[0] == HEADER
    with pytest.raises(EnvelopeError, match="a message of round 4"):
        open_envelope(seal(HEADER | {"round": 4}, TENSORS), expected=expected)
    assert seen == [HEADER, HEADER | {"round": 4}]


def test_a_codec_s_errors_are_errors_of_the_envelope_for_whoever_receives() -> None:
    assert issubclass(CodecError, EnvelopeError)
    assert issubclass(EnvelopeError, ValueError)


def allocated(payload: bytes) -> int:
    """Bytes of Python's memory in use at most while `payload` is opened or refused; tensors are made of such memory."""
    tracemalloc.start()
    opens_or_refuses(payload)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_opening_takes_one_copy_of_the_tensors() -> None:
    payload = seal({}, {str(i): torch.ones(500_000) for i in range(4)})
    assert allocated(payload) < len(payload) + 100_000


@pytest.mark.parametrize("shape", [[2**50], [2**25, 2**25], [2**62, 2], [1, 2**31]])
@pytest.mark.parametrize("end", [4, 2**52, 2**63])
def test_a_header_that_claims_a_giant_is_refused_without_memory_for_it(shape: list[int], end: int) -> None:
    payload = crafted(body_of({"dtype": "F32", "shape": shape, "data_offsets": [0, end]}, b"\0" * 4))
    assert not opens_or_refuses(payload)
    assert allocated(payload) < 100_000
    assert allocated(crafted((2**60).to_bytes(8, "little") + b"{}")) < 100_000


@pytest.mark.parametrize(
    "piece", [b"[]", b"{}", b'{"":0}', b'{"a":{}}', b'"ab"', '"é"'.encode(), '"\U0001f600"'.encode(), b"1.5", b"300"]
)
def test_json_takes_no_more_memory_than_stated(piece: bytes) -> None:
    """At most 40 bytes for each byte of the header, whatever it is filled with."""
    text = b'{"x":[' + b",".join([piece] * (300_000 // (len(piece) + 1))) + b"]}"
    assert allocated(crafted(safetensors_body(text))) < len(text) * 40
    within = safetensors_body(json.dumps({"__metadata__": {"fedkeel": text.decode()}}, ensure_ascii=False).encode())
    assert opens_or_refuses(crafted(within))
    assert allocated(crafted(within)) < len(within) * 40


def test_a_header_over_its_limit_is_refused_unread() -> None:
    text = b'{"__metadata__": {"fedkeel": "{}"}}'.ljust(HEADER_LIMIT)
    assert opens_or_refuses(crafted(safetensors_body(text)))
    with pytest.raises(EnvelopeError, match=f"{HEADER_LIMIT + 1} bytes of JSON in a body of {HEADER_LIMIT + 9}"):
        open_envelope(crafted(safetensors_body(text + b" ")))


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


def test_another_program_reads_the_same_tensors() -> None:
    for payload in (SMALL, seal({}, filled("normal")), seal({}, make_codec("topk=0.1+int4").encode(filled("normal"), 0))):
        assert same_bits(safetensors.torch.load(payload[36:]), open_envelope(payload)[1])


def test_the_body_is_a_plain_safetensors_file() -> None:
    """Layout by hand, so that another program can read it: 8 bytes of length, JSON, data."""
    body = SMALL[36:]
    size = int.from_bytes(body[:8], "little")
    described = json.loads(body[8 : 8 + size])
    assert json.loads(described["__metadata__"]["fedkeel"]) == HEADER
    assert described["m.b"]["shape"] == [1, 2]
    start, end = described["m.b"]["data_offsets"]
    assert torch.frombuffer(bytearray(body[8 + size :][start:end]), dtype=torch.float32).tolist() == [1.5, -2.0]
