"""One seed, many independent generators, each keyed by what it is for. Nothing else in FedKeel seeds anything.

A key is a tuple such as ("batches", round, site, step). The generator depends on the key alone and not on what was drawn
before, so a resumed run, another engine or another order of sites draws the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


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
