"""Laws of aggregation rules, over the table of all rules, against the dense sum formed in full."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from builders import AGGREGATORS, SHAPES, dense_of, dense_sum, flat, make_adapter, make_updates, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedkeel.exchange.messages import layout
from fedkeel.method.aggregate.common import Aggregate, blend, compress, exact_factors, mean_tensors, product_norm, singular
from fedkeel.method.aggregate.exact import Stack, measured_error
from fedkeel.method.aggregate.rule import Aggregator, Options
from fedkeel.method.aggregate.svd import ROW_NORM
from fedkeel.method.aggregate.weighting import weights
from fedkeel.tables import WEIGHTINGS
from fedkeel.types import Adapter, Lora, Update

RULES = pytest.mark.parametrize("rule", AGGREGATORS.values(), ids=AGGREGATORS.keys())
ROBUST = ("median", "trimmed", "clipped", "centred", "krum")  # they count every site the same
WEIGHING = pytest.mark.parametrize("name", [name for name in AGGREGATORS if name not in ROBUST])
MIXED_RANKS = (1, 4, 2)
# α/r and, for rsLoRA, α/√r, of the ranks above with α = 8
MIXED_SCALES = (8 / 1, 8 / 4, 8 / math.sqrt(2))


class Again:
    """A re-iterable that is no sequence and makes its updates anew each time, by ascending site."""

    def __init__(self, updates: Sequence[Update]) -> None:
        self.updates = sorted(updates, key=lambda u: u.site)

    def __iter__(self) -> Iterator[Update]:
        for u in self.updates:
            tensors = {name: t.clone() for name, t in u.adapter.tensors().items()}
            yield Update(u.site, u.adapter.with_tensors(tensors), u.positions)


def obedient(rule: Aggregator, reference: Adapter, updates: Sequence[Update], round: int = 0) -> list[Update]:
    """The updates as a server gets them: what is not trained and sent in this round is as in the reference."""
    sent = rule.entry.trained(round) & rule.entry.shared
    old = reference.tensors()
    rests = {name: t for name, t in old.items() if name.rpartition(".")[2] in {"a", "b"} - sent}
    return [Update(u.site, u.adapter.with_tensors(u.adapter.tensors() | rests), u.positions) for u in updates]


def got_dense(result: Aggregate, path: str) -> np.ndarray:
    """What the model is changed by in one module, adapter and shift together, in float64."""
    left, right = result.shift.get(path, (torch.zeros(1, 0), torch.zeros(0, 1)))
    return dense_of(result.adapter.lora[path]) + left.double().numpy() @ right.double().numpy()


def twin_error(result: Aggregate, updates: Sequence[Update], shares: dict[str, float]) -> float:
    """‖W_rule − W_exact‖ / ‖W_exact‖ over all modules, from dense float64 matrices."""
    exact = np.concatenate([dense_sum(updates, shares, path).ravel() for path in result.adapter.lora])
    got = np.concatenate([got_dense(result, path).ravel() for path in result.adapter.lora])
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


def same(one: Aggregate, two: Aggregate) -> bool:
    """To the bit."""
    shifts = [{p: [t.numpy().tobytes() for t in pair] for p, pair in r.shift.items()} for r in (one, two)]
    return flat(one.adapter) == flat(two.adapter) and shifts[0] == shifts[1] and one.error == two.error


@RULES
def test_the_order_of_replies_changes_no_bit(rule: Aggregator) -> None:
    updates = make_updates(4)
    shares = weights(updates, "positions")
    first = rule(make_adapter(0), updates, shares)
    for order in itertools.permutations(updates):
        assert same(rule(make_adapter(0), order, weights(order, "positions")), first)
    stream = Again(updates[::-1])
    assert weights(stream, "positions") == shares
    assert same(rule(make_adapter(0), stream, shares), first)


@RULES
@pytest.mark.parametrize("round", [0, 1])
def test_one_site_is_the_identity_on_the_product(rule: Aggregator, round: int) -> None:
    """Where a factor does not travel: on the factor that does. Krum needs three sites, and here they are all alike."""
    reference = make_adapter(0, scale=1.5)
    sent = make_adapter(1, scale=1.5)
    updates = obedient(rule, reference, [Update(f"site-{k}", sent, 100) for k in range(rule.entry.least(0))], round)
    result = rule(reference, updates, weights(updates, "uniform"), Options(round=round))
    for path, factors in result.adapter.lora.items():
        expected = dense_of(updates[0].adapter.lora[path])
        np.testing.assert_allclose(got_dense(result, path), expected, atol=1e-6 * np.abs(expected).max())
        if rule.entry.personal:
            (shared,) = rule.entry.shared
            assert torch.equal(getattr(factors, shared), getattr(sent.lora[path], shared))
    torch.testing.assert_close(result.adapter.dense["head.weight"], sent.dense["head.weight"], rtol=1e-7, atol=0)
    assert result.error < 1e-6


@RULES
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_reported_error_is_the_error_against_the_dense_sum(rule: Aggregator, weighting: str) -> None:
    updates = make_updates(5)
    shares = weights(updates, weighting)
    result = rule(make_adapter(0), updates, shares)
    assert result.error == pytest.approx(twin_error(result, updates, shares), rel=1e-6)
    assert (result.error < 1e-6) if rule.entry.shifts else (result.error > 0.01)


@RULES
@pytest.mark.parametrize("round", [0, 1])
def test_a_rule_errs_only_if_it_does_not_claim_to_be_exact(rule: Aggregator, round: int) -> None:
    reference = make_adapter(0)
    updates = obedient(rule, reference, make_updates(5), round)
    result = rule(reference, updates, weights(updates, "positions"), Options(round=round))
    if rule.entry.exact or rule.entry.personal:
        assert result.error < 1e-6
    else:
        assert result.error > 0.01
    assert bool(result.shift) == rule.entry.shifts


ONE_RANK = {"alpha/r": ((3,), (8 / 3,)), "rsLoRA": ((3,), (8 / math.sqrt(3),))}
SEVERAL = {"mixed": (MIXED_RANKS, MIXED_SCALES), "full": ((24, 3), (8 / 24, 8 / math.sqrt(3)))}
EXACT = {
    f"{rule.entry.name}, {name}": (rule, *case)
    for rule in AGGREGATORS.values()
    if rule.entry.exact
    for name, case in (ONE_RANK | SEVERAL if rule.entry.mixed else ONE_RANK).items()
}


@pytest.mark.parametrize(("rule", "ranks", "scales"), EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("round", [0, 1])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_exact_rules_are_the_dense_sum(
    rule: Aggregator, round: int, ranks: tuple[int, ...], scales: tuple[float, ...], weighting: str
) -> None:
    reference = make_adapter(0, ranks[0], scales[0])
    updates = make_updates(5, ranks, scales)
    updates = updates if rule.entry.mixed else obedient(rule, reference, updates, round)
    shares = weights(updates, weighting)
    result = rule(reference, updates, shares, Options(round=round))
    for path in SHAPES:
        expected = dense_sum(updates, shares, path)
        assert np.linalg.norm(got_dense(result, path) - expected) < 1e-6 * np.linalg.norm(expected)
    assert result.error == pytest.approx(twin_error(result, updates, shares), rel=1e-6)


@RULES
def test_mixed_ranks_and_scales_are_taken_and_measured_or_refused_by_name(rule: Aggregator) -> None:
    updates = make_updates(5, MIXED_RANKS, MIXED_SCALES)
    shares = weights(updates, "positions")
    reference = make_adapter(0, 4, 8 / 4)
    if rule.entry.mixed:
        result = rule(reference, updates, shares)
        assert layout(result.adapter) == layout(reference)
        assert result.error == pytest.approx(twin_error(result, updates, shares), rel=1e-6)
    else:
        with pytest.raises(ValueError, match=rf"rule {rule.entry.name}: site site-0: rank or scale of layer\.0\.q differs"):
            rule(reference, updates, shares)


@RULES
@pytest.mark.parametrize(("rank", "scale"), [(2, 2.0), (3, 4.0)])
def test_one_odd_site_is_named_where_ranks_and_scales_must_be_equal(rule: Aggregator, rank: int, scale: float) -> None:
    updates = [Update("odd-site", make_adapter(9, rank, scale), 5), *make_updates(2)]
    if rule.entry.mixed:
        assert rule(make_adapter(0), updates, weights(updates, "uniform")).error >= 0
    else:
        with pytest.raises(ValueError, match=r"odd-site.*layer\.0\.q"):
            rule(make_adapter(0), updates, weights(updates, "uniform"))


@RULES
def test_a_small_change_of_the_sites_is_a_small_change_of_factors_that_keep_their_basis(rule: Aggregator) -> None:
    """Where it is not so, what a server optimiser carries from round to round would be noise."""
    reference = make_adapter(0)
    shown = rule(reference, obedient(rule, reference, near_sites(reference)), dict.fromkeys("pqr", 1 / 3)).adapter
    moved = max(float((t - reference.tensors()[name]).abs().max()) for name, t in shown.tensors().items())
    if rule.entry.keeps_basis:
        assert 0 < moved < 1e-3
    elif rule.entry.name != "alternate":  # there it is the gauge between two rounds that changes the basis
        assert moved > 0.1


def near_sites(reference: Adapter) -> list[Update]:
    changes = {site: make_adapter(k + 1).tensors() for k, site in enumerate("pqr")}
    return [
        Update(site, reference.with_tensors({n: t + 1e-4 * change[n] for n, t in reference.tensors().items()}), 1)
        for site, change in changes.items()
    ]


def test_what_is_trained_and_sent() -> None:
    both = frozenset("ab")
    trained = {name: [rule.entry.trained(r) for r in range(4)] for name, rule in AGGREGATORS.items()}
    assert trained.pop("freeze_a") == [frozenset("b")] * 4
    assert trained.pop("alternate") == [frozenset("b"), frozenset("a")] * 2
    assert all(rounds == [both] * 4 for rounds in trained.values())
    shared = {name: rule.entry.shared for name, rule in AGGREGATORS.items()}
    assert (shared.pop("share_a"), shared.pop("share_b")) == (frozenset("a"), frozenset("b"))
    assert set(shared.values()) == {both}
    assert all(rule.entry.shared == both - {rule.entry.keeps} for rule in AGGREGATORS.values())


@pytest.mark.parametrize(
    ("name", "round", "averaged"),
    [
        ("freeze_a", 0, "b"),
        ("alternate", 0, "b"),
        ("alternate", 1, "a"),
        ("alternate", 2, "b"),
        ("share_a", 5, "a"),
        ("share_b", 5, "b"),
        ("mean", 3, "ab"),
        ("residual", 3, "ab"),
    ],
)
def test_what_is_not_averaged_is_the_references_to_the_bit(name: str, round: int, averaged: str) -> None:
    updates, reference = make_updates(3), make_adapter(0)
    shares = weights(updates, "positions")
    result = AGGREGATORS[name](reference, updates, shares, Options(round=round))
    for path, got in result.adapter.lora.items():
        for factor in "ab":
            sites = [getattr(u.adapter.lora[path], factor) for u in updates]
            mean = sum(shares[u.site] * t.double().numpy() for u, t in zip(updates, sites, strict=True))
            expected = torch.tensor(mean).float() if factor in averaged else getattr(reference.lora[path], factor)
            assert torch.equal(getattr(got, factor), expected)


@RULES
def test_the_result_is_laid_out_as_the_reference_and_the_inputs_stay_as_they_were(rule: Aggregator) -> None:
    updates, reference = make_updates(3), make_adapter(0)
    before = [flat(u.adapter) for u in updates], flat(reference)
    result = rule(reference, updates, weights(updates, "uniform"))
    assert layout(result.adapter) == layout(reference)
    tensors = [*result.adapter.tensors().values(), *itertools.chain(*result.shift.values())]
    assert {t.dtype for t in tensors} == {torch.float32}
    assert all(t.is_contiguous() for t in tensors)
    assert ([flat(u.adapter) for u in updates], flat(reference)) == before


@WEIGHING
def test_dense_parameters_are_averaged_with_the_weights(name: str) -> None:
    one = Update("one", Adapter({}, {"head": torch.tensor([1.0, 8.0])}), 1)
    two = Update("two", Adapter({}, {"head": torch.tensor([5.0, -4.0])}), 3)
    result = AGGREGATORS[name](Adapter({}, {"head": torch.zeros(2)}), [two, one], {"one": 0.25, "two": 0.75})
    assert result.adapter.dense["head"].tolist() == [4.0, -1.0]
    assert result.error == 0.0


@RULES
def test_a_sum_of_zero_has_no_error_and_can_still_be_trained(rule: Aggregator) -> None:
    shapes = {"square": (6, 6), "few_outputs": (2, 9)}
    updates = [
        Update(f"site-{k}", Adapter({p: Lora(numbers(k, 3, i), torch.zeros(o, 3), 2.0) for p, (o, i) in shapes.items()}), 1)
        for k in range(3)
    ]
    result = rule(updates[0].adapter, updates, weights(updates, "uniform"))
    assert result.error == 0.0
    assert result.shift == {}
    for factors in result.adapter.lora.values():
        assert not factors.b.any()
        # ∂/∂B of the product is scale · G Aᵀ: a zero row of A would be dead for ever
        assert factors.a.norm(dim=1).min() > 0.1


def test_mean_averages_the_factors_and_errs_by_what_it_reports() -> None:
    # By hand: A = [1 0], [0 1]; B = 2, 4 at scale 1, each with weight 1/2. Exact sum: [1, 2]. Mean: B A = 3 · [½ ½].
    def site(name: str, a: list[float], b: float) -> Update:
        return Update(name, Adapter({"m": Lora(torch.tensor([a]), torch.tensor([[b]]), 1.0)}), 1)

    updates = [site("one", [1.0, 0.0], 2.0), site("two", [0.0, 1.0], 4.0)]
    result = AGGREGATORS["mean"](updates[0].adapter, updates, {"one": 0.5, "two": 0.5})
    assert result.adapter.lora["m"].a.tolist() == [[0.5, 0.5]]
    assert result.adapter.lora["m"].b.tolist() == [[3.0]]
    # off by [½, −½], of [1, 2]
    assert result.error == pytest.approx(math.sqrt(0.5 / 5), rel=1e-12)


def test_svd_of_full_rank_is_the_dense_sum_where_mean_fails_by_its_reported_error() -> None:
    updates = make_updates(3, ranks=(2,))  # Σ r_k = 6
    shares = weights(updates, "positions")
    exact = AGGREGATORS["svd"](make_adapter(0, rank=6), updates, shares)
    for path, factors in exact.adapter.lora.items():
        expected = dense_sum(updates, shares, path)
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-5 * np.linalg.norm(expected))
    assert exact.error < 1e-6
    mean = AGGREGATORS["mean"](make_adapter(0, rank=2), updates, shares)
    lost = twin_error(mean, updates, shares)
    assert lost > 0.3
    assert mean.error == pytest.approx(lost, rel=1e-6)


def test_svd_of_full_rank_is_exact_with_mixed_ranks_and_scales() -> None:
    updates = make_updates(3, MIXED_RANKS, MIXED_SCALES)  # Σ r_k = 7
    shares = weights(updates, "sqrt_positions")
    result = AGGREGATORS["svd"](make_adapter(0, rank=7, scale=8 / 7), updates, shares)
    for path, factors in result.adapter.lora.items():
        expected = dense_sum(updates, shares, path)
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-5 * np.linalg.norm(expected))
        assert factors.scale == 8 / 7
    assert result.error < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_truncated_svd_is_the_best_of_its_rank(rank: int) -> None:
    """Eckart and Young: what is lost is the tail of the dense sum's singular values, and nothing loses less."""
    updates = make_updates(3, MIXED_RANKS, MIXED_SCALES)
    shares = weights(updates, "positions")
    result = AGGREGATORS["svd"](make_adapter(0, rank=rank, scale=8 / math.sqrt(rank)), updates, shares)
    spectra = {path: np.linalg.svd(dense_sum(updates, shares, path), compute_uv=False) for path in SHAPES}
    tail = math.sqrt(sum((s[rank:] ** 2).sum() for s in spectra.values()))
    total = math.sqrt(sum((s**2).sum() for s in spectra.values()))
    assert result.error == pytest.approx(tail / total, rel=1e-6)
    assert result.error == pytest.approx(twin_error(result, updates, shares), rel=1e-6)
    for path, factors in result.adapter.lora.items():
        got = np.linalg.svd(dense_of(factors), compute_uv=False)[:rank]
        np.testing.assert_allclose(got, spectra[path][:rank], rtol=1e-5)


