"""Rules that withstand hostile sites: small cases by hand, twins in NumPy, and what hostile sites can move."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from builders import AGGREGATORS, SHAPES, dense_of, dense_sum, flat, make_adapter, make_updates, numbers

from fedkeel.method.aggregate import robust
from fedkeel.method.aggregate.krum import distances
from fedkeel.method.aggregate.robust import leading
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.weighting import weights
from fedkeel.types import Adapter, Lora, Update

ROBUST = ("median", "trimmed", "clipped", "centred", "krum")
FULL = 12  # min(d_out, d_in) of no module is larger: nothing is cut off
MIXED_RANKS, MIXED_SCALES = (1, 4, 2), (8 / 1, 8 / 4, 8 / math.sqrt(2))


def scalar(site: str, value: float, head: float = 0.0, positions: int = 1) -> Update:
    """One module of 1 × 1 with product `value`, at scale 2, and a dense parameter of one number."""
    lora = {"m": Lora(torch.full((1, 1), 0.5), torch.full((1, 1), value), 2.0)}
    return Update(site, Adapter(lora, {"head": torch.tensor([head])}), positions)


def combined(name: str, values: Sequence[float], hostile: int = 0) -> tuple[float, float]:
    """(product, dense parameter) of the rule over sites with these products; dense parameters are ten times as large."""
    updates = [scalar(f"site-{k}", v, 10 * v, positions=1 + 1000 * k) for k, v in enumerate(values)]
    result = AGGREGATORS[name](updates[0].adapter, updates, weights(updates, "positions"), Options(hostile=hostile))
    return float(result.adapter.lora["m"].dense()), float(result.adapter.dense["head"])


@pytest.mark.parametrize(
    ("name", "values", "hostile", "expected"),
    [
        ("median", [3.0, 1.0, 1e30], 0, 3.0),
        ("median", [1.0, 2.0, 8.0, 1e30], 0, 5.0),  # the mean of the middle two
        ("median", [7.0], 0, 7.0),
        ("trimmed", [1.0, 2.0, 6.0], 0, 3.0),
        ("trimmed", [1e30, 1.0, 2.0, 6.0, -1e30], 1, 3.0),
        ("trimmed", [1e30, 1.0, 2.0, 6.0, -1e30], 2, 2.0),
        # f = 0, one nearest of three: 1 and 2 are 1 apart, and the tie goes to the first
        ("krum", [6.0, 1.0, 2.0], 0, 1.0),
        # f = 1, two nearest of five: 4 is nearest to its own (1 + 1), 1e30 and 1e30 + … only to one another
        ("krum", [1e30, 3.0, 4.0, 5.0, -1e30], 1, 4.0),
        ("krum", [0.0, 1.0, 1.5, 3.0, 9.0], 1, 1.0),  # sums of two: 3.25, 1.25, 2.5, 6.25, …
        # from 0, the first site's: τ = 1, so 0, 1 and 1 over 3; all as they are where none is longer than the middle
        ("clipped", [0.0, 1.0, 1e30], 0, 2 / 3),
        ("clipped", [0.0, 1.0, 5.0], 0, 2 / 3),
        ("clipped", [7.0], 0, 7.0),
        ("centred", [7.0], 0, 7.0),
        # from 0, the first site's, the pulls are 0, 1 and 1 (of 5, cut to τ = 1) over 3, and so on: 2/3, 7/9, 23/27, 73/81
        ("centred", [0.0, 1.0, 5.0], 0, 227 / 243),
    ],
)
def test_cases_by_hand(name: str, values: list[float], hostile: int, expected: float) -> None:
    product, head = combined(name, values, hostile)
    assert product == pytest.approx(expected, rel=1e-6)
    assert head == pytest.approx(10 * expected, rel=1e-6)


def products(updates: Sequence[Update], path: str) -> np.ndarray:
    return np.stack([dense_of(u.adapter.lora[path]) for u in updates])


@pytest.mark.parametrize("block", [1, 100, 2**23])
@pytest.mark.parametrize("count", [4, 5])
def test_median_is_the_twins_at_any_size_of_block(monkeypatch: pytest.MonkeyPatch, block: int, count: int) -> None:
    monkeypatch.setattr(robust, "BLOCK", block)
    updates = make_updates(count, MIXED_RANKS, MIXED_SCALES)
    result = AGGREGATORS["median"](make_adapter(0, FULL, 0.5), updates, weights(updates, "positions"))
    for path, factors in result.adapter.lora.items():
        expected = np.median(products(updates, path), axis=0)
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-6 * np.linalg.norm(expected))
    heads = np.median([u.adapter.dense["head.weight"].numpy() for u in updates], axis=0)
    np.testing.assert_allclose(result.adapter.dense["head.weight"].numpy(), heads, rtol=1e-6)


@pytest.mark.parametrize(("count", "hostile"), [(4, 1), (5, 1), (5, 2), (7, 2)])
def test_trimmed_is_the_twins(count: int, hostile: int) -> None:
    updates = make_updates(count, MIXED_RANKS, MIXED_SCALES)
    result = AGGREGATORS["trimmed"](make_adapter(0, FULL), updates, weights(updates, "uniform"), Options(hostile=hostile))
    for path, factors in result.adapter.lora.items():
        expected = np.sort(products(updates, path), axis=0)[hostile : count - hostile].mean(axis=0)
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-6 * np.linalg.norm(expected))


def test_trimmed_by_nobody_is_the_unweighted_mean_of_products() -> None:
    updates = make_updates(4)
    result = AGGREGATORS["trimmed"](make_adapter(0, FULL), updates, weights(updates, "positions"))
    equal = weights(updates, "uniform")
    for path, factors in result.adapter.lora.items():
        expected = dense_sum(updates, equal, path)
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-6 * np.linalg.norm(expected))
    uniform = AGGREGATORS["trimmed"](make_adapter(0, FULL), updates, equal)
    assert flat(uniform.adapter) == flat(result.adapter)
    assert uniform.error < 1e-6 < result.error, "the error is against the weighted sum"


@pytest.mark.parametrize("name", ROBUST)
def test_a_site_gains_nothing_by_the_weight_it_claims(name: str) -> None:
    updates = make_updates(5)
    shares = [dict(zip("01234", w, strict=True)) for w in ([0.2] * 5, [0.96, 0.01, 0.01, 0.01, 0.01])]
    results = [AGGREGATORS[name](make_adapter(0), updates, {f"site-{k}": v for k, v in s.items()}) for s in shares]
    assert flat(results[0].adapter) == flat(results[1].adapter)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("name", ["median", "trimmed"])
def test_of_the_picked_matrix_the_best_approximation_is_taken(name: str, rank: int) -> None:
    updates = make_updates(5)
    whole = AGGREGATORS[name](make_adapter(0, FULL), updates, weights(updates, "uniform"), Options(hostile=1))
    cut = AGGREGATORS[name](make_adapter(0, rank, 0.5), updates, weights(updates, "uniform"), Options(hostile=1))
    for path, factors in cut.adapter.lora.items():
        u, s, vt = np.linalg.svd(dense_of(whole.adapter.lora[path]))
        expected = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(dense_of(factors), expected, atol=1e-5 * s[0])


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_leading_singular_vectors(shape: tuple[int, int]) -> None:
    matrix = numbers(3, *shape).double()
    spectrum = torch.linalg.svdvals(matrix)
    for rank in (1, 3, 5, 20):
        u, s, vt = leading(matrix, rank)
        k = min(rank, *shape)
        assert (u.shape, s.shape, vt.shape) == ((shape[0], k), (k,), (k, shape[1]))
        np.testing.assert_allclose(s.numpy(), spectrum[:k].numpy(), rtol=1e-9)
        np.testing.assert_allclose((u.T @ u).numpy(), np.eye(k), atol=1e-12)
        np.testing.assert_allclose((vt @ vt.T).numpy(), np.eye(k), atol=1e-12)
        lost = float(torch.linalg.matrix_norm(matrix - (u * s) @ vt))
        assert lost == pytest.approx(float(spectrum[k:].norm()), abs=1e-9)


# ------------------------------------------------------------------------------------------------------------ hostile sites


def hostile_sites(count: int, alike: bool) -> list[Update]:
    """Sites of huge numbers; alike, they agree with one another as colluding ones would."""
    sites = []
    for k in range(count):
        adapter = make_adapter(900 if alike else 900 + k)
        huge = {name: 1e15 * t for name, t in adapter.tensors().items()}
        sites.append(Update(f"hostile-{k}", adapter.with_tensors(huge), 10**9))
    return sites


def range_of(updates: Sequence[Update], path: str) -> tuple[np.ndarray, np.ndarray]:
    made = products(updates, path)
    return made.min(axis=0), made.max(axis=0)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("honest", "count"), [(3, 1), (4, 2), (5, 2), (6, 3)])
@pytest.mark.parametrize("name", ["median", "trimmed"])
def test_hostile_sites_leave_every_entry_between_honest_ones(name: str, honest: int, count: int, alike: bool) -> None:
    good = make_updates(honest)
    updates = [*good, *hostile_sites(count, alike)]
    result = AGGREGATORS[name](make_adapter(0, FULL), updates, weights(updates, "positions"), Options(hostile=count))
    for path, factors in result.adapter.lora.items():
        low, high = range_of(good, path)
        slack = 1e-5 * np.abs(high).max()
        assert (low - slack <= dense_of(factors)).all()
        assert (dense_of(factors) <= high + slack).all()
    heads = torch.stack([u.adapter.dense["head.weight"] for u in good])
    assert bool((heads.amin(0) <= result.adapter.dense["head.weight"]).all())
    assert bool((result.adapter.dense["head.weight"] <= heads.amax(0)).all())
    assert result.error == pytest.approx(1.0), "the weighted sum is the hostile sites'"


@pytest.mark.parametrize("name", ["median", "trimmed"])
def test_half_of_the_sites_or_one_more_than_allowed_do_move_it(name: str) -> None:
    """The bound is where it is said to be: so that the test above can fail."""
    updates = [*make_updates(3), *hostile_sites(2 if name == "trimmed" else 4, alike=True)]
    result = AGGREGATORS[name](make_adapter(0, FULL), updates, weights(updates, "uniform"), Options(hostile=1))
    low, high = range_of(updates[:3], "layer.0.q")
    got = dense_of(result.adapter.lora["layer.0.q"])
    assert (got < low - 1).any() or (got > high + 1).any()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["median", "trimmed"])
def test_what_is_cut_off_cannot_take_it_far(name: str, rank: int) -> None:
    """‖W_r − X‖ ≤ 2 ‖W − X‖ for every X of rank r: here X is each honest site's own product."""
    good = make_updates(5, ranks=(rank,))
    updates = [*good, *hostile_sites(2, alike=True)]
    options, shares = Options(hostile=2), weights(updates, "uniform")
    whole = AGGREGATORS[name](make_adapter(0, FULL), updates, shares, options)
    cut = AGGREGATORS[name](make_adapter(0, rank), updates, shares, options)
    for path in SHAPES:
        for u in good:
            own = dense_of(u.adapter.lora[path])
            far = np.linalg.norm(dense_of(whole.adapter.lora[path]) - own)
            assert np.linalg.norm(dense_of(cut.adapter.lora[path]) - own) <= 2 * far


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_krum_is_an_honest_site_to_the_bit(count: int, alike: bool) -> None:
    good = make_updates(count + 3)
    updates = [*good, *hostile_sites(count, alike)]
    result = AGGREGATORS["krum"](make_adapter(0), updates, weights(updates, "positions"), Options(hostile=count))
    assert flat(result.adapter) in [flat(u.adapter) for u in good]


