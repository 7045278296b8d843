"""Rows of rounds and of scorings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedkeel import tables
from fedkeel.federation.gather import Gathered
from fedkeel.federation.server import RoundResult
from fedkeel.runs.legs import Leg
from fedkeel.runs.prepare import Prepared
from fedkeel.scores.evaluate import Scored, over_tasks, overall, task_table
from fedkeel.scores.metrics import macro
from fedkeel.types import Row


def score_rows(leg: Leg, stage: int, round: int, split: str, scored: Sequence[Scored], prepared: Prepared) -> list[Row]:
    """Rows of one scoring: per task, over all tasks, in a stream per stage that the rows came with, and per site on its own."""
    run = prepared.recipe.name

    def row(name: str, value: float, unit: str = "share", task: str = "", at: str = leg.site) -> Row:
        return Row(run, leg.method, leg.seed, round, name, value, unit, site=at, stage=stage, task=task, split=split)

    table = task_table(scored)
    rows = []
    for task, metrics in table.items():
        rows += [row(n, v, unit_of_score(n), task) for n, v in metrics.items()]
    rows += [row(name, value, unit_of_score(name)) for name, value in over_tasks(table).items()]
    if len(leg.stages) > 1:
        for came in range(stage + 1):
            of_stage = [s for s in scored if prepared.arrival[s.record.id] == came]
            if of_stage:
                rows.append(row(f"score_of_stage_{came + 1}", overall(of_stage)))
    by_id = {s.record.id: s for s in scored}
    for name, held in prepared.stages[stage].rows.items():
        own = [by_id[r.id] for r in held[split] if r.id in by_id]
        if own and (leg.method != "local" or name == leg.site):
            rows.append(row("own_score", overall(own), at=name))
    return rows


def unseen_rows(leg: Leg, stage: int, round: int, scored: Sequence[Scored], prepared: Prepared) -> list[Row]:
    """Rows of one scoring of the sites that take no part in training: over all tasks, and of each such site on its own, but
    for a local model, whose rows are under the name of the site that it is of."""

    def row(name: str, value: float, at: str) -> Row:
        run = prepared.recipe.name
        return Row(run, leg.method, leg.seed, round, name, value, "share", site=at, stage=stage, split="unseen-sites")

    rows = [row("score", overall(scored), leg.site)]
    by_id = {s.record.id: s for s in scored}
    for name, held in prepared.unseen[stage].rows.items():
        own = [by_id[r.id] for r in held["test"] if r.id in by_id]
        if own and leg.method != "local":
            rows.append(row("own_score", overall(own), name))
    return rows


def unit_of_score(name: str) -> str:
    """The unit of a number of a task's scoring."""
    return "rows" if name == "rows" else tables.METRICS[name].unit if name in tables.METRICS else "share"


def unit_of(name: str) -> str:
    """The unit of a number that a site tells of its round: of a term's mean, its term's; gates and strengths are weights."""
    told = {"update_norm": "norm", "dropped": "share", **{e.row: e.unit for e in tables.TERMS.values() if e.row}}
    return told.get(name, "weight")


def round_rows(leg: Leg, stage: int, result: RoundResult, run: str, cpu: float) -> list[Row]:
    """Rows of one round: what it took, what was sent, how far the sites disagreed by block, and what each site told.

    A site's numbers keep their names (`loss`, `gate_a_mean`, `strength`, ...), but for its wall clock, `site_seconds`.
    cpu: seconds of processor time of the round, all sites and the exchange: unlike wall clock, it says what a method costs on
    a machine that has other work too.
    """

    def row(name: str, value: float, unit: str, site: str = "") -> Row:
        return Row(run, leg.method, leg.seed, result.state.round, name, value, unit, site=site, stage=stage)

    rows = [
        *([row("aggregation_error", result.error, "share")] if math.isfinite(result.error) else []),
        row("seconds", result.seconds, "seconds"),
        row("cpu_seconds", cpu, "seconds"),
        row("aggregation_seconds", result.aggregation_seconds, "seconds"),
    ]
    rows += [row(f"drift/{block}", value, "ratio") for block, value in result.state.drift.items()]
    for update in result.updates:
        rows.append(row("positions", update.positions, "positions", update.site))
        for name, value in sorted(update.stats.items()):
            if name == "seconds":
                rows.append(row("site_seconds", value, "seconds", update.site))
            else:
                rows.append(row(name, value, unit_of(name), update.site))
    for name, sizes in (("bytes_down", result.bytes_down), ("bytes_up", result.bytes_up)):
        rows += [row(name, size, "bytes", site) for site, size in sorted(sizes.items())]
    rows += [row("failed", 1, "rounds", site) for site in sorted(result.failures)]
    return rows


