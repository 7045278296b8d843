"""One message as bytes: magic, SHA-256 of the rest, and a safetensors file with a typed header. No pickle.

b"FKL1" | 32 bytes SHA-256(body) | body = safetensors(tensors, metadata={"fedkeel": header as JSON})

Whoever sends can make the checksum right, so it guards against accidents only, and nothing that follows it is trusted. The
body is read here and not by the safetensors library: every number of its JSON is checked in Python's integers before one
tensor is built. Opening takes one copy of the tensors, so at most the payload's size again, and what JSON becomes in memory:
at most 40 bytes for each byte of a header of at most HEADER_LIMIT.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

MAGIC = b"FKL1"
LIMIT = 2**31 - 1  # bytes; what the engines of today can carry in one message
# A log of 50 base shifts over all 7 maps of 80 layers, two factors each, takes 56,000 tensors and 7 MB of JSON.
HEADER_LIMIT = 2**23  # bytes of JSON
MAX_TENSORS = 2**16
MAX_NAME = 256  # characters
MAX_DIMENSIONS = 8
# what codecs send
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}

Wire = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors of a message before there are any: name -> (type, shape)."""


class EnvelopeError(ValueError):
    """A message that is not what its receiver was promised."""


class _Entry(NamedTuple):
    """One tensor in the body: its type and shape, and where its bytes begin and end, counted from after the JSON."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite, without a temporary of the tensor's size (NaN goes through min and max)."""
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def mismatch(found: Wire, promised: Wire) -> str:
    """What differs between what came and what was to come, one thing of perhaps many; empty if nothing does."""
    for name in sorted(found.keys() ^ promised.keys()):
        return f"{name}: " + ("missing" if name in promised else "not a tensor that the codec sends")
    for name, (dtype, shape) in sorted(promised.items()):
        came, its_shape = found[name]
        if (came, its_shape) != (dtype, shape):
            was, right = (str(t).removeprefix("torch.") for t in (came, dtype))
            return f"{name}: {was} {tuple(its_shape)} where the codec sends {right} {tuple(shape)}"
    return ""


def seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """`header` (JSON values) and `tensors` as one message. Raises EnvelopeError for a type, name or size that no receiver
    takes, see `open_envelope`; whether the values are finite is not looked at."""
    metadata = {"fedkeel": json.dumps(header, sort_keys=True, allow_nan=False)}
    body = safetensors.torch.save({k: t.contiguous() for k, t in sorted(tensors.items())}, metadata)
    _read(memoryview(body))
    return MAGIC + hashlib.sha256(body).digest() + body


