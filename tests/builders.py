"""Small adapters, updates and messages with known values, for many tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.exchange.channel import Channel, Feedback
from fedkeel.exchange.codecs import Codec
from fedkeel.method.aggregate.rule import Aggregator, aggregator
from fedkeel.types import Adapter, Lora, Update

AGGREGATORS: dict[str, Aggregator] = {name: aggregator(name) for name in tables.RULES}

# (d_out, d_in) by module path: wide, tall and square, so that a transposed factor cannot pass
SHAPES = {"layer.0.q": (10, 14), "layer.0.up": (24, 9), "layer.1.q": (12, 12)}


def numbers(seed: int, *shape: int) -> Tensor:
    """Standard normal float32 numbers that depend on `seed` alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_adapter(seed: int, rank: int = 3, scale: float = 2.0, shapes: Mapping[str, tuple[int, int]] = SHAPES) -> Adapter:
    """A LoRA of `rank` on every module of `shapes`, and one dense parameter of five numbers."""
    lora = {
        path: Lora(numbers(1000 * seed + i, rank, d_in), numbers(1000 * seed + i + 500, d_out, rank), scale)
        for i, (path, (d_out, d_in)) in enumerate(shapes.items())
    }
    return Adapter(lora, {"head.weight": numbers(1000 * seed + 999, 5)})


def make_updates(count: int, ranks: Sequence[int] = (3,), scales: Sequence[float] = (2.0,)) -> list[Update]:
    """Sites site-0, site-1, … with different contents and positions; ranks and scales are gone through in turn."""
    return [
        Update(f"site-{k}", make_adapter(k + 1, ranks[k % len(ranks)], scales[k % len(scales)]), 100 + 37 * k)
        for k in range(count)
    ]


def dense_sum(updates: Sequence[Update], weights: Mapping[str, float], path: str) -> np.ndarray:
    """The slow, obvious twin: Σ p_k scale_k B_k A_k of one module, formed in full in float64."""
    total = np.zeros(updates[0].adapter.lora[path].dense().shape)
    for update in updates:
        factors = update.adapter.lora[path]
        total += weights[update.site] * factors.scale * (factors.b.double().numpy() @ factors.a.double().numpy())
    return total


def dense_of(factors: Lora) -> np.ndarray:
    """scale · B A of one module in float64."""
    return factors.scale * (factors.b.double().numpy() @ factors.a.double().numpy())


def flat(adapter: Adapter) -> dict[str, bytes]:
    """The bits of every tensor, for comparisons without any tolerance."""
    return {name: tensor.contiguous().numpy().tobytes() for name, tensor in adapter.tensors().items()}


def crafted(body: bytes) -> bytes:
    """A message whose magic and checksum are right, whatever `body` is: what a hostile sender can always make."""
    return b"FKL1" + hashlib.sha256(body).digest() + body


def safetensors_body(header: Any, data: bytes = b"") -> bytes:
    """The safetensors layout by hand: length, JSON, data. header: JSON values, or bytes to stand there as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_residual(
    codec: Codec, tensors: Mapping[str, Tensor], residual: Mapping[str, Tensor] | None, key: int
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """What travels of tensors and the residual of the last time, and the new residual."""
    memory = {} if residual is None else {"residual": residual}
    encoded, memory = Channel(codec, {"residual": Feedback()}).send(tensors, memory, key)
    return encoded, memory["residual"]
