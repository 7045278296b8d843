"""The round loop, once: sample, send, screen, aggregate, checkpoint. It needs no model in memory, only adapters."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from fedkeel.aggregate import AGGREGATORS, drift, weights
from fedkeel.codecs import CODECS, EnvelopeError
from fedkeel.config import Federation
from fedkeel.messages import pack_global, read_counts, unpack
from fedkeel.rng import numpy_generator
from fedkeel.types import Adapter, FedKeelError, Global, Reply, Request, Transport, Update


class FederationError(FedKeelError):
    """A federation that stopped: too few sites answered well, or a round changed nothing."""


@dataclass(frozen=True)
class RoundResult:
    """One finished round.

    bytes_down, bytes_up: site -> len(payload) as sent. updates: the replies that were used. failures: site -> what went
    wrong there. error: what the rule lost, see `aggregate.Aggregate`. seconds: wall clock of the whole round.
    """

    state: Global
    error: float
    updates: Sequence[Update]
    bytes_down: Mapping[str, int]
    bytes_up: Mapping[str, int]
    seconds: float
    aggregation_seconds: float
    failures: Mapping[str, str] = field(default_factory=dict)


def sample_sites(sites: Sequence[str], count: int, seed: int, round: int) -> list[str]:
    """`count` sites of round `round`, without replacement, sorted; all of them if count is 0 or too large."""
    ordered = sorted(sites)
    if count == 0 or count >= len(ordered):
        return ordered
    chosen = numpy_generator(seed, "sites", round).choice(len(ordered), count, replace=False)
    return [ordered[i] for i in sorted(chosen)]


def screen(reply: Reply, round: int, reference: Adapter, max_norm: float) -> Update:
    """A reply as an Update, or EnvelopeError saying why it is refused: malformed, another round or layout, not finite,
    no positions, or a change longer than `max_norm` (Euclidean, all tensors together)."""
    if reply.error:
        raise EnvelopeError(reply.error)
    header, change = unpack(reply.payload, "update", round, reference)
    if header.get("site") != reply.site:
        raise EnvelopeError(f"the message says it is from site {header.get('site')!r}, not {reply.site!r}")
    positions, stats = header.get("positions"), header.get("stats")
    if type(positions) is not int or not 1 <= positions <= 2**53 or not isinstance(stats, dict):
        raise EnvelopeError(f"the message reports {positions!r} supervised positions and stats {stats!r}")
    try:
        stats = {name: float(value) for name, value in (stats | {"loss": stats["loss"], "seconds": header["seconds"]}).items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EnvelopeError(f"the message's numbers cannot be read: {error!r}") from error
    counts = read_counts(header.get("tasks"))
    if not all(map(math.isfinite, stats.values())):
        raise EnvelopeError(f"the message reports stats that are not finite: {stats!r}")
    norm = float(torch.sqrt(sum((t.double().square().sum() for t in change.values()), torch.zeros(()))))
    if norm > max_norm:
        raise EnvelopeError(f"the change has norm {norm:.3g}, over federation.max_update_norm = {max_norm:g}")
    old = reference.tensors()
    adapter = reference.with_tensors({name: old[name] + t for name, t in change.items()})
    return Update(reply.site, adapter, positions, {**stats, "update_norm": norm}, counts)


def run_round(
    state: Global, transport: Transport, sites: Sequence[str], federation: Federation, seed: int,
    clock: Callable[[], float] = time.perf_counter,
) -> RoundResult:  # fmt: skip
    """One round from `state` to the next.

    Raises FederationError, with every failed site's own words, if fewer than quorum · sampled sites answered well, if no
    update differs from what was sent, or if codec_down cannot hold the adapter.
    """
    begin = clock()
    sampled = sample_sites(sites, federation.sites_per_round, seed, state.round)
    sent = state.adapter.tensors()
    total: Counter[str] = Counter()
    for held in state.counts.values():
        total.update(held)
    try:
        payload = pack_global("global", state, federation.codec_down, tasks=dict(sorted(total.items())))
    except ValueError as error:  # a value over the range of the type that it should travel as
        raise FederationError(f"round {state.round + 1}: the global adapter cannot be sent: {error}") from error
    # What the sites start from is what the codec left of the global adapter.
    codec = CODECS[federation.codec_down]
    reference = state.adapter.with_tensors(codec.decode(codec.encode(sent)))
    replies = transport.exchange([Request(site, payload) for site in sampled], federation.deadline)
    updates, failures = [], {}
    for reply in sorted(replies, key=lambda r: r.site):
        try:
            updates.append(screen(reply, state.round, reference, federation.max_update_norm))
        except EnvelopeError as error:
            failures[reply.site] = str(error)
    answered = [r.site for r in replies]
    if len(set(answered)) < len(answered) or not set(answered) <= set(sampled):
        raise FederationError(f"round {state.round + 1}: replies from {sorted(answered)}, but each of {sampled} was asked once")
    for site in set(sampled) - set(answered):
        failures[site] = "no reply"
    # a share, not a product: 0.55 · 20 is 11.000000000000002, and 11 of 20 are enough
    if not updates or len(updates) / len(sampled) < federation.quorum:
        told = "\n".join(f"--- {site}: {text.strip()}" for site, text in sorted(failures.items()))
        raise FederationError(
            f"round {state.round + 1} stopped: {len(updates)} of {len(sampled)} sites answered well, and federation.quorum = "
            f"{federation.quorum:g} asks for at least {federation.quorum * len(sampled):g}. What failed:\n{told}"
        )
    if not any(u.stats["update_norm"] for u in updates):
        raise FederationError(f"round {state.round + 1} changed nothing: every site sent back the adapter that it was given")
    aggregation = clock()
    shares = weights(updates, federation.weighting)
    result = AGGREGATORS[federation.rule](reference, updates, shares)
    disagreement = drift(reference, updates, shares)
    end = clock()
    return RoundResult(
        Global(
            state.round + 1,
            result.adapter,
            state.memory,
            {**state.counts, **{u.site: u.tasks for u in updates}},
            disagreement,
        ),
        result.error,
        updates,
        dict.fromkeys(sampled, len(payload)),
        {r.site: len(r.payload) for r in replies},
        end - begin,
        end - aggregation,
        failures,
    )
