"""What a message says: an adapter, or the change of one, sealed with a header that both ends check.

A receiver works out from its own adapter, the codec and the header's counts which tensors must follow, of which type and
shape, and refuses anything else before a tensor is built.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedkeel.exchange.codecs import Codec, EnvelopeError, Wire, decoded, make_codec, open_envelope, seal
from fedkeel.exchange.codecs.quantize import matrix_of
from fedkeel.exchange.heads import heads_packed, heads_unpacked, heads_wire
from fedkeel.exchange.quantile import read_bound
from fedkeel.tables import Rule
from fedkeel.types import Adapter, Global, Shift

SCHEMA = 3
MOST_TASKS, MOST_LETTERS = 4096, 2**18  # of one site's counts
MEMORY = "memory/"  # before the names of the adapter that ended the previous stage
CHOSEN = {"serve": math.inf, "average": 1.0}  # fields of a Global that validation rows choose -> below what
REACH = "reach/"  # before the name of a tensor: of its rows
SHIFT = "shift/"  # before the number of an entry of the log of base shifts, and a module path


def layout(adapter: Adapter) -> str:
    """A fingerprint of an adapter's names, shapes and scales; two ends that differ in it cannot work together."""
    shapes = {name: list(tensor.shape) for name, tensor in adapter.tensors().items()}
    scales = {path: factors.scale for path, factors in adapter.lora.items()}
    return hashlib.sha256(json.dumps([shapes, scales], sort_keys=True).encode()).hexdigest()[:16]


def difference(after: Adapter, before: Adapter) -> dict[str, Tensor]:
    """after − before, tensor by tensor, by flat name."""
    old = before.tensors()
    return {name: tensor - old[name] for name, tensor in after.tensors().items()}


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """name -> shape."""
    return {name: tuple(t.shape) for name, t in tensors.items()}


def about(kind: str, round: int, adapter: Adapter, **more: Any) -> dict[str, Any]:
    """The header of a message of `kind` about `adapter`'s layout, in round `round`."""
    return {"schema": SCHEMA, "kind": kind, "round": round, "layout": layout(adapter), **more}


def check_promised(header: Mapping[str, Any], promised: Mapping[str, Any]) -> None:
    """Raise EnvelopeError where a header says anything else than was promised."""
    for key, value in promised.items():
        if header.get(key) != value or isinstance(header.get(key), bool):
            raise EnvelopeError(f"a message with {key} = {header.get(key)!r} where {value!r} belongs")


def pack(kind: str, round: int, adapter: Adapter, encoded: Mapping[str, Tensor], codec: str, **more: Any) -> bytes:
    """A message of `kind` (`global` or `update`) about `adapter`'s layout, carrying what `codec` made of its tensors."""
    return seal(about(kind, round, adapter, codec=codec, **more), encoded)


