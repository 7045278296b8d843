"""Scores as pure functions: texts, tables or distributions in, a number out.

In a task stream of S stages `table[s][i]` = R[s][i] is the score on the rows of stage i after stage s, i ≤ s, both from 0: a
lower triangle as lists of 1, 2, …, S numbers, or as mappings with those keys. Scores are shares in [0, 1], more is better.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from rouge_score.rouge_scorer import RougeScorer

Table = Sequence[Sequence[float]] | Mapping[int, Mapping[int, float]]


def normalise(text: str) -> str:
    """Lower case, without punctuation, white space folded: what exact match compares (Super-NaturalInstructions)."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(kept.split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the normalised prediction equals some normalised reference, else 0.0."""
    return float(normalise(prediction) in {normalise(r) for r in references})


@cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in [0, 1] with stemming, the best over the references (Lin 2004; Google's `rouge-score`)."""
    return max(float(_rouge().score(r, prediction)["rougeL"].fmeasure) for r in references)


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean. Raises ValueError on nothing: an average of no rows is not a score."""
    if not values:
        raise ValueError("the mean of no values")
    return sum(values) / len(values)


def macro(table: Mapping[str, float]) -> float:
    """The mean over tasks, each task counting the same whatever its number of rows. table: task -> score."""
    return mean(list(table.values()))


def _triangle(table: Table, stages: int) -> list[list[float]]:
    """`table` as lists. Raises ValueError unless it is a triangle of finite numbers and of at least `stages` stages."""
    rows: list[list[float]] = []
    for stage in range(len(table)):
        try:
            row = table[stage]
            rows.append([float(row[came]) for came in range(len(row))])
        except (KeyError, TypeError) as error:
            raise ValueError(f"a score table holds numbers for stages 0, 1, …; stage {stage} does not: {error!r}") from error
    sizes = [len(row) for row in rows]
    if sizes != list(range(1, len(rows) + 1)):
        raise ValueError(f"after stage s, from 0, a score table holds s + 1 scores; this one holds {sizes}")
    if not all(math.isfinite(value) for row in rows for value in row):
        raise ValueError("a score table holds finite numbers only")
    if len(rows) < stages:
        raise ValueError(f"a score table of {len(rows)} stages; {stages} are needed")
    return rows


def average_final(table: Table) -> float:
    """mean_i R[S][i], the mean score over all stages after the last: retention and learning in one number, in [0, 1].

    Source: ACC in Lopez-Paz & Ranzato 2017, arXiv:1706.08840. Raises ValueError on no triangle.
    """
    return mean(_triangle(table, 1)[-1])


def average_learnt(table: Table) -> float:
    """mean_i R[i][i], the mean score of each stage when it had just been learnt: learning without retention, in [0, 1].

    Source: LA in Riemer et al. 2019, arXiv:1810.11910. Raises ValueError on no triangle.
    """
    return mean([row[-1] for row in _triangle(table, 1)])


def backward_transfer(table: Table) -> float:
    """BWT = mean_{i<S} (R[S][i] − R[i][i]): what later stages did to earlier ones; in [−1, 1], below 0 is forgetting.

    Source: Lopez-Paz & Ranzato 2017, arXiv:1706.08840. Raises ValueError on no triangle or a single stage.
    """
    rows = _triangle(table, 2)
    return mean([rows[-1][i] - rows[i][i] for i in range(len(rows) - 1)])


def forgetting(table: Table) -> float:
    """mean_{i<S} (max_{s<S} R[s][i] − R[S][i]): how far each earlier stage is below its best; in [−1, 1], lower is better.

    At least −BWT; below 0 where the last stage made an earlier one better than it ever was.
    Source: Chaudhry et al. 2018, arXiv:1801.10112. Raises ValueError on no triangle or a single stage.
    """
    rows = _triangle(table, 2)
    return mean([max(row[i] for row in rows[i:-1]) - rows[-1][i] for i in range(len(rows) - 1)])


def retention_ratio(table: Table) -> float:
    """mean_{i<S} R[S][i] / max_s R[s][i], the maximum over all stages, the last too: the share kept of the best, in [0, 1].

    Source: METHOD §6. Raises ValueError on no triangle, a single stage, or a stage that never scored above 0: nothing to keep.
    """
    rows = _triangle(table, 2)
    best = [max(row[i] for row in rows[i:]) for i in range(len(rows) - 1)]
    if min(best) <= 0.0:
        raise ValueError(f"stage {best.index(min(best))}, from 0, never scored above 0, so no share of it can be kept")
    return mean([rows[-1][i] / best[i] for i in range(len(best))])


def stability_index(strengths: Sequence[float], scores: Sequence[float], clean: float) -> float:
    """SSI: the area under the score-against-strength curve, as a share of the area under `clean` held all the way.

    The curve is piecewise linear through (0, clean), (strengths[0], scores[0]), …, so the area is the trapezoids' sum, and it
    is divided by strengths[-1] · clean. 1: no damage cost anything. ≥ 0; above 1 where damage helped. Never 0: the curve
    begins at the clean score, so a model that every damage brings to 0 still has strengths[0] / (2 strengths[-1]).
    Two indices compare only over equal strengths, and say nothing of the clean score: report it beside them.
    strengths: > 0 and rising, one a score. clean: the score without damage, > 0. Raises ValueError outside these.
    Source: METHOD §6.
    """
    if not strengths or len(strengths) != len(scores):
        raise ValueError(f"{len(strengths)} strengths and {len(scores)} scores: one score a strength, and at least one")
    x, y = [0.0, *strengths], [clean, *scores]
    if not all(low < high for low, high in pairwise(x)) or not math.isfinite(x[-1]):
        raise ValueError(f"strengths rise from above 0, not {list(strengths)}")
    if not (clean > 0.0 and min(y) >= 0.0 and all(map(math.isfinite, y))):
        raise ValueError(f"scores are ≥ 0 and the clean one is above 0, not {list(scores)} and {clean}")
    area = sum((x[n + 1] - x[n]) * (y[n] + y[n + 1]) / 2 for n in range(len(scores)))
    return area / (x[-1] * clean)


def consistency(p: ArrayLike, q: ArrayLike) -> float:
    """1 − JS(p, q)/ln 2, the mean over rows: 1 where the distributions are equal, 0 where they share no outcome.

    p, q: (N, V) probabilities, each row with sum 1 (to 1e-3), as arrays, lists or CPU tensors. JS is the Jensen–Shannon
    divergence in nats, at most ln 2. Sums run in float64. Symmetric. Raises ValueError where the shapes disagree, nothing is
    there or a row is no distribution. Source: Lin 1991, IEEE Trans. Inf. Theory 37(1).
    """
    import numpy as np

    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(f"distributions are two (N, V) of one shape, not {a.shape} and {b.shape}")
    for rows in (a, b):
        if not ((rows >= 0.0).all() and (abs(rows.sum(1) - 1.0) <= 1e-3).all()):
            raise ValueError("a distribution has no entry below 0 and the sum 1")
    a, b = a / a.sum(1, keepdims=True), b / b.sum(1, keepdims=True)
    middle = (a + b) / 2
    # an entry of 0 adds nothing to its own side
    sides = [rows * np.log(np.divide(rows, middle, out=np.ones_like(rows), where=rows > 0.0)) for rows in (a, b)]
    divergence = (sides[0] + sides[1]).sum(1) / 2
    return float(np.clip(1.0 - divergence / np.log(2.0), 0.0, 1.0).mean())
