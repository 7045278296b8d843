"""The server's part in a round of secure aggregation: it sees keys, sealed shares, masked updates, and their sum."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedkeel.exchange.codecs import EnvelopeError, Wire, open_envelope, seal
from fedkeel.exchange.masks import SECRET, SHARE, MaskError, join, mean_of, pair_masks, public_of, stream
from fedkeel.exchange.messages import SCHEMA, layout, names_of, shapes_of
from fedkeel.federation.masking import check_hex
from fedkeel.federation.server import Answers, FederationError, Roster, RoundResult, Sent, aggregated, message
from fedkeel.types import Global, Reply, Request, Transport, Update


def needed(sites: int, share: float) -> int:
    """Sites whose shares give a secret back: a share of them, rounded up, and more than half."""
    return min(sites, max(math.ceil(share * sites - 1e-9), sites // 2 + 1))


@dataclass
class _Talk:
    """One round's messages. down, up: bytes so far, by site. failures: site -> what went wrong there first."""

    state: Global
    roster: Roster
    transport: Transport
    down: Counter[str] = field(default_factory=Counter)
    up: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)

    def header(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"schema": SCHEMA, "kind": kind, "round": self.state.round, "layout": layout(self.state.adapter), **more}

    def ask(self, to: Mapping[str, bytes], read: Callable[[Reply], Any]) -> dict[str, Any]:
        """Answers by site, as `read` reads them."""
        requests = [Request(site, payload) for site, payload in sorted(to.items())]
        found = {}
        for reply in sorted(self.transport.exchange(requests, self.roster.federation.deadline), key=lambda r: r.site):
            self.down[reply.site] += len(to[reply.site])
            self.up[reply.site] += len(reply.payload)
            try:
                if reply.error:
                    raise EnvelopeError(reply.error)
                found[reply.site] = read(reply)
            except (EnvelopeError, MaskError) as error:
                self.failures.setdefault(reply.site, str(error))
        for site in to.keys() - found.keys():
            self.failures.setdefault(site, "no reply")
        return found

    def opened(self, reply: Reply, kind: str, wire: Wire | None = None) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """A reply that is what it must be. Raises EnvelopeError."""

        def expected(header: dict[str, Any]) -> Wire:
            for key, value in self.header(kind, site=reply.site).items():
                if header.get(key) != value or isinstance(header.get(key), bool):
                    raise EnvelopeError(f"a message with {key} = {header.get(key)!r} where {value!r} belongs")
            return wire or {}

        return open_envelope(reply.payload, expected=expected)

    def enough(self, found: Sequence[str], of: Sequence[str], least: int, what: str) -> None:
        """Raise FederationError unless so many sites answered."""
        quorum = self.roster.federation.quorum
        if len(found) < least or len(found) / len(of) < quorum:
            told = "\n".join(f"--- {site}: {text.strip()}" for site, text in sorted(self.failures.items()))
            raise FederationError(
                f"round {self.state.round + 1} stopped: {len(found)} of {len(of)} sites {what}; secure aggregation needs "
                f"{least}, and federation.quorum = {quorum:g} at least {quorum * len(of):g}. What failed:\n{told}"
            )


