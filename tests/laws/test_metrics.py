"""Scores by hand, and ROUGE-L against a slow longest common subsequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.metrics import exact_match, macro, mean, normalise, rouge_l


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes.", "yes"),
        ("  The\tcat\n sat ", "the cat sat"),
        ("don't  STOP!", "dont stop"),
        ("a-b, c", "ab c"),
        ("?!", ""),
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
