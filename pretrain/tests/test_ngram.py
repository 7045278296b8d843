"""The n-gram baseline against a slow twin written from the formula, and against hand-worked cases."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

import ngram

VOCABULARY, BOS = 12, 0


def toy_documents() -> list[list[int]]:
    """60 documents of 1 to 40 tokens from a skewed second-order chain over 1..10; 11 never occurs."""
    rng = random.Random(5)
    documents = []
    for _ in range(60):
        document = [BOS]
        for _ in range(rng.randint(1, 40)):
            shift = sum(document[-2:])
            document.append(1 + (shift + min(int(rng.expovariate(0.5)), 9)) % 10)
        documents.append(document)
    return documents


class Twin:
    """Interpolated modified Kneser-Ney straight from Chen and Goodman 1999, one probability at a time."""

    def __init__(self, documents: list[list[int]], order: int) -> None:
        self.order = order
        occurrences: Counter[tuple[int, ...]] = Counter()
        lefts: dict[tuple[int, ...], set[int]] = {}
        for document in documents:
            for n in range(1, order + 1):
                for i in range(len(document) - n + 1):
                    gram = tuple(document[i : i + n])
                    occurrences[gram] += 1
                    if i:
                        lefts.setdefault(gram, set()).add(document[i - 1])
        del occurrences[(BOS,)]
        self.counts = {
            gram: times if len(gram) == order or gram[0] == BOS else len(lefts[gram]) for gram, times in occurrences.items()
        }
        self.taken = {n: self.discounts(n) for n in range(1, order + 1)}

    def discounts(self, n: int) -> tuple[float, ...]:
        n1, n2, n3, n4 = (sum(c == k for g, c in self.counts.items() if len(g) == n) for k in (1, 2, 3, 4))
        if not (n1 and n2 and n3):
            return ngram.FALLBACK
        y = n1 / (n1 + 2 * n2)
        found = (0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3)
        return found if min(found[1:]) > 0 else ngram.FALLBACK

    def probability(self, context: tuple[int, ...], word: int) -> float:
        context = context[max(0, len(context) - self.order + 1) :]
        lower = self.probability(context[1:], word) if context else 1 / VOCABULARY
        n = len(context) + 1
        followers = [c for g, c in self.counts.items() if len(g) == n and g[:-1] == context]
        if not followers:
            return lower
        taken = self.taken[n]
        gamma = sum(taken[min(c, 3)] for c in followers) / sum(followers)
        own = self.counts.get((*context, word), 0)
        return (own - taken[min(own, 3)]) / sum(followers) + gamma * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_agrees_with_the_twin(order: int) -> None:
    documents = toy_documents()
    twin = Twin(documents, order)
    levels = ngram.fit(ngram.count(documents, order, VOCABULARY), VOCABULARY)
    # Seen text, text in another order, and a token that training never saw.
    queries = [documents[0], [BOS, *reversed(documents[1][1:])], [BOS, 11, 3, 11, *documents[2][1:]]]
    expected = [twin.probability(tuple(q[:i]), q[i]) for q in queries for i in range(1, len(q))]
    np.testing.assert_allclose(ngram.probabilities(levels, queries, VOCABULARY), expected, rtol=1e-12)


def test_a_lower_order_is_the_model_of_the_first_tables() -> None:
    documents = toy_documents()
    cut = ngram.fit(ngram.count(documents, 5, VOCABULARY)[:3], VOCABULARY)
    own = ngram.fit(ngram.count(documents, 3, VOCABULARY), VOCABULARY)
    np.testing.assert_array_equal(
        ngram.probabilities(cut, documents, VOCABULARY), ngram.probabilities(own, documents, VOCABULARY)
    )


def test_toy_corpus_uses_estimated_discounts() -> None:
    levels = ngram.fit(ngram.count(toy_documents(), 4, VOCABULARY), VOCABULARY)
    assert all(tuple(level.discounts) != ngram.FALLBACK for level in levels[1:])


@pytest.mark.parametrize("context", [(), (3,), (3, 7), (11,), (4, 11, 2), tuple(toy_documents()[0][1:])])
def test_sums_to_one(context: tuple[int, ...]) -> None:
    """Over the vocabulary after seen and unseen contexts, at the start of a document and inside one."""
    levels = ngram.fit(ngram.count(toy_documents(), 4, VOCABULARY), VOCABULARY)
    last = len(context)
    queries = [[BOS, *context, word] for word in range(VOCABULARY)]
    p = ngram.probabilities(levels, queries, VOCABULARY).reshape(VOCABULARY, last + 1)[:, last]
    assert p.min() > 0
    assert abs(p.sum() - 1) < 1e-9


def test_discounts_by_hand() -> None:
    # n1, n2, n3, n4 = 4, 2, 1, 1: Y = 4 / (4 + 2 x 2) = 1/2.
    counts = np.array([0, 1, 1, 1, 1, 2, 2, 3, 4, 9])
    np.testing.assert_allclose(ngram.discounts(counts), [0.0, 0.5, 1.25, 1.0])


def test_discounts_without_rare_counts_fall_back() -> None:
    assert tuple(ngram.discounts(np.array([7, 8, 9]))) == ngram.FALLBACK


def test_continuation_counts_by_hand() -> None:
    # 2 ("Francisco") stands thrice but only after 1 ("San"); 3 stands twice, after 1 and after <|bos|>.
    unigrams, bigrams = ngram.count([[BOS, 1, 2], [BOS, 1, 2, 1, 2], [BOS, 3], [BOS, 1, 3]], 2, VOCABULARY)
    assert unigrams.keys.tolist() == [BOS, 1, 2, 3]
    assert unigrams.raw.tolist() == [0, 4, 3, 2]
    assert unigrams.left.tolist() == [0, 2, 1, 2]
    assert dict(zip(bigrams.keys.tolist(), bigrams.raw.tolist(), strict=True)) == {1: 3, 3: 1, 14: 3, 15: 1, 25: 1}


def test_heldout_counts_every_byte_and_token_once() -> None:
    documents = [("novels", "abc"), ("novels", "é"), ("howto", "x")]

    def encode(text: str) -> list[int]:
        return [ngram.BYTE_BOS, *text.encode()]

    table = ngram.heldout_bits([], documents, encode, 256)
    assert {kind: (row["tokens"], row["bytes"]) for kind, row in table.items()} == {
        "novels": (5, 5),
        "howto": (1, 1),
        "all": (6, 6),
    }
    # No level: every byte costs log2(256) bits.
    assert all(math.isclose(row["bits_per_byte"], 8) and math.isclose(row["perplexity"], 256) for row in table.values())
