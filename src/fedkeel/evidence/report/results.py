"""What a line of a suite's table is worth: numbers over its seeds, as shares and bytes, before they become text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fedkeel.evidence.report.interval import Interval, Scores, paired_difference
from fedkeel.evidence.report.run_numbers import (
    Matrix,
    cpu_seconds,
    final_score,
    held_out,
    own_scores,
    stage_matrix,
    stream_numbers,
    under_damage,
)
from fedkeel.evidence.report.suite import Line, Suite, lines_of
from fedkeel.evidence.report.tables import mean_and_sd, rounds_done, total
from fedkeel.scores import metrics


@dataclass(frozen=True)
class Result:
    """A line and its numbers, one value a seed that has it. final: seed -> score. ahead: seed -> score − the reference's.

    interval: of `ahead`, None without row scores. spread: standard deviation over sites. held_out_ssi, held_out_fall: over the
    families of damage that no line's training had used. cost: processor seconds of every round of every seed. fooled: success
    of a backdoor, of suites that have one.
    """

    line: Line
    final: dict[int, float]
    ahead: dict[int, float]
    interval: Interval | None
    stream: dict[str, tuple[float, ...]]
    worst: tuple[float, ...]
    decile: tuple[float, ...]
    spread: tuple[float, ...]
    held_out_ssi: tuple[float, ...]
    held_out_fall: tuple[float, ...]
    rounds: tuple[int, ...]
    up: tuple[float, ...]
    down: tuple[float, ...]
    cost: tuple[float, ...]
    fooled: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """The final score, the mean over seeds."""
        return mean_and_sd(self.final.values())[0] if self.final else None


def results_of(suite: Suite, stream: str, left_out: Collection[str] = ()) -> list[Result]:
    """The numbers of every line of a stream's table: baselines first, then methods, each group from the best to the worst;
    lines without a score come last in their group. left_out: tasks that no average holds, see chance.py."""
    lines = lines_of(suite, stream)
    reference = next((line for line in lines if line.method == suite.reference and not line.baseline), None)
    families = held_out(run.measures for line in lines for run in line.runs)
    found = [_result(line, reference, stream, left_out, families) for line in lines]
    return sorted(found, key=lambda r: (not r.line.baseline, r.mean is None, -(r.mean or 0.0)))


def row_scores(line: Line, left_out: Collection[str]) -> dict[int, Scores]:
    """seed -> the scores of test rows, of tasks that are not left out; without seeds that have none."""
    kept = {run.seed: {t: s for t, s in run.scores.get(line.leg, {}).items() if t not in left_out} for run in line.runs}
    return {seed: scores for seed, scores in kept.items() if scores}


def _result(line: Line, reference: Line | None, stream: str, left_out: Collection[str], families: Collection[str]) -> Result:
    final = finals_of(line, left_out)
    against = finals_of(reference, left_out) if reference else {}
    compared = reference is not None and reference != line
    interval = None
    if reference is not None and compared:
        mine, other = row_scores(line, left_out), row_scores(reference, left_out)
        interval = paired_difference(mine, other, stream, line.name)
    numbers = [stream_numbers(stage_matrix(r.rows, line.leg, left_out)) for r in line.runs]
    own = [list(found.values()) for r in line.runs if (found := own_scores(r.rows, line.leg))]
    federated = [] if line.baseline else list(line.runs)
    damaged = [under_damage(r.measures, families) for r in federated]

    def known(values: Sequence[float | None]) -> tuple[float, ...]:
        return tuple(v for v in values if v is not None)

    return Result(
        line,
        final,
        {seed: score - against[seed] for seed, score in final.items() if compared and seed in against},
        interval,
        {name: tuple(n[name] for n in numbers if name in n) for name in ("learnt", "final", "bwt", "forgetting", "retention")},
        tuple(map(metrics.worst, own)),
        tuple(map(metrics.bottom_decile, own)),
        tuple(metrics.spread(values) for values in own if len(values) > 1),
        known([ssi for ssi, _ in damaged]),
        known([fall for _, fall in damaged]),
        tuple(rounds_done(r.rows) for r in federated),
        known([total(r.rows, "federated", "bytes_up") for r in federated]),
        known([total(r.rows, "federated", "bytes_down") for r in federated]),
        tuple(seconds for r in federated for seconds in cpu_seconds(r.rows)),
        tuple(row.value for r in federated for row in r.rows if row.name == "attack_success"),
    )


def finals_of(line: Line, left_out: Collection[str]) -> dict[int, float]:
    """seed -> final score, over tasks that are not left out; without seeds that have none."""
    found = {run.seed: final_score(run.rows, line.leg, left_out) for run in line.runs}
    return {seed: score for seed, score in found.items() if score is not None}


def mean_matrix(line: Line, left_out: Collection[str]) -> Matrix:
    """The stage × stage matrix of a line, each cell the mean over the seeds that have it."""
    matrices = [stage_matrix(run.rows, line.leg, left_out) for run in line.runs]
    cells = sorted({(s, i) for m in matrices for s in m for i in m[s]})
    found: Matrix = {}
    for s, i in cells:
        values = [m[s][i] for m in matrices if i in m.get(s, {})]
        found.setdefault(s, {})[i] = mean_and_sd(values)[0]
    return found


def interaction(results: Sequence[Result], square: Sequence[str]) -> dict[int, dict[str, float]]:
    """Of the 2 × 2, by seed that has all four: the four scores, the gain of each part over neither, and `interaction`:
    both − first − second + neither, what the parts give together beyond what they give one by one. As shares."""
    by_name = {r.line.name: r.final for r in results if not r.line.baseline}
    if len(square) != 4 or any(name not in by_name for name in square):
        return {}
    neither, first, second, both = (by_name[name] for name in square)
    return {
        seed: {
            "neither": neither[seed],
            "first": first[seed],
            "second": second[seed],
            "both": both[seed],
            "first alone": first[seed] - neither[seed],
            "second alone": second[seed] - neither[seed],
            "together": both[seed] - neither[seed],
            "interaction": metrics.interaction(neither[seed], first[seed], second[seed], both[seed]),
        }
        for seed in sorted(set(neither) & set(first) & set(second) & set(both))
    }