def run_masked_round(
    state: Global, transport: Transport, roster: Roster, clock: Callable[[], float] = time.perf_counter
) -> RoundResult:
    """As `server.run_round`, of the sum of the sites' changes alone. Raises FederationError."""
    begin, sampled = clock(), roster.asked(state.round)
    talk = _Talk(state, roster, transport)
    least = needed(len(sampled), roster.privacy.threshold)
    keys = talk.ask({site: seal(talk.header("keys"), {}) for site in sampled}, lambda reply: _keys(talk, reply))
    talk.enough(list(keys), sampled, least, "gave keys")
    told = {site: [key.hex() for key in pair] for site, pair in sorted(keys.items())}
    question = seal(talk.header("shares", keys=told, threshold=least), {})
    shares = talk.ask(dict.fromkeys(keys, question), lambda reply: _shares(talk, reply, set(keys)))
    talk.enough(list(shares), sampled, least, "gave shares of their keys")
    among = sorted(shares)
    sent = {site: _global(talk, site, among, shares) for site in among}
    reference = sent[among[0]].reference
    names = names_of(reference, roster.rule.trained(state.round) & roster.rule.shared)
    shapes = {name: shape for name, shape in shapes_of(reference.tensors()).items() if name in names}
    count = sum(math.prod(shape) for shape in shapes.values())
    wire: Wire = {"sum": (torch.int32, (count,))}
    came = talk.ask(
        {site: one.payload for site, one in sent.items()}, lambda reply: talk.opened(reply, "masked", wire)[1]["sum"]
    )
    answered = sorted(came)
    talk.enough(answered, sampled, least, "sent their masked change")
    question = seal(talk.header("unmask", answered=answered), {})
    helped = talk.ask(dict.fromkeys(answered, question), lambda reply: _unmasking(talk, reply, among, answered))
    talk.enough(list(helped), sampled, least, "helped to take the masks off")
    aggregation = clock()
    total = _unmasked(talk, keys, among, came, helped)
    change = mean_of(total, len(answered), shapes)
    old = reference.tensors()
    both = Update("all", reference.with_tensors(old | {name: old[name] + t for name, t in change.items()}), 1)
    if not any(bool(t.any()) for t in change.values()):
        raise FederationError(f"round {state.round + 1} changed nothing: every site sent back the adapter that it was given")
    heads = [Update(site, replace(both.adapter, lora={}, dense={}), 1) for site in answered]
    result, kept = aggregated(state, roster, Answers([both], [both], talk.failures), reference, {"all": frozenset()})
    end = clock()
    after = replace(state, round=state.round + 1, adapter=result.adapter, drift={}, optimiser=kept)
    seconds = (end - begin, end - aggregation)
    return RoundResult(after, math.nan, heads, dict(talk.down), dict(talk.up), *seconds, talk.failures)


def _keys(talk: _Talk, reply: Reply) -> tuple[bytes, bytes]:
    header, _ = talk.opened(reply, "keys")
    told = header.get("keys")
    if not isinstance(told, list) or len(told) != 2:
        raise EnvelopeError("two public keys belong here")
    channel, mask = (check_hex(key, SECRET, "a public key") for key in told)
    return channel, mask


def _shares(talk: _Talk, reply: Reply, sites: set[str]) -> dict[str, str]:
    """other site -> what is sealed for it."""
    told = talk.opened(reply, "shares")[0].get("shares")
    if not isinstance(told, dict) or set(told) != sites:
        raise EnvelopeError("shares for each site that gave keys belong here")
    size = 12 + 2 * SHARE + 16  # nonce, shares of seed and key, tag
    return {site: check_hex(text, size, f"shares for {site}").hex() for site, text in told.items()}


def _global(talk: _Talk, site: str, among: Sequence[str], shares: Mapping[str, Mapping[str, str]]) -> Sent:
    told = {"among": list(among), "shares": {other: shares[other][site] for other in among}}
    return message(talk.state, talk.roster, {}, talk.state.held.get(site, 0), masked=told)


def _unmasking(
    talk: _Talk, reply: Reply, among: Sequence[str], answered: Sequence[str]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(shares of seeds of those that answered, of keys of those that did not)."""
    header, _ = talk.opened(reply, "unmask")
    found = []
    for part, sites in (("seeds", set(answered)), ("keys", set(among) - set(answered))):
        told = header.get(part)
        if not isinstance(told, dict) or set(told) != sites:
            raise EnvelopeError(f"{part}: a share of each of {sorted(sites)} belongs here")
        found.append({site: check_hex(text, SHARE, f"a share of {site}") for site, text in told.items()})
    return found[0], found[1]


def _unmasked(
    talk: _Talk,
    keys: Mapping[str, tuple[bytes, bytes]],
    among: Sequence[str],
    came: Mapping[str, torch.Tensor],
    helped: Mapping[str, tuple[Mapping[str, bytes], Mapping[str, bytes]]],
) -> np.ndarray:
    """The sum of the changes of those that answered, uint32. Raises FederationError where shares do not fit."""
    round, number = talk.state.round, {site: n for n, site in enumerate(sorted(keys), 1)}
    least = needed(len(talk.roster.asked(round)), talk.roster.privacy.threshold)
    masks = {site: pair[1] for site, pair in keys.items() if site in among}
    total: np.ndarray = sum(t.numpy().view(np.uint32) for t in came.values())  # type: ignore[assignment]  # mod 2³²
    try:
        for site in among:
            part = 0 if site in came else 1
            secret = join({number[other]: told[part][site] for other, told in sorted(helped.items())[:least]})
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