@pytest.mark.parametrize("ranks", [(3,), (1,), (2, 1)])
def test_svd_leaves_orthogonal_rows_of_a_of_one_norm_and_no_dead_direction(ranks: tuple[int, ...]) -> None:
    """Also where the sum has a lower rank than asked for: a site whose B is 0 adds directions with singular value 0."""
    updates = make_updates(2, ranks)
    silent = make_adapter(7, rank=4)
    silent = silent.with_tensors({n: t * 0 if n.endswith(".b") else t for n, t in silent.tensors().items()})
    updates.append(Update("silent", silent, 50))
    shares = weights(updates, "uniform")
    result = AGGREGATORS["svd"](make_adapter(0, rank=5), updates, shares)
    assert result.error < 1e-6 or sum(u.adapter.lora["layer.0.q"].a.shape[0] for u in updates[:2]) > 5
    for factors in result.adapter.lora.values():
        gram = (factors.a.double() @ factors.a.double().T).numpy()
        np.testing.assert_allclose(gram, np.eye(5) * ROW_NORM**2, atol=1e-6)


def test_svd_with_fewer_directions_than_the_rank_keeps_rows_of_the_old_a() -> None:
    updates = make_updates(1, ranks=(1,))
    reference = make_adapter(0, rank=4)
    result = AGGREGATORS["svd"](reference, updates, {"site-0": 1.0})
    for path, factors in result.adapter.lora.items():
        assert torch.equal(factors.a[1:], reference.lora[path].a[1:])
        assert not factors.b[:, 1:].any()
        np.testing.assert_allclose(dense_of(factors), dense_of(updates[0].adapter.lora[path]), atol=1e-5)


