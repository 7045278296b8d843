"""The stages of a task stream: when a row arrives, and what a site holds then."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

from fedkeel.data.forms import spoken
from fedkeel.data.sites import Sites
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive
from fedkeel.types import Record


def stage_names(recipe: Recipe) -> list[list[str]]:
    """The names of each stage, of tasks, groups of labels or labels, as the recipe lists them; empty without a stream."""
    return [[name.strip() for name in stage.split("+")] for stage in recipe.stream.stages]


def _part(record: Record) -> str:
    """What of its task a record belongs to: its label's group, or, where the task's labels are in none, its label; empty of a
    free answer."""
    return record.group or (record.output if record.labels else "")


def arrivals(records: Sequence[Record], recipe: Recipe, partly: bool = False) -> list[int]:
    """The stage in which each record arrives, from 0; −1 for a record that no stage names.

    partly: the records are of one site of many, which need not hold rows of every task and stage.

    Raises ConfigError on a stage without training rows, a name that no record carries, or one that stands twice.
    """
    stages, order = stage_names(recipe), recipe.stream.order
    if not stages:
        return [0] * len(records)
    tasks = {r.task for r in records}
    missing = [name for names in stages for name in names if name not in tasks]
    if order and missing and not partly:
        raise ConfigError(
            f"stream.order = {order!r} names {', '.join(missing[:5])}, and no row is of "
            f"{'that task' if len(missing) == 1 else f'these {len(missing)} tasks'}: add the files to data.files, or list in "
            f"data.tasks those that you have"
        )
    known = tasks | {_part(r) for r in records} - {""}
    where: dict[str, int] = {}
    for stage, names in enumerate(stages):
        for listed in names:
            name = listed if listed in known else spoken((listed,))[0]
            if name not in known and not partly:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)[:20])}"
                raise ConfigError(f"stream.stages: no row is of a task, label group or label {listed!r}; {hint}")
            if name in where:
                raise ConfigError(f"stream.stages: {listed!r} stands twice; a task arrives once")
            where[name] = stage
    both = sorted({f"{_part(r)!r} of {r.task!r}" for r in records if _part(r) in where and r.task in where})
    if both:
        raise ConfigError(f"stream.stages names {both[0]} and the whole task too; name one of them")
    found = [where.get(_part(r) or r.task, where.get(r.task, -1)) for r in records]
    for stage, names in enumerate(() if partly else stages):
        if not any(at == stage and r.split == "train" for at, r in zip(found, records, strict=True)):
            raise ConfigError(f"stream.stages: stage {stage + 1} ({' + '.join(names)}) has no training row")
    return found


def kept_between_stages(recipe: Recipe) -> str:
    """What a site keeps of the rows of a stage once it is over, in words."""
    count = recipe.stream.replay
    if not count:
        return "between stages a site keeps no row: what it learnt is in the adapter alone"
    return f"between stages a site keeps up to {count} training rows of each stage, chosen by a hash of their id"


def _named(recipe: Recipe) -> dict[str, int]:
    """The stage of each name, as it is listed and as words."""
    stages = enumerate(stage_names(recipe))
    return {name: stage for stage, names in stages for listed in names for name in (listed, *spoken((listed,)))}


def _born(
    records: Sequence[Record], arrival: Mapping[str, int], named: Mapping[str, int], groups: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str], int]:
    """(task, label) -> the stage in which its first row arrives; at one site of many, its group, as everywhere else. named:
    see `_named`; the others as of `stages_of`."""
    born = {label: named[group] for label, group in groups.items() if group in named}
    for record in records:
        if record.labels:
            label = record.task, record.output
            born[label] = min(arrival[record.id], born.get(label, arrival[record.id]))
    return born


def stages_of(
    sites: Sites, arrival: Mapping[str, int], recipe: Recipe, groups: Mapping[tuple[str, str], str] | None = None
) -> list[Sites]:
    """The sites as they are in each stage of the stream; without one, a single stage with everything.

    In stage s a site trains on the rows that arrive then and on those that it keeps of each earlier stage: the first
    stream.replay of them by a hash of their id, so none by default. Validation and test rows are those of all stages up to s.
    Candidate labels of a task are those seen up to s (class-incremental where a stage names labels or groups of them,
    task-incremental where it names tasks), for kept rows too. A site may hold no training row in a stage and is then not asked.
    arrival: record id -> stage, as `arrivals` finds it, for every record of the sites. groups: (task, label) -> its group, or
    the label itself, where the sites are one of many, whose rows need not hold every label or stage; None: they are all.
    """
    everything = [r for split in ("train", "validation", "test") for r in sites.all(split)]
    named = _named(recipe)
    born = _born(everything, arrival, named, groups or {})
    by_part = {r.task for r in everything if _part(r) and named and r.task not in named}

    kept: set[str] = set()  # ids of the rows that some site keeps once their stage is over
    for held in sites.rows.values():
        for stage in range(len(recipe.stream.stages) - 1):
            came = [r for r in held["train"] if arrival[r.id] == stage]
            kept.update(r.id for r in sorted(came, key=lambda r: derive(recipe.seed, "replay", r.id))[: recipe.stream.replay])

    def trains(record: Record, stage: int) -> bool:
        return arrival[record.id] == stage or (arrival[record.id] < stage and record.id in kept)

    @cache  # one answer for the many rows of a task
    def seen(task: str, labels: tuple[str, ...], stage: int) -> tuple[str, ...]:
        return tuple(v for v in labels if born.get((task, v), stage + 1) <= stage)

    def at_stage(record: Record, stage: int) -> Record:
        return replace(record, labels=seen(record.task, record.labels, stage)) if record.task in by_part else record

    found = []
    for stage in range(max(1, len(recipe.stream.stages))):
        rows = {
            name: {
                split: [
                    at_stage(r, stage) for r in records if (trains(r, stage) if split == "train" else arrival[r.id] <= stage)
                ]
                for split, records in held.items()
            }
            for name, held in sites.rows.items()
        }
        if groups is None and not any(arrival[r.id] == stage for held in rows.values() for r in held["train"]):
            raise ConfigError(
                f"stream.stages: no site keeps a training row of stage {stage + 1}; raise data.rows_per_site "
                f"(now {recipe.data.rows_per_site}) or put more tasks into the stage"
            )
        found.append(Sites(rows))
    return found


def check_stages_are_learnt(stages: Sequence[Sites], arrival: Mapping[str, int], recipe: Recipe) -> None:
    """Raise ConfigError if no site that takes part holds a training row that arrives in some stage, naming the stage.

    stages: the sites that take part, by stage.
    """
    for number, stage in enumerate(stages):
        if not any(arrival[r.id] == number for r in stage.all("train")):
            count, names = recipe.evaluation.unseen_sites, recipe.stream.stages[number]
            raise ConfigError(
                f"evaluation.unseen_sites = {count} takes every training row of stage {number + 1} ({names}) away: set it "
                f"lower, or another seed or partition"
            )
