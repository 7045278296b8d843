"""What a message says: an adapter, or the change of one, sealed with a header that both ends check."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedkeel.codecs import CODECS, EnvelopeError, open_envelope, seal
from fedkeel.types import Adapter

SCHEMA = 1


def layout(adapter: Adapter) -> str:
    """A fingerprint of an adapter's names, shapes and scales; two ends that differ in it cannot work together."""
    shapes = {name: list(tensor.shape) for name, tensor in adapter.tensors().items()}
    scales = {path: factors.scale for path, factors in adapter.lora.items()}
    return hashlib.sha256(json.dumps([shapes, scales], sort_keys=True).encode()).hexdigest()[:16]


def difference(after: Adapter, before: Adapter) -> dict[str, Tensor]:
    """after − before, tensor by tensor, by flat name."""
    old = before.tensors()
    return {name: tensor - old[name] for name, tensor in after.tensors().items()}


def pack(kind: str, round: int, adapter: Adapter, tensors: Mapping[str, Tensor], codec: str, **more: Any) -> bytes:
    """A message of `kind` (`global` or `update`) about `adapter`'s layout, carrying `tensors` through `codec`."""
    header = {"schema": SCHEMA, "kind": kind, "round": round, "codec": codec, "layout": layout(adapter), **more}
    return seal(header, CODECS[codec].encode(tensors))


def unpack(payload: bytes, kind: str, round: int | None, like: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and float32 tensors of a message made by `pack` for an adapter laid out as `like`.

    round: what the message must be of; None takes any. Raises EnvelopeError if it is anything else than promised.
    """
    header, sent = open_envelope(payload)
    promised = {"schema": SCHEMA, "kind": kind, "layout": layout(like)} | ({} if round is None else {"round": round})
    for key, value in promised.items():
        if header.get(key) != value:
            raise EnvelopeError(f"a message with {key} = {header.get(key)!r} where {value!r} belongs")
    codec = header.get("codec")
    if not isinstance(codec, str) or codec not in CODECS:
        raise EnvelopeError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    shapes = {name: tuple(t.shape) for name, t in like.tensors().items()}
    if {name: tuple(t.shape) for name, t in sent.items()} != shapes:
        raise EnvelopeError("names or shapes of the tensors are not those of the adapter")
    try:
        return header, CODECS[codec].decode(sent)
    except ValueError as error:
        raise EnvelopeError(str(error)) from error
