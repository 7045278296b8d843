"""Server optimisers against slow twins in NumPy, over several rounds and through their stored state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from builders import flat, make_adapter, numbers

from fedkeel.method.aggregate.optimise import Rates, step
from fedkeel.tables import OPTIMISERS
from fedkeel.types import Adapter, Lora

Arrays = dict[str, np.ndarray]


def twin_average(x: Arrays, changes: list[Arrays], rates: Rates) -> Arrays:
    for change in changes:
        x = {n: (t + rates.lr * change[n]).astype(np.float32).astype(float) for n, t in x.items()}
    return x


def twin_momentum(x: Arrays, changes: list[Arrays], rates: Rates) -> Arrays:
    v = {n: np.zeros_like(t) for n, t in x.items()}
    for change in changes:
        for n in x:
            v[n] = rates.beta1 * v[n] + change[n]
            x[n] = x[n] + rates.lr * v[n]
    return x


def twin_adam(x: Arrays, changes: list[Arrays], rates: Rates) -> Arrays:
    m = {n: np.zeros_like(t) for n, t in x.items()}
    v = {n: np.full_like(t, rates.tau**2) for n, t in x.items()}
    for change in changes:
        for n in x:
            m[n] = rates.beta1 * m[n] + (1 - rates.beta1) * change[n]
            v[n] = rates.beta2 * v[n] + (1 - rates.beta2) * change[n] ** 2
            x[n] = x[n] + rates.lr * m[n] / (np.sqrt(v[n]) + rates.tau)
    return x


TWINS: dict[str, Callable[[Arrays, list[Arrays], Rates], Arrays]] = {
    "average": twin_average,
    "momentum": twin_momentum,
    "adam": twin_adam,
}
NAMES = pytest.mark.parametrize("name", OPTIMISERS)


def test_every_optimiser_has_a_twin() -> None:
    assert TWINS.keys() == OPTIMISERS.keys()


@NAMES
@pytest.mark.parametrize("rates", [Rates(), Rates(0.3), Rates(0.05, 0.5, 0.8, 1e-2)], ids=["default", "slow", "other"])
def test_five_rounds_are_the_twins(name: str, rates: Rates) -> None:
    """Each round the rule adds a change of its own to where the sites started, of sizes from 1e-4 to 1."""
    adapter, state, changes = make_adapter(1), {}, []
    start = {n: t.double().numpy() for n, t in adapter.tensors().items()}
    for round in range(5):
        size = 10.0 ** -(round % 5)
        raw = {n: size * numbers(100 * round + i, *t.shape) for i, (n, t) in enumerate(adapter.tensors().items())}
        aggregated = adapter.with_tensors({n: t + raw[n] for n, t in adapter.tensors().items()})
        before = adapter.tensors()
        changes.append({n: (t.double() - before[n].double()).numpy() for n, t in aggregated.tensors().items()})
        adapter, state = step(name, adapter, aggregated, state, rates)
    expected = TWINS[name](start, changes, rates)
    for n, tensor in adapter.tensors().items():
        np.testing.assert_allclose(tensor.double().numpy(), expected[n], rtol=2e-6, atol=2e-6)
    assert {t.dtype for t in adapter.tensors().values()} == {torch.float32}


def test_average_with_rate_one_is_the_aggregated_adapter_to_the_bit() -> None:
    reference, aggregated = make_adapter(1), make_adapter(2)
    aggregated = aggregated.with_tensors({n: t * -0.0 if n == "head.weight" else t for n, t in aggregated.tensors().items()})
    got, state = step("average", reference, aggregated, {}, Rates())
    assert flat(got) == flat(aggregated)
    assert state == {}


def test_average_with_half_the_rate_is_half_the_way() -> None:
    reference, aggregated = make_adapter(1), make_adapter(2)
    got, state = step("average", reference, aggregated, {}, Rates(0.5))
    for n, tensor in got.tensors().items():
        torch.testing.assert_close(tensor, (reference.tensors()[n] + aggregated.tensors()[n]) / 2, rtol=1e-6, atol=1e-6)
    assert state == {}


def one(value: float) -> Adapter:
    return Adapter({"m": Lora(torch.full((1, 1), value), torch.full((1, 1), value), 2.0)}, {"head": torch.tensor([value])})


def test_two_steps_of_each_by_hand() -> None:
    """From 0, twice by Δ = 1. Momentum: 1, then 1 + 1.9. Adam at η = 1: m = 0.1, 0.19; v = 0.0100009…, 0.01990…"""
    x, state = step("momentum", one(0.0), one(1.0), {}, Rates())
    x, state = step("momentum", x, one(float(x.dense["head"]) + 1.0), state, Rates())
    assert x.dense["head"].item() == pytest.approx(2.9, rel=1e-6)
    assert state["m/head"].item() == pytest.approx(1.9, rel=1e-6)
    x, state = step("adam", one(0.0), one(1.0), {}, Rates())
    first = 0.1 / (np.sqrt(0.99 * 1e-6 + 0.01) + 1e-3)  # 0.99: with a bias correction it would be 1
    assert x.lora["m"].a.item() == pytest.approx(first, rel=1e-6)
    x, state = step("adam", x, one(float(x.dense["head"]) + 1.0), state, Rates())
    second = 0.19 / (np.sqrt(0.99 * (0.99 * 1e-6 + 0.01) + 0.01) + 1e-3)
    assert x.lora["m"].b.item() == pytest.approx(first + second, rel=1e-6)


@NAMES
def test_the_state_is_flat_and_float32_and_what_went_in_stays(name: str) -> None:
    reference, aggregated = make_adapter(1), make_adapter(2)
    before = flat(reference), flat(aggregated)
    _, state = step(name, reference, aggregated, {}, Rates(0.5))
    kinds = {"average": [], "momentum": ["m"], "adam": ["m", "v"]}[name]
    assert set(state) == {f"{kind}/{n}" for kind in kinds for n in reference.tensors()}
    assert {t.dtype for t in state.values()} <= {torch.float32}
    held = {n: t.clone() for n, t in state.items()}
    step(name, reference, aggregated, state, Rates(0.5))
    assert all(torch.equal(t, held[n]) for n, t in state.items())
    assert (flat(reference), flat(aggregated)) == before


@NAMES
def test_a_factor_that_no_one_trains_stays(name: str) -> None:
    """As A under `freeze_a`: a change of 0 is a step of 0, in every round."""
    adapter, state = make_adapter(1), {}
    start = adapter.tensors()
    for round in range(3):
        moved = {n: t + numbers(round, *t.shape) if n.endswith(".b") else t for n, t in adapter.tensors().items()}
        adapter, state = step(name, adapter, adapter.with_tensors(moved), state, Rates(0.5))
    for n, tensor in adapter.tensors().items():
        assert torch.equal(tensor, start[n]) != n.endswith(".b")


def test_a_state_of_another_shape_is_refused_by_its_tensor() -> None:
    _, state = step("adam", make_adapter(1), make_adapter(2), {}, Rates())
    with pytest.raises(ValueError, match=r"the server optimiser holds m/layer\.0\.q\.a of shape \(3, 14\), not \(4, 14\)"):
        step("adam", make_adapter(1, rank=4), make_adapter(2, rank=4), state, Rates())
