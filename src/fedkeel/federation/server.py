"""The server's part in a round, once: sample, send, screen, aggregate. It needs no model in memory, only adapters."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fedkeel import tables
from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.messages import Way, layout, names_of, pack_global, unpack_global, unsent
from fedkeel.exchange.noise import deviation, noised
from fedkeel.exchange.quantile import as_now, next_bound
from fedkeel.federation.asking import told
from fedkeel.federation.screen import Expected, screen
from fedkeel.method.aggregate.common import Aggregate, exact_factors, product_norm
from fedkeel.method.aggregate.drift import drift
from fedkeel.method.aggregate.gauge import gauge
from fedkeel.method.aggregate.layouts import truncated
from fedkeel.method.aggregate.optimise import Rates, step
from fedkeel.method.aggregate.rule import Aggregator, Options
from fedkeel.method.aggregate.weighting import weights
from fedkeel.method.structure.shares import within
from fedkeel.recipe.schema import Evidence, Federation, Privacy
from fedkeel.rng import derive, numpy_generator
from fedkeel.types import Adapter, FedKeelError, Global, Reply, Request, Transport, Update

SMALL = 2**28  # bytes of all replies of a round, up to which their decoded updates are held together


class FederationError(FedKeelError):
    """A federation that stopped: too few sites answered well, or a round changed nothing."""


def nothing_held(site: str, round: int) -> frozenset[str]:
    """No module is left out."""
    return frozenset()


@dataclass(frozen=True)
class Roster:
    """Who takes part in a leg's rounds, and what the rounds go by.

    layouts: what the adapter of a site looks like whose rank is not that of the global one. hold: (site, round) -> the modules
    that the site leaves out of this round. own: the rule's own options. privacy: what is hidden of a site, and who hides it.
    evidence: what is made of sums of rows. by_head: whether sites score classes by the analytic classifiers. moves: what a
    number can change by in a stage's first round. ranks: of the branches, that may change; None: all.
    """

    sites: Sequence[str]
    federation: Federation
    seed: int
    layouts: Mapping[str, Adapter] = field(default_factory=dict)
    hold: Callable[[str, int], frozenset[str]] = nothing_held
    own: Any = None
    privacy: Privacy = field(default_factory=Privacy)
    evidence: Evidence = field(default_factory=Evidence)
    by_head: bool = False
    moves: float = 0.03
    ranks: range | None = None

    @property
    def rule(self) -> tables.Rule:
        """Of aggregation."""
        return tables.RULES[self.federation.rule]

    @property
    def hides(self) -> bool:
        """Whether it is the coordinator who adds noise, so that what is seen of updates must not be told."""
        return self.privacy.unit != "none" and self.privacy.noise_at == "coordinator"

    def now(self, state: Global) -> Roster:
        """The same for a round of `state`, by its clipping bound."""
        return replace(self, privacy=as_now(self.privacy, state.clip))

    def asked(self, round: int) -> list[str]:
        """The sites of round `round`."""
        return sample_sites(self.sites, self.federation.sites_per_round, self.seed, round)


@dataclass(frozen=True)
class RoundResult:
    """One finished round.

    bytes_down, bytes_up: site -> len(payload) as sent. updates: what the sites whose replies were used told, without their
    adapters. failures: site -> what went wrong there. error: what the rule lost, see `aggregate.common.Aggregate`. seconds:
    wall clock of the whole round.
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


@dataclass(frozen=True)
class _Anew:
    """Replies as Updates in the order given, decoded each time they are gone through, so that one is held at a time."""

    replies: Sequence[Reply]
    decode: Callable[[Reply], Update]

    def __iter__(self) -> Iterator[Update]:
        return map(self.decode, self.replies)


@dataclass(frozen=True)
class Sent:
    """What went down to some sites. payload: as sent. reference: what they then start from, after the codec."""

    payload: bytes
    reference: Adapter


@dataclass(frozen=True)
class Answers:
    """Replies that were used. heads: their updates without adapters, by ascending site. updates: with them, re-iterable."""

    heads: Sequence[Update]
    updates: Iterable[Update]
    failures: Mapping[str, str]