def unpack(
    payload: bytes,
    kind: str,
    round: int | None,
    like: Adapter,
    names: Collection[str] | None = None,
    codec: str = "",
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and float32 tensors of a message made by `pack` for an adapter laid out as `like`.

    round: what the message must be of; None takes any. names: the tensors that it must carry; None: all. codec: what it
    must have come through; empty takes any known one. Raises EnvelopeError if it is anything else than promised.
    """
    shapes = {name: shape for name, shape in shapes_of(like.tensors()).items() if names is None or name in names}

    def expected(header: dict[str, Any]) -> Wire:
        return _codec(header, kind, round, like, codec).wire(shapes)

    header, sent = open_envelope(payload, expected=expected)
    return header, decoded(make_codec(header["codec"]), sent, shapes)


def _codec(header: Mapping[str, Any], kind: str, round: int | None, like: Adapter, codec: str) -> Codec:
    """The codec that a header names, once it has promised all else that it must."""
    promised = {"schema": SCHEMA, "kind": kind, "layout": layout(like)}
    promised |= ({} if round is None else {"round": round}) | ({"codec": codec} if codec else {})
    check_promised(header, promised)
    found = header.get("codec")
    return make_codec(found if isinstance(found, str) else repr(found))


def read_counts(value: Any) -> dict[str, int]:
    """Task -> supervised positions from a header, or EnvelopeError."""
    # True is an int too, and JSON integers have no bound; a float must hold this one
    if not isinstance(value, dict) or not all(type(n) is int and 0 <= n <= 2**53 for n in value.values()):
        raise EnvelopeError(f"the message reports tasks {value!r} where task names with whole numbers belong")
    if len(value) > MOST_TASKS or sum(map(len, value)) > MOST_LETTERS:  # checkpoints hold those of all sites
        raise EnvelopeError(
            f"the message reports {len(value)} tasks, {sum(map(len, value))} letters; at most {MOST_TASKS}, {MOST_LETTERS}"
        )
    return value


@dataclass(frozen=True)
class Way:
    """How an adapter travels. codec: its spec. names: of the tensors that do; None: all. key: of what the codec draws."""

    codec: str = "fp32"
    names: Collection[str] | None = None
    key: int = 0


def pack_global(kind: str, state: Global, way: Way = Way(), since: int | None = None, **more: Any) -> bytes:
    """The state of a federation as a message of `kind` (`global` or `checkpoint`), without the sites' counts.

    since: entries of the log of base shifts that the receiver holds; those after them travel, in float32. None sends none.
    """
    tensors = {name: t for name, t in state.adapter.tensors().items() if way.names is None or name in way.names}
    if state.memory is not None:
        # copies: tensors that share memory are refused by the format
        tensors |= {MEMORY + name: tensor.clone() for name, tensor in state.memory.tensors().items()}
    first = len(state.shifts) if since is None else since
    plain, ranks = {}, []
    for number, entry in enumerate(state.shifts[first:], first):
        ranks.append({path: left.shape[1] for path, (left, _) in sorted(entry.items())})
        for path, (left, right) in entry.items():
            plain[f"{SHIFT}{number}/{path}.left"], plain[f"{SHIFT}{number}/{path}.right"] = left, right
    log = {"first": first, "ranks": ranks}
    heads, parts = heads_packed(state.heads)
    plain |= parts
    plain |= {REACH + name: reach.float().clone() for name, reach in state.reach.items()}
    remembers = state.memory is not None
    encoded = make_codec(way.codec).encode(tensors, way.key) | plain
    told = {"drift": dict(state.drift), "memory": remembers, "shifts": log, "heads": heads, **more}
    told |= {name: value for name in CHOSEN if (value := getattr(state, name)) is not None}
    told |= ({"clip": state.clip} if state.clip else {}) | ({"reach": sorted(state.reach)} if state.reach else {})
    return pack(kind, state.round, state.adapter, encoded, way.codec, **told)


def unpack_global(
    payload: bytes,
    kind: str,
    like: Adapter,
    names: Collection[str] | None = None,
    codec: str = "",
) -> tuple[dict[str, Any], Global]:
    """Header and state of a message made by `pack_global`. Tensors that do not travel are those of `like`.

    The state's `shifts` are the entries that travelled; header["shifts"]["first"] counts those before them.
    names, codec: as in `unpack`. Raises EnvelopeError if it is anything else than promised.
    """
    whole = shapes_of(like.tensors())
    shapes = {name: shape for name, shape in whole.items() if names is None or name in names}
    plain: Wire = {}

    def expected(header: dict[str, Any]) -> Wire:
        nonlocal shapes, plain
        found = _codec(header, kind, None, like, codec)
        if not isinstance(header.get("memory"), bool):
            raise EnvelopeError(f"a message with memory = {header.get('memory')!r} where true or false belongs")
        if header["memory"]:
            shapes = shapes | {MEMORY + name: shape for name, shape in whole.items()}
        plain = _shift_wire(header.get("shifts"), like) | heads_wire(header.get("heads", []))
        plain |= _reach_wire(header.get("reach", []), whole)
        return found.wire(shapes) | plain

    header, sent = open_envelope(payload, expected=expected)
    tensors = decoded(make_codec(header["codec"]), {n: t for n, t in sent.items() if n not in plain}, shapes)
    round, drift = header.get("round"), header.get("drift")
    if type(round) is not int or round < 0:
        raise EnvelopeError(f"a message of round {round!r}")
    if not isinstance(drift, dict) or not all(type(v) is float and 0 <= v < math.inf for v in drift.values()):
        raise EnvelopeError(f"the message reports a drift of {drift!r}")
    before = {name.removeprefix(MEMORY): t for name, t in tensors.items() if name.startswith(MEMORY)}
    current = like.tensors() | {name: t for name, t in tensors.items() if not name.startswith(MEMORY)}
    memory = like.with_tensors(before) if before else None
    first = header["shifts"]["first"]
    # copies, for the reason that `Cast.decode` gives
    shifts = [
        {p: (sent[f"{SHIFT}{n}/{p}.left"].clone(), sent[f"{SHIFT}{n}/{p}.right"].clone()) for p in ranks}
        for n, ranks in enumerate(header["shifts"]["ranks"], first)
    ]
    heads = heads_unpacked(header.get("heads", []), sent)  # a checkpoint from before there were any names none
    chosen: dict[str, Any] = {name: header.get(name) for name in CHOSEN}
    for name, most in CHOSEN.items():
        if chosen[name] is not None and not (type(chosen[name]) is float and 0 <= chosen[name] < most):
            raise EnvelopeError(f"the message reports {name} = {chosen[name]!r}")
    found = Global(round, like.with_tensors(current), memory, drift=drift, shifts=shifts, heads=heads, **chosen)
    reach = {name: sent[REACH + name].clone() for name in header.get("reach", [])}
    if not all(bool((r > 0).all()) for r in reach.values()):
        raise EnvelopeError("the message tells a reach of rows that is not above 0")
    return header, replace(found, clip=read_bound(header.get("clip", 0)), reach=reach)


def _reach_wire(names: Any, shapes: Mapping[str, tuple[int, ...]]) -> Wire:
    """The tensors of the reach of rows that a header announces. Raises EnvelopeError where it announces nonsense."""
    if not isinstance(names, list) or not all(isinstance(name, str) and name in shapes for name in names):
        raise EnvelopeError(f"the message reports a reach of {names!r:.99}, which are no tensors of this adapter")
    return {REACH + name: (torch.float32, (min(matrix_of(shapes[name])),)) for name in names}


def _shift_wire(log: Any, like: Adapter) -> Wire:
    """The tensors of the entries that a header announces. Raises EnvelopeError where it announces nonsense."""
    if not isinstance(log, dict) or set(log) != {"first", "ranks"} or type(log["first"]) is not int or log["first"] < 0:
        raise EnvelopeError(f"the message reports base shifts {log!r}")
    if not isinstance(log["ranks"], list) or not all(isinstance(entry, dict) for entry in log["ranks"]):
        raise EnvelopeError("the message reports base shifts without their ranks")
    wire: Wire = {}
    for number, entry in enumerate(log["ranks"], log["first"]):
        for path, rank in entry.items():
            if path not in like.lora:
                raise EnvelopeError(f"a base shift of {path!r}, which is no map of this adapter")
            d_out, d_in = like.lora[path].b.shape[0], like.lora[path].a.shape[1]
            if type(rank) is not int or not 1 <= rank <= min(d_out, d_in):
                raise EnvelopeError(f"a base shift of {path} of rank {rank!r}; from 1 to {min(d_out, d_in)} is possible")
            wire[f"{SHIFT}{number}/{path}.left"] = (torch.float32, (d_out, rank))
            wire[f"{SHIFT}{number}/{path}.right"] = (torch.float32, (rank, d_in))
    return wire


def pack_tensors(tensors: Mapping[str, Tensor], **header: Any) -> bytes:
    """Named float32 tensors with a header, for files of a run's own."""
    return seal({"schema": SCHEMA, **header}, {name: t.detach().cpu().clone() for name, t in tensors.items()})


def pack_shift(entry: Shift) -> bytes:
    """One entry of the log of base shifts, for its file."""
    pairs = {f"{path}.{side}": t for path, (left, right) in entry.items() for side, t in (("left", left), ("right", right))}
    return pack_tensors(pairs, kind="shift", paths=sorted(entry))


def unpack_shift(payload: bytes, like: Adapter | None = None) -> Shift:
    """What `pack_shift` packed. like: an adapter whose maps it must fit. Raises EnvelopeError."""
    header, sent = open_envelope(payload)
    paths = header.get("paths")
    if header.get("kind") != "shift" or not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise EnvelopeError("this is no entry of a log of base shifts")
    if sent.keys() != {f"{path}.{side}" for path in paths for side in ("left", "right")}:
        raise EnvelopeError("an entry of a log of base shifts whose tensors are not two for each path that it names")
    # copies, for the reason that `Cast.decode` gives
    entry = {path: (sent[f"{path}.left"].clone(), sent[f"{path}.right"].clone()) for path in paths}
    for path, (left, right) in entry.items():
        if left.dim() != 2 or right.dim() != 2 or left.shape[1] != right.shape[0]:
            raise EnvelopeError(f"a base shift of {path} of shapes {tuple(left.shape)} and {tuple(right.shape)}")
        if like is not None and (
            path not in like.lora or (left.shape[0], right.shape[1]) != (like.lora[path].b.shape[0], like.lora[path].a.shape[1])
        ):
            raise EnvelopeError(
                f"a base shift of {path!r}, {left.shape[0]} by {right.shape[1]}, which fits no map of the adapter"
            )
    return entry


def unsent(adapter: Adapter, rule: Rule) -> str:
    """A fingerprint of the tensors that both ends hold and that never travel under `rule`: with it they check that they hold
    the same. Factors that stay at the sites differ, and are no part of it."""
    digest = hashlib.sha256()
    sent = adapter.tensors() if rule.personal else names_of(adapter, rule.down)
    for name, tensor in sorted(adapter.tensors().items()):
        if name not in sent:
            digest.update(name.encode() + b"\0" + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


NOTHING_UNSENT = hashlib.sha256().hexdigest()[:16]


def names_of(adapter: Adapter, factors: Collection[str], without: Collection[str] = ()) -> set[str]:
    """Flat names of `factors` (`a`, `b`) of every map but those `without`, and of all dense parameters."""
    return {f"{path}.{f}" for path in adapter.lora if path not in without for f in factors} | set(adapter.dense)
