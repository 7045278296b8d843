"""How far a site trusts the global model, by numbers written out; and the drift that its layers are trusted by."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from builders import make_adapter, make_updates

from fedkeel.method.aggregate.common import block_of
from fedkeel.method.aggregate.drift import drift
from fedkeel.method.objective.trust import layer_trust, site_trust, task_trust, trusts
from fedkeel.types import Adapter, Lora, Update


def test_task_trust_is_others_evidence_against_mine() -> None:
    """v = (1/own) / (1/own + 1/others): own 30, others 10: (1/30) / (1/30 + 3/30) = 1/4."""
    assert task_trust(30, 10) == pytest.approx(0.25)
    assert task_trust(10, 30) == pytest.approx(0.75)
    assert task_trust(7, 7) == 0.5
    assert task_trust(5, 0) == 0.0
    for own, others in ((3, 8), (100, 1), (1, 999)):
        assert task_trust(own, others) == pytest.approx((1 / own) / (1 / own + 1 / others))


def test_site_trust_by_hand() -> None:
    """Mine (1, 0) against everyone's (1/2, 1/2): m = (3/4, 1/4); JS = ½ ln(4/3) + ½ (½ ln(2/3) + ½ ln 2) = 0.215762 nats;
    over ln 2 0.311278."""
    by_hand = (math.log(4 / 3) / 2 + (math.log(2 / 3) / 2 + math.log(2) / 2) / 2) / math.log(2)
    assert by_hand == pytest.approx(0.311278, abs=1e-6)
    assert site_trust({"a": 6}, {"a": 5, "b": 5}) == pytest.approx(by_hand)
    # (1/4, 3/4) against (3/4, 1/4): m = (½, ½), JS = ¾ ln 1.5 + ¼ ln 0.5 = 0.130812, over ln 2 0.188722: the floor
    assert 0.75 * math.log(1.5) + 0.25 * math.log(0.5) == pytest.approx(0.130812, abs=1e-6)
    assert site_trust({"a": 1, "b": 3}, {"a": 30, "b": 10}) == 0.25
    # (1, 0, 0) against (1/10, 4/10, 5/10): m = (.55, .2, .25)
    far = (math.log(1 / 0.55) + 0.1 * math.log(0.1 / 0.55) + 0.9 * math.log(2)) / 2 / math.log(2)
    assert site_trust({"a": 3}, {"a": 1, "b": 4, "c": 5}) == pytest.approx(far)


def test_site_trust_at_its_ends() -> None:
    assert site_trust({"a": 3, "b": 1}, {"a": 300, "b": 100}) == 0.25  # the same histogram: the floor
    assert site_trust({"a": 3}, {"b": 9}) == pytest.approx(1.0)  # nothing in common
    assert site_trust({"a": 3}, {}) == site_trust({"a": 3}, {"a": 0}) == 1.0  # nothing known
    assert site_trust({"a": 3}, {"b": 9}) <= 1.0


def test_trusts_by_hand() -> None:
    """Tasks a (30 positions, others 10), b (10, others 30), c (60, nobody else): v = ¼, ¾, 0.

    Gold: mean (30 · ¼ + 10 · ¾ + 0) / 100 = 0.15. Rest: v at least ¼: (30 · ¼ + 10 · ¾ + 60 · ¼) / 100 = 0.3.
    """
    own, total = {"c": 60, "a": 30, "b": 10}, {"a": 40, "b": 40, "c": 60}
    got = trusts(own, total, True, False)
    assert list(got) == ["a", "b", "c"]
    assert got["a"] == pytest.approx((0.25 / 0.15, 0.25 / 0.3))
    assert got["b"] == pytest.approx((0.75 / 0.15, 0.75 / 0.3))
    assert got["c"] == pytest.approx((0.0, 0.25 / 0.3))
    u = site_trust(own, total)
    both = trusts(own, total, True, True)
    assert both == {task: pytest.approx((u * g, u * r)) for task, (g, r) in got.items()}
    assert trusts(own, total, False, True) == {task: pytest.approx((u, u)) for task in own}
    assert trusts(own, total, False, False) == dict.fromkeys(own, (1.0, 1.0))


@pytest.mark.parametrize(
    ("own", "total"),
    [
        ({"a": 5}, {"a": 50}),
        ({"a": 5, "b": 500}, {"a": 50, "b": 501}),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 9, "b": 2, "c": 3, "d": 99, "e": 1000}),
    ],
)
def test_over_the_sites_own_positions_the_mean_is_one(own: dict[str, int], total: dict[str, int]) -> None:
    weights = trusts(own, total, True, False)
    for part in (0, 1):
        mean = sum(weights[task][part] * n for task, n in own.items()) / sum(own.values())
        assert mean == pytest.approx(1.0)


def test_before_anyone_has_reported_the_gold_part_is_off_and_the_rest_is_whole() -> None:
    assert trusts({"a": 5, "b": 9}, {}, True, True) == {"a": (0.0, 1.0), "b": (0.0, 1.0)}
    # alone in the federation: the same histogram, so u is at its floor
    assert trusts({"a": 5, "b": 9}, {"a": 5, "b": 9}, True, True) == {"a": (0.0, 0.25), "b": (0.0, 0.25)}


def test_a_single_task_in_all_says_nothing_about_skew() -> None:
    assert site_trust({"a": 5}, {"a": 500}) == 1.0
    assert site_trust({"a": 5}, {"a": 5, "b": 1}) < 1.0
    assert trusts({"a": 5}, {"a": 20}, True, True) == {"a": (1.0, 1.0)}


# -------------------------------------------------------------------------------------------------------------- the layers


def test_layer_trust_by_hand() -> None:
    """Four blocks, tapped at the second and the fourth: D = (0 + 0.3) / 2 = 0.15 and (0.4 + 1.4) / 2 = 0.9; over
    1/(0.1 + D): 4 and 1."""
    stack = [f"layers.{i}" for i in range(4)]
    spread = {"layers.1": 0.3, "layers.2": 0.4, "layers.3": 1.4, "elsewhere.0": 50.0}
    assert layer_trust(["layers.1", "layers.3"], stack, spread) == pytest.approx([0.8, 0.2])
    assert layer_trust(stack, stack, {}) == [0.25] * 4
    # D = 0, 0.3, 0.4, 1.4: 10, 2.5, 2, 2/3, together 91/6
    assert layer_trust(stack, stack, spread) == pytest.approx([60 / 91, 15 / 91, 12 / 91, 4 / 91])
    assert layer_trust(["layers.3"], stack, spread) == [1.0]


def test_layer_trust_is_bounded_and_sums_to_one() -> None:
    stack = [f"b.{i}" for i in range(3)]
    got = layer_trust(stack, stack, {"b.0": 1e6, "b.1": 0.0, "b.2": 1.0})
    assert sum(got) == pytest.approx(1.0)
    assert all(0.0 < value < 1.0 for value in got)
    assert got[1] / got[2] == pytest.approx(11.0)  # D = 0 counts eleven times as much as D = 1


# --------------------------------------------------------------------------------------------------------------- the drift


def moved(site: str, a: list[float], b: list[float], other: float = 0.0) -> Update:
    """What a site gives back that moved block 0 by a and b, and block 1 by `other` in one entry. All start at 1."""
    first = Lora(1 + torch.tensor([a]), 1 + torch.tensor([[x] for x in b]), 2.0)
    second = Lora(torch.tensor([[1.0 + other, 1.0]]), torch.ones(2, 1), 2.0)
    return Update(site, Adapter({"h.0.q": first, "h.1.q": second}, {"head": torch.tensor([7.0])}), 10)


START = moved("", [0.0, 0.0], [0.0, 0.0]).adapter
HALF = {"one": 0.5, "two": 0.5}


def test_drift_of_two_sites_by_hand() -> None:
    alike = [moved("one", [1.0, 2.0], [0.0, 3.0]), moved("two", [1.0, 2.0], [0.0, 3.0])]
    assert drift(START, alike, HALF) == {"h.0": 0.0, "h.1": 0.0}
    # at right angles by equal lengths: (½ · 1 + ½ · 1 − ½) / ½ = 1 = K − 1
    assert drift(START, [moved("one", [1.0, 0.0], [0.0, 0.0]), moved("two", [0.0, 1.0], [0.0, 0.0])], HALF)["h.0"] == 1.0
    # by 3 and 1 along one line: mean 2, spread (9 + 1) / 2 = 5: (5 − 4) / 4
    assert drift(START, [moved("one", [0.0, 0.0], [3.0, 0.0]), moved("two", [0.0, 0.0], [1.0, 0.0])], HALF)["h.0"] == 0.25
    # a and b are of one block: spread ½ (4 + 1) + ½ · 1 = 3; mean (1, 0 | ½ + ½ = 1, 0): 2
    both = [moved("one", [2.0, 0.0], [1.0, 0.0]), moved("two", [0.0, 0.0], [1.0, 0.0], other=5.0)]
    found = drift(START, both, HALF)
    assert found["h.0"] == pytest.approx(0.5)
    assert found["h.1"] == pytest.approx(1.0)  # one of two moved: (½ · 25 − 6.25) / 6.25
    # weights ¾ and ¼: mean 3/2 of 2, spread ¾ · 4 = 3: (3 − 2.25) / 2.25
    one_moves = [moved("one", [2.0, 0.0], [0.0, 0.0]), moved("two", [0.0, 0.0], [0.0, 0.0])]
    assert drift(START, one_moves, {"one": 0.75, "two": 0.25})["h.0"] == pytest.approx(1 / 3)


def test_drift_is_capped_and_zero_where_nobody_moved() -> None:
    against = [moved("one", [1.0, 0.0], [0.0, 0.0]), moved("two", [-1.0, 0.0], [0.0, 0.0])]
    assert drift(START, against, HALF) == {"h.0": 1e6, "h.1": 0.0}
    nearly = [moved("one", [1.0, 0.0], [0.0, 0.0]), moved("two", [-0.9999, 0.0], [0.0, 0.0])]
    assert drift(START, nearly, HALF)["h.0"] == 1e6


@pytest.mark.parametrize("count", [2, 3, 5])
def test_sites_at_right_angles_drift_by_one_less_than_their_number(count: int) -> None:
    start = Adapter({"h.0": Lora(torch.zeros(1, count), torch.zeros(1, 1), 1.0)})
    updates = [
        Update(f"s{k}", Adapter({"h.0": Lora(torch.eye(count)[k : k + 1], torch.zeros(1, 1), 1.0)}), 1) for k in range(count)
    ]
    shares = {u.site: 1 / count for u in updates}
    assert drift(start, updates, shares) == {"h.0": pytest.approx(count - 1)}


def test_drift_does_not_depend_on_the_order_of_updates_or_on_a_common_scale() -> None:
    start, updates = make_adapter(0), make_updates(3)
    shares = {"site-0": 0.2, "site-1": 0.3, "site-2": 0.5}
    found = [drift(start, order, shares) for order in permutations(updates)]
    assert all(f == found[0] for f in found)
    assert set(found[0]) == {"layer.0", "layer.1"}
    assert all(value > 0 for value in found[0].values())
    old = start.tensors()
    further = [
        Update(u.site, start.with_tensors({n: old[n] + 4 * (t - old[n]) for n, t in u.adapter.tensors().items()}), 1)
        for u in updates
    ]
    assert drift(start, further, shares) == {block: pytest.approx(v, rel=1e-5) for block, v in found[0].items()}


def test_drift_is_gamma_less_one() -> None:
    """Σ p_k ‖Δ_k‖² / ‖Σ p_k Δ_k‖² − 1, from flat vectors of all that lies in a block."""
    start, updates = make_adapter(0), make_updates(3)
    shares = {"site-0": 0.2, "site-1": 0.3, "site-2": 0.5}
    found = drift(start, updates, shares)
    for block in found:
        names = [n for n in start.tensors() if n.startswith(f"{block}.")]
        old = torch.cat([start.tensors()[n].double().flatten() for n in names])
        moves = {u.site: torch.cat([u.adapter.tensors()[n].double().flatten() for n in names]) - old for u in updates}
        mean = sum(shares[s] * m for s, m in moves.items())
        gamma = sum(shares[s] * float(m @ m) for s, m in moves.items()) / float(mean @ mean)
        assert found[block] == pytest.approx(gamma - 1)


def test_blocks_of_module_paths() -> None:
    assert block_of("model.layers.3.mlp.up_proj") == "model.layers.3"
    assert block_of("decoder.block.11.layer.0.SelfAttention.q") == "decoder.block.11"
    assert block_of("lm_head") == "lm_head"