def test_row_norm_is_what_lora_starts_from() -> None:
    fresh = torch.empty(64, 4096)
    torch.nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))  # as peft does
    assert float(fresh.norm(dim=1).mean()) == pytest.approx(ROW_NORM, rel=0.01)


def test_weightings_by_hand() -> None:
    updates = [Update(site, Adapter({}), positions) for site, positions in (("c", 900), ("a", 100), ("b", 400))]
    expected = {
        "positions": {"a": 1 / 14, "b": 4 / 14, "c": 9 / 14},
        "sqrt_positions": {"a": 1 / 6, "b": 2 / 6, "c": 3 / 6},
        "uniform": {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
    }
    assert expected.keys() == WEIGHTINGS.keys()
    for weighting, by_site in expected.items():
        assert weights(updates, weighting) == pytest.approx(by_site, rel=1e-15)
        assert weights(updates[::-1], weighting) == weights(updates, weighting)
        assert list(weights(updates, weighting)) == ["a", "b", "c"]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=30))
def test_weights_sum_to_one(positions: list[int]) -> None:
    updates = [Update(f"site-{k}", Adapter({}), n) for k, n in enumerate(positions)]
    for weighting in WEIGHTINGS:
        assert sum(weights(updates, weighting).values()) == pytest.approx(1.0, abs=1e-12)