def test_krum_is_taken_in_by_more_colluders_than_it_was_told_of() -> None:
    """So that the test above can fail: three alike have two neighbours each at no distance at all."""
    updates = [*make_updates(2), *hostile_sites(3, alike=True)]
    fooled = AGGREGATORS["krum"](make_adapter(0), updates, weights(updates, "uniform"), Options(hostile=1))
    assert flat(fooled.adapter) == flat(updates[2].adapter)


@pytest.mark.parametrize("hidden", ["factors", "head"])
def test_krum_sees_through_factors_and_into_dense_parameters(hidden: str) -> None:
    """A site with the product of the honest ones but other factors is near; one with another head is not."""
    base = make_adapter(1)
    near = [
        Update(f"honest-{k}", base.with_tensors({n: t + 1e-2 * numbers(k, *t.shape) for n, t in base.tensors().items()}), 1)
        for k in range(4)
    ]
    centre = {n: torch.stack([u.adapter.tensors()[n] for u in near]).mean(0) for n in base.tensors()}
    if hidden == "factors":  # nearest of all, at the centre of the others, though its factors are far from theirs
        factor = {"a": 64.0, "b": 1 / 64}
        tensors = {n: t * factor.get(n.rpartition(".")[2], 1.0) for n, t in centre.items()}
    else:
        tensors = centre | {"head.weight": centre["head.weight"] + 100.0}
    updates = [*near, Update("odd", base.with_tensors(tensors), 1)]
    result = AGGREGATORS["krum"](make_adapter(0), updates, weights(updates, "uniform"), Options(hostile=1))
    assert (flat(result.adapter) == flat(updates[-1].adapter)) == (hidden == "factors")


