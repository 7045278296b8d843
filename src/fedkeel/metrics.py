"""Scores as pure functions: texts or tables in, a number out."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer


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