def test_sums_run_in_float64() -> None:
    parts = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    assert mean_tensors(parts, [1.0, 1.0, 1.0]).tolist() == [1.0]  # float32 would give 0
    assert mean_tensors(parts, [1.0, 1.0, 1.0]).dtype == torch.float32


def test_exact_factors_multiply_to_the_dense_sum() -> None:
    updates = make_updates(3, MIXED_RANKS, MIXED_SCALES)
    shares = weights(updates, "positions")
    for path, (d_out, d_in) in SHAPES.items():
        left, right = exact_factors(updates[::-1], shares, path)
        assert (left.shape, right.shape) == ((d_out, 7), (7, d_in))
        np.testing.assert_allclose((left @ right).numpy(), dense_sum(updates, shares, path), rtol=1e-12, atol=1e-12)


def test_the_measured_error_spans_all_modules_together() -> None:
    # Two modules of 1 × 1: exact 3 and 4, got 3 and 0. Lost 4 of 5; with a shift of 1 in the second, 3 of 5.
    sent = Adapter({p: Lora(torch.ones(1, 1), torch.tensor([[v]]), 1.0) for p, v in (("x", 3.0), ("y", 4.0))})
    exact = Stack()
    exact.add(1.0, sent)
    one, none = torch.ones(1, 1), torch.zeros(1, 1)
    got = Adapter({"x": Lora(torch.tensor([[1.0]]), torch.tensor([[1.5]]), 2.0), "y": Lora(one, none, 2.0)})
    assert measured_error(exact, got, {}) == pytest.approx(0.8, rel=1e-12)
    assert measured_error(exact, got, {"y": (one, one)}) == pytest.approx(0.6, rel=1e-12)


