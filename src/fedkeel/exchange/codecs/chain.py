"""What a codec is, what every codec checks, and two codecs in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedkeel.exchange.codecs.envelope import EnvelopeError, Wire, is_finite, mismatch

Shapes = Mapping[str, tuple[int, ...]]


class CodecError(EnvelopeError):
    """A spec that makes no sense, tensors that a codec cannot send, or tensors that no codec of that spec has sent."""


class Codec(Protocol):
    """From named tensors to the tensors that travel, and back. Immutable, and determined by its `name`."""

    @property
    def name(self) -> str:
        """The spec in its one canonical form; `make_codec` of it gives an equal codec."""
        ...

    @property
    def unbiased(self) -> bool:
        """Whether the mean of decode(encode(x, key)) over keys is x."""
        ...

    def wire(self, shapes: Shapes) -> Wire:
        """Exactly the tensors that travel for tensors of these shapes: name -> (type, shape), whatever their values.

        Raises CodecError for a name or a shape that the codec cannot send.
        """
        ...

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """The tensors that travel, laid out as `wire` says. Tensors are read as float32.

        key: from `rng.derive`; the result is a function of key, names and values alone, the same on every machine and in
        whatever order the names come. Raises CodecError if a value is not finite or does not fit.
        """
        ...

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """Float32 tensors of `shapes`, all finite, in fresh memory. Raises CodecError if `encoded` cannot be `encode`'s."""
        ...

    def bound(self, tensor: Tensor) -> Tensor:
        """An upper bound of |decode(encode(x)) − x| for every entry of a float32 tensor, under any key, in its shape."""
        ...


def count_of(name: str, shape: tuple[int, ...]) -> int:
    """How many numbers the tensor has. Raises CodecError for one without any: there is nothing to scale or to choose."""
    count = math.prod(shape)
    if not count:
        raise CodecError(f"{name}: a tensor of shape {shape} holds no numbers")
    return count


def as_float32(name: str, tensor: Tensor) -> Tensor:
    """The values that a codec works on, apart from any graph. Raises CodecError if there are none, or one is not finite, or
    one does not fit."""
    count_of(name, tuple(tensor.shape))
    values = tensor.detach().float()
    if not is_finite(values):
        raise CodecError(f"{name}: a value " + ("does not fit float32" if is_finite(tensor.detach()) else "is not finite"))
    return values


def extra(name: str, kind: str) -> str:
    """The name of what travels beside `name`: `<name>#<kind>`, which is no tensor's own name, as those hold no `#`."""
    if "#" in name:
        raise CodecError(f"{name}: a tensor's name holds no '#'; that is for what a codec sends beside it")
    return f"{name}#{kind}"


def check_wire(encoded: Mapping[str, Tensor], promised: Wire) -> None:
    """Raise CodecError unless names, types and shapes are exactly those promised."""
    problem = mismatch({name: (t.dtype, tuple(t.shape)) for name, t in encoded.items()}, promised)
    if problem:
        raise CodecError(problem)


def decoded(codec: Codec, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """`codec.decode`, held to what it promises: a codec of somebody else's could return anything. Raises CodecError."""
    found = codec.decode(encoded, shapes)
    problem = mismatch(
        {name: (t.dtype, tuple(t.shape)) for name, t in found.items()},
        {n: (torch.float32, tuple(s)) for n, s in shapes.items()},
    )
    if problem:
        raise CodecError(f"codec {codec.name!r} decodes to something else than was sent: {problem}")
    return found


@dataclass(frozen=True)
class Chain:
    """What `outer` sends under the tensors' own names is sent through `inner`; what it sends beside them goes as it is.

    outer: a codec whose decode places those values and is linear in them, such as `Sparse`.
    """

    outer: Codec
    inner: Codec

    @property
    def name(self) -> str:
        """`outer+inner`."""
        return f"{self.outer.name}+{self.inner.name}"

    @property
    def unbiased(self) -> bool:
        """Only if both are."""
        return self.outer.unbiased and self.inner.unbiased

    def wire(self, shapes: Shapes) -> Wire:
        """See `Codec.wire`."""
        return self.outer.wire(shapes) | self.inner.wire(self._values(shapes))

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """See `Codec.encode`."""
        sent = self.outer.encode(tensors, key)
        return sent | self.inner.encode({name: sent[name] for name in tensors}, key)

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """See `Codec.decode`."""
        check_wire(encoded, self.wire(shapes))
        kept = self._values(shapes)
        values = self.inner.decode({name: encoded[name] for name in self.inner.wire(kept)}, kept)
        beside = {name: encoded[name] for name in self.outer.wire(shapes) if name not in shapes}
        return self.outer.decode(beside | values, shapes)

    def bound(self, tensor: Tensor) -> Tensor:
        """The sum: of what `outer` loses, and of what `inner` loses of the values that `outer` sends, in their places."""
        sent = self.outer.encode({"x": tensor}, 0)
        lost = self.inner.bound(sent["x"])
        return self.outer.bound(tensor) + self.outer.decode(sent | {"x": lost}, {"x": tuple(tensor.shape)})["x"]

    def _values(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        sent = self.outer.wire(shapes)
        return {name: sent[name][1] for name in shapes}
