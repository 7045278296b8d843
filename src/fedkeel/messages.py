"""What a message says: an adapter, or the change of one, sealed with a header that both ends check."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fedkeel.codecs import CODECS, EnvelopeError, open_envelope, seal
from fedkeel.types import Adapter, Global

SCHEMA = 2
MEMORY = "memory/"  # before the names of the adapter that ended the previous stage


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
    header, tensors = _open(payload, kind, round, like)
    _check_shapes(tensors, like)
    return header, tensors


def _open(payload: bytes, kind: str, round: int | None, like: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header, sent = open_envelope(payload)
    promised = {"schema": SCHEMA, "kind": kind, "layout": layout(like)} | ({} if round is None else {"round": round})
    for key, value in promised.items():
        if header.get(key) != value:
            raise EnvelopeError(f"a message with {key} = {header.get(key)!r} where {value!r} belongs")
    codec = header.get("codec")
    if not isinstance(codec, str) or codec not in CODECS:
        raise EnvelopeError(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    try:
        return header, CODECS[codec].decode(sent)
    except ValueError as error:
        raise EnvelopeError(str(error)) from error


def _check_shapes(tensors: Mapping[str, Tensor], like: Adapter) -> None:
    shapes = {name: tuple(t.shape) for name, t in like.tensors().items()}
    if {name: tuple(t.shape) for name, t in tensors.items()} != shapes:
        raise EnvelopeError("names or shapes of the tensors are not those of the adapter")


def read_counts(value: Any) -> dict[str, int]:
    """Task -> supervised positions from a header, or EnvelopeError."""
    # True is an int too, and JSON integers have no bound; a float must hold this one
    if not isinstance(value, dict) or not all(type(n) is int and 0 <= n <= 2**53 for n in value.values()):
        raise EnvelopeError(f"the message reports tasks {value!r} where task names with whole numbers belong")
    return value


def pack_global(kind: str, state: Global, codec: str, **more: Any) -> bytes:
    """The state of a federation as a message of `kind` (`global` or `checkpoint`), without the sites' counts."""
    tensors = state.adapter.tensors()
    if state.memory is not None:
        # copies: tensors that share memory are refused by the format
        tensors |= {MEMORY + name: tensor.clone() for name, tensor in state.memory.tensors().items()}
    return pack(kind, state.round, state.adapter, tensors, codec, drift=dict(state.drift), **more)


def unpack_global(payload: bytes, kind: str, like: Adapter) -> tuple[dict[str, Any], Global]:
    """Header and state of a message made by `pack_global`. Raises EnvelopeError if it is anything else than promised."""
    header, tensors = _open(payload, kind, None, like)
    current = {name: t for name, t in tensors.items() if not name.startswith(MEMORY)}
    before = {name.removeprefix(MEMORY): t for name, t in tensors.items() if name.startswith(MEMORY)}
    _check_shapes(current, like)
    if before:
        _check_shapes(before, like)
    round, drift = header.get("round"), header.get("drift")
    if type(round) is not int or round < 0:
        raise EnvelopeError(f"a message of round {round!r}")
    if not isinstance(drift, dict) or not all(type(v) is float and 0 <= v < math.inf for v in drift.values()):
        raise EnvelopeError(f"the message reports a drift of {drift!r}")
    memory = like.with_tensors(before) if before else None
    return header, Global(round, like.with_tensors(current), memory, drift=drift)
