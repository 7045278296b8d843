"""The gauge before a round of `alternate`: the product stays, one factor becomes orthogonal, and nothing dies of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from builders import SHAPES, dense_of, make_adapter, numbers
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel.exchange.messages import layout
from fedkeel.method.aggregate.gauge import gauge
from fedkeel.method.aggregate.svd import ROW_NORM
from fedkeel.types import Adapter, Lora

BOTH = pytest.mark.parametrize("trained", ["a", "b"])


def resting(factors: Lora, trained: str) -> np.ndarray:
    """The factor that is not trained as (n, r), float64: its columns are to be orthogonal."""
    return (factors.a.T if trained == "b" else factors.b).double().numpy()


def moving(factors: Lora, trained: str) -> np.ndarray:
    """The factor that is trained as (r, m), float64."""
    return (factors.b.T if trained == "b" else factors.a).double().numpy()


def assert_same_product(one: Adapter, two: Adapter) -> None:
    for path, factors in two.lora.items():
        expected = dense_of(factors)
        np.testing.assert_allclose(dense_of(one.lora[path]), expected, atol=1e-6 * max(np.abs(expected).max(), 1e-30))


def single(a: torch.Tensor, b: torch.Tensor) -> Adapter:
    return Adapter({"m": Lora(a, b, 2.0)})


@BOTH
def test_the_product_stays_and_the_factor_that_rests_is_orthogonal_with_one_norm(trained: str) -> None:
    adapter = make_adapter(1, rank=4)
    fixed = gauge(adapter, trained)
    assert layout(fixed) == layout(adapter)
    assert_same_product(fixed, adapter)
    for factors in fixed.lora.values():
        held = resting(factors, trained)
        np.testing.assert_allclose(held.T @ held, ROW_NORM**2 * np.eye(4), atol=1e-7)
        assert factors.a.is_contiguous()
        assert factors.b.is_contiguous()
        assert (factors.a.dtype, factors.b.dtype) == (torch.float32, torch.float32)
    assert torch.equal(fixed.dense["head.weight"], adapter.dense["head.weight"])


@BOTH
def test_the_logits_of_a_map_stay(trained: str) -> None:
    adapter = make_adapter(1, rank=4)
    fixed = gauge(adapter, trained)
    for path, (_, d_in) in SHAPES.items():
        x = numbers(5, 7, d_in)
        before, after = (x @ f.a.T @ f.b.T * f.scale for f in (adapter.lora[path], fixed.lora[path]))
        torch.testing.assert_close(after, before, rtol=0, atol=2e-6 * float(before.abs().max()))


@BOTH
def test_it_is_the_qr_with_a_positive_diagonal(trained: str) -> None:
    adapter = make_adapter(1, rank=4)
    fixed = gauge(adapter, trained)
    for path, factors in adapter.lora.items():
        q, r = np.linalg.qr(resting(factors, trained))
        sign = np.sign(np.diag(r))
        np.testing.assert_allclose(resting(fixed.lora[path], trained), ROW_NORM * q * sign, atol=1e-6)
        expected = (sign[:, None] * r) @ moving(factors, trained) / ROW_NORM
        np.testing.assert_allclose(moving(fixed.lora[path], trained), expected, atol=1e-5)


@BOTH
def test_twice_is_once_but_for_rounding(trained: str) -> None:
    once = gauge(make_adapter(1, rank=4), trained)
    for name, tensor in gauge(once, trained).tensors().items():
        torch.testing.assert_close(tensor, once.tensors()[name], rtol=1e-5, atol=1e-5)


@BOTH
def test_a_small_change_changes_it_little(trained: str) -> None:
    """Without the positive diagonal a column could turn round from one round to the next."""
    adapter = make_adapter(1, rank=4)
    fixed = gauge(adapter, trained).tensors()
    for seed in range(20):
        nearby = {n: t + 1e-4 * numbers(seed + i, *t.shape) for i, (n, t) in enumerate(adapter.tensors().items())}
        for name, tensor in gauge(adapter.with_tensors(nearby), trained).tensors().items():
            assert float((tensor - fixed[name]).abs().max()) < 1e-2


def test_a_learning_rate_means_the_same_in_rounds_of_a_and_of_b() -> None:
    """A step of gradient descent changes the product by −η scale² c² times the gradient, in the directions of the factor
    that rests: with a gradient that lies in both spaces, by the same."""
    adapter = make_adapter(3, rank=4, shapes={"m": (12, 12)})
    f = adapter.lora["m"]
    gradient = f.b.double() @ f.a.double()
    steps = {}
    for trained in "ab":
        got = gauge(adapter, trained).lora["m"]
        a, b = got.a.double(), got.b.double()
        # ∂/∂B = scale G Aᵀ, ∂/∂A = scale Bᵀ G
        steps[trained] = got.scale**2 * (gradient @ a.T @ a if trained == "b" else b @ b.T @ gradient)
    torch.testing.assert_close(steps["a"], steps["b"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steps["b"], f.scale**2 * ROW_NORM**2 * gradient, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ where the rank is low


@BOTH
def test_before_the_first_round_a_product_of_zero_stays_zero_and_both_factors_can_be_trained(trained: str) -> None:
    start = single(numbers(1, 4, 9), torch.zeros(6, 4))
    fixed = gauge(start, trained).lora["m"]
    held = resting(fixed, trained)
    np.testing.assert_allclose(held.T @ held, ROW_NORM**2 * np.eye(4), atol=1e-7)
    assert not moving(fixed, trained).any()
    if trained == "a":  # from nothing at all, but always from the same
        assert torch.equal(fixed.b, gauge(start, "a").lora["m"].b)
        elsewhere = gauge(Adapter({"n": start.lora["m"]}), "a").lora["n"]
        assert not torch.allclose(fixed.b, elsewhere.b)


def ranked(n: int, r: int, kept: list[int], seed: int) -> torch.Tensor:
    """(n, r) whose columns outside `kept` are whole multiples of one of those before them, or 0."""
    columns = numbers(seed, n, r)
    for j in range(r):
        if j not in kept:
            before = [k for k in kept if k < j]
            columns[:, j] = 2.0 * columns[:, before[-1]] if before else 0.0
    return columns


@pytest.mark.parametrize("kept", [[0, 1, 2], [1, 3], [0], [3], []])
@BOTH
def test_a_dependent_column_gives_way_to_a_direction_at_right_angles_with_partner_zero(trained: str, kept: list[int]) -> None:
    columns, partner = ranked(8, 4, kept, 1), numbers(2, 4, 5)
    adapter = single(columns.T, partner.T) if trained == "b" else single(partner, columns)
    fixed = gauge(adapter, trained)
    assert_same_product(fixed, adapter)
    held, moved = resting(fixed.lora["m"], trained), moving(fixed.lora["m"], trained)
    np.testing.assert_allclose(held.T @ held, ROW_NORM**2 * np.eye(4), atol=1e-7)
    fresh = [j for j in range(4) if j not in kept]
    assert not moved[fresh].any()
    np.testing.assert_allclose(held[:, fresh].T @ columns.double().numpy(), 0, atol=1e-6)
    assert all(np.abs(moved[j]).max() > 0 for j in kept)
    again = gauge(fixed, trained).tensors()
    for name, tensor in fixed.tensors().items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)


@BOTH
def test_beyond_the_width_of_a_map_pairs_rest_and_come_back(trained: str) -> None:
    """Rank 5 on a map with 3 outputs and 4 inputs: three (four) directions are all there are."""
    adapter = single(numbers(1, 5, 4), numbers(2, 3, 5))
    fixed = gauge(adapter, trained)
    assert_same_product(fixed, adapter)
    held, moved = resting(fixed.lora["m"], trained), moving(fixed.lora["m"], trained)
    width = len(held)
    np.testing.assert_allclose(held[:, :width].T @ held[:, :width], ROW_NORM**2 * np.eye(width), atol=1e-7)
    assert not held[:, width:].any()
    assert not moved[width:].any()
    other = gauge(fixed, "ab".replace(trained, ""))
    assert_same_product(other, adapter)
    assert np.linalg.matrix_rank(resting(other.lora["m"], "ab".replace(trained, ""))) == 7 - width


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from("ab"), st.booleans())
def test_of_any_shape_and_any_rank_the_product_stays(
    d_out: int, d_in: int, rank: int, seed: int, trained: str, whole: bool
) -> None:
    """Of whole numbers too, where columns often depend on one another."""
    a, b = numbers(seed, rank, d_in), numbers(seed + 1, d_out, rank)
    adapter = single(a.round(), b.round()) if whole else single(a, b)
    fixed = gauge(adapter, trained)
    size = np.linalg.norm(a.numpy()) * np.linalg.norm(b.numpy())
    np.testing.assert_allclose(dense_of(fixed.lora["m"]), dense_of(adapter.lora["m"]), atol=1e-6 * size)
    held = resting(fixed.lora["m"], trained)
    width = min(held.shape)
    found = np.linalg.svd(held, compute_uv=False)
    np.testing.assert_allclose(found, ROW_NORM * np.ones(width), atol=1e-6)


def test_columns_of_very_different_size_are_all_kept() -> None:
    sizes = torch.tensor([1e-12, 1e6, 1.0, 1e-20])
    adapter = single(numbers(1, 4, 9), numbers(2, 8, 4) * sizes)
    fixed = gauge(adapter, "a")
    assert_same_product(fixed, adapter)
    assert (np.abs(fixed.lora["m"].a.numpy()).max(axis=1) > 0).all()


def test_another_name_of_a_factor_is_refused() -> None:
    with pytest.raises(ValueError, match="'ab' is trained, where 'a' or 'b' belongs"):
        gauge(make_adapter(1), "ab")
