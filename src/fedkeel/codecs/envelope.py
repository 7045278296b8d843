"""One message as bytes: magic, SHA-256 of the rest, and a safetensors file with a typed header. No pickle.

b"FKL1" | 32 bytes SHA-256(body) | body = safetensors(tensors, metadata={"fedkeel": header as JSON})
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

MAGIC = b"FKL1"
LIMIT = 2**31 - 1  # bytes; what the engines of today can carry in one message


class EnvelopeError(ValueError):
    """A message that is not what its receiver was promised."""


def seal(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """`header` (JSON values) and `tensors` as one message."""
    metadata = {"fedkeel": json.dumps(header, sort_keys=True, allow_nan=False)}
    body = safetensors.torch.save({k: t.contiguous() for k, t in sorted(tensors.items())}, metadata)
    return MAGIC + hashlib.sha256(body).digest() + body


def open_envelope(payload: bytes, limit: int = LIMIT) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and tensors of a message made by `seal`.

    Raises EnvelopeError on a message longer than `limit` bytes, with the wrong magic or checksum, malformed, or holding a
    value that is not finite.
    """
    if len(payload) > limit:
        raise EnvelopeError(f"a message of {len(payload)} bytes, over the limit of {limit}")
    if payload[:4] != MAGIC:
        raise EnvelopeError(f"not a FedKeel message: it begins with {payload[:4]!r} instead of {MAGIC!r}")
    body = payload[36:]
    if hashlib.sha256(body).digest() != payload[4:36]:
        raise EnvelopeError("the checksum does not match: the message was cut or altered on its way")
    try:
        size = int.from_bytes(body[:8], "little")
        header = json.loads(json.loads(body[8 : 8 + size])["__metadata__"]["fedkeel"])
        # The parser hands tensors out in no fixed order; sums over them need one.
        tensors = dict(sorted(safetensors.torch.load(body).items()))
        finite = {name: bool(torch.isfinite(tensor).all()) for name, tensor in tensors.items()}
    # RuntimeError: JSON nested too deep, a shape or a type that torch cannot hold
    except (KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise EnvelopeError(f"a malformed message: {error}") from error
    if not isinstance(header, dict):
        raise EnvelopeError(f"a header of type {type(header).__name__} where an object belongs")
    for name, fine in finite.items():
        if not fine:
            raise EnvelopeError(f"{name} holds a value that is not finite")
    return header, tensors
