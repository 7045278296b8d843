"""The analytic anchor: sums, the closed forms of ridge regression, and distributions along a trie, against brute force."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedkeel.method.objective import anchor
from fedkeel.model.features import chances, features_of, scores_of
from fedkeel.types import Forward, Head, Soft, Sums

LABELS = ["ham", "egg", "tea"]


def rows(seed: int, count: int, width: int = 6) -> tuple[Tensor, list[str]]:
    """Features whose mean depends on the label, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = [LABELS[n % 3] for n in range(count)]
    centres = 2 * torch.randn(3, width, generator=generator)
    hidden = torch.stack([centres[n % 3] for n in range(count)]) + torch.randn(count, width, generator=generator)
    return features_of([hidden]), labels


def solved(features: Tensor, labels: list[str], strength: float) -> Tensor:
    """The ridge regression of one-hot labels as least squares over rows with √λ I below them, (labels, d)."""
    x = features.double()
    y = torch.tensor([[float(label == known) for known in sorted(set(labels))] for label in labels], dtype=torch.float64)
    more = math.sqrt(strength) * torch.eye(x.shape[1], dtype=torch.float64)
    below = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    return torch.linalg.lstsq(torch.cat([x, more]), torch.cat([y, below])).solution.T


def strength(sums: Sums, ridge: float) -> float:
    return ridge * float(sums.gram.diagonal().double().mean())


def test_features_by_hand() -> None:
    """(1, 3) has mean 2 and deviation 1, so (−1, 1): 64 steps of 1/64 each; the intercept is 1 too; far values are cut at 8.
    Each part is measured by itself."""
    first, second = torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.tensor([[0.0, 0.0, 3.0, 3.0], [9.0, 7.0, 9.0, 7.0]])
    assert features_of([first]).tolist() == [[-64, 64, 64], [0, 0, 64]]
    assert features_of([first, second]).tolist() == [[-64, 64, -64, -64, 64, 64, 64], [0, 0, 64, -64, 64, -64, 64]]
    spike = torch.zeros(1, 400)
    spike[0, 0] = 1.0
    assert features_of([spike])[0, 0] == 512  # its deviation is 1/20: 20 of them
    scaled = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(features_of([scaled]), features_of([3 * scaled + 2]))


def test_sums_of_sites_and_stages_are_those_of_all_rows_in_any_order() -> None:
    features, labels = rows(1, 30)
    whole = anchor.sums_of(features, labels)
    assert torch.equal(whole.gram, features.to(torch.int64).T @ features.to(torch.int64))
    cuts = [(0, 4), (4, 11), (11, 30)]
    parts = [anchor.sums_of(features[a:b], labels[a:b], stage) for stage, (a, b) in enumerate(cuts)]
    for order in permutations(parts):
        found = anchor.added(order)
        assert torch.equal(found.gram, whole.gram)
        assert found.rows == whole.rows == {"egg": 10, "ham": 10, "tea": 10}
        assert found.stage == 2
        assert all(torch.equal(found.moments[label], whole.moments[label]) for label in LABELS)
        assert torch.equal(anchor.head_of(found, 0.1).weight, anchor.head_of(whole, 0.1).weight)
    with pytest.raises(ValueError, match="features of 4 numbers beside such of 7"):
        anchor.added([whole, anchor.sums_of(rows(1, 3, 3)[0], LABELS)])


def test_the_head_is_the_ridge_regression_of_all_rows() -> None:
    features, labels = rows(2, 24)
    sums = anchor.sums_of(features, labels)
    for ridge in (1e-3, 0.3):
        head = anchor.head_of(sums, ridge)
        assert head.labels == ("egg", "ham", "tea")
        torch.testing.assert_close(head.weight.double(), solved(features, labels, strength(sums, ridge)), rtol=1e-5, atol=1e-9)


def test_leaving_a_row_out_is_refitting_without_it() -> None:
    features, labels = rows(3, 18)
    sums = anchor.sums_of(features, labels)
    held = strength(sums, 0.05)
    head, inverse = anchor.head_of(sums, 0.05), anchor.inverse(sums, 0.05)
    exact = anchor.moments_of(sums) @ inverse
    found = anchor.left_out(features, labels, head.labels, exact, inverse)
    for row in range(18):
        others = [n for n in range(18) if n != row]
        again = solved(features[others], [labels[n] for n in others], held)
        torch.testing.assert_close(found[row], features[row].double() @ again.T, rtol=1e-6, atol=1e-8)


def test_generalised_cross_validation_from_sums_is_that_from_rows() -> None:
    for seed, count in ((4, 12), (5, 60)):
        features, labels = rows(seed, count)
        sums = anchor.sums_of(features, labels)
        x = features.double()
        y = torch.tensor([[float(label == known) for known in sorted(set(labels))] for label in labels], dtype=torch.float64)
        errors = {}
        for ridge in anchor.RIDGES:
            weight = solved(features, labels, strength(sums, ridge))
            hat = x @ torch.linalg.inv(x.T @ x + strength(sums, ridge) * torch.eye(7, dtype=torch.float64)) @ x.T
            errors[ridge] = count * float((y - x @ weight.T).square().sum()) / (count - float(hat.trace())) ** 2
        assert anchor.cross_validated(sums) == min(errors, key=errors.__getitem__)
        assert torch.equal(anchor.inverse(sums, 0.0), anchor.inverse(sums, anchor.cross_validated(sums)))


