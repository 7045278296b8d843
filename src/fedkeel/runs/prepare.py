"""Data to sites and stages: everything that a run needs but the weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkeel.data.canaries import planted
from fedkeel.data.sites import Sites, make_sites, unseen_sites
from fedkeel.data.sources import label_groups, load_records
from fedkeel.data.splits import held_apart
from fedkeel.data.stages import arrivals, check_stages_are_learnt, kept_between_stages, stages_of
from fedkeel.model.load import kind_of, load_config
from fedkeel.recipe.checks import check_enough
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError, Frozen
from fedkeel.runs.legs import Cast, cast_of
from fedkeel.types import Record


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the weights. sites: those that take part, all stages together; stages: see `stages.stages_of`.

    unseen: by stage, the sites that take no part in training. arrival: record id -> stage. notes: what was done to the data
    that the user should know.
    """

    recipe: Recipe
    sites: Sites
    stages: Sequence[Sites]
    unseen: Sequence[Sites]
    arrival: Mapping[str, int]
    kind: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def cast(self) -> Cast:
        """The sites that take part, by the training rows that they hold: `Here.cast` leaves out those that do not fit."""
        return cast_of(self.recipe, [{name: held["train"] for name, held in stage.rows.items()} for stage in self.stages])


def data_view(recipe: Recipe) -> Recipe:
    """The recipe as preparing data may see it: all that does not decide which rows are where is at its default. Runs for which
    it is equal have the same data."""
    default = Recipe()
    own = {key: options for key, options in recipe.own.items() if key.partition(".")[0] in ("source", "scheme")}
    return Recipe(
        seed=recipe.seed,
        model=recipe.model,
        data=recipe.data,
        partition=recipe.partition,
        stream=dataclasses.replace(recipe.stream, average=default.stream.average, average_from=default.stream.average_from),
        audit=recipe.audit,
        evaluation=dataclasses.replace(default.evaluation, unseen_sites=recipe.evaluation.unseen_sites),
        own=Frozen(own),
    )


def prepare(recipe: Recipe, alone: str = "", records: Sequence[Record] | None = None) -> Prepared:
    """Read and deal the data, and look at the base model's configuration. Loads no weights.

    alone: the name of the one site that holds all of the data here, and perhaps not of every task or stage; empty: the recipe's
    partition deals them. records: instead of the recipe's source. Raises FedKeelError where no run can be made of them.
    """
    whole, recipe = recipe, data_view(recipe)
    kind = kind_of(recipe.model, load_config(recipe.model))
    read = list(load_records(recipe.data, recipe.seed, partly=bool(alone)) if records is None else records)
    held = len(read)
    read, notes = held_apart(read)
    if held and not any(r.split == "train" for r in read):
        raise ConfigError(f"no training row is left: {'; '.join(notes)}")
    notes += _ignored_keys(read)
    if alone:
        read = [dataclasses.replace(r, site=alone) for r in read]
        recipe = dataclasses.replace(recipe, partition=dataclasses.replace(recipe.partition, scheme="natural"))
        whole = dataclasses.replace(whole, partition=recipe.partition)
    classes: tuple[str, ...] = ()
    if kind == "classifier":
        read, classes = _classified(read, recipe, notes)
    arrival = {r.id: at for r, at in zip(read, arrivals(read, recipe, partly=bool(alone)), strict=True) if at >= 0}
    if len(arrival) < len(read):
        notes.append(f"{len(read) - len(arrival)} rows left out: no stage of the stream names their task or label")
        read = [r for r in read if r.id in arrival]
    if recipe.stream.stages:
        notes.append(kept_between_stages(recipe))
    dealt = make_sites(read, recipe)
    apart = unseen_sites(dealt, recipe)
    taking_part = dealt.rows.keys() - set(apart)
    stages = stages_of(dealt, arrival, recipe, label_groups(recipe.data) if alone else None)
    if apart:
        tests = len(dealt.only(apart).all("test"))
        notes.append(f"{', '.join(apart)}: no part in any training (evaluation.unseen_sites); {tests} test rows to score")
    sites = dealt.only(taking_part)
    notes += _unlearnt_labels(read, sites)
    trains, scored_only = ([stage.only(names) for stage in stages] for names in (taking_part, apart))
    if not alone:
        check_stages_are_learnt(trains, arrival, recipe)
        check_enough(whole, len(sites.rows))
        if whole.federation.sites_per_round > len(sites.rows):
            notes.append(
                f"federation.sites_per_round = {whole.federation.sites_per_round}, and all {len(sites.rows)} sites are asked"
            )
    if recipe.audit.canaries and kind == "classifier":
        raise ConfigError("audit.canaries: a classifier writes no text, and so no secret; set 0, or another base")
    trains, told = planted(trains, recipe.audit, recipe.seed, alone)
    notes += told
    return Prepared(whole, sites, trains, scored_only, arrival, kind, classes, tuple(notes))


def _classified(records: list[Record], recipe: Recipe, notes: list[str]) -> tuple[list[Record], tuple[str, ...]]:
    """The rows that a classifier can use, and its classes: all candidate answers. Raises ConfigError without any."""
    labelled = [r for r in records if r.labels]
    if len(labelled) < len(records):
        notes.append(f"{len(records) - len(labelled)} rows without candidate labels left out: this base is a classifier")
    if not labelled:
        raise ConfigError(
            f"model.base = {recipe.model.base!r} is a classifier, and no row of the data has labels; use a causal base"
        )
    return labelled, tuple(sorted({label for labels in {r.labels for r in labelled} for label in labels}))


def _ignored_keys(records: Sequence[Record]) -> list[str]:
    """A note that names the keys of rows that nothing was made of."""
    found = Counter(key for record in records for key in record.ignored)
    named = ", ".join(f"{key!r} ({count} rows)" for key, count in sorted(found.items()))
    return [f"keys of rows that are not used: {named}"] if found else []


def _unlearnt_labels(records: Sequence[Record], sites: Sites) -> list[str]:
    """Notes of held-out rows whose label no training row carries."""
    notes = []
    label_sets: dict[str, set[tuple[str, ...]]] = {}
    for record in records:
        label_sets.setdefault(record.task, set()).add(record.labels)
    trained = {(r.task, r.output) for r in sites.all("train")}
    for split in ("validation", "test"):
        # A task whose every row offers the same labels; where each row brings options of its own, answers may well be new.
        fixed = [r for r in sites.all(split) if r.labels and len(label_sets[r.task]) == 1]
        unseen = [r for r in fixed if (r.task, r.output) not in trained]
        if unseen:
            names = ", ".join(sorted({f"{r.task}: {r.output}" for r in unseen})[:5])
            notes.append(
                f"{len(unseen)} {split} rows carry a label never seen in training ({names}); they are scored all the same"
            )
    return notes


def describe_sites(prepared: Prepared) -> list[tuple[str, int, int, int, int, str]]:
    """Per site: name, training, validation and test rows, tasks, and its commonest answer with its share."""
    lines = []
    for name, held in prepared.sites.rows.items():
        tasks = len({r.task for r in held["train"]})
        answers = Counter(r.output for r in held["train"] if r.labels).most_common(1)
        top = f"{answers[0][0][:24]} {answers[0][1] / len(held['train']):.0%}" if answers else ""
        lines.append((name, len(held["train"]), len(held["validation"]), len(held["test"]), tasks, top))
    return lines
