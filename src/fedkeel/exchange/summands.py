"""What a site adds behind masks: its change in whole numbers of steps that all sites know beforehand, exact in their sum.

`Whole` has steps of 2⁻²² and 32 bits. `Narrow` has few bits, m: of n sites each sends

    q = ⌊x / s + Q / 2 + u⌋,    s = 2 R / Q,    Q = ⌊(2^m − 1) / n⌋,    x cut to [−R, R],

of 0 … Q, so that the sum of all stays below 2^m. u is drawn evenly from (0, 1) by a key that both ends have, and taken off
again: s (q − u + ½ − Q / 2) is off by at most s / 2, by nothing in the mean and s² / 12 in variance, whatever x in [−R, R] is
(subtractive dither; Schuchman 1964). R, the reach of a row, is the same at all sites: it comes with the message down, made of
the round before, in which beside the change the rows' root mean squares were added up. In a stage's first round it is what
AdamW is likely to make it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.exchange.codecs import EnvelopeError, Wire, make_codec
from fedkeel.exchange.codecs.chain import Shapes, as_float32, extra
from fedkeel.exchange.codecs.quantize import along, axis_of, matrix_of
from fedkeel.exchange.masks import MaskError, mean_of, whole_numbers
from fedkeel.rng import counter_uniform, derive

LEAST = 3  # Q at least; with less, what error feedback carries grows from round to round
LOW, TOP = 2.0**-6, 16.0  # of a row's root mean square by its reach
TINY, HUGE = 2.0**-100, 2.0**100  # of a reach, with room for its products in float32
BLOCK = 2**18  # numbers that are packed at once

Means = tuple[dict[str, Tensor], list[float], dict[str, Tensor]]
"""Of a sum: the mean change, float32 by name; the sums of what was beside it; the reach of the next round."""


@dataclass(frozen=True)
class Form:
    """How a site's whole numbers lie in its message: first `change` numbers mod 2^bits, densely, then `beside` mod 2³²; all in
    one where bits = 32."""

    change: int
    bits: int
    beside: int

    def wire(self) -> Wire:
        """As `Codec.wire`."""
        if self.bits == 32:
            return {"sum": (torch.int32, (self.change + self.beside,))}
        packed = (self.change * self.bits + 7) // 8
        return {"sum": (torch.uint8, (packed,)), "beside": (torch.int32, (self.beside,))}

    def packed(self, whole: np.ndarray) -> dict[str, Tensor]:
        """uint32 (change + beside,) as tensors of a message."""
        if self.bits == 32:
            return {"sum": torch.from_numpy(whole.view(np.int32))}
        first = _packed(whole[: self.change], self.bits)
        return {"sum": torch.from_numpy(first), "beside": torch.from_numpy(whole[self.change :].view(np.int32))}

    def unpacked(self, sent: Mapping[str, Tensor]) -> np.ndarray:
        """The inverse. Raises EnvelopeError where bits after the last number are set."""
        if self.bits == 32:
            return sent["sum"].numpy().view(np.uint32)
        first = _unpacked(sent["sum"].numpy(), self.bits, self.change)
        return np.concatenate([first, sent["beside"].numpy().view(np.uint32)])


@dataclass(frozen=True)
class Whole:
    """Of `sites`, in steps of `masks.STEP`."""

    sites: int

    def form(self, shapes: Shapes, beside: int) -> Form:
        """beside: numbers beside the change."""
        return Form(sum(map(math.prod, shapes.values())), 32, beside)

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """As `Codec.encode`: float32, as they are."""
        return make_codec("fp32").encode(tensors, key)

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """As `Codec.decode`."""
        return make_codec("fp32").decode(encoded, shapes)

    def numbers(self, encoded: Mapping[str, Tensor], beside: Sequence[float]) -> np.ndarray:
        """uint32 mod 2³², by sorted name. Raises MaskError where the sum could run over."""
        return whole_numbers(encoded, self.sites, beside)

    def means(self, total: np.ndarray, keys: Sequence[int], shapes: Shapes) -> Means:
        """total: the sum of `numbers` of as many sites as keys."""
        return *mean_of(total, len(keys), shapes), {}


@dataclass(frozen=True)
class Narrow:
    """Of `sites`, in few bits. bits: of the codec whose place it takes. reach: name -> R, float32 (rows,), where rows are those
    of `codecs.quantize`.

    The draws follow the recipe's seed, as those of the codecs do: the masks hide a site's q, and where its change is to be
    private, it was so before.
    """

    sites: int
    bits: int
    reach: Mapping[str, Tensor]

    @property
    def width(self) -> int:
        """m: a quarter more than the codec's bits, or what LEAST steps of so many sites take."""
        return max(5 * self.bits // 4, (LEAST * self.sites).bit_length())

    @property
    def steps(self) -> int:
        """Q."""
        return (2**self.width - 1) // self.sites

    def form(self, shapes: Shapes, beside: int) -> Form:
        """beside: numbers beside the change and the rows' sizes."""
        rows = sum(min(matrix_of(shape)) for shape in shapes.values())
        return Form(sum(map(math.prod, shapes.values())), self.width, rows + beside)

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """As `Codec.encode`: q, int32, under a tensor's name in its shape; and `<name>#size`, float32 (rows,), the rows' root
        mean squares by R. `<name>#draw`, u, stays. Raises MaskError where no reach was told."""
        sent = {}
        for name, tensor in tensors.items():
            values = as_float32(name, tensor)
            parts = values.reshape(matrix_of(values.shape)).double() / self._reach(name, tuple(values.shape))
            draws = _draws(key, name, values.numel())
            exact = (parts + 1) * (self.steps / 2)
            whole = (exact + draws.view_as(exact)).floor().clamp(0, self.steps)
            sent[name], sent[extra(name, "draw")] = whole.to(torch.int32).view(values.shape), draws
            sizes = parts.square().mean(axis_of(values.shape)).sqrt()
            sent[extra(name, "size")] = sizes.clamp(LOW, TOP).float()
        return sent

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """As `Codec.decode`, of what `encode` gave: what one site's numbers stand for."""
        off = {name: encoded[name].double().flatten() - encoded[extra(name, "draw")] for name in shapes}
        return {name: self._values(name, off[name], shape) for name, shape in shapes.items()}

    def numbers(self, encoded: Mapping[str, Tensor], beside: Sequence[float]) -> np.ndarray:
        """uint32: the change by sorted name, mod 2^m once it is packed; then sizes and `beside` in steps of `masks.STEP`."""
        names = sorted(name for name in encoded if "#" not in name)
        sizes = {name: encoded[extra(name, "size")] for name in names}
        first = torch.cat([encoded[name].flatten() for name in names]).cpu().numpy().view(np.uint32)
        return np.concatenate([first, whole_numbers(sizes, self.sites, beside)])

    def means(self, total: np.ndarray, keys: Sequence[int], shapes: Shapes) -> Means:
        """total: the sum of `numbers` of sites that drew by `keys`."""
        names = sorted(shapes)
        sizes = [math.prod(shapes[name]) for name in names]
        rows = {name: (min(matrix_of(shape)),) for name, shape in shapes.items()}
        change, whole = {}, total[: sum(sizes)] & np.uint32(2**self.width - 1)
        for name, part in zip(names, torch.from_numpy(whole.astype(np.float64)).split(sizes), strict=True):
            for key in keys:
                part = part - _draws(key, name, len(part))
            change[name] = self._values(name, part / len(keys), shapes[name])
        rms, beside = mean_of(total[sum(sizes) :], len(keys), rows)
        reach = {name: self.reach[name] * rms[name] * spread(self.steps) for name in names}
        return change, beside, {name: r.clamp(TINY, HUGE) for name, r in reach.items()}

    def _values(self, name: str, off: Tensor, shape: tuple[int, ...]) -> Tensor:
        """s (q − u + ½ − Q / 2) of a tensor. off: q − u, float64, or its mean over sites."""
        steps = off.reshape(matrix_of(shape)) + 0.5 - self.steps / 2
        return (steps * (self._reach(name, shape) * (2 / self.steps))).float().view(shape)

    def _reach(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """R over the matrix of a tensor, float64."""
        held = self.reach.get(name)
        if held is None or tuple(held.shape) != (min(matrix_of(shape)),):
            raise MaskError(f"{name}: the message tells no reach of its rows, so that sites cannot round to the same steps")
        return along(held.double(), shape)


def spread(steps: int) -> float:
    """R by a row's root mean square. With few steps it is small: they are better spent on the many small numbers, and error
    feedback brings what saturates a round later. A row of AdamW's changes of a round goes to about 2.3 of it."""
    return 0.85 + 0.2 * math.log2(steps + 1)


def summand(codec: str, sites: int, reach: Mapping[str, Tensor]) -> Whole | Narrow:
    """What stands for `codec` behind masks of `sites`."""
    (entry, _), *_ = tables.codec_parts(codec)
    return Narrow(sites, entry.bits, reach) if entry.bits else Whole(sites)


def first_reach(adds: Whole | Narrow, shapes: Shapes, most: float) -> dict[str, Tensor]:
    """Of a stage's first round; empty where there is none. most: what AdamW could move a number by, if all its steps went
    one way. As a rule a third of that is the root mean square."""
    if isinstance(adds, Whole):
        return {}
    return {name: torch.full((min(matrix_of(shape)),), spread(adds.steps) * most / 3) for name, shape in shapes.items()}


def _draws(key: int, name: str, count: int) -> Tensor:
    """u of a tensor's numbers in row-major order, float32."""
    return counter_uniform(derive(key, "quantize", name), torch.arange(count))


def _packed(whole: np.ndarray, bits: int) -> np.ndarray:
    """uint32 (n,) mod 2^bits as uint8 (⌈n · bits / 8⌉,): number by number, the least bit first."""
    places = np.arange(bits, dtype=np.uint32)
    blocks = [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]  # of a length that 8 divides, but for the last
    rows = [np.packbits(((block[:, None] >> places) & 1).astype(np.uint8), bitorder="little") for block in blocks]
    return np.concatenate(rows)


def _unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The inverse of `_packed`, uint32. Raises EnvelopeError where a bit after the last number is set."""
    whole, places = np.empty(count, np.uint32), np.arange(bits, dtype=np.uint32)
    size = BLOCK * bits // 8
    for block in range(-(-count // BLOCK)):
        row = np.unpackbits(packed[block * size : (block + 1) * size], bitorder="little")
        here = min(BLOCK, count - block * BLOCK)
        if row[here * bits :].any():
            raise EnvelopeError("a masked sum with bits set after its last number")
        whole[block * BLOCK : block * BLOCK + here] = (row[: here * bits].reshape(here, bits).astype(np.uint32) << places).sum(
            1, dtype=np.uint32
        )
    return whole