@st.composite
def _factor_pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    d_out, inner, d_in = (draw(st.integers(1, 6)) for _ in range(3))
    values = st.integers(-1000, 1000).map(lambda n: n / 100)  # zeros too, but nothing whose square underflows
    return draw(arrays(float, (d_out, inner), elements=values)), draw(arrays(float, (inner, d_in), elements=values))


@settings(max_examples=200, deadline=None)
@given(_factor_pairs())
def test_product_norm_is_the_norm_of_the_dense_product(pair: tuple[np.ndarray, np.ndarray]) -> None:
    left, right = pair
    expected = np.linalg.norm(left @ right)
    size = np.linalg.norm(left) * np.linalg.norm(right)
    assert product_norm(torch.from_numpy(left), torch.from_numpy(right)) == pytest.approx(expected, rel=1e-9, abs=1e-14 * size)


@settings(max_examples=200, deadline=None)
@given(_factor_pairs())
def test_a_compressed_product_is_the_product_with_as_many_columns_as_its_rank(pair: tuple[np.ndarray, np.ndarray]) -> None:
    left, right = pair
    size = np.linalg.norm(left) * np.linalg.norm(right)
    got_left, got_right = compress(torch.from_numpy(left), torch.from_numpy(right))
    np.testing.assert_allclose((got_left.double() @ got_right.double()).numpy(), left @ right, atol=1e-6 * size)
    assert got_left.shape[1] == got_right.shape[0] == np.linalg.matrix_rank(left @ right, tol=1e-12 * size)