def twin_distances(adapters: Sequence[Adapter]) -> np.ndarray:
    def whole(adapter: Adapter) -> np.ndarray:
        return np.concatenate(
            [dense_of(f).ravel() for f in adapter.lora.values()] + [t.double().numpy().ravel() for t in adapter.dense.values()]
        )

    flats = [whole(a) for a in adapters]
    return np.array([[np.sum((x - y) ** 2) for y in flats] for x in flats])


def test_distances_are_the_dense_ones() -> None:
    adapters = [u.adapter for u in make_updates(5, MIXED_RANKS, MIXED_SCALES)]
    expected = twin_distances(adapters)
    np.testing.assert_allclose(distances(adapters).numpy(), expected, rtol=1e-12, atol=1e-12 * expected.max())
    assert torch.equal(distances(adapters), distances(adapters).T)


@pytest.mark.parametrize(("count", "hostile"), [(3, 0), (5, 0), (5, 1), (7, 1), (7, 2), (9, 3)])
def test_krum_is_the_twins(count: int, hostile: int) -> None:
    updates = make_updates(count)
    apart = twin_distances([u.adapter for u in updates])
    scores = [sum(sorted(np.delete(apart[i], i))[: count - hostile - 2]) for i in range(count)]
    result = AGGREGATORS["krum"](make_adapter(0), updates, weights(updates, "uniform"), Options(hostile=hostile))
    assert flat(result.adapter) == flat(updates[int(np.argmin(scores))].adapter)


