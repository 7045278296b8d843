"""Updates that come one at a time: how many are held, what is refused, and the error that is then estimated."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from builders import AGGREGATORS, dense_of, dense_sum, make_adapter, make_updates

from fedkeel.method.aggregate.drift import drift
from fedkeel.method.aggregate.exact import PROBES, STACKED, Sketch, Stack, measure
from fedkeel.method.aggregate.rule import Aggregator
from fedkeel.method.aggregate.weighting import weights
from fedkeel.rng import counter_normal, derive
from fedkeel.types import Adapter, Update

RULES = pytest.mark.parametrize("rule", AGGREGATORS.values(), ids=AGGREGATORS.keys())
ONE_AT_A_TIME = ("mean", "freeze_a", "alternate", "share_a", "share_b")
FEW, MANY = STACKED // 3, STACKED // 3 + 1  # sites of rank 3: 510 and 513 rows of A


class Decoded:
    """Sites whose updates are decoded anew each time; counts how many are in memory at once.

    What is counted is the memory itself: the arrays below the tensors, which live as long as any view of them.
    """

    def __init__(self, count: int) -> None:
        self.count, self.most, self.passes = count, 0, 0
        self.alive = 0
        self.tensors = len(make_adapter(0).tensors())

    def freed(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[Update]:
        self.passes += 1
        for k in range(self.count):
            adapter = make_adapter(k + 1)
            tensors = {}
            for name, tensor in adapter.tensors().items():
                array = tensor.numpy().copy()
                self.alive += 1
                weakref.finalize(array, self.freed)
                tensors[name] = torch.from_numpy(array)
                del array
            update = Update(f"site-{k:03}", adapter.with_tensors(tensors), 100 + k)
            del tensors
            self.most = max(self.most, math.ceil(self.alive / self.tensors))
            yield update
            del update


def uniform(count: int) -> dict[str, float]:
    return {f"site-{k:03}": 1 / count for k in range(count)}


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_one_update_is_held_at_a_time_in_one_pass(name: str) -> None:
    stream = Decoded(MANY)
    AGGREGATORS[name](make_adapter(0), stream, uniform(MANY))
    assert (stream.most, stream.passes) == (1, 1)


def test_drift_and_weights_hold_one_update_at_a_time() -> None:
    stream = Decoded(20)
    drift(make_adapter(0), stream, uniform(20))
    assert (stream.most, stream.passes) == (1, 1)
    stream = Decoded(20)
    weights(stream, "positions")
    assert stream.most <= 2


def test_the_count_sees_updates_that_are_kept() -> None:
    """So that the two tests above can fail: below the limit factors are stacked, and `svd` holds them in any case."""
    few = Decoded(20)
    AGGREGATORS["mean"](make_adapter(0), few, uniform(20))
    stacking = Decoded(20)
    AGGREGATORS["svd"](make_adapter(0), stacking, uniform(20))
    assert (few.most, stacking.most) == (18, 18)  # 19 sites without their dense parameter, 6 tensors of 7, and the last
    assert stacking.passes == 1


def test_the_limit_between_measuring_and_estimating() -> None:
    assert isinstance(measure(make_adapter(0), uniform(FEW)), Stack)
    assert isinstance(measure(make_adapter(0), uniform(MANY)), Sketch)
    assert isinstance(measure(Adapter({}), uniform(9999)), Stack)


# ------------------------------------------------------------------------------------------------------------ the estimate


def dense_error(adapter: Adapter, updates: list[Update], shares: dict[str, float]) -> float:
    exact = np.concatenate([dense_sum(updates, shares, path).ravel() for path in adapter.lora])
    got = np.concatenate([dense_of(factors).ravel() for factors in adapter.lora.values()])
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("name", ONE_AT_A_TIME)
def test_the_estimated_error_is_near_the_dense_one(name: str) -> None:
    """Within four of its standard deviations, at most 0.125 each; and it is the probes' own, by a slow twin."""
    updates = list(Decoded(MANY))
    shares = weights(updates, "positions")
    result = AGGREGATORS[name](make_adapter(0), updates, shares)
    true = dense_error(result.adapter, updates, shares)
    assert result.error == pytest.approx(true, rel=4 * 0.125)
    assert result.error != pytest.approx(true, rel=1e-6), "an estimate was to be tested"
    lost = total = 0.0
    for path, factors in result.adapter.lora.items():
        exact, d_in = dense_sum(updates, shares, path), factors.a.shape[1]
        counters = torch.arange(d_in * PROBES).view(d_in, PROBES)
        probes = counter_normal(derive(0, "aggregate", "probes", d_in), counters).double().numpy()
        lost += np.linalg.norm((dense_of(factors) - exact) @ probes) ** 2
        total += np.linalg.norm(exact @ probes) ** 2
    assert result.error == pytest.approx(math.sqrt(lost / total), rel=1e-9)


def test_both_sides_of_the_limit_agree() -> None:
    """The same sum, stacked and sketched: squares of the sum and of what a result is off by, within four deviations."""
    updates = list(Decoded(40))
    shares = weights(updates, "uniform")
    stack, sketch = Stack(), Sketch()
    for update in updates:
        stack.add(shares[update.site], update.adapter)
        sketch.add(shares[update.site], update.adapter)
    for path, factors in updates[0].adapter.lora.items():
        got = factors.scale * factors.b.double(), factors.a.double()
        for true, estimate in zip(stack.squares(path, got), sketch.squares(path, got), strict=True):
            assert estimate == pytest.approx(true, rel=4 * math.sqrt(2 / PROBES))