def gathered_rows(leg: Leg, stage: int, round: int, found: Gathered, run: str) -> list[Row]:
    """Rows of the exchange that makes the analytic anchor of a stage, under the number of the stage's first round: its bytes,
    and the share of all rows so far whose labels the others foretell."""

    def row(name: str, value: float, unit: str, site: str = "", task: str = "") -> Row:
        return Row(run, leg.method, leg.seed, round + bool(leg.rounds), name, value, unit, site=site, stage=stage, task=task)

    rows = [
        row(name, size, "bytes", site)
        for name, by in (("bytes_down", found.bytes_down), ("bytes_up", found.bytes_up))
        for site, size in sorted(by.items())
    ]
    for task, known in sorted(found.known.items()):
        rows.append(row("foretold", sum(known.hits.values()) / sum(known.rows.values()), "share", task=task))
    return rows


# What a site says of its held-out rows: stage in which they came -> task -> measure -> (weighted sum, weights)
Sums = Mapping[int, Mapping[str, Mapping[str, "tuple[float, float]"]]]


def pooled_rows(leg: Leg, stage: int, round: int, split: str, sums: Mapping[str, Sums], run: str) -> list[Row]:
    """Rows of one scoring from sites' sums: per task, over all tasks and per stage of a stream, of all rows together, and of
    each site. Of a local leg, whose model is scored where it was trained, that site's alone."""

    def row(name: str, value: float, unit: str = "share", task: str = "", site: str = leg.site) -> Row:
        return Row(run, leg.method, leg.seed, round, name, value, unit, site=site, stage=stage, task=task, split=split)

    own = [
        row("own_score", macro({task: m["score"] for task, m in _means(_together([told])).items()}), site=site)
        for site, told in sorted(sums.items())
        if any(told.values())
    ]
    if leg.method == "local":
        return own
    means = _means(_together(sums.values()))
    rows = [row(n, v, unit_of_score(n), task) for task, of in means.items() for n, v in of.items()]
    rows += [row(name, value, unit_of_score(name)) for name, value in over_tasks(means).items()]
    if len(leg.stages) > 1:
        for came in sorted({came for told in sums.values() for came in told if told[came]}):
            of_stage = _means(_together([{came: told.get(came, {})} for told in sums.values()]))
            rows.append(row(f"score_of_stage_{came + 1}", macro({task: m["score"] for task, m in of_stage.items()})))
    return rows + own


def _together(many: Iterable[Sums]) -> dict[str, dict[str, tuple[float, float]]]:
    """task -> measure -> (weighted sum, weights), of several sites and of all stages."""
    totals: dict[str, dict[str, tuple[float, float]]] = {}
    for sums in many:
        for tasks in sums.values():
            for task, measures in tasks.items():
                held = totals.setdefault(task, {})
                for name, (total, count) in measures.items():
                    before = held.get(name, (0.0, 0.0))
                    held[name] = before[0] + total, before[1] + count
    return totals


def _means(totals: Mapping[str, Mapping[str, tuple[float, float]]]) -> dict[str, dict[str, float]]:
    """task -> measure -> its mean, and `rows`; as `evaluate.task_table`."""
    return {
        task: {**{name: total / count for name, (total, count) in held.items()}, "rows": held["score"][1]}
        for task, held in sorted(totals.items())
    }
