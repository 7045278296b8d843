"""Send the largest entries of every tensor, and keep what was not sent for the next time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fedkeel.exchange.codecs.chain import CodecError, Shapes, as_float32, check_wire, count_of, extra
from fedkeel.exchange.codecs.envelope import Wire, is_finite


@dataclass(frozen=True)
class Sparse:
    """Keep the k = max(1, ⌈share · numel⌉) entries of largest magnitude, of equal ones those that come first.

    share: over 0 and under 1, read as the decimal number that it prints as (0.1 of 30 is 3).

    On the wire, with entries counted in row-major order: float32 (k,) under the tensor's name, the values in the order of
    their places; and the places, whichever of two forms is smaller: `<name>#index`, int32 (k,) and increasing, where
    32 k ≤ numel, else `<name>#mask`, uint8 (⌈numel / 8⌉,), bit i % 8 (of value 2^(i % 8)) of byte i // 8 set where entry i
    is kept, and 0 after the last entry.

    Source: Stich, Cordonnier & Jaggi 2018 (arXiv:1809.07599).
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise CodecError(f"a share of {self.share} where a number over 0 and under 1 belongs")

    @property
    def name(self) -> str:
        """`topk=SHARE`."""
        return f"topk={self.share!r}"

    @property
    def unbiased(self) -> bool:
        """No: small entries are always dropped; see `with_residual`."""
        return False

    def wire(self, shapes: Shapes) -> Wire:
        """See `Codec.wire`."""
        sent: Wire = {}
        for name, shape in shapes.items():
            count = count_of(name, shape)
            kept = self._kept(count)
            sent[name] = (torch.float32, (kept,))
            if _by_index(kept, count):
                sent[extra(name, "index")] = (torch.int32, (kept,))
            else:
                sent[extra(name, "mask")] = (torch.uint8, ((count + 7) // 8,))
        return sent

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """See `Codec.encode`; nothing is drawn."""
        sent = {}
        for name, tensor in tensors.items():
            values = as_float32(name, tensor).flatten()
            places = self._places(values)
            sent[name] = values[places]
            if _by_index(len(places), len(values)):
                sent[extra(name, "index")] = places.int()
            else:
                sent[extra(name, "mask")] = _pack(places, len(values))
        return sent

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """See `Codec.decode`; 0 where nothing was sent."""
        check_wire(encoded, self.wire(shapes))
        tensors = {}
        for name, shape in shapes.items():
            count, values = math.prod(shape), encoded[name]
            if not is_finite(values):
                raise CodecError(f"{name}: a value is not finite")
            if _by_index(len(values), count):
                places = encoded[extra(name, "index")].long()
                if places[0] < 0 or places[-1] >= count or (places[1:] <= places[:-1]).any():
                    raise CodecError(f"{name}: the places are not increasing numbers from 0 to under {count}")
            else:
                places = _unpack(encoded[extra(name, "mask")])
                if len(places) != len(values) or places[-1] >= count:
                    raise CodecError(f"{name}: a mask that does not mark {len(values)} of {count} entries")
            tensors[name] = values.new_zeros(count).index_put_((places,), values).view(shape)
        return tensors

    def bound(self, tensor: Tensor) -> Tensor:
        """|x| where the entry is dropped, 0 where it is kept."""
        values = as_float32("x", tensor)
        lost = values.abs().flatten()
        lost[self._places(values.flatten())] = 0.0
        return lost.view(values.shape)

    def _kept(self, count: int) -> int:
        # exactly: in floats 0.07 · 100 is 7.000000000000001, and its ceiling 8
        return max(1, math.ceil(Fraction(repr(self.share)) * count))

    def _places(self, values: Tensor) -> Tensor:
        """int64 (k,), increasing: which of the values (n,) are kept."""
        size = values.abs()
        least = size.topk(self._kept(len(values))).values[-1]
        kept = size > least
        # topk chooses among equal entries as it likes; here the first of them fill up what is left
        equal = (size == least).nonzero().squeeze(1)
        kept[equal[: self._kept(len(values)) - int(kept.sum())]] = True
        return kept.nonzero().squeeze(1)


def _by_index(kept: int, count: int) -> bool:
    """Whether the places travel as int32 numbers, which end at 2^31, and not as a mask of one bit an entry."""
    return 32 * kept <= count <= 2**31


def _pack(places: Tensor, count: int) -> Tensor:
    """Places (k,) out of `count` as a mask, uint8 (⌈count / 8⌉,)."""
    bits = torch.zeros((count + 7) // 8 * 8, dtype=torch.uint8, device=places.device)
    bits[places] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=places.device)).sum(1, dtype=torch.uint8)


def _unpack(mask: Tensor) -> Tensor:
    """The places of the bits that are set, int64, increasing; the inverse of `_pack`."""
    bits = mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten().nonzero().squeeze(1)
