"""Laws of partitions, over the table of all partitions.

Rows are given sorted by id (`sources.load_records` sorts them), and a partition sees positions only; so the order of
lines in a file has no say, and these functions need not undo it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkeel import tables
from fedkeel.data import partition
from fedkeel.recipe.schema import Partition
from fedkeel.types import Record

Indices = list[list[int]]


def dealer(entry: tables.Partition) -> Callable[[list[str], list[str], int, np.random.Generator], Indices]:
    """(keys, strata, sites, generator) -> indices by site; a key is a row's task, answer and site."""

    def deal(keys: list[str], strata: list[str], sites: int, rng: np.random.Generator) -> Indices:
        records = [Record(f"{i:06}", k, s, k, labels=(k,), site=k) for i, (k, s) in enumerate(zip(keys, strata, strict=True))]
        spec = Partition(scheme=entry.name, sites=sites, alpha=0.3)
        held = entry.load()(partition.Deal(records, spec, rng))
        return list(held.values() if isinstance(held, dict) else held)

    return deal


ALL = pytest.mark.parametrize("name", tables.PARTITIONS)
SPLITS = ["train"] * 7 + ["validation"] * 2 + ["test"]


def rows(count: int, keys: int) -> tuple[list[str], list[str]]:
    """Keys and splits of `count` rows, mixed by fixed arithmetic; every key has rows in every split."""
    return [f"key-{(i * i + i // 3) % keys}" for i in range(count)], [SPLITS[(7 * i + i // 11) % 10] for i in range(count)]


def shares_of(held: Indices, members: set[int]) -> np.ndarray:
    return np.array([len(members & set(h)) for h in held]) / len(members)


@ALL
@settings(max_examples=60, deadline=None)
@given(count=st.integers(6, 120), sites=st.integers(1, 5), keys=st.integers(5, 6), seed=st.integers(0, 2**32))
def test_every_index_is_dealt_exactly_once(name: str, count: int, sites: int, keys: int, seed: int) -> None:
    labels = [f"key-{i % keys}" for i in range(count)]
    held = dealer(tables.PARTITIONS[name])(labels, rows(count, keys)[1], sites, np.random.default_rng(seed))
    assert sorted(i for h in held for i in h) == list(range(count))
    assert all(type(i) is int for h in held for i in h)
    assert all(h == sorted(h) for h in held)
    assert name == "natural" or len(held) == sites


@ALL
def test_the_same_generator_deals_the_same_rows(name: str) -> None:
    deal = dealer(tables.PARTITIONS[name])
    keys, strata = rows(400, 7)
    once, again, other = (deal(keys, strata, 4, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert once == again
    assert (once == other) == (name == "natural")


@ALL
def test_the_order_of_lines_in_a_file_has_no_say_once_rows_are_sorted_by_id(name: str) -> None:
    deal = dealer(tables.PARTITIONS[name])
    keys, strata = rows(300, 7)
    file = [(f"id-{i:03}", k, s) for i, (k, s) in enumerate(zip(keys, strata, strict=True))]

    def sites_by_id(lines: list[tuple[str, str, str]]) -> list[set[str]]:
        ordered = sorted(lines)
        held = deal([k for _, k, _ in ordered], [s for _, _, s in ordered], 3, np.random.default_rng(5))
        return [{ordered[i][0] for i in h} for h in held]

    assert sites_by_id(file[::-1]) == sites_by_id(file)


def test_iid_gives_equal_numbers_of_every_stratum() -> None:
    _, strata = rows(603, 7)
    held = partition.iid(strata, 4, np.random.default_rng(3))
    for split in set(strata):
        members = {i for i, s in enumerate(strata) if s == split}
        sizes = shares_of(held, members) * len(members)
        assert np.abs(sizes - len(members) / 4).max() < 1


def test_iid_deals_at_random() -> None:
    """Rows of the first half of the list: about half of each site's, not all of the first sites'."""
    held = partition.iid(["train"] * 2000, 4, np.random.default_rng(3))
    assert [len(h) for h in held] == [500] * 4
    for h in held:
        # hypergeometric with mean 250 and σ = 500 · ½ · √(0.75 / 500) ≈ 9.7
        assert abs(sum(i < 1000 for i in h) - 250) < 5 * 9.7


def test_quantity_keeps_its_shares_within_every_stratum() -> None:
    _, strata = rows(500, 7)
    shares = np.array([5.0, 3.0, 1.0, 1.0])
    held = partition.quantity(strata, shares, np.random.default_rng(4))
    for split in set(strata):
        members = {i for i, s in enumerate(strata) if s == split}
        assert np.abs(shares_of(held, members) - shares / 10).max() * len(members) <= 1
    assert [len(h) for h in partition.quantity(["train"] * 100, shares, np.random.default_rng(0))] == [50, 30, 10, 10]
    # sizes are rounded, not cut: two thirds of ten are seven
    assert [len(h) for h in partition.quantity(["train"] * 10, np.array([2.0, 1.0]), np.random.default_rng(0))] == [7, 3]


def test_quantity_skew_is_unequal_in_amount_and_equal_across_strata() -> None:
    strata = ["train"] * 4000 + ["test"] * 1000
    train, test = set(range(4000)), set(range(4000, 5000))
    largest = []
    for seed in range(40):
        held = partition.quantity_skew(strata, 4, 0.3, np.random.default_rng(seed))
        assert np.abs(shares_of(held, train) - shares_of(held, test)).max() <= 1 / 4000 + 1 / 1000
        largest.append(shares_of(held, train).max())
    assert np.mean(largest) > 0.6  # equal amounts would be 0.25
    even = partition.quantity_skew(strata, 4, 1e5, np.random.default_rng(0))
    assert np.abs(shares_of(even, train) - 0.25).max() < 0.01


def test_dirichlet_gives_a_key_the_same_shares_in_every_stratum() -> None:
    keys, strata = rows(6000, 7)
    held = partition.dirichlet(keys, strata, 4, 0.5, np.random.default_rng(6))
    by = {
        (key, split): {i for i in range(6000) if keys[i] == key and strata[i] == split}
        for key in set(keys)
        for split in ("train", "test")
    }
    for key in set(keys):
        train, test = by[key, "train"], by[key, "test"]
        assert min(len(train), len(test)) > 20
        # each site's count is within one row of its share
        assert np.abs(shares_of(held, train) - shares_of(held, test)).max() <= 1 / len(train) + 1 / len(test)


@pytest.mark.parametrize(
    ("alpha", "low", "high"),
    [
        (0.05, 0.85, 1.0),
        # uniform on the simplex: the largest of four shares is (1 + 1/2 + 1/3 + 1/4) / 4 in the mean
        (1.0, 25 / 48 - 0.03, 25 / 48 + 0.03),
        # σ of a share is √(¼ · ¾ / 401) = 0.022, so the largest of four lies about one σ above a quarter
        (100.0, 0.25, 0.30),
    ],
)
def test_dirichlet_concentrates_as_alpha_says(alpha: float, low: float, high: float) -> None:
    keys = [f"key-{i % 400}" for i in range(400 * 100)]
    held = partition.dirichlet(keys, ["train"] * len(keys), 4, alpha, np.random.default_rng(7))
    counts = [Counter(keys[i] for i in h) for h in held]
    largest = [max(c[key] for c in counts) / 100 for key in set(keys)]
    assert low <= np.mean(largest) <= high


def test_dirichlet_at_large_alpha_is_nearly_uniform_and_at_tiny_alpha_gives_each_key_one_site() -> None:
    keys, strata = [f"key-{i % 7}" for i in range(2800)], ["train"] * 2800
    even = partition.dirichlet(keys, strata, 4, 1e6, np.random.default_rng(8))
    one = partition.dirichlet(keys, strata, 4, 1e-6, np.random.default_rng(8))
    for key in set(keys):
        members = {i for i, k in enumerate(keys) if k == key}
        assert np.abs(shares_of(even, members) - 0.25).max() <= 0.01
        assert shares_of(one, members).max() == 1.0


def test_dirichlet_draws_apart_for_each_key() -> None:
    """With a tiny alpha seven keys land on more than one site; one draw for all keys would give them all to one."""
    keys = [f"key-{i % 7}" for i in range(700)]
    held = partition.dirichlet(keys, ["train"] * 700, 4, 1e-6, np.random.default_rng(8))
    assert sum(bool(h) for h in held) > 1


@pytest.mark.parametrize(("tasks", "sites"), [(7, 3), (7, 7), (8, 4), (5, 1)])
def test_by_task_keeps_tasks_whole_and_takes_turns(tasks: int, sites: int) -> None:
    keys = [f"task-{i % tasks}" for i in range(10 * tasks)]
    held = partition.by_task(keys, sites, np.random.default_rng(9))
    per_site = [{keys[i] for i in h} for h in held]
    assert sum(len(t) for t in per_site) == tasks
    assert max(len(t) for t in per_site) - min(len(t) for t in per_site) <= 1
    assert min(len(t) for t in per_site) >= 1


def test_by_task_refuses_more_sites_than_tasks() -> None:
    with pytest.raises(ValueError, match="4 sites but only 3 tasks"):
        partition.by_task(["a", "b", "c", "a"], 4, np.random.default_rng(0))


def test_natural_is_one_site_a_key_in_sorted_order() -> None:
    held = partition.natural(["ward-b", "ward-a", "ward-b", "", "ward-a", "ward-c"])
    assert list(held.items()) == [("", [3]), ("ward-a", [1, 4]), ("ward-b", [0, 2]), ("ward-c", [5])]
