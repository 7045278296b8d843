"""Frozen weights in half the memory, for passes under bf16 autocast on a CPU."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import nn


def hold_in_bf16(net: nn.Module) -> None:
    """Hold the frozen linear maps of `net` in bf16 where that changes no bit of a pass under bf16 autocast.

    Those are maps whose weights are bf16 numbers in float32: autocast would cast each of them in every pass, and keep the
    casts until the backward pass. A map that is tied to an embedding stays.
    """
    tied = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    for module in net.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad and id(module.weight) not in tied:
            half = module.weight.data.to(torch.bfloat16)
            if torch.equal(half.float(), module.weight.data):
                module.weight.data = half
    _give_back()


def _give_back() -> None:
    """Hand freed memory to the system: glibc keeps it, as new weights lie between the old ones (benchmarks/llm.py)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)
