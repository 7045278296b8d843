"""The server's part in a round of secure aggregation: it sees keys, sealed shares, masked updates, and their sum."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from fedkeel.exchange.codecs import EnvelopeError, Wire, open_envelope, seal
from fedkeel.exchange.masks import NONCE, SECRET, SHARE, TAG, MaskError, agreed, join, new_key, pair_masks, public_of, stream
from fedkeel.exchange.messages import about, check_promised, names_of, shapes_of
from fedkeel.exchange.summands import first_reach, summand
from fedkeel.federation.asking import Asking, told
from fedkeel.federation.server import Answers, FederationError, Roster, RoundResult, Sent, aggregated, bound_after, message
from fedkeel.rng import derive
from fedkeel.types import Adapter, Global, Reply, Transport, Update


def needed(sites: int, share: float) -> int:
    """Sites whose shares give a secret back: a share of them, rounded up, and more than half."""
    return min(sites, max(math.ceil(share * sites - 1e-9), sites // 2 + 1))


@dataclass
class _Talk(Asking):
    """One round's messages. state: before it. asked: the sites of the round, of which `least` must stay to its end."""

    state: Global
    asked: Sequence[str]
    least: int
    quorum: float

    def header(self, kind: str, **more: Any) -> dict[str, Any]:
        return about(kind, self.state.round, self.state.adapter, **more)

    def opened(self, reply: Reply, kind: str, wire: Wire | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A reply that is what it must be. Raises EnvelopeError."""

        def expected(header: dict[str, Any]) -> Wire:
            check_promised(header, self.header(kind, site=reply.site))
            return wire or {}

        return open_envelope(reply.payload, expected=expected)

    def enough(self, found: Collection[str], what: str) -> None:
        """Raise FederationError unless so many sites answered."""
        asked = len(self.asked)
        if len(found) < self.least or len(found) / asked < self.quorum:
            raise FederationError(
                f"round {self.state.round + 1} stopped: {len(found)} of {asked} sites {what}; secure aggregation needs "
                f"{self.least}, and federation.quorum = {self.quorum:g} at least {self.quorum * asked:g}. What failed:\n"
                f"{told(self.failures)}"
            )


def run_masked_round(
    state: Global, transport: Transport, roster: Roster, clock: Callable[[], float] = time.perf_counter
) -> RoundResult:
    """As `server.run_round`, of the sum of the sites' changes alone. Raises FederationError."""
    begin, asked, federation, roster = clock(), roster.asked(state.round), roster.federation, roster.now(state)
    names = names_of(state.adapter, roster.rule.trained(state.round) & roster.rule.shared)
    shapes = {name: shape for name, shape in shapes_of(state.adapter.tensors()).items() if name in names}
    if not state.reach:
        state = replace(state, reach=first_reach(summand(federation.codec_up, len(asked), {}), shapes, roster.moves))
    talk = _Talk(transport, federation.deadline, state, asked, needed(len(asked), roster.privacy.threshold), federation.quorum)
    keys = talk.ask(dict.fromkeys(asked, seal(talk.header("keys"), {})), partial(_keys, talk))
    talk.enough(keys, "gave keys")
    public = {site: [key.hex() for key in pair] for site, pair in sorted(keys.items())}
    question = seal(talk.header("shares", keys=public, threshold=talk.least), {})
    shares = talk.ask(dict.fromkeys(keys, question), partial(_shares, talk, set(keys)))
    talk.enough(shares, "gave shares of their keys")
    sent = {site: _global(talk, roster, site, shares) for site in sorted(shares)}
    reference = next(iter(sent.values())).reference
    adds = summand(federation.codec_up, len(sent), state.reach)
    form = adds.form(shapes, int(roster.privacy.quantile > 0))
    came = talk.ask(
        {site: one.payload for site, one in sent.items()},
        lambda reply: form.unpacked(talk.opened(reply, "masked", form.wire())[1]),
    )
    talk.enough(came, "sent their masked change")
    question = seal(talk.header("unmask", answered=sorted(came)), {})
    helped = talk.ask(dict.fromkeys(came, question), partial(_unmasking, talk, set(sent), set(came)))
    talk.enough(helped, "helped to take the masks off")
    aggregation = clock()
    total = _unmasked(talk, keys, sorted(sent), came, helped)
    drawn = [derive(roster.seed, "up", site, state.round) for site in sorted(came)]
    change, sides, reach = adds.means(total, drawn, shapes)
    old = reference.tensors()
    both = Update("all", reference.with_tensors(old | {name: old[name] + t for name, t in change.items()}), 1)
    if not any(bool(t.any()) for t in change.values()):
        raise FederationError(f"round {state.round + 1} changed nothing: every site sent back the adapter that it was given")
    heads = [Update(site, Adapter({}), 1) for site in sorted(came)]
    result, kept = aggregated(state, roster, Answers([both], [both], talk.failures), reference, {"all": frozenset()})
    end = clock()
    bound = bound_after(roster, state, sum(sides), len(came))
    after = replace(state, round=state.round + 1, adapter=result.adapter, drift={}, optimiser=kept, clip=bound, reach=reach)
    seconds = (end - begin, end - aggregation)
    return RoundResult(after, math.nan, heads, dict(talk.down), dict(talk.up), *seconds, talk.failures)


def _keys(talk: _Talk, reply: Reply) -> tuple[bytes, bytes]:
    header, _ = talk.opened(reply, "keys")
    pair = header.get("keys")
    if not isinstance(pair, list) or len(pair) != 2:
        raise EnvelopeError("two public keys belong here")
    channel, mask = (_bytes(key, SECRET, "a public key") for key in pair)
    try:
        for key in (channel, mask):
            agreed(new_key()[0], key, "a trial")  # one that nobody can agree with would fail at every other site
    except MaskError as error:
        raise EnvelopeError(str(error)) from error
    return channel, mask


def _shares(talk: _Talk, sites: Set[str], reply: Reply) -> dict[str, str]:
    """other site -> what is sealed for it."""
    held = talk.opened(reply, "shares")[0].get("shares")
    if not isinstance(held, dict) or set(held) != sites:
        raise EnvelopeError("shares for each site that gave keys belong here")
    size = NONCE + 2 * SHARE + TAG
    return {site: _bytes(text, size, f"shares for {site}").hex() for site, text in held.items()}


def _global(talk: _Talk, roster: Roster, site: str, shares: Mapping[str, Mapping[str, str]]) -> Sent:
    masks = {"among": sorted(shares), "shares": {other: of[site] for other, of in sorted(shares.items())}}
    return message(talk.state, roster, {}, talk.state.held.get(site, 0), masked=masks)


def _unmasking(talk: _Talk, among: Set[str], answered: Set[str], reply: Reply) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(shares of seeds of those that answered, of keys of those that did not)."""
    header, _ = talk.opened(reply, "unmask")
    found = []
    for part, sites in (("seeds", answered), ("keys", among - answered)):
        held = header.get(part)
        if not isinstance(held, dict) or set(held) != sites:
            raise EnvelopeError(f"{part}: a share of each of {sorted(sites)} belongs here")
        found.append({site: _bytes(text, SHARE, f"a share of {site}") for site, text in held.items()})
    return found[0], found[1]


def _bytes(value: Any, size: int, what: str) -> bytes:
    """Bytes of a header's text. Raises EnvelopeError."""
    try:
        found = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        found = b""
    if len(found) != size:
        raise EnvelopeError(f"{what}: not {size} bytes in hexadecimal")
    return found


def _unmasked(
    talk: _Talk,
    keys: Mapping[str, tuple[bytes, bytes]],
    among: Sequence[str],
    came: Mapping[str, np.ndarray],
    helped: Mapping[str, tuple[Mapping[str, bytes], Mapping[str, bytes]]],
) -> np.ndarray:
    """The sum of what those that answered added, uint32 mod 2³². Raises FederationError where shares do not fit."""
    round, number = talk.state.round, {site: n for n, site in enumerate(sorted(keys), 1)}
    masks = {site: pair[1] for site, pair in keys.items() if site in among}
    total = reduce(np.add, came.values())
    try:
        for site in among:
            part = 0 if site in came else 1
            secret = join({number[other]: parts[part][site] for other, parts in sorted(helped.items())[: talk.least]})
            if site in came:
                total = total - stream(secret, len(total))
                continue
            if public_of(secret) != masks[site]:
                raise MaskError(f"the key of site {site}, which is missing, does not come out of the others' shares")
            # what it would have added itself cancels what the others added for their pair with it
            gone = {site: masks[site], **{other: masks[other] for other in came}}
            total = total + pair_masks(secret, gone, site, f"mask {round}", len(total))
    except MaskError as error:
        raise FederationError(
            f"round {round + 1}: the masks cannot be taken off: {error}; the round before can be resumed"
        ) from error
    return total