def open_envelope(
    payload: bytes, limit: int = LIMIT, expected: Wire | Callable[[dict[str, Any]], Wire] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a message made by `seal`; the tensors in the order of their names, in memory of their own.

    expected: the names, types and shapes that the tensors must have, see `Codec.wire`, or a function of the header that
    gives them and may refuse the header by an EnvelopeError; None takes any.
    Raises EnvelopeError, and nothing else, on a message longer than `limit` bytes, with the wrong magic or checksum,
    malformed, with other tensors than expected, or holding a value that is not finite.
    """
    if len(payload) > limit:
        raise EnvelopeError(f"a message of {len(payload)} bytes, over the limit of {limit}")
    if payload[:4] != MAGIC:
        raise EnvelopeError(f"not a FedKeel message: it begins with {payload[:4]!r} instead of {MAGIC!r}")
    body = memoryview(payload)[36:]
    if hashlib.sha256(body).digest() != payload[4:36]:
        raise EnvelopeError("the checksum does not match: the message was cut or altered on its way")
    header, entries, data = _read(body)
    if expected is not None:
        promised = expected(header) if callable(expected) else expected
        problem = mismatch({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, promised)
        if problem:
            raise EnvelopeError(problem)
    tensors = {}
    for name, entry in sorted(entries.items()):
        tensor = torch.frombuffer(bytearray(data[entry.begin : entry.end]), dtype=entry.dtype).reshape(entry.shape)
        if entry.dtype.is_floating_point and not is_finite(tensor):
            raise EnvelopeError(f"{name} holds a value that is not finite")
        tensors[name] = tensor
    return header, tensors


def header_of(payload: bytes) -> dict[str, Any]:
    """The header of a message, before anything is promised of it. Raises EnvelopeError on one that is malformed."""
    if payload[:4] != MAGIC:
        raise EnvelopeError(f"not a FedKeel message: it begins with {payload[:4]!r} instead of {MAGIC!r}")
    return _read(memoryview(payload)[36:])[0]


def _read(body: memoryview) -> tuple[dict[str, Any], dict[str, _Entry], memoryview]:
    """The header, where the tensors lie, and the bytes that they lie in, of a safetensors file held to all our limits."""
    size = int.from_bytes(body[:8], "little")
    if len(body) < 8 or size > min(HEADER_LIMIT, len(body) - 8):
        raise EnvelopeError(f"{size} bytes of JSON in a body of {len(body)}; at most {HEADER_LIMIT} are read")
    data = body[8 + size :]
    try:
        text = str(body[8 : 8 + size], "utf-8")
    except UnicodeDecodeError as error:
        raise EnvelopeError(f"malformed JSON: {error}") from error
    described = _object(_parse(text), "the JSON of a message")
    metadata = described.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.keys() != {"fedkeel"} or not isinstance(metadata["fedkeel"], str):
        raise EnvelopeError("not a FedKeel message: its metadata are not a text under `fedkeel`")
    header = _object(_parse(metadata["fedkeel"]), "the header")
    if len(described) > MAX_TENSORS:
        raise EnvelopeError(f"{len(described)} tensors; at most {MAX_TENSORS} are read")
    entries = {name: _entry(name, value, len(data)) for name, value in described.items()}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != end:
            raise EnvelopeError(f"{name} begins at byte {entry.begin} where the tensor before it ends at {end}")
        end = entry.end
    if end != len(data):
        raise EnvelopeError(f"{len(data)} bytes of tensors, of which {end} are described")
    return header, entries, data


def _entry(name: str, described: Any, size: int) -> _Entry:
    """One tensor as the JSON describes it, checked against a body with `size` bytes of tensors."""
    # no control characters or lone surrogates, and nothing that could lead out of a folder, should it become a file's name
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name[0] == "/" or "\\" in name or ".." in name.split("/"):
        raise EnvelopeError(f"{name[:MAX_NAME]!r} is no name for a tensor")
    fields = _object(described, name)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise EnvelopeError(f"{name}: not described by dtype, shape and data_offsets alone")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise EnvelopeError(f"{name}: a type that is none of {', '.join(DTYPES)}")
    # True is an int too. A tensor without numbers has no business here, and so no dimension is longer than its bytes.
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 < n <= size for n in shape):
        raise EnvelopeError(f"{name}: a shape that is not of at most {MAX_DIMENSIONS} whole numbers from 1 to {size}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and 0 <= n <= size for n in offsets):
        raise EnvelopeError(f"{name}: places that are not two whole numbers from 0 to {size}")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise EnvelopeError(f"{name}: {end - begin} bytes for {dtype} {shape}")
    return _Entry(DTYPES[dtype], tuple(shape), begin, end)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise EnvelopeError(f"{what} is of type {type(value).__name__} where an object belongs")
    return value


def _parse(text: str) -> Any:
    """JSON without the liberties that Python takes: no key twice, no NaN. Raises EnvelopeError if it is anything else."""
    try:
        return json.loads(text, object_pairs_hook=_without_twins, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise EnvelopeError(f"malformed JSON: {error}") from error


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise EnvelopeError("a key that stands twice in one object")
    return unique


def _refuse(constant: str) -> Any:
    raise EnvelopeError(f"{constant} is no JSON")
