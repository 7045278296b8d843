"""Send tensors in a narrower float type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.exchange.codecs.chain import CodecError, Shapes, as_float32, check_wire, count_of
from fedkeel.exchange.codecs.envelope import Wire, is_finite

# spec, unit roundoff, and half of the smallest number above 0: by type
_TYPES = {"float32": ("fp32", 0.0, 0.0), "bfloat16": ("bf16", 2.0**-8, 2.0**-134), "float16": ("fp16", 2.0**-11, 2.0**-25)}


@dataclass(frozen=True)
class Cast:
    """Round to `dtype` (`float32`, `bfloat16` or `float16`), to nearest, ties to even."""

    dtype: str

    @property
    def name(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return _TYPES[self.dtype][0]

    @property
    def unbiased(self) -> bool:
        """Only float32: rounding to nearest errs by the same amount every time."""
        return self.dtype == "float32"

    def wire(self, shapes: Shapes) -> Wire:
        """Every tensor under its own name and in its own shape."""
        for name, shape in shapes.items():
            count_of(name, shape)
        return {name: (getattr(torch, self.dtype), tuple(shape)) for name, shape in shapes.items()}

    def encode(self, tensors: Mapping[str, Tensor], key: int) -> dict[str, Tensor]:
        """See `Codec.encode`; nothing is drawn."""
        sent = {}
        for name, tensor in tensors.items():
            sent[name] = as_float32(name, tensor).to(getattr(torch, self.dtype)).contiguous()
            if not is_finite(sent[name]):
                raise CodecError(f"{name}: a value does not fit {self.dtype}; use bf16 or fp32")
        return sent

    def decode(self, encoded: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
        """See `Codec.decode`."""
        check_wire(encoded, self.wire(shapes))
        for name, tensor in encoded.items():
            if not is_finite(tensor):
                raise CodecError(f"{name}: a value is not finite")
        # A copy even where the type is right: what was read from a message lies where Python put it, and sums over memory
        # aligned otherwise are vectorised otherwise, so that the last bit would depend on that.
        return {name: tensor.to(torch.float32, copy=True) for name, tensor in encoded.items()}

    def bound(self, tensor: Tensor) -> Tensor:
        """Relative to |x| the unit roundoff, 2^-8 for bfloat16, 2^-11 for float16 and 0 for float32; at numbers so small
        that the type's smallest one decides, half of that: 2^-134 for bfloat16, 2^-25 for float16."""
        _, roundoff, smallest = _TYPES[self.dtype]
        return (as_float32("x", tensor).abs() * roundoff).clamp_min(smallest)
