"""A site's part in secure aggregation: keys, shares, the masked update, and the shares that take masks off again.

Of each round a site has secrets of its own, which it keeps from message to message and forgets once it has told its shares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from fedkeel.exchange.codecs import seal
from fedkeel.exchange.masks import (
    MaskError,
    agreed,
    hidden,
    new_key,
    opened,
    pair_masks,
    split,
    stream,
)
from fedkeel.exchange.messages import about, layout
from fedkeel.federation.kept import Kept
from fedkeel.rng import secret_bytes
from fedkeel.types import Adapter

KINDS = ("keys", "shares", "unmask")


@dataclass(frozen=True)
class Secrets:
    """Of one site and round, in hexadecimal. channel, mask: private keys. seed: of its own mask. keys: site -> its two public
    keys. threshold: shares that give a secret back. came: sealed shares of the others, by site."""

    round: int
    channel: str
    mask: str
    seed: str
    keys: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    threshold: int = 0
    came: Mapping[str, str] = field(default_factory=dict)


def _kept(kept: Kept, round: int, site: str) -> Secrets:
    found = Secrets(**json.loads(kept.masks)) if kept.masks else None
    if found is None or found.round != round:
        raise MaskError(f"site {site}: it has no keys of round {round + 1}, which is begun anew by asking for them")
    return found


def _keep(kept: Kept, secrets: Secrets | None) -> None:
    kept.masks = b"" if secrets is None else json.dumps(asdict(secrets)).encode()


def prepare(header: Mapping[str, Any], like: Adapter, site: str, kept: Kept) -> bytes:
    """The answer to a message of KINDS. Raises MaskError, naming the site, for one that does not fit the round so far."""
    round = header.get("round")
    if type(round) is not int or header.get("layout") != layout(like):
        raise MaskError(f"site {site}: keys are asked for by another model, or of round {round!r}")
    answer = partial(about, header["kind"], round, like, site=site)
    if header["kind"] == "keys":
        (channel, public), (mask, mask_public) = new_key(), new_key()
        _keep(kept, Secrets(round, channel.hex(), mask.hex(), secret_bytes(32).hex()))
        return seal(answer(keys=[public.hex(), mask_public.hex()]), {})
    secrets = _kept(kept, round, site)
    if header["kind"] == "shares":
        return seal(answer(shares=_shared(header, secrets, site, kept)), {})
    told = _unmasking(header, secrets, site)
    _keep(kept, None)  # once
    return seal(answer(**told), {})


def _shared(header: Mapping[str, Any], secrets: Secrets, site: str, kept: Kept) -> dict[str, str]:
    """other site -> its shares of this one's two secrets, sealed for it."""
    if secrets.keys:
        raise MaskError(f"site {site}: it gave shares of round {secrets.round + 1} before; a round begins anew with new keys")
    keys: Any = header.get("keys")
    threshold = header.get("threshold")
    known = isinstance(keys, dict) and site in keys
    if not known or type(threshold) is not int or not len(keys) / 2 < threshold <= len(keys):
        raise MaskError(
            f"site {site}: shares are asked for so that {threshold!r} of {len(keys or {})} sites could open them; more than "
            f"half must be needed"
        )
    order = sorted(keys)
    parts = zip(
        order,
        split(bytes.fromhex(secrets.seed), threshold, len(order)),
        split(bytes.fromhex(secrets.mask), threshold, len(order)),
        strict=True,
    )
    _keep(kept, replace(secrets, keys=keys, threshold=threshold))
    found = {}
    for other, seed, mask in parts:
        key = agreed(bytes.fromhex(secrets.channel), bytes.fromhex(keys[other][0]), f"shares {secrets.round}")
        found[other] = hidden(key, seed + mask, f"{site} to {other} in {secrets.round}").hex()
    return found


@dataclass(frozen=True)
class Masks:
    """A site's of one round: its own, and those that it shares with each other site of `among`."""

    site: str
    among: Sequence[str]
    secrets: Secrets

    def over(self, numbers: np.ndarray) -> np.ndarray:
        """Whole numbers behind them, uint32 mod 2³², and so mod any 2^m."""
        keys = {other: bytes.fromhex(self.secrets.keys[other][1]) for other in self.among}
        purpose = f"mask {self.secrets.round}"
        pairs = pair_masks(bytes.fromhex(self.secrets.mask), keys, self.site, purpose, len(numbers))
        return numbers + pairs + stream(bytes.fromhex(self.secrets.seed), len(numbers))


def masks_of(told: Mapping[str, Any], round: int, site: str, kept: Kept) -> Masks:
    """The masks of a change. told: of the message down: `among`, those who gave shares, and `shares`, theirs for this site.
    Raises MaskError."""
    secrets, among, came = _kept(kept, round, site), told.get("among"), told.get("shares")
    if (
        not isinstance(among, list)
        or not set(among) <= set(secrets.keys)
        or site not in among
        or len(among) < secrets.threshold
    ):
        raise MaskError(f"site {site}: masks among {among!r} are asked for, of {sorted(secrets.keys)} that gave keys")
    if not isinstance(came, dict) or set(came) != set(among):
        raise MaskError(f"site {site}: shares of {sorted(came or [])} came, and masks are among {among}")
    if secrets.came:
        raise MaskError(
            f"site {site}: it was asked for its change of round {round + 1} before, and two behind the same masks would tell "
            f"how they differ; a round begins anew with new keys"
        )
    _keep(kept, replace(secrets, came=came))
    return Masks(site, among, secrets)


def _unmasking(header: Mapping[str, Any], secrets: Secrets, site: str) -> dict[str, dict[str, str]]:
    """Shares of the seeds of those that answered, and of the keys of those that did not: never both of one site."""
    answered: Any = header.get("answered")
    among = set(secrets.came)
    enough = isinstance(answered, list) and set(answered) <= among and len(set(answered)) >= max(1, secrets.threshold)
    if not enough:
        raise MaskError(
            f"site {site}: masks are to be taken off {answered!r}, of {sorted(among)}; {secrets.threshold} or more of these "
            f"must have answered"
        )
    seeds, keys = {}, {}
    for other in sorted(among):
        key = agreed(bytes.fromhex(secrets.channel), bytes.fromhex(secrets.keys[other][0]), f"shares {secrets.round}")
        both = opened(key, bytes.fromhex(secrets.came[other]), f"{other} to {site} in {secrets.round}")
        if other in answered:
            seeds[other] = both[: len(both) // 2].hex()
        else:
            keys[other] = both[len(both) // 2 :].hex()
    return {"seeds": seeds, "keys": keys}
