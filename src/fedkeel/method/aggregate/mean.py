"""Average the factors apart, as FedIT does (Zhang et al. 2023, arXiv:2305.05644)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedkeel.method.aggregate.common import Aggregate
from fedkeel.method.aggregate.exact import measure, measured_error
from fedkeel.method.aggregate.rule import Options
from fedkeel.method.aggregate.updates import gather
from fedkeel.types import Adapter, Update


def mean(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """A = Σ p_k A_k and B = Σ p_k B_k, of equal ranks and scales.

    The mean of products is not the product of means, so this errs; see `error`, which is measured exactly while Σ r_k ≤ 512,
    and beyond that estimated from 64 random probes, with a relative standard deviation of at most 0.125 (`exact.Sketch`).
    """
    return average(reference, updates, weights, "ab")


def average(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], factors: str) -> Aggregate:
    """The mean of the `factors` (of "ab") and of the dense parameters; a factor that is not named is the reference's.

    One pass, with one update held at a time.
    """
    exact = measure(reference, weights)
    names = [f"{path}.{factor}" for path in reference.lora for factor in factors]
    means = gather(reference, updates, weights, [*names, *reference.dense], exact)
    adapter = reference.with_tensors(reference.tensors() | means)
    return Aggregate(adapter, measured_error(exact, adapter, {}))
