"""What all sites' rows of a stage say through the frozen base: the server's part, once a stage, before its first round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkeel.exchange.sums import pack_gather, pack_trial, read_foretold, read_sums
from fedkeel.federation.asking import Asking, told
from fedkeel.federation.server import FederationError, Roster
from fedkeel.method.objective.anchor import SumsError, added, head_of, inverse
from fedkeel.types import Adapter, Head, Sums, Transport


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

    before: of the stages before. like: the layout of the adapter. round, stage: from 0. A site that does not answer one of the
    two is left out of the sums. Raises FederationError if fewer than quorum · sites answered.
    """
    try:
        return _gather(before, Asking(transport, roster.federation.deadline), roster, like, round, stage)
    except SumsError as error:
        raise FederationError(f"the anchor of stage {stage + 1} cannot be made: {error}") from error


def _gather(before: Mapping[str, Sums], asking: Asking, roster: Roster, like: Adapter, round: int, stage: int) -> Gathered:
    question = pack_gather(round, stage, like)
    sums = asking.ask(dict.fromkeys(roster.sites, question), lambda reply: read_sums(reply, round, stage, like))
    for site, text in _odd(sums, before).items():
        asking.failures[site] = text
        del sums[site]
    _check(sums, roster, asking.failures, stage)
    ridge, tasks = roster.evidence.ridge, sorted({task for known in sums.values() for task in known})
    fresh = _together(before, sums, tasks)
    heads = {task: head_of(known, ridge) for task, known in fresh.items()}
    if tasks:
        inverses = {task: inverse(known, ridge) for task, known in fresh.items()}
        trial = pack_trial(round, stage, like, heads, inverses)
        tried = asking.ask(dict.fromkeys(sums, trial), lambda reply: read_foretold(reply, round, like, sums[reply.site]))
        _check(tried, roster, asking.failures, stage)
        # a site that told no outcome is left out whole: its rows would count as foretold by nobody
        fresh = _together(before, tried, sorted({task for known in tried.values() for task in known}))
    known = {**before, **fresh}
    heads = {task: head_of(held, ridge, bool(roster.evidence.prototype)) for task, held in sorted(known.items())}
    return Gathered(known, heads, asking.down, asking.up, asking.failures)


def _together(before: Mapping[str, Sums], sums: Mapping[str, Mapping[str, Sums]], tasks: Sequence[str]) -> dict[str, Sums]:
    """Of each of `tasks`: what was known before and what the sites tell."""
    return {t: added([*([before[t]] if t in before else []), *(s[t] for s in sums.values() if t in s)]) for t in tasks}


def _odd(sums: Mapping[str, Mapping[str, Sums]], before: Mapping[str, Sums]) -> dict[str, str]:
    """Sites whose features are of another number than those before, or, in the first stage, than most sites'; how, in words."""
    widths = {site: len(known.gram) for site, held in sorted(sums.items()) for known in held.values()}
    known = [len(held.gram) for held in before.values()] or [width for width, _ in Counter(widths.values()).most_common(1)]
    return {s: f"its features are {w} numbers, and those of the others {known[0]}" for s, w in widths.items() if w != known[0]}


def _check(sums: Mapping[str, Mapping[str, Sums]], roster: Roster, failures: Mapping[str, str], stage: int) -> None:
    if len(sums) / len(roster.sites) < roster.federation.quorum or not sums:
        raise FederationError(
            f"the anchor of stage {stage + 1} cannot be made: {len(sums)} of {len(roster.sites)} sites told what their "
            f"rows say, and federation.quorum = {roster.federation.quorum:g}. What failed:\n{told(failures)}"
        )
