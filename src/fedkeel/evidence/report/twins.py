"""A stream beside its twin, the same rows dealt evenly: what skew costs each method, and how much more sites disagree by it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedkeel.evidence.report.interval import COVERAGE, Interval, paired_difference
from fedkeel.evidence.report.results import Result, results_of, row_scores
from fedkeel.evidence.report.run_charts import blocks
from fedkeel.evidence.report.suite import Suite, SuiteRun
from fedkeel.evidence.report.suite_tables import ahead_text, signed_points, with_sd
from fedkeel.evidence.report.tables import MISSING, Table, mean_and_sd, number, points_with_sd


def disagreement(run: SuiteRun) -> float | None:
    """Γ = Σ p‖Δ‖² / ‖Σ p Δ‖² of the sites' updates, mean over blocks and rounds; 1 where all sites move alike. None if the run
    did not note it."""
    found = [drift for of in blocks(run.rows).values() for drift in of.values()]
    return 1 + mean_and_sd(found)[0] if found else None


def twin_table(suite: Suite, stream: str, left_out: Collection[str]) -> Table:
    """A line a method that ran on both: its final score and Γ here and on the twin, over the seeds and the tasks of both.

    left_out: tasks at chance on the stream or on its twin.
    """
    twin = suite.twins.get(stream, "")
    others = {r.line.name: r for r in results_of(suite, twin, left_out)}
    lines, told = [], ""
    for mine in results_of(suite, stream, left_out):
        other = others.get(mine.line.name)
        seeds = sorted(mine.final.keys() & other.final.keys()) if other else []
        if other is None or not seeds:
            continue
        here, there = [mine.final[s] for s in seeds], [other.final[s] for s in seeds]
        sure = paired_difference(
            row_scores(mine.line, left_out), row_scores(other.line, left_out), "twin", stream, mine.line.name
        )
        gammas = [_gammas(r, seeds) for r in (mine, other)]
        more = [a - b for a, b in zip(*gammas, strict=True)] if all(gammas) else []
        lines.append(
            (
                mine.line.name,
                points_with_sd(here),
                points_with_sd(there),
                ahead_text([a - b for a, b in zip(here, there, strict=True)]),
                f"{signed_points(sure.low)} to {signed_points(sure.high)}" if sure else MISSING,
                *(with_sd(of) for of in (*gammas, more)),
            )
        )
        if mine.line.name == suite.reference and sure:
            told = _verdict(suite.reference, sure)
    interval = f"{COVERAGE:.0%} interval".replace("%", " %")
    header = ("method", "final score", f"on {twin}", "difference", interval, "Γ", f"Γ on {twin}", "difference of Γ")
    note = (
        "Seeds that both have. Γ = Σ p‖Δ‖² / ‖Σ p Δ‖² of the sites' updates Δ, mean over blocks and rounds; the noise of "
        "batches alone makes it more than 1."
    )
    return Table(f"{stream}: against its even twin", header, tuple(lines), (note, told) if told else (note,))


def _gammas(result: Result, seeds: Sequence[int]) -> list[float]:
    """Of its runs of these seeds, in their order; empty where one did not note it."""
    by_seed = {run.seed: disagreement(run) for run in result.line.runs}
    found = [by_seed.get(seed) for seed in seeds]
    return [gamma for gamma in found if gamma is not None] if None not in found else []


def _verdict(reference: str, sure: Interval) -> str:
    if sure.high < 0:
        return f"Skew costs {reference} {number(-100 * sure.mean)} points here."
    return f"{reference} does not trail its twin beyond chance: too easy a stream to tell methods against skew apart."
