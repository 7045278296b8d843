"""What looks wrong with a recipe, or with a run: verdicts in words, each with its number, its reason and what to change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkeel.data.format import Formatter
from fedkeel.evidence.report.interval import Interval, paired_difference
from fedkeel.evidence.report.sure import Models, mean_score, read_scores
from fedkeel.evidence.report.tables import read_rows
from fedkeel.model.load import load_tokenizer
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.prepare import Prepared
from fedkeel.types import Record, Row

LOOK, BAD, GOOD = "look", "bad", "good"


@dataclass(frozen=True)
class Verdict:
    """level: `bad` (results are not what they seem), `look` or `good`. told: what was found, with its number. change: what to
    do about it, empty where nothing is wrong."""

    level: str
    told: str
    change: str = ""


def of_recipe(prepared: Prepared) -> list[Verdict]:
    """Verdicts on a recipe and its rows, before any training; the tokenizer is read, no weights."""
    recipe = prepared.recipe
    rows = [r for stage in prepared.stages for r in stage.all("train")]
    found = [cut(load_tokenizer(recipe.model), prepared, rows)] if prepared.kind == "causal" else []
    return [*found, seen(prepared), *labels(prepared), resolution(prepared), payload(recipe)]


def cut(words: object, prepared: Prepared, rows: Sequence[Record]) -> Verdict:
    """The share of training rows' tokens that data.max_length takes away."""
    data = prepared.recipe.data
    narrow, wide = (Formatter(words, prepared.kind, most, data.list_labels) for most in (data.max_length, 10**7))
    whole, kept, lengths = 0, 0, []
    for record in rows:
        full = wide.encode_all([record])
        length = full[0].length if full else 0
        lengths.append(length)
        whole += length
        kept += sum(e.length for e in narrow.encode_all([record]))
    share = 1 - kept / max(1, whole)
    told = f"data.max_length = {data.max_length} takes {share:.1%} of all tokens of the training rows away"
    if share < 0.01:
        return Verdict(GOOD, told)
    enough = sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]
    return Verdict(BAD if share > 0.1 else LOOK, told, f"set data.max_length = {enough}, which 99 % of the rows fit into")


def seen(prepared: Prepared) -> Verdict:
    """How often a site goes through its rows."""
    train, rounds = prepared.recipe.train, prepared.recipe.federation.rounds
    epochs = []
    for stage in prepared.stages:
        for name, held in stage.rows.items():
            count = len(held["train"])
            if count:
                steps = rounds * train.local_steps * train.batch_size / count
                epochs.append((rounds * train.local_epochs or steps, name))
    least, most = min(epochs), max(epochs)
    told = f"a site goes through its rows {least[0]:.2g} ({least[1]}) to {most[0]:.2g} times ({most[1]}) in a stage"
    if least[0] < 0.5:
        return Verdict(LOOK, told, "more federation.rounds or train.local_steps: most rows of some sites are never seen")
    if most[0] > 20:
        return Verdict(LOOK, told, "fewer rounds or steps, or train.local_steps in place of epochs: small sites learn by heart")
    return Verdict(GOOD, told)


def labels(prepared: Prepared) -> Iterator[Verdict]:
    """Labels that sites lack, task by task."""
    held: dict[str, dict[str, set[str]]] = {}
    known: dict[str, set[tuple[str, ...]]] = {}
    sites = sorted(prepared.sites.rows)
    for name in sites:
        for record in prepared.sites.rows[name]["train"]:
            if record.labels:
                held.setdefault(record.task, {}).setdefault(record.output, set()).add(name)
                known.setdefault(record.task, set()).add(record.labels)
    for task, by_label in sorted(held.items()):
        if len(known[task]) > 1 or len(sites) < 2:
            continue  # each row brings candidates of its own
        (all_of,) = known[task]
        lonely = sorted(label for label, names in by_label.items() if len(names) == 1)
        absent = sum(len(sites) - len(by_label.get(label, ())) for label in all_of) / (len(all_of) * len(sites))
        told = f"{task}: a site holds no row of {absent:.0%} of its {len(all_of)} labels, {len(lonely)} are at one site only"
        restricted = prepared.recipe.evidence.task != "plain"
        if absent > 0.2 and not restricted:
            yield Verdict(LOOK, told, "try evidence.task = 'restricted': labels that a site lacks then leave its softmax")
        else:
            yield Verdict(GOOD, told)


def resolution(prepared: Prepared) -> Verdict:
    """How far the choice of test rows alone moves a score that is a share of right answers, at worst."""
    limit = prepared.recipe.evaluation.test_rows
    counts = Counter(r.task for stage in prepared.stages for r in stage.all("test"))
    kept = [min(count, limit) if limit else count for count in counts.values()]
    half = 196 * math.sqrt(sum(1 / (4 * count) for count in kept)) / len(kept)
    told = f"{sum(kept)} test rows of {len(kept)} tasks: a score is known to ± {half:.1f} points (95 %, at worst)"
    if half > 3:
        change = "more test rows (evaluation.test_rows, data.test_share) before differences of a few points are believed"
        return Verdict(BAD if half > 8 else LOOK, told, change)
    return Verdict(GOOD, told)


def payload(recipe: Recipe) -> Verdict:
    """Whether updates travel in more bytes than they need."""
    told = f"updates travel as federation.codec_up = {recipe.federation.codec_up!r}"
    if recipe.federation.codec_up == "fp32":
        return Verdict(LOOK, told, "int8 sends a quarter, and cost nothing that we could measure (docs/exchange.md)")
    return Verdict(GOOD, told)


def of_run(folder: Path) -> list[Verdict]:
    """Verdicts on what a run measured. Raises FedKeelError for a folder whose files cannot be read."""
    rows, scores = read_rows(folder / "rows.jsonl"), read_scores(folder)
    return [*falling(rows), *order(scores)]


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
    elif change < -0.05:
        yield Verdict(LOOK, told, "more federation.rounds: it still falls, and a comparison would judge speed")
    else:
        yield Verdict(GOOD, told)


def order(scores: Models) -> Iterator[Verdict]:
    """Base, local, federated and centralised, as far as test rows tell them apart."""
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
        of_leg = [found for (name, _), found in known.items() if name == leg]
        worse = sum(found.high < 0 for found in of_leg)
        if of_leg and worse:
            yield Verdict(BAD, f"{told}, surely less than {worse} of {len(of_leg)} {leg}", change)
        elif of_leg and not any(found.low > 0 for found in of_leg):
            yield Verdict(LOOK, f"{told}, and surely more than none of {len(of_leg)} {leg}", "more rounds, or more test rows")
        elif of_leg:
            ahead = sum(found.low > 0 for found in of_leg)
            yield Verdict(GOOD, f"{told}, surely more than {ahead} of {len(of_leg)} {leg}")
    pooled = known.get(("centralised", ""))
    if pooled is not None and pooled.low > 0:
        change = "a lower or higher train.lr for all: training on pooled rows should not be behind"
        yield Verdict(LOOK, f"{told}, surely more than centralised", change)