def centred_twin(updates: Sequence[Update], begin: Adapter, steps: int) -> dict[str, np.ndarray]:
    """The steps of the paper on whole vectors of products and dense parameters."""
    paths = [*SHAPES]

    def vector(adapter: Adapter) -> np.ndarray:
        heads = [adapter.dense[name].double().numpy().ravel() for name in sorted(adapter.dense)]
        return np.concatenate([*(dense_of(adapter.lora[p]).ravel() for p in paths), *heads])

    sites, v = [vector(u.adapter) for u in updates], vector(begin)
    for _ in range(steps):
        far = [np.linalg.norm(w - v) for w in sites]
        tau = np.median(far)
        v = v + sum((w - v) * min(1.0, tau / d) if d else 0 * v for w, d in zip(sites, far, strict=True)) / len(sites)
    found, at = {}, 0
    for p in paths:
        shape = dense_of(begin.lora[p]).shape
        found[p] = v[at : at + shape[0] * shape[1]].reshape(shape)
        at += shape[0] * shape[1]
    return found | {"dense": v[at:]}


@pytest.mark.parametrize("hostile", [0, 2])
@pytest.mark.parametrize("count", [3, 4, 5])
@pytest.mark.parametrize(("name", "steps"), [("clipped", 1), ("centred", 5)])
def test_clipping_is_the_twins(name: str, steps: int, count: int, hostile: int) -> None:
    reference = make_adapter(0, FULL)
    updates = [*make_updates(count, MIXED_RANKS, MIXED_SCALES), *hostile_sites(hostile, alike=False)]
    small = {name: 1e-9 * t for name, t in (updates[-1].adapter.tensors().items() if hostile else ())}
    if hostile:  # 1e6 times the honest ones in each factor: what float64 can still add up in the twin
        updates[-1] = Update("hostile-1", updates[-1].adapter.with_tensors(small), 1)
        updates[-2] = Update("hostile-0", updates[-1].adapter, 1)
    result = AGGREGATORS[name](reference, updates, weights(updates, "positions"))
    twin = centred_twin(updates, reference, steps)
    for path, factors in result.adapter.lora.items():
        np.testing.assert_allclose(dense_of(factors), twin[path], atol=2e-6 * np.linalg.norm(twin[path]))
    heads = np.concatenate([result.adapter.dense[n].double().numpy().ravel() for n in sorted(result.adapter.dense)])
    np.testing.assert_allclose(heads, twin["dense"], atol=1e-5 * np.abs(twin["dense"]).max())


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(("honest", "count"), [(3, 1), (4, 2), (6, 3)])
def test_centred_is_moved_by_a_reach_a_hostile_site_and_step_at_most(honest: int, count: int, alike: bool) -> None:
    """τ ≤ the widest honest distance d from the centre, which a step widens by τ f / K at most."""
    good, reference = make_updates(honest), make_adapter(0, FULL)
    updates = [*good, *hostile_sites(count, alike)]
    result = AGGREGATORS["centred"](reference, updates, weights(updates, "positions"))
    start = [u.adapter for u in good]
    widest = float(distances([reference, *start])[0].max().sqrt())
    share, bound = count / len(updates), widest
    for _ in range(5):
        bound *= 1 + share
    apart = distances([result.adapter, *start])[0][1:].sqrt()
    assert float(apart.max()) <= bound * (1 + 1e-6)


