"""Send tensors as small integers with a scale for every row, rounded at random so that nothing is lost in the mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedkeel.exchange.codecs.chain import CodecError, Shapes, as_float32, check_wire, count_of, extra
from fedkeel.exchange.codecs.envelope import Wire, is_finite
from fedkeel.rng import counter_uniform, derive


@dataclass(frozen=True)
class Quantize:
    """x ≈ scale · q with whole q in [−L, L], L = 127 (8 bits) or 7 (4 bits), and one float32 scale for every row.

    A tensor is read as the matrix (product of its leading dimensions, last one), and a row is a line along the longer of
    the two, along the last where they are equal: both LoRA factors, A (r, d_in) and B (d_out, r), have r rows and r scales.

    scale: max|row| / L, rounded up to 17 significant bits. So every product scale · q is a float32 number, no |x| needs a q
    over L, and rounding x / scale at random to one of its two neighbours gives x in the mean (to 2^-24 of a step, the
    resolution of the draws). The exception is a row with a number within 2^-16 of the largest float32, where the scale is
    held down so that L · scale is finite, and the top is cut off by less than a step.

    On the wire: 8 bits as int8 under the tensor's name, in its shape; 4 bits as uint8 (⌈numel / 2⌉,), the even entry in the
    low half of a byte, two's complement, and a 0 after an odd number of entries. `<name>#scale`: float32 (rows,).

    Source: QSGD (Alistarh et al. 2017, arXiv:1610.02132), with the largest magnitude for the norm and a row for the bucket.
    """

    bits: Literal[4, 8]

    @property
    def name(self) -> str:
        """`int8` or `int4`."""
        return f"int{self.bits}"

    @property
    def unbiased(self) -> bool:
        """Yes, see above."""
        return True

    @property
    def levels(self) -> int:
        """L, the largest q."""
        return 2 ** (self.bits - 1) - 1

    def wire(self, shapes: Shapes) -> Wire:
        """See `Codec.wire`."""
        sent: Wire = {}
        for name, shape in shapes.items():
            count = count_of(name, shape)
            sent[name] = (torch.int8, tuple(shape)) if self.bits == 8 else (torch.uint8, ((count + 1) // 2,))
            sent[extra(name, "scale")] = (torch.float32, (min(matrix_of(shape)),))
        return sent

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """See `Codec.encode`. Entry i of a tensor, in row-major order, uses counter i under the tensor's own key."""
        sent = {}
        for name, tensor in tensors.items():
            values = as_float32(name, tensor)
            scale = self._scale(values)
            # in float64 the quotient's rounding is far below what the draws resolve; 1 for 0, whose row is all zeros
            steps = values.reshape(matrix_of(values.shape)).double() / along(scale.where(scale > 0, 1.0), values.shape)
            draws = counter_uniform(derive(key, "quantize", name), torch.arange(values.numel(), device=values.device))
            whole = (steps + draws.view_as(steps)).floor().clamp(-self.levels, self.levels).to(torch.int8)
            sent[name] = whole.view(values.shape) if self.bits == 8 else _pack(whole.flatten())
            sent[extra(name, "scale")] = scale
        return sent

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """See `Codec.decode`."""
        check_wire(encoded, self.wire(shapes))
        tensors = {}
        for name, shape in shapes.items():
            scale = encoded[extra(name, "scale")]
            if not is_finite(scale) or scale.amin() < 0:
                raise CodecError(f"{name}: a scale is not a finite number from 0 up")
            whole = encoded[name] if self.bits == 8 else _unpack(name, encoded[name], math.prod(shape))
            if whole.amin() < -self.levels:
                raise CodecError(f"{name}: {int(whole.amin())} where whole numbers from {-self.levels} belong")
            values = (whole.reshape(matrix_of(shape)).float() * along(scale, shape)).view(shape)
            if not is_finite(values):
                raise CodecError(f"{name}: a scale is too large; a value would not be finite")
            tensors[name] = values
        return tensors

    def bound(self, tensor: Tensor) -> Tensor:
        """One step: the scale of the entry's row, 0 in a row of zeros."""
        values = as_float32("x", tensor)
        return along(self._scale(values), values.shape).expand(matrix_of(values.shape)).reshape(values.shape)

    def _scale(self, values: Tensor) -> Tensor:
        """(rows,): the least float32 with 17 significant bits and scale · L ≥ max|row|, held down as the class says."""
        top = values.reshape(matrix_of(values.shape)).abs().amax(axis_of(values.shape))
        # On the numbers' bits, which are ordered as positive numbers are. float64 holds a float32 times L exactly.
        bits = (top.double() / self.levels).float().view(torch.int32)
        bits = bits + (bits.view(torch.float32).double() * self.levels < top.double()).int()
        most = torch.tensor(torch.finfo(torch.float32).max / self.levels, dtype=torch.float32)
        return ((bits + 127) & -128).clamp_max(int(most.view(torch.int32)) & -128).view(torch.float32)


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix that a tensor of `shape` is read as; its rows run along the longer of the two."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def axis_of(shape: tuple[int, ...]) -> int:
    """The dimension of the matrix that a row runs along."""
    leading, last = matrix_of(shape)
    return 0 if leading > last else 1


def along(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scales (rows,) so that they broadcast over the matrix of `shape`."""
    return scale.unsqueeze(axis_of(shape))


def _pack(whole: Tensor) -> Tensor:
    """int8 (n,) in [−8, 7] as uint8 (⌈n / 2⌉,)."""
    halves = torch.nn.functional.pad(whole, (0, len(whole) % 2)) & 15
    low, high = halves.to(torch.uint8).view(-1, 2).unbind(1)
    return low | high << 4


def _unpack(name: str, packed: Tensor, count: int) -> Tensor:
    """int8 (count,), the inverse of `_pack`. Raises CodecError if the half byte after an odd count is not 0."""
    halves = torch.stack([packed & 15, packed >> 4], 1).flatten().to(torch.int8)
    if halves[count:].any():
        raise CodecError(f"{name}: the half byte after the last number is not 0")
    return (halves[:count] ^ 8) - 8  # the sign bit of four moves up to that of eight