def run_round(
    state: Global, transport: Transport, roster: Roster, clock: Callable[[], float] = time.perf_counter
) -> RoundResult:
    """One round from `state` to the next.

    Raises FederationError, with every failed site's own words, if fewer than quorum · sampled sites answered well, if no
    update differs from what was sent, or if codec_down cannot hold the adapter.
    """
    begin = clock()
    roster = roster.now(state)
    rule, federation = roster.rule, roster.federation
    sampled = roster.asked(state.round)
    _check_together(roster, sampled)
    if len(rule.trains) > 1:  # by turns: the factor that rests is made orthogonal
        state = replace(state, adapter=gauge(state.adapter, "".join(rule.trained(state.round))))
    to = _messages(state, roster, sampled)
    replies = transport.exchange([Request(site, to[site].payload) for site in sampled], federation.deadline)
    left_out = {site: roster.hold(site, state.round) for site in sampled}
    answers = _sifted(replies, sampled, partial(_decoded, state, roster, to, left_out), state.round)
    _check_quorum(answers, sampled, roster, state.round)
    aggregation = clock()
    # Sites may start from other truncations of the global adapter; rules that allow it look at what came back alone.
    reference = state.adapter if roster.layouts else to[answers.heads[0].site].reference
    result, kept = aggregated(state, roster, answers, reference, left_out)
    # factors can be compared where all sites have them, of one rank
    comparable = not roster.layouts and not any(left_out.values()) and not roster.hides
    shares = weights(answers.heads, federation.weighting)
    disagreement = drift(reference, answers.updates, shares) if comparable else {}
    end = clock()
    held = {u.site: u.held for u in answers.heads}
    after = replace(
        state,
        round=state.round + 1,
        adapter=result.adapter,
        counts={**state.counts, **{u.site: u.tasks for u in answers.heads}},
        drift=disagreement,
        shifts=[*state.shifts, result.shift] if result.shift else state.shifts,
        # a site that failed may have lost its base: it is sent the whole log again, and passes over what it holds
        held={**state.held, **dict.fromkeys(answers.failures, 0), **held},
        optimiser=kept,
        clip=bound_after(roster, state, sum(u.side for u in answers.heads), len(answers.heads)),
    )
    down = {site: len(to[site].payload) for site in sampled}
    up = {r.site: len(r.payload) for r in replies}
    error = math.nan if roster.hides else result.error
    heads = [replace(u, stats={}, side=0.0) for u in answers.heads] if roster.hides else answers.heads
    return RoundResult(after, error, heads, down, up, end - begin, end - aggregation, answers.failures)


def _messages(state: Global, roster: Roster, sampled: Sequence[str]) -> dict[str, Sent]:
    """What goes to each site; sites of one layout that hold the same base shifts are sent the same."""
    total: Counter[str] = Counter()
    for counted in state.counts.values():
        total.update(counted)
    tasks = dict(sorted(total.items()))
    sent: dict[tuple[str, int], Sent] = {}
    to: dict[str, Sent] = {}
    for site in sampled:
        like, held = roster.layouts.get(site), state.held.get(site, 0)
        which = (layout(like) if like else "", held)
        try:
            if which not in sent:
                sent[which] = message(_laid_out(state, like), roster, tasks, held)
        except ValueError as error:  # a value over the range of the type that it should travel as
            raise FederationError(f"round {state.round + 1}: the global adapter cannot be sent: {error}") from error
        to[site] = sent[which]
    return to


def _laid_out(state: Global, like: Adapter | None) -> Global:
    """The state for sites with an adapter laid out as `like` (None: as the global one)."""
    if like is None:
        return state
    memory = None if state.memory is None else truncated(state.memory, like)
    return replace(state, adapter=truncated(state.adapter, like), memory=memory)


