"""A stream beside its twin, the same rows dealt evenly: what skew costs each method, and how much more sites disagree by it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedkeel.evidence.report.interval import COVERAGE, Interval, paired_difference
from fedkeel.evidence.report.results import Result, finals_of, row_scores
from fedkeel.evidence.report.run_charts import blocks
from fedkeel.evidence.report.suite import Line, Suite, SuiteRun
from fedkeel.evidence.report.suite_tables import ahead_text, signed_points, with_sd
from fedkeel.evidence.report.tables import MISSING, Table, mean_and_sd, number, points_with_sd


def disagreement(run: SuiteRun) -> float | None:
    """Γ = Σ p‖Δ‖² / ‖Σ p Δ‖² of the sites' updates, mean over blocks and rounds; 1 where all sites move alike. None if the run
    did not note it."""
    found = [drift for of in blocks(run.rows).values() for drift in of.values()]
    return 1 + mean_and_sd(found)[0] if found else None


def twin_table(
    suite: Suite, stream: str, results: Sequence[Result], evenly: Sequence[Result], left_out: Collection[str]
) -> Table:
    """A line a method that ran on both: its final score and Γ here and on the twin, over the seeds and the tasks of both.

    results, evenly: of the stream, and of its twin. left_out: tasks at chance on one of the two.
    """
    twin = suite.twins.get(stream, "")
    others = {r.line.name: r.line for r in evenly}
    lines, told = [], ""
    for mine in (r.line for r in results):
        if (other := others.get(mine.name)) is None:
            continue
        finals = [finals_of(line, left_out) for line in (mine, other)]
        seeds = sorted(finals[0].keys() & finals[1].keys())
        if not seeds:
            continue
        here, there = ([final[s] for s in seeds] for final in finals)
        sure = paired_difference(row_scores(mine, left_out), row_scores(other, left_out), "twin", stream, mine.name)
        gammas = [_gammas(line, seeds) for line in (mine, other)]
        more = [a - b for a, b in zip(*gammas, strict=True)] if all(gammas) else []
        lines.append(
            (
                mine.name,
                points_with_sd(here),
                points_with_sd(there),
                ahead_text([a - b for a, b in zip(here, there, strict=True)]),
                f"{signed_points(sure.low)} to {signed_points(sure.high)}" if sure else MISSING,
                *(with_sd(of) for of in (*gammas, more)),
            )
        )
        if mine.name == suite.reference and sure:
            told = _verdict(suite.reference, sure)
    interval = f"{COVERAGE:.0%} interval".replace("%", " %")
    header = ("method", "final score", f"on {twin}", "difference", interval, "Γ", f"Γ on {twin}", "difference of Γ")
    note = (
        "Seeds that both have. Γ = Σ p‖Δ‖² / ‖Σ p Δ‖² of the sites' updates Δ, mean over blocks and rounds; the noise of "
        "batches alone makes it more than 1."
    )
    return Table(f"{stream}: against its even twin", header, tuple(lines), (note, told) if told else (note,))


def _gammas(line: Line, seeds: Sequence[int]) -> list[float]:
    """Of its runs of these seeds, in their order; empty where one did not note it."""
    by_seed = {run.seed: disagreement(run) for run in line.runs}
    found = [by_seed.get(seed) for seed in seeds]
    return [gamma for gamma in found if gamma is not None] if None not in found else []


def _verdict(reference: str, sure: Interval) -> str:
    if sure.high < 0:
        return f"Skew costs {reference} {number(-100 * sure.mean)} points here."
    return f"{reference} does not trail its twin beyond chance: too easy a stream to tell methods against skew apart."
