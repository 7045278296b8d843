"""Laws of aggregation rules, over the table of all rules, against the dense sum formed in full."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from builders import SHAPES, dense_of, dense_sum, flat, make_adapter, make_updates, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedkeel.aggregate import AGGREGATORS, WEIGHTINGS, blend, weights
from fedkeel.aggregate.common import exact_factors, mean_tensors, measured_error, product_norm
from fedkeel.aggregate.svd import ROW_NORM, svd
from fedkeel.messages import layout
from fedkeel.types import Adapter, Lora, Update

RULES = pytest.mark.parametrize("rule", AGGREGATORS.values(), ids=AGGREGATORS.keys())
MIXED_RANKS = (1, 4, 2)
# α/r and, for rsLoRA, α/√r, of the ranks above with α = 8
MIXED_SCALES = (8 / 1, 8 / 4, 8 / math.sqrt(2))


def twin_error(adapter: Adapter, updates: list[Update], shares: dict[str, float]) -> float:
    """‖W_rule − W_exact‖ / ‖W_exact‖ over all modules, from dense float64 matrices."""
    exact = np.concatenate([dense_sum(updates, shares, path).ravel() for path in adapter.lora])
    got = np.concatenate([dense_of(factors).ravel() for factors in adapter.lora.values()])
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@RULES
def test_the_order_of_replies_changes_no_bit(rule) -> None:
    updates = make_updates(4)
    shares = weights(updates, "positions")
    first = rule(make_adapter(0), updates, shares)
    for order in itertools.permutations(updates):
        again = rule(make_adapter(0), order, weights(order, "positions"))
        assert flat(again.adapter) == flat(first.adapter)
        assert again.error == first.error


@RULES
def test_one_site_is_the_identity_on_the_product(rule) -> None:
    update = make_updates(1, scales=(1.5,))[0]
    result = rule(make_adapter(0, scale=1.5), [update], {update.site: 1.0})
    for path, factors in result.adapter.lora.items():
        expected = dense_of(update.adapter.lora[path])
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-6 * np.abs(expected).max())
    assert torch.equal(result.adapter.dense["head.weight"], update.adapter.dense["head.weight"])
    assert result.error < 1e-6


@RULES
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_reported_error_is_the_error_against_the_dense_sum(rule, weighting: str) -> None:
    updates = make_updates(5)
    shares = weights(updates, weighting)
    result = rule(make_adapter(0), updates, shares)
    assert result.error == pytest.approx(twin_error(result.adapter, updates, shares), rel=1e-6)
    assert result.error > 0.01


@RULES
def test_the_result_is_laid_out_as_the_reference_and_the_inputs_stay_as_they_were(rule) -> None:
    updates, reference = make_updates(3), make_adapter(0)
    before = [flat(u.adapter) for u in updates], flat(reference)
    result = rule(reference, updates, weights(updates, "uniform"))
    assert layout(result.adapter) == layout(reference)
    assert {t.dtype for t in result.adapter.tensors().values()} == {torch.float32}
    assert ([flat(u.adapter) for u in updates], flat(reference)) == before


@RULES
def test_dense_parameters_are_averaged_with_the_weights(rule) -> None:
    one = Update("one", Adapter({}, {"head": torch.tensor([1.0, 8.0])}), 1)
    two = Update("two", Adapter({}, {"head": torch.tensor([5.0, -4.0])}), 3)
    result = rule(Adapter({}, {"head": torch.zeros(2)}), [two, one], {"one": 0.25, "two": 0.75})
    assert result.adapter.dense["head"].tolist() == [4.0, -1.0]
    assert result.error == 0.0


@RULES
def test_a_sum_of_zero_has_no_error_and_can_still_be_trained(rule) -> None:
    shapes = {"square": (6, 6), "few_outputs": (2, 9)}
    updates = [
        Update(f"site-{k}", Adapter({p: Lora(numbers(k, 3, i), torch.zeros(o, 3), 2.0) for p, (o, i) in shapes.items()}), 1)
        for k in range(2)
    ]
    result = rule(updates[0].adapter, updates, weights(updates, "uniform"))
    assert result.error == 0.0
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


@pytest.mark.parametrize(("rank", "scale"), [(2, 2.0), (3, 4.0)])
def test_mean_refuses_mixed_ranks_and_scales_by_name(rank: int, scale: float) -> None:
    updates = make_updates(2)
    odd = Update("odd-site", make_adapter(9, rank, scale), 5)
    with pytest.raises(ValueError, match=r"odd-site.*layer\.0\.q"):
        AGGREGATORS["mean"](make_adapter(0), [odd, *updates], weights([odd, *updates], "uniform"))


def test_svd_of_full_rank_is_the_dense_sum_where_mean_fails_by_its_reported_error() -> None:
    updates = make_updates(3, ranks=(2,))  # Σ r_k = 6
    shares = weights(updates, "positions")
    exact = svd(make_adapter(0, rank=6), updates, shares)
    for path, factors in exact.adapter.lora.items():
        expected = dense_sum(updates, shares, path)
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-5 * np.linalg.norm(expected))
    assert exact.error < 1e-6
    mean = AGGREGATORS["mean"](make_adapter(0, rank=2), updates, shares)
    lost = twin_error(mean.adapter, updates, shares)
    assert lost > 0.3
    assert mean.error == pytest.approx(lost, rel=1e-6)


def test_svd_of_full_rank_is_exact_with_mixed_ranks_and_scales() -> None:
    updates = make_updates(3, MIXED_RANKS, MIXED_SCALES)  # Σ r_k = 7
    shares = weights(updates, "sqrt_positions")
    result = svd(make_adapter(0, rank=7, scale=8 / 7), updates, shares)
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
    result = svd(make_adapter(0, rank=rank, scale=8 / math.sqrt(rank)), updates, shares)
    spectra = {path: np.linalg.svd(dense_sum(updates, shares, path), compute_uv=False) for path in SHAPES}
    tail = math.sqrt(sum((s[rank:] ** 2).sum() for s in spectra.values()))
    total = math.sqrt(sum((s**2).sum() for s in spectra.values()))
    assert result.error == pytest.approx(tail / total, rel=1e-6)
    assert result.error == pytest.approx(twin_error(result.adapter, updates, shares), rel=1e-6)
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
    result = svd(make_adapter(0, rank=5), updates, shares)
    assert result.error < 1e-6 or sum(u.adapter.lora["layer.0.q"].a.shape[0] for u in updates[:2]) > 5
    for factors in result.adapter.lora.values():
        gram = (factors.a.double() @ factors.a.double().T).numpy()
        np.testing.assert_allclose(gram, np.eye(5) * ROW_NORM**2, atol=1e-6)


def test_svd_with_fewer_directions_than_the_rank_keeps_rows_of_the_old_a() -> None:
    updates = make_updates(1, ranks=(1,))
    reference = make_adapter(0, rank=4)
    result = svd(reference, updates, {"site-0": 1.0})
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
    # Two modules of 1 × 1: exact 3 and 4, got 3 and 0. Lost 4 of 5.
    updates = [
        Update("s", Adapter({p: Lora(torch.ones(1, 1), torch.tensor([[v]]), 1.0) for p, v in (("x", 3.0), ("y", 4.0))}), 1)
    ]
    got = {"x": Lora(torch.tensor([[1.0]]), torch.tensor([[1.5]]), 2.0), "y": Lora(torch.ones(1, 1), torch.zeros(1, 1), 2.0)}
    assert measured_error(got, updates, {"s": 1.0}) == pytest.approx(0.8, rel=1e-12)


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


def test_blend_is_the_weighted_mean_of_every_tensor() -> None:
    older, newer = make_adapter(1), make_adapter(2)
    got = blend(older, newer, 0.25)
    for name, tensor in got.tensors().items():
        want = 0.25 * older.tensors()[name].double() + 0.75 * newer.tensors()[name].double()
        torch.testing.assert_close(tensor.double(), want, rtol=0, atol=1e-7)
    assert layout(got) == layout(newer)
    assert flat(blend(older, newer, 0.0)) == flat(newer)
    assert flat(blend(older, newer, 1.0)) == flat(older)
