"""What looks wrong with a recipe, or with a run: verdicts in words, each with its number, its reason and what to change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedkeel.data.format import Formatter
from fedkeel.evidence.report.chance import chances, majority
from fedkeel.evidence.report.sure import Models, mean_score, read_scores
from fedkeel.evidence.report.tables import plural, read_rows
from fedkeel.evidence.report.verdicts import BAD, GOOD, LOOK, Verdict, measured, read_verdicts, write_verdicts
from fedkeel.model.load import load_tokenizer
from fedkeel.recipe.load import make_recipe, read_tree
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import Prepared
from fedkeel.types import Record, Row

LOOKED_AT = 2000  # training rows whose tokens are counted; their ids are hashes, so the first are a fair draw


def of_recipe(prepared: Prepared) -> list[Verdict]:
    """Verdicts on a recipe and its rows, before any training; the tokenizer is read, no weights."""
    rows = _trained(prepared)
    some = [rows[name][1] for name in sorted(rows)[:LOOKED_AT]]
    about_rows = [cut(prepared, some), seen(prepared), *labels(prepared), *odd(prepared), resolution(prepared)]
    return [*about_rows, payload(prepared.recipe)]


def _trained(prepared: Prepared) -> dict[str, tuple[str, Record]]:
    """The training rows of all stages: id -> (site, row)."""
    return {r.id: (site, r) for stage in prepared.stages for site, of in stage.rows.items() for r in of["train"]}


def cut(prepared: Prepared, rows: Sequence[Record]) -> Verdict:
    """The share of training rows' tokens that data.max_length takes away."""
    data, words = prepared.recipe.data, load_tokenizer(prepared.recipe.model)
    narrow, wide = (
        Formatter(words, prepared.kind, most, data.list_labels, classes=prepared.classes) for most in (data.max_length, 10**7)
    )
    whole, kept, lengths = 0, 0, []
    for record in rows:
        full = wide.encode_all([record])
        length = full[0].length if full else 0
        lengths.append(length)
        whole += length
        kept += sum(e.length for e in narrow.encode_all([record]))
    share = 1 - kept / max(1, whole)
    told = f"data.max_length = {data.max_length} takes {share:.1%} of the tokens of {len(rows):,} training rows away"
    if share < 0.01:
        return Verdict(GOOD, told)
    enough = sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]
    return Verdict(BAD if share > 0.5 else LOOK, told, f"set data.max_length = {enough}, which 99 % of the rows fit into")


def seen(prepared: Prepared) -> Verdict:
    """How often a site goes through its rows."""
    train, federation, epochs = prepared.recipe.train, prepared.recipe.federation, []
    for stage in prepared.stages:
        counts = {name: count for name, held in stage.rows.items() if (count := len(held["train"]))}
        asked = min(federation.sites_per_round or len(counts), len(counts)) / max(1, len(counts))
        rounds = federation.rounds * asked  # that a site is asked for, on average
        for name, count in counts.items():
            epochs.append((rounds * (train.local_epochs or train.local_steps * train.batch_size / count), name))
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
        told = f"{task}: a site lacks {absent:.0%} of its {len(all_of)} labels, on average; {len(lonely)} are at one site only"
        restricted = prepared.recipe.evidence.task != "plain"
        if absent > 0.2 and not restricted:
            yield Verdict(LOOK, told, "try evidence.task = 'restricted': labels that a site lacks then leave its softmax")
        else:
            yield Verdict(GOOD, told)


def odd(prepared: Prepared) -> Iterator[Verdict]:
    """Names that differ in case alone, texts that say nothing, the same row twice at a site."""
    rows = _trained(prepared)
    held = [record for _, record in rows.values()]
    tasks, asked = dict[str, set[str]](), dict[str, set[str]]()
    for r in held:
        tasks.setdefault(r.task, set()).update([r.output] if r.labels else [])
        asked.setdefault(r.task, set()).add(r.instruction)
    named = {"sites": {*prepared.sites.rows}} | {f"labels of task {task}": of for task, of in sorted(tasks.items())}
    for what, names in named.items():
        alike: dict[str, list[str]] = {}
        for name in sorted(names):
            alike.setdefault(name.casefold(), []).append(name)
        if twins := [" and ".join(map(repr, of)) for of in alike.values() if len(of) > 1]:
            told = f"{what} that differ in the case of letters alone: {', '.join(twins[:3])}"
            yield Verdict(LOOK, told, "one name, where one is meant")
    # an instruction of its own may be all that a row asks
    if empty := sum(not r.messages and not r.input.strip() and len(asked[r.task]) == 1 for r in held):
        yield Verdict(LOOK, f"{plural(empty, 'training row')} without a text: an answer to nothing", "leave them out")
    contents = Counter((site, r.task, r.instruction, r.input, r.output, str(r.messages)) for site, r in rows.values())
    if again := contents.total() - len(contents):
        told = f"{plural(again, 'training row')} that a site holds already, word for word"
        yield Verdict(LOOK, told, "leave them out, unless they are meant to count twice")


def resolution(prepared: Prepared) -> Verdict:
    """How far the choice of test rows alone moves a score that is a share of right answers, at worst."""
    limit = prepared.recipe.evaluation.test_rows
    counts = Counter(r.task for r in prepared.stages[-1].all("test"))  # of all stages
    return _known_to([min(count, limit) if limit else count for count in counts.values()])


