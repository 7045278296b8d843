"""One seed, many independent generators, each keyed by what it is for. Nothing else in FedKeel seeds anything. What must be
secret is drawn from the operating system's entropy, and from no seed: `secret_normal`.

A key is a tuple such as ("batches", round, site, step). The generator depends on the key alone and not on what was drawn
before, so a resumed run, another engine or another order of sites draws the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def derive(seed: int, *key: str | int) -> int:
    """An integer in [0, 2^63) that is a hash of `seed` and `key`."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def numpy_generator(seed: int, *key: str | int) -> np.random.Generator:
    """A NumPy generator for `key`."""
    import numpy as np

    return np.random.default_rng(derive(seed, *key))


def seed_torch(seed: int, *key: str | int) -> None:
    """Seed torch's global generator for `key`; for library code that draws from it (initialisation, dropout)."""
    import torch

    torch.manual_seed(derive(seed, *key))


def counter_uniform(key: int, counters: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float32, each a pure function of `key` and its own counter: no state, no order of drawing.

    key: from `derive`. counters: int64, any shape, any device; the result has that shape and device, and the same bits on
    every device. Equal counters under equal keys give equal numbers.
    Source: the finaliser of SplitMix64 (Steele, Lea & Flood 2014, OOPSLA) over a Weyl sequence; its top 23 bits are used.
    """

    def shifted(x: Tensor, by: int) -> Tensor:  # a logical shift: int64 in torch shifts the sign in
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = counters * -0x61C8864680B583EB + key  # 0x9E37… as a signed number; products wrap
    x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15
    x = x ^ shifted(x, 31)
    return (shifted(x, 41).float() + 0.5) / 2.0**23  # 23 bits and the half are exact in float32


def counter_normal(key: int, counters: Tensor) -> Tensor:
    """Standard normal numbers, float32, keyed as `counter_uniform` is (Box & Muller 1958): counter c uses 2c and 2c + 1."""
    radius = (-2.0 * counter_uniform(key, 2 * counters).log()).sqrt()
    return radius * (2.0 * math.pi * counter_uniform(key, 2 * counters + 1)).cos()


def secret_bytes(count: int) -> bytes:
    """Bytes of the operating system's entropy: keys, which no seed decides."""
    import secrets

    return secrets.token_bytes(count)


def keystream(key: bytes, size: int) -> bytes:
    """`size` bytes of ChaCha20 under a key of 32 bytes, from its beginning. Needs `cryptography`."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(size))


def _secret_uniform(count: int) -> np.ndarray:
    """Numbers in (0, 1), float64, from a ChaCha20 stream under a key of 256 bits of the operating system, which is forgotten.
    Raises FedKeelError where `cryptography` is not installed."""
    import numpy as np

    try:
        stream = keystream(secret_bytes(32), 8 * count)
    except ImportError as error:
        raise FedKeelError("noise for privacy is drawn through `cryptography`: pip install 'fedkeel[privacy]'") from error
    whole = np.frombuffer(stream, dtype=np.uint64) >> np.uint64(11)
    return (whole.astype(np.float64) + 0.5) / 2.0**53


def secret_draw(count: int, rate: float) -> list[int]:
    """Which of `count` things are drawn, each with probability `rate` by itself; nobody can foretell it. Raises as
    `secret_normal`."""
    return [int(n) for n in (_secret_uniform(count) < rate).nonzero()[0]]


def secret_normal(shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float64, that nobody can foretell or draw again (Box & Muller 1958). Raises FedKeelError where
    `cryptography` is not installed."""
    import numpy as np
    import torch

    count = math.prod(shape)
    pairs = (count + 1) // 2
    uniform = _secret_uniform(2 * pairs)
    radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * math.pi * uniform[pairs:]
    numbers = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return torch.from_numpy(numbers.reshape(shape))
