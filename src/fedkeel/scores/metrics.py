"""Scores as pure functions: texts, tables or distributions in, a number out.

In a task stream of S stages `table[s][i]` = R[s][i] is the score on the rows of stage i after stage s, i ≤ s, both from 0: a
lower triangle as lists of 1, 2, …, S numbers, or as mappings with those keys. Scores are shares in [0, 1], more is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedkeel.scores.words import Words, normalise

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from rouge_score.rouge_scorer import RougeScorer

Table = Sequence[Sequence[float]] | Mapping[int, Mapping[int, float]]


def same(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction is one of the references, letter by letter, else 0.0: accuracy of chosen labels."""
    return float(prediction in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals some reference as `words.normalise` writes them, else 0.0."""
    return float(normalise(prediction) in {normalise(r) for r in references})


@cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=Words())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 in [0, 1] over `Words`, the best over the references (Lin 2004; Google's `rouge-score`).

    Two texts without a word are equal, 1.0.
    """
    return max(_rouge_l(prediction, reference) for reference in references)


def _rouge_l(prediction: str, reference: str) -> float:
    if not (Words().tokenize(prediction) or Words().tokenize(reference)):
        return 1.0
    return float(_rouge().score(reference, prediction)["rougeL"].fmeasure)


def nats_a_token(nats: float, hits: int, tokens: int) -> float:
    """−log p(answer) over its tokens; exp of it is the perplexity."""
    return nats / tokens


def token_accuracy(nats: float, hits: int, tokens: int) -> float:
    """The share of an answer's tokens that the model finds the likeliest behind those before, in [0, 1]."""
    return hits / tokens


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

    Source: method.md §6. Raises ValueError on no triangle, a single stage, or one that never scored above 0: nothing to keep.
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
    Source: method.md §6.
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


def kl_divergence(log_p: ArrayLike, log_q: ArrayLike) -> float:
    """KL(p ‖ q) in nats, the mean over rows: what it costs to take q for p. ≥ 0; infinite where q rules out what p does not.

    log_p, log_q: (N, V) natural logs of probabilities, −inf for 0, each row with sum 1 (to 1e-3), as arrays, lists or CPU
    tensors; logs, since a probability below 1e-45 would be 0 in float32. Sums run in float64. For the KL to base of METHOD
    §6 p is the base model's distribution of the next token and q the tuned model's, at every token of held-out general text.
    Raises ValueError where the shapes disagree, nothing is there or a row is no distribution.
    Source: Kullback and Leibler 1951, Ann. Math. Stat. 22(1).
    """
    import numpy as np

    a, b = np.asarray(log_p, dtype=np.float64), np.asarray(log_q, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or not a.size:
        raise ValueError(f"distributions are two (N, V) of one shape, not {a.shape} and {b.shape}")
    for rows in (a, b):
        if not (abs(np.exp(rows).sum(1) - 1.0) <= 1e-3).all():
            raise ValueError("the exponentials of a distribution's logs have the sum 1")
    some = a > -np.inf  # an outcome of chance 0 adds nothing
    apart = np.subtract(a, b, out=np.zeros_like(a), where=some)
    return max(0.0, float((np.exp(a) * apart).sum(1).mean()))


def perplexity_ratio(tuned: Sequence[float], base: Sequence[float]) -> float:
    """exp(mean(tuned) − mean(base)): perplexity after tuning over that before, > 0; above 1 the text surprises more.

    tuned, base: −ln p of every token of one text, in nats. Raises ValueError on no tokens or unequally many.
    Source: method.md §6.
    """
    if len(tuned) != len(base):
        raise ValueError(f"{len(tuned)} and {len(base)} tokens: both models read the same text")
    return math.exp(mean(tuned) - mean(base))


def linear_cka(x: ArrayLike, y: ArrayLike) -> float:
    """Debiased linear CKA of states x (N, d) and y (N, d') of the same N ≥ 4 inputs, in [−1, 1]: 1 where they are equal up to
    rotation, shift and scale, about 0 where unrelated, whatever N and d.

    HSIC₁(x, y) / √(HSIC₁(x, x) HSIC₁(y, y)), with the unbiased HSIC₁ of Song et al. 2012 (JMLR 13, eq. 5) as Nguyen et al.
    2020, arXiv:2010.15327, put into the CKA of Kornblith et al. 2019, arXiv:1905.00414; the same number as
    `objective.distill.linear_cka`. In float64, and from d × d' sums, so N may be large: columns centred, K = xxᵀ and L = yyᵀ
    have row sums 0, and with k and l their diagonals
        N (N − 3) HSIC₁ = ‖xᵀy‖² − k·l · N / (N − 2) + Σk Σl / ((N − 1)(N − 2)).
    Raises ValueError on other shapes, numbers that are not finite, or states of one side that are all equal.
    """
    import numpy as np

    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or len(a) < 4:
        raise ValueError(f"debiased CKA compares (N, d) and (N, d') with N of at least 4, not {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("states are finite numbers")
    n = len(a)
    a, b = a - a.mean(0), b - b.mean(0)
    if not (a.any() and b.any()):
        raise ValueError("the states of one side are all equal: there is nothing to compare")
    a, b = a / np.sqrt((a * a).sum(1).mean()), b / np.sqrt((b * b).sum(1).mean())

    def hsic(u: Any, v: Any) -> float:
        k, m = (u * u).sum(1), (v * v).sum(1)
        return float(((u.T @ v) ** 2).sum() - k @ m * n / (n - 2) + k.sum() * m.sum() / ((n - 1) * (n - 2)))

    return float(np.clip(hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b)), -1.0, 1.0))


def participation_gap(participating: float, unseen: float) -> float:
    """How much better a model is at held-out rows of sites that took part than at rows of sites that did not; in [−1, 1].

    Both are scores in [0, 1]. It is what the sites' differences cost beyond the rows' own.
    Source: Yuan et al. 2022, arXiv:2110.14216. Raises ValueError outside [0, 1].
    """
    for score in (participating, unseen):
        if not 0.0 <= score <= 1.0:
            raise ValueError(f"a score is in [0, 1], not {score}")
    return participating - unseen


def worst(scores: Sequence[float]) -> float:
    """The lowest of the sites' scores. Raises ValueError on none or on NaN. Source: Mohri et al. 2019, arXiv:1902.00146."""
    return _sorted(scores)[0]


def bottom_decile(scores: Sequence[float]) -> float:
    """The mean of the lowest tenth of the sites' scores, at least one: ⌈n / 10⌉ of n, so up to ten sites the worst alone.

    Raises ValueError on none or on NaN. Source: worst 10 % in Li et al. 2020, arXiv:1905.10497.
    """
    return mean(_sorted(scores)[: math.ceil(len(scores) / 10)])


def spread(scores: Sequence[float]) -> float:
    """The sample standard deviation (n − 1) of the sites' scores; 0 for a single one. Raises ValueError on none or on NaN."""
    middle = mean(_sorted(scores))
    return math.sqrt(sum((score - middle) ** 2 for score in scores) / max(1, len(scores) - 1))


def _sorted(scores: Sequence[float]) -> list[float]:
    if not scores or any(map(math.isnan, scores)):
        raise ValueError(f"scores of sites are numbers, and at least one, not {list(scores)}")
    return sorted(scores)


def bytes_to_target(scores: Sequence[float], sent: Sequence[float], target: float) -> float | None:
    """Bytes sent until the first score that reaches `target`; None where none does.

    scores: at points of a run in order. sent: all bytes sent by then, one number a score, never falling.
    Raises ValueError where there are not as many, or they fall. Source: rounds to a target in McMahan et al. 2017,
    arXiv:1602.05629, in bytes.
    """
    if len(scores) != len(sent) or any(later < before for before, later in pairwise(sent)):
        raise ValueError(f"one number of bytes a score, never falling, not {list(sent)} for {len(scores)} scores")
    return next((size for score, size in zip(scores, sent, strict=True) if score >= target), None)


def step_cost(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Mean processor seconds of a method's rounds over those of the reference's rounds, plain LoRA; > 0, above 1 is dearer.

    Both as measured on one machine, of rounds with equally many steps on equal rows. Raises ValueError on nothing, or on
    a reference that took no time. Source: method.md §6.
    """
    if mean(reference) <= 0.0:
        raise ValueError("the reference's rounds took no time")
    return mean(seconds) / mean(reference)


def interaction(neither: float, first: float, second: float, both: float) -> float:
    """both − first − second + neither: what two parts together add beyond what each adds alone; 0 where they add up.

    Source: the interaction contrast of a 2 × 2 design (Fisher 1935, The Design of Experiments).
    """
    return both - first - second + neither