def _known_to(kept: Sequence[float]) -> Verdict:
    """See `resolution`. kept: test rows of each task."""
    if not any(kept):
        return Verdict(BAD, "no test row: nothing could be scored", "data.test_share above 0, or rows with split `test`")
    half = 196 * math.sqrt(sum(1 / (4 * count) for count in kept)) / len(kept)
    counted = f"{plural(round(sum(kept)), 'test row')} of {plural(len(kept), 'task')}"
    told = f"{counted}: a score alone is known to ± {half:.1f} points (95 %, at worst)"
    if half > 3:
        change = "more test rows (evaluation.test_rows, data.test_share) before differences of a few points are believed"
        return Verdict(BAD if half > 8 else LOOK, told, change)
    return Verdict(GOOD, told)


def payload(recipe: Recipe) -> Verdict:
    """Whether updates travel in more bytes than they need."""
    told = f"updates travel as federation.codec_up = {recipe.federation.codec_up!r}"
    if recipe.federation.codec_up == "fp32":
        return Verdict(
            LOOK,
            told,
            "int8 sends a quarter, and cost nothing that we could measure (docs/results-all.md, score against bytes)",
        )
    return Verdict(GOOD, told)


def of_run(folder: Path, prepared: Prepared | None = None) -> list[Verdict]:
    """Verdicts on a run: on what it measured, and on its rows. prepared: these; None: what the run kept of its own verdicts.

    Raises FedKeelError for files that cannot be read.
    """
    scores = read_scores(folder)
    rows = read_rows(folder / "rows.jsonl")
    about_rows = read_verdicts(folder) if prepared is None else _of_rows(prepared, of_recipe(prepared), rows, scores)
    return [*measured(rows, scores), *about_rows]


def _of_rows(prepared: Prepared, found: Sequence[Verdict], rows: Sequence[Row], scores: Models) -> list[Verdict]:
    return [*found, *at_chance(prepared, scores), *served(prepared.recipe, rows)]


def served(recipe: Recipe, rows: Sequence[Row]) -> Iterator[Verdict]:
    """That the federated scores are of more than the adapter, which is what is exported."""
    if recipe.evidence.served:
        weight = served_weight(recipe, rows)
        told = f"the federated scores are of the adapter with the analytic head beside it, weight {weight:g}"
        change = "nothing, where the run's folder is served; the adapter alone: fedkeel evaluate RUN evidence.serve=0"
        yield Verdict(LOOK, told, change)


def served_weight(recipe: Recipe, rows: Sequence[Row]) -> float:
    """Of the analytic head beside a run's adapter: as validation rows chose it last, else the recipe's."""
    chosen = [(r.stage, r.value) for r in rows if (r.method, r.name, r.unit) == ("federated", "serve", "weight")]
    return max(chosen)[1] if chosen else next(iter(recipe.evidence.serve_from), recipe.evidence.serve)


def rows_are_away(folder: Path) -> bool:
    """Whether a run is a coordinator's: its rows are at its sites."""
    return bool(RunFolder(folder).state().reference)


def of_coordinator(folder: Path) -> list[Verdict]:
    """Verdicts on a coordinator's run: those that need neither rows nor the scores of single rows.

    Raises FedKeelError for files that cannot be read.
    """
    rows = read_rows(folder / "rows.jsonl")
    tested = [r for r in rows if (r.method, r.name, r.split) == ("federated", "rows", "test") and r.task]
    last = max(((r.stage, r.round) for r in tested), default=None)
    kept = [r.value for r in tested if (r.stage, r.round) == last and not r.site]
    recipe = make_recipe(read_tree(folder / "recipe.toml"), data=False)
    return [*measured(rows, {}), *([_known_to(kept)] if kept else []), payload(recipe), *served(recipe, rows)]


def keep(prepared: Prepared, folder: Path, found: Sequence[Verdict]) -> None:
    """Keep in a run's folder the verdicts that need the text of rows. found: of `of_recipe`."""
    write_verdicts(folder, _of_rows(prepared, found, read_rows(folder / "rows.jsonl"), read_scores(folder)))


def at_chance(prepared: Prepared, scores: Models) -> Iterator[Verdict]:
    """Tasks whose federated score is no more than their commonest answer gives, by the rule of `report.chance`."""
    mine = next((of for (leg, _), of in scores.items() if leg == "federated"), {})
    rows = [r for r in prepared.stages[-1].all("test") if r.id in mine.get(r.task, {})]
    found = chances(majority(rows), {task: mean_score({task: of}) for task, of in mine.items()})
    for task, held in found.items():
        if held.out:
            told = (
                f"{task}: federated {100 * held.centralised:.1f} points, the commonest answer alone {100 * held.majority:.1f}"
            )
            change = "more rounds, a higher train.lr, or a base that can do it: until then its score compares nothing"
            yield Verdict(LOOK, f"{told} ({held.rows} rows): not surely above chance", change)
    if found and not any(held.out for held in found.values()):
        yield Verdict(GOOD, f"every task with labels ({len(found)}) is surely above what its commonest answer alone gives")
