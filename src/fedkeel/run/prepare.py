"""Data to sites and stages: everything that a run needs but the weights."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkeel.data.sites import Sites, make_sites, unseen_sites
from fedkeel.data.sources import load_records
from fedkeel.data.stages import arrivals, check_stages_are_learnt, kept_between_stages, stages_of
from fedkeel.model.load import kind_of, load_config
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs but the weights. sites: those that take part, all stages together; stages: see
    `sites.stages_of`. unseen: by stage, the sites that take no part in training. arrival: record id -> stage. notes: what was
    done to the data that the user should know."""

    recipe: Recipe
    sites: Sites
    stages: Sequence[Sites]
    unseen: Sequence[Sites]
    arrival: Mapping[str, int]
    kind: str
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def prepare(recipe: Recipe, alone: str = "") -> Prepared:
    """Read and deal the data, and look at the base model's configuration. Loads no weights.

    alone: the name of the one site that holds all of the data; empty: the recipe's partition deals them.
    """
    base_config = load_config(recipe.model)
    kind = kind_of(recipe.model, base_config)
    records = load_records(recipe.data, recipe.seed)
    if alone:
        records = [dataclasses.replace(r, site=alone) for r in records]
        recipe = dataclasses.replace(recipe, partition=dataclasses.replace(recipe.partition, scheme="natural"))
    classes: tuple[str, ...] = ()
    notes = []
    if kind == "classifier":
        unlabelled = sum(not r.labels for r in records)
        records = [r for r in records if r.labels]
        if unlabelled:
            notes.append(f"{unlabelled} rows without candidate labels left out: this base is a classifier")
        if not records:
            raise ConfigError(
                f"model.base = {recipe.model.base!r} is a classifier, and no row of the data has labels; use a causal base"
            )
        classes = tuple(sorted({label for labels in {r.labels for r in records} for label in labels}))
    arrival = {r.id: at for r, at in zip(records, arrivals(records, recipe), strict=True) if at >= 0}
    if len(arrival) < len(records):
        notes.append(f"{len(records) - len(arrival)} rows left out: no stage of the stream names their task or label group")
        records = [r for r in records if r.id in arrival]
    if recipe.stream.stages:
        notes.append(kept_between_stages(recipe))
    dealt = make_sites(records, recipe)
    apart = unseen_sites(dealt, recipe)
    taking_part = dealt.rows.keys() - set(apart)
    sites, stages = dealt.only(taking_part), stages_of(dealt, arrival, recipe)
    if apart:
        tests = len(dealt.only(apart).all("test"))
        notes.append(f"{', '.join(apart)}: no part in any training (evaluation.unseen_sites); {tests} test rows to score")
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
    trains, scored_only = ([stage.only(names) for stage in stages] for names in (taking_part, apart))
    check_stages_are_learnt(trains, arrival, recipe)
    return Prepared(recipe, sites, trains, scored_only, arrival, kind, classes, tuple(notes))


def describe_sites(prepared: Prepared) -> list[tuple[str, int, int, int, int, str]]:
    """Per site: name, training, validation and test rows, tasks, and its commonest answer with its share."""
    lines = []
    for name, held in prepared.sites.rows.items():
        tasks = len({r.task for r in held["train"]})
        answers = Counter(r.output for r in held["train"] if r.labels).most_common(1)
        top = f"{answers[0][0][:24]} {answers[0][1] / len(held['train']):.0%}" if answers else ""
        lines.append((name, len(held["train"]), len(held["validation"]), len(held["test"]), tasks, top))
    return lines
