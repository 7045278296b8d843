"""Send tensors in a narrower float type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cast:
    """Round to `dtype` (`float32`, `bfloat16` or `float16`), to nearest, ties to even.

    Relative error of a normal number at most 2^-8 for bfloat16, 2^-11 for float16, 0 for float32.
    """

    dtype: str

    def encode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that travel. Raises ValueError if a finite value does not fit the type."""
        sent = {name: t.detach().to(getattr(torch, self.dtype)).contiguous() for name, t in tensors.items()}
        for name, t in sent.items():
            if not torch.isfinite(t).all() and torch.isfinite(tensors[name]).all():
                raise ValueError(f"{name}: a value does not fit {self.dtype}; use bf16 or fp32")
        return sent

    def decode(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Back to float32. Raises ValueError if a tensor is of another type than this codec sends."""
        for name, t in tensors.items():
            if t.dtype != getattr(torch, self.dtype):
                raise ValueError(f"{name}: {t.dtype} where the codec sends {self.dtype}")
        # A copy even where the type is right: what was read from a message lies at any address, and sums over unaligned
        # memory are vectorised otherwise, so that the last bit would depend on the length of a header.
        return {name: t.to(torch.float32, copy=True) for name, t in tensors.items()}