def test_compression_does_not_take_a_badly_scaled_pair_for_rounding() -> None:
    """‖left‖ ‖right‖ would be 1e20 here, and its rounding larger than the product."""
    left = torch.tensor([[1e10, 0.0], [0.0, 1e-10]], dtype=torch.float64)
    right = torch.tensor([[1e-10, 0.0], [0.0, 1e10]], dtype=torch.float64)
    got_left, got_right = compress(left, right)
    np.testing.assert_allclose((got_left @ got_right).numpy(), np.eye(2), atol=1e-6)
    cancelled = compress(torch.cat([left, -left], 1), torch.cat([right, right]))
    assert [t.numel() for t in cancelled] == [0, 0]


@settings(max_examples=100, deadline=None)
@given(_factor_pairs())
def test_singular_vectors_are_orthonormal_and_multiply_to_the_product(pair: tuple[np.ndarray, np.ndarray]) -> None:
    left, right = pair
    u, s, vt = (t.numpy() for t in singular(torch.from_numpy(left), torch.from_numpy(right)))
    size = max(1.0, np.linalg.norm(left) * np.linalg.norm(right))
    np.testing.assert_allclose((u * s) @ vt, left @ right, atol=1e-12 * size)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(len(s)), atol=1e-12)
    np.testing.assert_allclose(s, np.linalg.svd(left @ right, compute_uv=False)[: len(s)], atol=1e-12 * size)


