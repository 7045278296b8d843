"""Scores by hand, and ROUGE-L against a slow longest common subsequence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.method.objective.distill import linear_cka as trained_cka
from fedkeel.scores.metrics import (
    average_final,
    average_learnt,
    backward_transfer,
    bottom_decile,
    bytes_to_target,
    consistency,
    exact_match,
    forgetting,
    interaction,
    kl_divergence,
    linear_cka,
    macro,
    mean,
    normalise,
    participation_gap,
    perplexity_ratio,
    retention_ratio,
    rouge_l,
    spread,
    stability_index,
    step_cost,
    worst,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The\tcat\n sat ", "the cat sat"),
        ("don't  STOP!", "don't stop"),
        ("a-b, c", "a-b c"),
        ("?!", "?!"),
        ("ÄRGER", "ärger"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("Paris", ["paris."], 1.0),
        ('"the  United\nKingdom"', ["London", "The United Kingdom!"], 1.0),
        ("Paris, France", ["Paris"], 0.0),
        ("the paris", ["paris"], 0.0),  # articles count
        ("", ["paris"], 0.0),
        ("paris", [], 0.0),
        ("par is", ["paris"], 0.0),
    ],
)
def test_exact_match(prediction: str, references: list[str], expected: float) -> None:
    assert exact_match(prediction, references) == expected


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence: the cat on mat. Precision 4/5, recall 4/6, F1 = 2 · 4 / (5 + 6).
    assert rouge_l("the cat on a mat", ["the cat sat on the mat"]) == pytest.approx(8 / 11, rel=1e-12)
    # Order counts: of "b a" only one word is in order.
    assert rouge_l("b a", ["a b"]) == pytest.approx(0.5, rel=1e-12)
    assert rouge_l("red", ["blue"]) == 0.0
    assert rouge_l("", ["blue"]) == 0.0
    assert rouge_l("The MAT!", ["the mat"]) == 1.0


def test_rouge_l_stems_and_takes_the_best_reference() -> None:
    assert rouge_l("running", ["runs"]) == 1.0
    assert rouge_l("a b", ["c d", "a b c d", "a x"]) == pytest.approx(2 * 2 / (2 + 4), rel=1e-12)
    with pytest.raises(ValueError, match="empty"):
        rouge_l("a", [])


def slow_lcs(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """By its definition: of the two last words, either both end the common subsequence or one is not in it."""
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + slow_lcs(a[:-1], b[:-1])
    return max(slow_lcs(a[:-1], b), slow_lcs(a, b[:-1]))


WORDS = st.lists(st.sampled_from(["red", "sea", "cat"]), min_size=1, max_size=6).map(tuple)


@settings(max_examples=60, deadline=None)
@given(WORDS, WORDS)
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(prediction: tuple[str, ...], reference: tuple[str, ...]) -> None:
    expected = 2 * slow_lcs(prediction, reference) / (len(prediction) + len(reference))
    assert rouge_l(" ".join(prediction), [" ".join(reference)]) == pytest.approx(expected, rel=1e-12)


def test_means() -> None:
    assert mean([1.0, 0.0, 0.5, 0.5]) == 0.5
    assert macro({"small": 1.0, "large": 0.25}) == 0.625


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        mean([])
    with pytest.raises(ValueError, match="no values"):
        macro({})


# stage 0 was best in the middle, stage 1 came back in the end
TABLE = [[0.8], [0.9, 0.5], [0.6, 0.4, 0.7], [0.45, 0.5, 0.35, 1.0]]
MEASURES = [average_final, average_learnt, backward_transfer, forgetting, retention_ratio]


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (average_final, (0.45 + 0.5 + 0.35 + 1.0) / 4),
        (average_learnt, (0.8 + 0.5 + 0.7 + 1.0) / 4),
        (backward_transfer, (-0.35 + 0.0 - 0.35) / 3),
        (forgetting, (0.45 + 0.0 + 0.35) / 3),
        (retention_ratio, (0.5 + 1.0 + 0.5) / 3),
    ],
)
def test_a_score_table_by_hand(measure: Any, expected: float) -> None:
    assert measure(TABLE) == pytest.approx(expected, rel=1e-12)
    assert measure({s: dict(enumerate(row)) for s, row in enumerate(TABLE)}) == measure(TABLE)


def test_nothing_forgotten_and_a_stage_that_gained_at_the_last() -> None:
    kept = [[0.5], [0.5, 0.25], [0.5, 0.25, 1.0]]
    assert (backward_transfer(kept), forgetting(kept), retention_ratio(kept)) == (0.0, 0.0, 1.0)
    gained = [[0.25], [0.5, 1.0]]
    assert (backward_transfer(gained), forgetting(gained), retention_ratio(gained)) == (0.25, -0.25, 1.0)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("table", "told"),
    [
        ([], "no values|stages"),
        ([[0.5, 0.5], [0.5, 0.5]], "s \\+ 1"),  # the scores of stages still to come have no place here
        ([[0.5], [0.5]], "s \\+ 1"),
        ({1: {0: 0.5}}, "stage 0"),
        ({0: {1: 0.5}}, "stage 0"),
        ([[0.5], [0.5, math.nan]], "finite"),
        ([[0.5], [None, 0.5]], "stage 1"),
    ],
)
def test_what_is_no_score_table_is_refused(measure: Any, table: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        measure(table)


def test_retention_needs_two_stages_and_something_to_keep() -> None:
    assert average_final([[0.5]]) == average_learnt([[0.5]]) == 0.5
    for measure in (backward_transfer, forgetting, retention_ratio):
        with pytest.raises(ValueError, match="2 are needed"):
            measure([[0.5]])
    with pytest.raises(ValueError, match="stage 1, from 0, never"):
        retention_ratio([[0.5], [0.5, 0.0], [0.5, 0.0, 1.0]])


def test_stability_index_by_hand() -> None:
    # Trapezoids under (0, 0.8), (0.1, 0.6), (0.5, 0.2): 0.1 · 0.7 + 0.4 · 0.4 = 0.23, of 0.5 · 0.8.
    assert stability_index([0.1, 0.5], [0.6, 0.2], 0.8) == pytest.approx(0.23 / 0.4, rel=1e-12)
    assert stability_index([1, 2, 4], [0.5, 0.5, 0.5], 0.5) == 1.0
    assert stability_index([1.0], [0.6], 0.4) == pytest.approx(1.25, rel=1e-12)  # damage helped
    assert stability_index([0.1, 0.5], [0.0, 0.0], 0.8) == pytest.approx(0.1 / (2 * 0.5), rel=1e-12)  # the least there is
    # only the ratios of strengths and of scores count
    assert stability_index([1, 5], [0.3, 0.1], 0.4) == pytest.approx(0.23 / 0.4, rel=1e-12)


@pytest.mark.parametrize(
    ("strengths", "scores", "clean"),
    [
        ([], [], 0.5),
        ([0.1, 0.2], [0.5], 0.5),
        ([0.0, 0.2], [0.5, 0.5], 0.5),
        ([0.2, 0.1], [0.5, 0.5], 0.5),
        ([0.1, 0.1], [0.5, 0.5], 0.5),
        ([math.inf], [0.5], 0.5),
        ([0.1], [0.5], 0.0),
        ([0.1], [-0.5], 0.5),
        ([0.1], [math.nan], 0.5),
        ([math.nan], [0.5], 0.5),
    ],
)
def test_stability_index_refuses_what_is_no_curve(strengths: list[float], scores: list[float], clean: float) -> None:
    with pytest.raises(ValueError, match=r"rise from|scores are|one score a strength"):
        stability_index(strengths, scores, clean)


def test_consistency_by_hand() -> None:
    p, q = [[1.0, 0.0], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]
    # Row 1: the middle is (3/4, 1/4); JS = (ln 4/3 + (ln 2/3 + ln 2) / 2) / 2.
    divergence = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    expected = (1 - divergence / math.log(2) + 1) / 2
    assert consistency(p, q) == pytest.approx(expected, rel=1e-12)
    assert consistency(q, p) == pytest.approx(expected, rel=1e-12)
    assert consistency(torch.tensor(p), np.array(q)) == pytest.approx(expected, rel=1e-12)
    assert consistency([[0.0, 1.0]], [[1.0, 0.0]]) == 0.0
    assert consistency(p, p) == 1.0


@pytest.mark.parametrize(
    ("p", "q"),
    [([], []), ([0.5, 0.5], [0.5, 0.5]), ([[1.0]], [[0.5, 0.5]]), ([[1.5, -0.5]], [[0.5, 0.5]]), ([[0.5, 0.4]], [[0.5, 0.5]])],
)
def test_consistency_refuses_what_is_no_distribution(p: list[Any], q: list[Any]) -> None:
    with pytest.raises(ValueError, match="distribution"):
        consistency(p, q)
    with pytest.raises(ValueError, match="distribution"):
        consistency(q, p)


def logs(rows: list[list[float]]) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))


def test_kl_divergence_by_hand_and_its_direction() -> None:
    p, q = logs([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]), logs([[0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    # ½ ln(0.5 / 0.25) in the first row, nothing in the second
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) / 2, rel=1e-12)
    assert kl_divergence(torch.tensor(p), q) == kl_divergence(p, q)
    assert kl_divergence(q, p) == math.inf  # p rules out the third outcome
    assert kl_divergence(p, p) == 0.0
    # of chances that float32 does not hold: 1 · (0 + 200) for a p that is certain of what q gives e^-200
    rare = np.array([[0.0, -300.0]]), np.array([[-200.0, 0.0]])
    assert kl_divergence(*rare) == pytest.approx(200.0, rel=1e-12)


@pytest.mark.parametrize(("p", "q"), [([], []), ([0.0], [0.0]), ([[0.0]], [[0.0, 0.0]]), ([[0.0]], [[-1.0]])])
def test_kl_divergence_refuses_what_is_no_distribution(p: list[Any], q: list[Any]) -> None:
    with pytest.raises(ValueError, match="distribution"):
        kl_divergence(p, q)


def test_perplexity_ratio_by_hand() -> None:
    # perplexities 4 and 2 of two tokens each
    assert perplexity_ratio([math.log(8), math.log(2)], [math.log(2), math.log(2)]) == pytest.approx(2.0, rel=1e-12)
    with pytest.raises(ValueError, match="2 and 1 tokens"):
        perplexity_ratio([1.0, 1.0], [1.0])


def slow_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Song et al. 2012, eq. 5, as it is printed: Gram matrices without their diagonals."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        k, m, one = k - np.diag(np.diag(k)), m - np.diag(np.diag(m)), np.ones(n)
        first, second = np.trace(k @ m), (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (first + second - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    a, b = x @ x.T, y @ y.T
    return hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))


@pytest.mark.parametrize(("n", "d", "other"), [(4, 3, 3), (9, 2, 5), (40, 7, 7), (12, 60, 30)])
def test_cka_against_the_unbiased_hsic_as_printed_and_against_the_one_that_is_trained(n: int, d: int, other: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.normal(3.0, 1.0, (n, d))
    y = x[:, :1] * rng.normal(size=(1, other)) + rng.normal(size=(n, other))
    assert linear_cka(x, y) == pytest.approx(slow_cka(x, y), abs=1e-9)
    assert linear_cka(x, y) == pytest.approx(float(trained_cka(torch.tensor(x), torch.tensor(y))), abs=1e-9)
    turned = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert linear_cka(x, -3 * x @ turned + 7) == pytest.approx(1.0, abs=1e-9)
    assert linear_cka(x, x) == 1.0


def test_cka_of_unrelated_states_is_about_nothing_where_the_biased_one_would_be_high() -> None:
    rng = np.random.default_rng(0)
    found = [linear_cka(rng.normal(size=(30, 300)), rng.normal(size=(30, 300))) for _ in range(40)]
    assert abs(mean(found)) < 0.02


def test_cka_refuses_what_cannot_be_compared() -> None:
    for x, y in (([[0.0]] * 3, [[0.0]] * 3), (np.eye(4), np.eye(5)), ([1.0] * 4, np.eye(4))):
        with pytest.raises(ValueError, match="N of at least 4"):
            linear_cka(x, y)
    with pytest.raises(ValueError, match="all equal"):
        linear_cka(np.ones((5, 2)), np.eye(5))
    with pytest.raises(ValueError, match="finite"):
        linear_cka(np.full((5, 2), np.nan), np.eye(5))


def test_scores_of_sites_by_hand() -> None:
    scores = [0.9, 0.1, 0.5, 0.3, 0.7, 0.6, 0.8, 0.4, 0.2, 1.0, 0.95]
    assert (worst(scores), bottom_decile(scores)) == (0.1, pytest.approx((0.1 + 0.2) / 2))  # two of eleven
    assert bottom_decile(scores[:10]) == 0.1
    assert spread([0.2, 0.4, 0.9]) == pytest.approx(math.sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2))
    assert (worst([0.5]), bottom_decile([0.5]), spread([0.5])) == (0.5, 0.5, 0.0)
    for measure in (worst, bottom_decile, spread):
        for odd in ([], [0.5, math.nan]):
            with pytest.raises(ValueError, match="at least one"):
                measure(odd)


def test_participation_gap_by_hand() -> None:
    assert participation_gap(0.75, 0.5) == 0.25
    assert participation_gap(0.25, 0.5) == -0.25
    with pytest.raises(ValueError, match="not 80"):
        participation_gap(80, 0.5)


def test_what_a_target_and_a_step_cost_by_hand() -> None:
    assert bytes_to_target([0.2, 0.5, 0.4, 0.6], [10, 20, 30, 40], 0.5) == 20
    assert bytes_to_target([0.2, 0.5], [10, 20], 0.55) is None
    assert bytes_to_target([], [], 0.5) is None
    for sent in ([10], [20, 10]):
        with pytest.raises(ValueError, match="never falling"):
            bytes_to_target([0.2, 0.5], sent, 0.5)
    assert step_cost([3.0, 5.0], [2.0]) == 2.0
    with pytest.raises(ValueError, match="took no time"):
        step_cost([1.0], [0.0])


def test_interaction_by_hand() -> None:
    assert interaction(0.5, 0.625, 0.75, 0.875) == 0.0
    assert interaction(0.5, 0.5, 0.5, 0.75) == 0.25