def message(state: Global, roster: Roster, tasks: Mapping[str, int], held: int, **more: Any) -> Sent:
    """The message for sites that hold `held` base shifts. more: of its header."""
    adapter = state.adapter
    way = Way(roster.federation.codec_down, names_of(adapter, roster.rule.down), derive(roster.seed, "down", state.round))
    # as a teacher those alone that rows of the present stage may ask; rows of an earlier one may be replayed, and scored
    now = max((head.stage for head in state.heads.values()), default=0)
    teaches = roster.evidence.anchor or roster.evidence.prototype
    heads = {task: head for task, head in state.heads.items() if roster.by_head or (teaches and head.stage == now)}
    sent = replace(state, heads=heads, serve=None, average=None)
    payload = pack_global("global", sent, way, held, tasks=dict(tasks), unsent=unsent(adapter, roster.rule), **more)
    # The bytes are read back, not the tensors kept: what a site starts from is what the codec left of the global adapter.
    _, back = unpack_global(payload, "global", adapter, way.names, way.codec)
    return Sent(payload, back.adapter)


def _decoded(
    state: Global, roster: Roster, to: Mapping[str, Sent], left_out: Mapping[str, frozenset[str]], reply: Reply
) -> Update:
    reference, federation = to[reply.site].reference, roster.federation
    shared = roster.rule.trained(state.round) & roster.rule.shared
    names = names_of(reference, shared, left_out[reply.site])
    log = len(state.shifts)
    held = (federation.codec_up, federation.max_update_norm, log)
    return screen(reply, Expected(state.round, reference, names, *held, roster.privacy))


def _sifted(replies: Sequence[Reply], sampled: Sequence[str], decode: Callable[[Reply], Update], round: int) -> Answers:
    """Good replies and bad ones. Small ones are decoded once and held; of large ones only the numbers, so that memory does not
    grow with the sites. Raises FederationError where replies are not those of the sites that were asked."""
    answered = [r.site for r in replies]
    if len(set(answered)) < len(answered) or not set(answered) <= set(sampled):
        raise FederationError(f"round {round + 1}: replies from {sorted(answered)}, but each of {sampled} was asked once")
    small = sum(len(r.payload) for r in replies) <= SMALL
    heads, good, failures = [], [], {}
    whole: list[Update] = []
    for reply in sorted(replies, key=lambda r: r.site):
        try:
            update = decode(reply)
        except EnvelopeError as error:
            failures[reply.site] = str(error)
            continue
        heads.append(replace(update, adapter=Adapter({})))
        good.append(reply)
        if small:
            whole.append(update)
    for site in set(sampled) - set(answered):
        failures[site] = "no reply"
    return Answers(heads, whole if small else _Anew(good, decode), failures)


def _check_together(roster: Roster, sampled: Sequence[str]) -> None:
    least = math.ceil(roster.federation.quorum * len(sampled) - 1e-9)
    if roster.privacy.unit != "none" and roster.privacy.together > least:
        raise FederationError(
            f"privacy.together = {roster.privacy.together}: by federation.quorum = {roster.federation.quorum:g} a round may go "
            f"on with {least} of {len(sampled)} sites, whose noise would not add up; set it to {least} or less"
        )


def _check_quorum(answers: Answers, sampled: Sequence[str], roster: Roster, round: int) -> None:
    heads, quorum = answers.heads, roster.federation.quorum
    # a share, not a product: 0.55 · 20 is 11.000000000000002, and 11 of 20 are enough
    if not heads or len(heads) / len(sampled) < quorum:
        raise FederationError(
            f"round {round + 1} stopped: {len(heads)} of {len(sampled)} sites answered well, and federation.quorum = "
            f"{quorum:g} asks for at least {quorum * len(sampled):g}. What failed:\n{told(answers.failures)}"
        )
    # where factors stay at the sites, all that changed may be there: A has no gradient while B is 0
    if not roster.rule.personal and not any(u.stats["update_norm"] for u in heads):
        raise FederationError(f"round {round + 1} changed nothing: every site sent back the adapter that it was given")