def test_the_spread_of_the_estimate_is_as_stated() -> None:
    """‖M Ω‖² / 64 over 400 draws: mean ‖M‖² and standard deviation √(2/64) ‖MᵀM‖, for rank one and for rank five."""
    rng = np.random.default_rng(3)
    for rank in (1, 5):
        matrix = rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 6))
        squares = []
        for draw in range(400):
            counters = torch.arange(6 * PROBES).view(6, PROBES)
            probes = counter_normal(derive(draw, "test"), counters).double().numpy()
            squares.append(np.linalg.norm(matrix @ probes) ** 2 / PROBES)
        square = np.linalg.norm(matrix) ** 2
        spread = math.sqrt(2 / PROBES) * np.linalg.norm(matrix.T @ matrix)
        assert np.mean(squares) == pytest.approx(square, abs=4 * spread / 20)
        assert np.std(squares) == pytest.approx(spread, rel=0.15)
        assert spread / square == pytest.approx(0.177, abs=1e-3) if rank == 1 else spread / square < 0.15


# ---------------------------------------------------------------------------------------------------------- what is refused


def changed(update: Update, **tensors: torch.Tensor) -> Update:
    by_name = {name.replace("__", "."): t for name, t in tensors.items()}
    return dataclasses.replace(update, adapter=update.adapter.with_tensors(update.adapter.tensors() | by_name))


def broken(kind: str) -> Update:
    """An update of site `bad` that is wrong in one way."""
    update = dataclasses.replace(make_updates(1)[0], site="bad")
    lora, dense = dict(update.adapter.lora), dict(update.adapter.dense)
    old = lora["layer.0.q"]
    if kind == "nan":
        return changed(update, **{"layer.0.q.b": torch.full_like(old.b, float("nan"))})
    if kind == "infinite head":
        return changed(update, **{"head.weight": torch.full((5,), float("inf"))})
    if kind == "scale":
        lora["layer.0.q"] = dataclasses.replace(old, scale=float("inf"))
    if kind == "width":
        lora["layer.0.q"] = dataclasses.replace(old, a=torch.zeros(3, 15))
    if kind == "height":
        lora["layer.0.q"] = dataclasses.replace(old, b=torch.zeros(11, 3))
    if kind == "inner":
        lora["layer.0.q"] = dataclasses.replace(old, b=torch.zeros(10, 2))
    if kind == "head":
        dense["head.weight"] = torch.zeros(6)
    if kind == "lost":
        del lora["layer.0.q"]
    if kind == "more":
        lora["layer.9.q"] = old
    return dataclasses.replace(update, adapter=Adapter(lora, dense))


REFUSED = {
    "nan": r"layer\.0\.q\.b holds a value that is not finite",
    "infinite head": r"head\.weight holds a value that is not finite",
    "scale": r"(the scale of layer\.0\.q is inf|rank or scale of layer\.0\.q differs)",
    "width": r"layer\.0\.q has A \(3, 15\) and B \(10, 3\)",
    "height": r"layer\.0\.q has A \(3, 14\) and B \(11, 3\)",
    "inner": r"layer\.0\.q has A \(3, 14\) and B \(10, 2\)",
    "head": r"head\.weight has the shape \(6,\)",
    "lost": r"layer\.0\.q only there or only in the global adapter",
    "more": r"layer\.9\.q only there or only in the global adapter",
}


@RULES
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_added_is_refused_by_rule_and_site(rule: Aggregator, kind: str) -> None:
    updates = [*make_updates(3), broken(kind)]
    with pytest.raises(ValueError, match=rf"rule {rule.entry.name}: site bad: {REFUSED[kind]}"):
        rule(make_adapter(0), updates, weights(updates, "uniform"))


@pytest.mark.parametrize("kind", REFUSED)
def test_drift_refuses_what_rules_refuse(kind: str) -> None:
    with pytest.raises(ValueError, match=rf"drift: site bad: {REFUSED[kind]}"):
        drift(make_adapter(0), [broken(kind)], {"bad": 1.0})


@RULES
def test_a_stream_that_can_be_read_once_is_no_silent_zero(rule: Aggregator) -> None:
    updates = make_updates(4)
    stream = iter(updates)
    shares = weights(stream, "uniform")
    with pytest.raises(ValueError, match=rf"rule {rule.entry.name}: updates of sites \[\], weights of sites \['site-0'"):
        rule(make_adapter(0), stream, shares)


@RULES
def test_sites_out_of_order_twice_or_without_a_weight_are_refused(rule: Aggregator) -> None:
    class Stream:
        def __init__(self, *updates: Update) -> None:
            self.updates = updates

        def __iter__(self) -> Iterator[Update]:
            return iter(self.updates)

    one, two, three, four = make_updates(4)
    shares = weights([one, two, three], "uniform")
    with pytest.raises(ValueError, match="site site-1 after site site-2; each belongs once, in ascending order"):
        rule(make_adapter(0), Stream(one, three, two), shares)
    with pytest.raises(ValueError, match="site site-1 after site site-1; each belongs once"):
        rule(make_adapter(0), [one, two, two], shares)
    with pytest.raises(ValueError, match=r"updates of sites \['site-0', 'site-1'\], weights of sites"):
        rule(make_adapter(0), Stream(one, two), shares)
    with pytest.raises((ValueError, KeyError), match="site-3"):
        rule(make_adapter(0), Stream(one, two, three, four), shares)
