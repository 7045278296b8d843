"""Numbers keyed by what they are for: against arithmetic in Python integers, and by their distribution."""

from __future__ import annotations

import math

import pytest
import torch

from fedkeel.rng import counter_normal, counter_uniform, derive

WRAP = (1 << 64) - 1


def slow_uniform(key: int, counter: int) -> float:
    """SplitMix64's finaliser as published, in whole numbers: state = key + counter · golden ratio."""
    x = (key + counter * 0x9E3779B97F4A7C15) & WRAP
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WRAP
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WRAP
    x ^= x >> 31
    return ((x >> 41) + 0.5) / 2**23


COUNTERS = [0, 1, 2, 3, 255, 2**20, 2**31, 2**44 + 7, 2**62, 2**63 - 1, -1, -(2**40), -(2**63)]


@pytest.mark.parametrize("key", [0, 1, 2**63 - 1, derive(1, "structure", "a", 3)])
def test_uniform_numbers_are_the_published_ones(key: int) -> None:
    got = counter_uniform(key, torch.tensor(COUNTERS))
    assert got.dtype == torch.float32
    assert got.tolist() == [slow_uniform(key, c) for c in COUNTERS]


def test_splitmix_by_its_known_first_numbers() -> None:
    """The reference implementation's first outputs for seed 0 (it adds the golden ratio before each)."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [((value >> 41) + 0.5) / 2**23 for value in first]
    assert counter_uniform(0, torch.tensor([1, 2, 3])).tolist() == expected


@pytest.mark.parametrize("key", [5, derive(7, "x")])
def test_normal_numbers_are_box_muller_over_the_uniform_ones(key: int) -> None:
    counters = [0, 1, 2, 77, 2**40]
    pairs = [(slow_uniform(key, 2 * c), slow_uniform(key, 2 * c + 1)) for c in counters]
    expected = [math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs]
    assert counter_normal(key, torch.tensor(counters)).tolist() == pytest.approx(expected, abs=2e-6)


def test_a_number_depends_on_its_own_counter_alone() -> None:
    whole = counter_uniform(3, torch.arange(60).view(3, 4, 5))
    assert whole.shape == (3, 4, 5)
    assert torch.equal(whole.flatten()[17:18], counter_uniform(3, torch.tensor([17])))
    assert torch.equal(counter_normal(3, torch.tensor([9, 9, 4])), counter_normal(3, torch.arange(10))[[9, 9, 4]])
    assert not torch.equal(whole, counter_uniform(4, torch.arange(60).view(3, 4, 5)))


def test_drawing_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    counter_normal(1, torch.arange(100))
    counter_uniform(1, torch.arange(100))
    assert torch.equal(before, torch.get_rng_state())


def test_the_distribution() -> None:
    """200,000 numbers: moments within four standard errors, every tenth equally full, never 0 or 1, neighbours unrelated."""
    n = 200_000
    u, z = counter_uniform(11, torch.arange(n)).double(), counter_normal(11, torch.arange(n)).double()
    assert 0.0 < float(u.min()) < float(u.max()) < 1.0
    assert abs(float(u.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / n)
    counts = torch.histc(u, 10, 0.0, 1.0)
    assert float((counts - n / 10).abs().max()) < 4 * math.sqrt(n * 0.1 * 0.9)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float((z**4).mean()) - 3) < 4 * math.sqrt(96 / n)
    for x in (u - 0.5, z):
        assert abs(float((x[1:] * x[:-1]).mean() / x.var())) < 4 / math.sqrt(n)
    others = counter_uniform(12, torch.arange(n)).double() - 0.5
    assert abs(float(((u - 0.5) * others).mean()) * 12) < 4 / math.sqrt(n)


def test_numbers_at_the_edges_are_finite() -> None:
    z = counter_normal(0, torch.arange(1_000_000))
    assert bool(z.isfinite().all())
    assert 4.0 < float(z.abs().max()) < math.sqrt(-2 * math.log(2**-24)) + 1e-3