def aggregated(
    state: Global, roster: Roster, answers: Answers, reference: Adapter, left_out: Mapping[str, frozenset[str]]
) -> tuple[Aggregate, dict[str, torch.Tensor]]:
    """What the rule and the server's optimiser make of the updates, and what the optimiser keeps. Raises FederationError."""
    federation, round = roster.federation, state.round
    shares = weights(answers.heads, federation.weighting)
    options = Options(federation.hostile, round, roster.own)
    try:
        result = _combine(Aggregator(roster.rule), reference, answers.updates, shares, options, left_out)
    except ValueError as error:
        raise FederationError(f"round {round + 1}, federation.rule = {federation.rule!r}: {error}") from error
    if roster.hides:
        result = replace(result, adapter=_hidden(roster, reference, result.adapter, state.round, len(answers.heads)))
    adapter, kept = step(federation.optimiser, reference, result.adapter, state.optimiser, Rates(federation.server_lr))
    made = [*adapter.tensors().items(), *((path, t) for path, pair in result.shift.items() for t in pair)]
    for name, tensor in made:
        if not torch.isfinite(tensor).all():
            raise FederationError(
                f"round {round + 1}: {name} is not finite once the updates are combined; a smaller "
                f"federation.max_update_norm keeps out what grew too large. The round before can be resumed"
            )
    if roster.ranks is not None:  # neither what codec_down rounds nor what a site sends moves the others
        adapter = within(roster.ranks, state.adapter, adapter)
    return replace(result, adapter=adapter), kept


def _hidden(roster: Roster, reference: Adapter, adapter: Adapter, round: int, count: int) -> Adapter:
    """The average of `count` sites with the noise of their sum, z_Δ · C, shared by them."""
    trained = names_of(reference, roster.rule.trained(round))
    held = adapter.tensors()
    sigma = deviation(roster.privacy, len(roster.asked(round))) / count
    return adapter.with_tensors(held | noised({n: held[n] for n in sorted(trained)}, sigma))


def bound_after(roster: Roster, state: Global, sides: float, count: int) -> float:
    """C after a round in which the sides of `count` sites add up to `sides`; 0 where it stays. Raises FederationError."""
    if not roster.privacy.quantile:
        return 0.0
    try:
        return next_bound(roster.privacy, sides, count, len(roster.asked(state.round)))
    except ValueError as error:
        raise FederationError(f"round {state.round + 1}: {error}") from error


def _combine(
    rule: Aggregator,
    reference: Adapter,
    updates: Iterable[Update],
    shares: Mapping[str, float],
    options: Options,
    left_out: Mapping[str, frozenset[str]],
) -> Aggregate:
    """The rule over all modules; where sites left modules out, over those that trained a module, with their shares anew.

    left_out: site -> modules. A module that nobody trained stays as it is.
    """
    if not any(left_out.values()):
        return rule(reference, updates, shares, options)
    held = list(updates)
    groups: dict[frozenset[str], list[str]] = {}
    for path in reference.lora:
        groups.setdefault(frozenset(site for site in shares if path not in left_out[site]), []).append(path)
    lora = dict(reference.lora)
    lost = total = 0.0
    for sites, paths in sorted(groups.items(), key=lambda item: item[1]):
        if not sites:
            continue
        part = [replace(u, adapter=Adapter({p: u.adapter.lora[p] for p in paths})) for u in held if u.site in sites]
        whole = sum(shares[site] for site in sites)
        own = {site: shares[site] / whole for site in sorted(sites)}
        found = rule(Adapter({p: reference.lora[p] for p in paths}), part, own, options)
        lora |= found.adapter.lora
        norm = sum(product_norm(*exact_factors(part, own, path)) ** 2 for path in paths)
        lost, total = lost + found.error**2 * norm, total + norm
    whole_tensors = [replace(u, adapter=Adapter({}, u.adapter.dense)) for u in held]
    dense = rule(Adapter({}, reference.dense), whole_tensors, shares, options).adapter.dense
    return Aggregate(Adapter(lora, dense), (lost / total) ** 0.5 if total else 0.0)
