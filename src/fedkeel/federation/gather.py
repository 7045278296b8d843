"""What all sites' rows of a stage say through the frozen base: the server's part, once a stage, before its first round."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.sums import pack_gather, pack_trial, read_foretold, read_sums
from fedkeel.federation.server import FederationError, Roster
from fedkeel.method.objective.anchor import added, head_of, inverse
from fedkeel.types import Adapter, Head, Reply, Request, Sums, Transport

Found = TypeVar("Found")


@dataclass(frozen=True)
class Gathered:
    """known: sums of all rows so far, by task. heads: what they make, by task. bytes_down, bytes_up: by site. failures: site ->
    what went wrong there."""

    known: Mapping[str, Sums]
    heads: Mapping[str, Head]
    bytes_down: Mapping[str, int]
    bytes_up: Mapping[str, int]
    failures: Mapping[str, str]


def gather(before: Mapping[str, Sums], transport: Transport, roster: Roster, like: Adapter, round: int, stage: int) -> Gathered:
    """Ask every site for the sums of its rows of a stage, then how well what they make foretells each row without it.

    before: of the stages before. like: the layout of the adapter. round, stage: from 0. A site that does not answer is left
    out of the sums. Raises FederationError if fewer than quorum · sites answered.
    """
    asking = _Asking(transport, roster)
    sums = asking.ask(pack_gather(round, stage, like), lambda reply: read_sums(reply, round, stage, like))
    _check(sums, roster, asking.failures, stage)
    ridge, tasks = roster.evidence.ridge, sorted({task for known in sums.values() for task in known})
    fresh = _together(before, sums, tasks)
    heads = {task: head_of(known, ridge) for task, known in fresh.items()}
    if tasks:
        inverses = {task: inverse(known, ridge) for task, known in fresh.items()}
        trial = pack_trial(round, stage, like, heads, inverses)
        tried = asking.ask(trial, lambda reply: read_foretold(reply, round, like, sums[reply.site]))
        fresh = _together(before, {**sums, **tried}, tasks)
    known = {**before, **fresh}
    heads = {task: head_of(held, ridge) for task, held in sorted(known.items())}
    return Gathered(known, heads, asking.down, asking.up, asking.failures)


def _together(before: Mapping[str, Sums], sums: Mapping[str, Mapping[str, Sums]], tasks: Sequence[str]) -> dict[str, Sums]:
    """Of each of `tasks`: what was known before and what the sites tell."""
    return {t: added([*([before[t]] if t in before else []), *(s[t] for s in sums.values() if t in s)]) for t in tasks}


@dataclass
class _Asking:
    """Questions to all sites, those aside that failed. down, up: bytes so far, by site."""

    transport: Transport
    roster: Roster
    down: dict[str, int] = field(default_factory=dict)
    up: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def ask(self, payload: bytes, read: Callable[[Reply], Found]) -> dict[str, Found]:
        """Answers by site, as `read` reads them."""
        sites = [site for site in sorted(self.roster.sites) if site not in self.failures]
        found = {}
        replies = self.transport.exchange([Request(site, payload) for site in sites], self.roster.federation.deadline)
        for reply in sorted(replies, key=lambda r: r.site):
            self.down[reply.site] = self.down.get(reply.site, 0) + len(payload)
            self.up[reply.site] = self.up.get(reply.site, 0) + len(reply.payload)
            try:
                found[reply.site] = read(reply)
            except EnvelopeError as error:
                self.failures[reply.site] = str(error)
        self.failures.update({site: "no reply" for site in sites if site not in found and site not in self.failures})
        return found


def _check(sums: Mapping[str, Mapping[str, Sums]], roster: Roster, failures: Mapping[str, str], stage: int) -> None:
    if len(sums) / len(roster.sites) < roster.federation.quorum or not sums:
        told = "\n".join(f"--- {site}: {text.strip()}" for site, text in sorted(failures.items()))
        raise FederationError(
            f"the anchor of stage {stage + 1} cannot be made: {len(sums)} of {len(roster.sites)} sites told what their "
            f"rows say, and federation.quorum = {roster.federation.quorum:g}. What failed:\n{told}"
        )
    widths = {site: len(known.gram) for site, held in sorted(sums.items()) for known in held.values()}
    if len(set(widths.values())) > 1:
        raise FederationError(f"the anchor of stage {stage + 1} cannot be made: sites tell of different features: {widths}")
