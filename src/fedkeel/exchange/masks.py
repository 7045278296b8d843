"""Secure aggregation: masks that cancel in a sum of whole numbers, and shares by which those of missing sites are taken out.

Bonawitz et al. 2017 (CCS, doi:10.1145/3133956.3133982), protocol 4 against a coordinator that is curious and follows it: of n
sites, site i sends

    yᵢ = xᵢ + PRG(bᵢ) + Σ_{j > i} PRG(sᵢⱼ) − Σ_{j < i} PRG(sᵢⱼ)   mod 2³²

with sᵢⱼ agreed by X25519 and HKDF between i and j. Each site shares bᵢ and its key of the sᵢⱼ among all by Shamir, any t of
which give them back: bᵢ of those that answered, the key of those that did not, and never both. `cryptography` is imported where
it is used, as a federation without masks does without; a recipe that asks for them is refused where it is missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkeel.rng import keystream, secret_bytes
from fedkeel.types import FedKeelError

STEP = 2.0**-22  # of the numbers that are added up
PRIME = 2**521 - 1  # of the field of shares
SECRET, SHARE, NONCE, TAG = 32, 66, 12, 16  # bytes


class MaskError(FedKeelError):
    """Masks that cannot be made or taken off; the text says whose."""


def new_key() -> tuple[bytes, bytes]:
    """(private, public) of X25519, 32 bytes each."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private = X25519PrivateKey.generate()
    return private.private_bytes_raw(), private.public_key().public_bytes_raw()


def public_of(private: bytes) -> bytes:
    """The public half of a private key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: str) -> bytes:
    """32 bytes that both ends of two keys come to, other ones for each purpose. Raises MaskError for a key that is none."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise MaskError(f"a key that is none of X25519: {error}") from error
    return HKDF(algorithm=SHA256(), length=SECRET, salt=None, info=purpose.encode()).derive(shared)


def stream(seed: bytes, count: int) -> np.ndarray:
    """`count` whole numbers of 32 bits, uint32, that look like chance to whoever has not the seed of 32 bytes."""
    return np.frombuffer(keystream(seed, 4 * count), dtype="<u4").astype(np.uint32)


def hidden(key: bytes, text: bytes, about: str) -> bytes:
    """`text` for whoever has the key, bound to `about`: a nonce, then ChaCha20-Poly1305."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    nonce = secret_bytes(NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, text, about.encode())


def opened(key: bytes, sealed: bytes, about: str) -> bytes:
    """What `hidden` hid. Raises MaskError where it was altered, or is for somebody else."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE], sealed[NONCE:], about.encode())
    except (InvalidTag, ValueError) as error:
        raise MaskError(f"shares that were altered on their way, or are not for this site ({about})") from error


def split(secret: bytes, threshold: int, count: int) -> list[bytes]:
    """`count` shares of a secret of 32 bytes, any `threshold` of which give it back and fewer say nothing (Shamir 1979).

    Share k, from 1, is the value at k of a polynomial of degree threshold − 1 over the integers mod 2⁵²¹ − 1."""
    if len(secret) != SECRET or not 1 <= threshold <= count:
        raise MaskError(f"{len(secret)} bytes cannot be shared among {count} so that {threshold} give them back")
    more = [int.from_bytes(secret_bytes(SHARE), "big") % PRIME for _ in range(threshold - 1)]
    coefficients = [int.from_bytes(secret, "big"), *more]
    shares = []
    for at in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * at + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE, "big"))
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret of shares by their number, from 1: the polynomial at 0. Raises MaskError where they are not of one secret."""
    secret = 0
    for at, share in shares.items():
        top = bottom = 1
        for other in shares:
            if other != at:
                top, bottom = top * other % PRIME, bottom * (other - at) % PRIME
        secret = (secret + int.from_bytes(share, "big") * top * pow(bottom, -1, PRIME)) % PRIME
    if secret >= 2 ** (8 * SECRET):
        raise MaskError("shares that are not of one secret: some site sent others than it was given")
    return secret.to_bytes(SECRET, "big")


def pair_masks(private: bytes, keys: Mapping[str, bytes], site: str, purpose: str, count: int) -> np.ndarray:
    """Σ_{j > i} PRG(sᵢⱼ) − Σ_{j < i} PRG(sᵢⱼ), uint32, of site i. keys: of all sites, public; names order them."""
    total = np.zeros(count, np.uint32)
    for other, public in keys.items():
        if other != site:
            numbers = stream(agreed(private, public, purpose), count)
            total = total + numbers if other > site else total - numbers
    return total


def whole_numbers(tensors: Mapping[str, Tensor], sites: int, beside: Sequence[float] = ()) -> np.ndarray:
    """All numbers by sorted name, then those beside them, in steps of STEP, uint32 mod 2³². Raises MaskError where so many
    sites' could run over."""
    parts = [tensors[name].detach().double().flatten().cpu() for name in sorted(tensors)]
    flat = torch.cat([*parts, torch.tensor(beside, dtype=torch.float64)])
    steps = (flat / STEP).round()
    most = float(steps.abs().max())
    if not most * sites < 2**31:
        raise MaskError(
            f"a change of {most * STEP:.3g} in one number: {sites} of such run over what is added up (at most "
            f"{2**31 * STEP / sites:.3g}); a lower train.lr, or privacy.unit = 'site' with a clip, keeps it small"
        )
    return steps.to(torch.int64).numpy().astype(np.uint32)


def mean_of(total: np.ndarray, sites: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, Tensor], list[float]]:
    """(the mean change that a sum of `sites` stands for, float32 by name; the sums of what was beside it). total: uint32."""
    numbers = torch.from_numpy(total.view(np.int32).astype(np.float64))
    sizes = [math.prod(shapes[name]) for name in sorted(shapes)]
    *parts, beside = numbers.split([*sizes, len(numbers) - sum(sizes)])
    change = {
        name: (part * (STEP / sites)).reshape(shapes[name]).float() for name, part in zip(sorted(shapes), parts, strict=True)
    }
    return change, (beside * STEP).tolist()