def test_what_is_foretold_by_hand() -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 1.0]], dtype=torch.float64)
    hits, nats = anchor.foretold(scores, ["b", "a", "a"], ("a", "b"))
    assert hits == {"a": 1, "b": 1}
    wanted = [math.log1p(math.exp(-a)) + math.log1p(math.exp(a)) + math.log1p(math.exp(-a)) for a in anchor.SCALES]
    assert nats == pytest.approx(wanted)


def test_scale_and_trust_come_from_what_was_foretold() -> None:
    gram, moments = torch.eye(2, dtype=torch.int64), {"a": torch.tensor([3, 0]), "b": torch.tensor([0, 2])}
    sums = Sums(gram, moments, {"a": 4, "b": 5}, {"a": 3}, [9.0, 4.0, 2.0, 1.0, 1.5, 8.0], 7)
    head = anchor.head_of(sums, 1.0)
    assert (head.scale, head.trust.tolist(), head.stage) == (10.0, [0.75, 0.0], 7)
    torch.testing.assert_close(head.weight, torch.tensor([[1.5, 0.0], [0.0, 1.0]]))


def test_a_label_without_evidence_scores_nothing() -> None:
    head = Head(("a", "b"), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), 2.0, torch.ones(2))
    features = torch.tensor([[3, 1]], dtype=torch.int16)
    assert scores_of(head, features, ("b", "z", "a")).tolist() == [[2.0, 0.0, 3.0]]
    wanted = [math.exp(v) / (math.exp(4) + 1 + math.exp(6)) for v in (4, 0, 6)]
    assert chances(head, features, ("b", "z", "a"))[0].tolist() == pytest.approx(wanted, rel=1e-6)


@st.composite
def tries(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[float], int]:
    """Label strings that all end in 9, a distribution over them, and a seed."""
    bodies = draw(st.lists(st.lists(st.integers(0, 3), max_size=3).map(tuple), min_size=2, max_size=7, unique=True))
    weights = draw(st.lists(st.integers(0, 5), min_size=len(bodies), max_size=len(bodies)).filter(any))
    return [(*body, 9) for body in bodies], [w / sum(weights) for w in weights], draw(st.integers(0, 99))


@given(tries())
def test_along_all_answers_the_terms_add_up_to_the_divergence_of_whole_labels(made: tuple) -> None:
    """A student says next tokens at each node of the trie; its distribution over whole labels is their product."""
    labels, chance, seed = made
    nodes = sorted({label[:n] for label in labels for n in range(len(label))})
    generator = torch.Generator().manual_seed(seed)
    logits = {node: torch.randn(10, generator=generator, dtype=torch.float64) for node in nodes}
    after = {node: sorted({label[len(node)] for label in labels if label[: len(node)] == node}) for node in nodes}

    def says(node: tuple[int, ...], token: int) -> float:
        """log of the next token, among those that lead on."""
        return float(logits[node][token] - logits[node][after[node]].logsumexp(0))

    whole = [sum(says(label[:n], label[n]) for n in range(len(label))) for label in labels]
    wanted = sum(p * (math.log(p) - q) for p, q in zip(chance, whole, strict=True) if p)
    found, seen = 0.0, set()
    for label in labels:
        told: dict[int, list[tuple[int, float, float]]] = {}
        for place, token, value, mass in anchor.along(label, labels, chance):
            told.setdefault(place, []).append((token, value, mass))
        for place, entries in told.items():
            assert [token for token, _, _ in sorted(entries)] == after[label[:place]]
            assert math.fsum(value for _, value, _ in entries) == pytest.approx(1.0)
            below = [p for p, other in zip(chance, labels, strict=True) if other[:place] == label[:place]]
            assert all(mass == pytest.approx(math.fsum(below)) for _, _, mass in entries)
            if label[:place] not in seen:
                seen.add(label[:place])
                found += sum(m * v * (math.log(v) - says(label[:place], t)) for t, v, m in entries if v)
    assert found == pytest.approx(wanted, abs=1e-9)


def test_the_term_equals_the_slow_loop() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), requires_grad=True)
    listed = {0: {1: 0.25, 4: 0.75}, 2: {0: 0.0, 1: 0.4, 5: 0.6}}
    weight = torch.tensor([2.0, 9.0, 0.5, 0.0])
    entries = [(place, token, value) for place, of in listed.items() for token, value in of.items()]
    place, token, value = (torch.tensor(column) for column in zip(*reversed(entries), strict=True))
    forward = Forward(logits, torch.zeros(4, dtype=torch.int64), torch.arange(4), anchor=Soft(place, token, value, weight))
    wanted = 0.0
    for n, of in listed.items():
        says = {t: math.exp(float(logits.detach()[n, t])) for t in of}
        wanted += float(weight[n]) * sum(p * math.log(p * sum(says.values()) / says[t]) for t, p in of.items() if p)
    loss = anchor.to_anchor(forward, None)
    assert float(loss.detach()) == pytest.approx(wanted / 4, rel=1e-5)
    (slope,) = torch.autograd.grad(loss, logits)
    assert (slope[[1, 3]] == 0).all()  # nothing is said there
    assert (slope[0, [0, 2, 3, 5]] == 0).all()  # nor of entries that are not listed
    assert float(anchor.to_anchor(Forward(logits, forward.targets, forward.rows), None)) == 0.0