def test_krum_stays_as_near_to_an_honest_site_as_it_says() -> None:
    """√((K − f − 2) / (K − 2 f − 1)) times the widest distance of two honest sites, for hostile sites placed anywhere."""
    good = make_updates(4)
    widest = math.sqrt(twin_distances([u.adapter for u in good]).max())
    bound = math.sqrt((5 - 1 - 2) / (5 - 2 - 1)) * widest
    chosen_hostile = 0
    for size, like in itertools.product((0.0, 0.5, 0.9, 1.0, 1.1, 2.0, 30.0), range(5)):
        tensors = {n: size * t for n, t in make_adapter(like + 1).tensors().items()}
        updates = [*good, Update("x", make_adapter(0).with_tensors(tensors), 1)]
        result = AGGREGATORS["krum"](make_adapter(0), updates, weights(updates, "uniform"), Options(hostile=1))
        apart = twin_distances([result.adapter, *(u.adapter for u in good)])[0, 1:]
        assert math.sqrt(apart.min()) <= bound
        chosen_hostile += flat(result.adapter) == flat(updates[-1].adapter)
    assert chosen_hostile, "a hostile site in the middle of the others was to be among those chosen"


def test_krum_brings_a_choice_of_another_rank_to_the_reference() -> None:
    """Four sites alike of rank 3 at scale 2, against one of rank 2: the choice has rank 3."""
    alike = [Update(f"site-{k}", make_adapter(1), 1) for k in range(4)]
    updates = [*alike, Update("site-9", make_adapter(9, rank=2), 1)]
    for rank, scale in ((5, 2.0), (3, 0.5)):
        result = AGGREGATORS["krum"](make_adapter(0, rank, scale), updates, weights(updates, "uniform"), Options(hostile=1))
        for path, factors in result.adapter.lora.items():
            assert (len(factors.a), factors.scale) == (rank, scale)
            expected = dense_of(alike[0].adapter.lora[path])
            np.testing.assert_allclose(dense_of(factors), expected, atol=1e-6 * np.linalg.norm(expected))
    cut = AGGREGATORS["krum"](make_adapter(0, rank=1), updates, weights(updates, "uniform"), Options(hostile=1))
    for path, factors in cut.adapter.lora.items():
        u, s, vt = np.linalg.svd(dense_of(alike[0].adapter.lora[path]))
        np.testing.assert_allclose(dense_of(factors), s[0] * np.outer(u[:, 0], vt[0]), atol=1e-5 * s[0])


LEAST: Mapping[str, tuple[int, int, int]] = {"median": (1, 1, 1), "trimmed": (1, 3, 5), "krum": (3, 5, 7)}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_too_few_sites_are_refused_by_the_name_of_the_rule(name: str) -> None:
    rule = AGGREGATORS[name]
    assert tuple(rule.entry.least(f) for f in range(3)) == LEAST.get(name, (1, 1, 1))
    for hostile in range(3):
        enough = rule.entry.least(hostile)
        updates = make_updates(enough)
        rule(make_adapter(0), updates, weights(updates, "uniform"), Options(hostile=hostile))
        fewer = updates[:-1]
        if fewer:
            told = rf"rule {name} with {hostile} hostile sites needs at least {enough} sites, not {enough - 1}"
            with pytest.raises(ValueError, match=told):
                rule(make_adapter(0), fewer, weights(fewer, "uniform"), Options(hostile=hostile))