def test_stack_moves_all_into_the_base_and_starts_afresh() -> None:
    updates, reference = make_updates(3, MIXED_RANKS, MIXED_SCALES), make_adapter(0)
    result = AGGREGATORS["stack"](reference, updates, weights(updates, "positions"))
    for path, factors in result.adapter.lora.items():
        assert torch.equal(factors.a, reference.lora[path].a)
        assert not factors.b.any()
        assert result.shift[path][0].shape == (SHAPES[path][0], 7)  # Σ r_k


@pytest.mark.parametrize("name", ["stack", "residual"])
def test_a_shift_has_no_more_columns_than_its_rank(name: str) -> None:
    many = make_updates(8)  # Σ r_k = 24, more than d_out or d_in of any module
    result = AGGREGATORS[name](make_adapter(0), many, weights(many, "uniform"))
    assert {path: len(right) for path, (_, right) in result.shift.items()} == {p: min(SHAPES[p]) for p in SHAPES}
    common = obedient(AGGREGATORS["freeze_a"], make_adapter(0), many)  # one A: rank 3, and nothing that a mean loses
    result = AGGREGATORS[name](make_adapter(0), common, weights(common, "uniform"))
    if name == "stack":
        assert {len(right) for _, right in result.shift.values()} == {3}
    else:  # but for the rounding of the mean to float32
        exact = {path: np.linalg.norm(dense_sum(common, weights(common, "uniform"), path)) for path in SHAPES}
        assert all(product_norm(*result.shift[p]) < 1e-6 * exact[p] for p in result.shift)


def test_residual_is_mean_and_what_mean_loses() -> None:
    updates = make_updates(4)
    shares = weights(updates, "positions")
    mean, residual = (AGGREGATORS[name](make_adapter(0), updates, shares) for name in ("mean", "residual"))
    assert flat(residual.adapter) == flat(mean.adapter)
    total = math.sqrt(sum(np.linalg.norm(dense_sum(updates, shares, p)) ** 2 for p in SHAPES))
    lost = math.sqrt(sum(product_norm(*pair) ** 2 for pair in residual.shift.values()))
    assert lost / total == pytest.approx(mean.error, rel=1e-6)
    alone = AGGREGATORS["residual"](make_adapter(0), updates[:1], {"site-0": 1.0})
    assert alone.shift == {}


def test_blend_is_the_weighted_mean_of_every_tensor() -> None:
    older, newer = make_adapter(1), make_adapter(2)
    got = blend(older, newer, 0.25)
    for name, tensor in got.tensors().items():
        want = 0.25 * older.tensors()[name].double() + 0.75 * newer.tensors()[name].double()
        torch.testing.assert_close(tensor.double(), want, rtol=0, atol=1e-7)
    assert layout(got) == layout(newer)
    assert flat(blend(older, newer, 0.0)) == flat(newer)
    assert flat(blend(older, newer, 1.0)) == flat(older)
