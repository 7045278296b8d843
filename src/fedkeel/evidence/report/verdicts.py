"""What looks wrong with what a run measured: verdicts in words, each with its number, its reason and what to change."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedkeel.evidence.report.interval import Interval, paired_difference
from fedkeel.evidence.report.run_numbers import own_scores
from fedkeel.evidence.report.sure import Models, mean_score, surely
from fedkeel.evidence.report.tables import Table, plural
from fedkeel.files import write_atomic
from fedkeel.types import FedKeelError, Row

BAD, LOOK, GOOD = "bad", "look", "good"
LEVELS = (BAD, LOOK, GOOD)
KEPT = "verdicts.json"  # in a run's folder: those that need its rows of text, see `doctor`


@dataclass(frozen=True)
class Verdict:
    """level: `bad` (results are not what they seem), `look` or `good`. told: what was found, with its number. change: what to
    do about it, empty where nothing is wrong."""

    level: str
    told: str
    change: str = ""


def measured(rows: Sequence[Row], scores: Models) -> list[Verdict]:
    """Verdicts on what a run measured."""
    return [*falling(rows), *order(scores), *at_home(rows)]


def at_home(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Whether the federated model is better than a site's own where the site would look: on that site's own test rows."""
    mine, alone = own_scores(rows, "federated"), own_scores(rows, "local")
    both = sorted(mine.keys() & alone.keys())
    if not both:
        return
    better = sum(mine[site] > alone[site] for site in both)
    means = [100 * sum(of[site] for site in both) / len(both) for of in (mine, alone)]
    told = (
        f"on a site's own test rows federated {means[0]:.1f} points, its own local model {means[1]:.1f}, the mean of "
        f"{plural(len(both), 'site')}; better at {better}"
    )
    if means[0] < means[1]:
        change = "look at what is gained on the rows of others, or at rules that leave a part at the sites (federation.rule)"
        yield Verdict(LOOK, told, change)
    else:
        yield Verdict(GOOD, told)


def in_order(found: Sequence[Verdict]) -> list[Verdict]:
    """The worst first."""
    return sorted(found, key=lambda v: LEVELS.index(v.level))


def verdict_table(found: Sequence[Verdict]) -> Table:
    """A line a verdict, the worst first."""
    lines = [(v.level, v.told, v.change or "–") for v in in_order(found)]
    return Table("Verdicts", ("", "what was found", "what to change"), tuple(lines))


def write_verdicts(folder: Path, found: Sequence[Verdict]) -> None:
    """Keep verdicts that cannot be found again without the text of rows."""
    write_atomic(folder / KEPT, json.dumps([asdict(v) for v in found], ensure_ascii=False, indent=1) + "\n")


def read_verdicts(folder: Path) -> list[Verdict]:
    """What `write_verdicts` kept; empty where nothing was. Raises FedKeelError for a file that is none."""
    path = folder / KEPT
    try:
        return [Verdict(**told) for told in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []
    except (OSError, ValueError, TypeError) as error:
        raise FedKeelError(f"{path} cannot be read: {error!r}") from error


def falling(rows: Sequence[Row]) -> Iterator[Verdict]:
    """Whether the training loss of the last stage had come to rest."""
    losses = [r for r in rows if r.method == "federated" and r.name == "loss"]
    weights = {(r.round, r.site): r.value for r in rows if r.method == "federated" and r.name == "positions"}
    last = max((r.stage for r in losses), default=0)
    by_round: dict[int, list[tuple[float, float]]] = {}
    for row in losses:
        if row.stage == last:
            by_round.setdefault(row.round, []).append((row.value, weights.get((row.round, row.site), 1.0)))
    means = [sum(v * w for v, w in of) / sum(w for _, w in of) for _, of in sorted(by_round.items())]
    if len(means) < 4:
        return
    quarter = max(1, len(means) // 4)
    late, before = (sum(part) / quarter for part in (means[-quarter:], means[-2 * quarter : -quarter]))
    change = late / before - 1
    told = f"training loss {before:.3g} and then {late:.3g} nats in the last two quarters of the rounds ({change:+.0%})"
    if change > 0.05:
        yield Verdict(BAD, told, "a lower train.lr: it rises")
    elif change < -0.05 and before - late > 0.05:
        yield Verdict(LOOK, told, "more federation.rounds: it still falls, and a comparison would judge speed")
    else:
        yield Verdict(GOOD, told)


def _of(count: int, of_leg: Sequence[int], leg: str) -> str:
    """Some of a leg's models, in words; the base is one."""
    return f"the {leg}" if leg == "base" else f"{count} of {plural(len(of_leg), f'{leg} model')}"


def order(scores: Models) -> Iterator[Verdict]:
    """Base, analytic head, local, federated and centralised, as far as test rows tell them apart."""
    mine = next((of for (leg, _), of in scores.items() if leg == "federated"), None)
    if mine is None:
        return
    told = f"federated {100 * mean_score(mine):.1f} points"
    against = {key: paired_difference({0: mine}, {0: of}, *key) for key, of in sorted(scores.items()) if key[0] != "federated"}
    known: Mapping[tuple[str, str], Interval] = {key: found for key, found in against.items() if found is not None}
    for leg, change in (
        ("base", "nothing is learnt that the base did not know: a higher train.lr, more rounds, or look at the rows"),
        ("local", "sites do better alone: look at how their data differ, at evidence.task and at federation.rule"),
    ):
        of_leg = [surely(found) for (name, _), found in known.items() if name == leg]
        worse = of_leg.count(-1)
        if of_leg and worse:
            yield Verdict(BAD, f"{told}, surely less than {_of(worse, of_leg, leg)}", change)
        elif of_leg and 1 not in of_leg:
            yield Verdict(
                LOOK, f"{told}, and not surely more than {_of(len(of_leg), of_leg, leg)}", "more rounds, or more test rows"
            )
        elif of_leg:
            yield Verdict(GOOD, f"{told}, surely more than {_of(of_leg.count(1), of_leg, leg)}")
    head = known.get(("analytic", ""))
    if head is not None and surely(head) < 0:
        change = "serve it: evidence.serve = 1 or more, by validation rows; or more rounds and local steps"
        yield Verdict(LOOK, f"{told}, surely less than the analytic head, which nobody trained", change)
    pooled = known.get(("centralised", ""))
    if pooled is not None and surely(pooled) > 0:
        change = "a lower or higher train.lr for all: training on pooled rows should not be behind"
        yield Verdict(LOOK, f"{told}, surely more than centralised", change)
