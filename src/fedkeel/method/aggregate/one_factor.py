"""Rules that average one factor, so that the other is common to all sites or each site's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fedkeel.method.aggregate.common import Aggregate
from fedkeel.method.aggregate.mean import average
from fedkeel.method.aggregate.rule import Options
from fedkeel.types import Adapter, Update


def freeze_a(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """B = Σ p_k B_k under the A of the reference, which no site trains: (Σ p_k B_k) A is the exact sum.

    Source: FFA-LoRA, Sun et al. 2024, arXiv:2403.12313. `error` is measured as `mean`'s is.
    """
    return average(reference, updates, weights, "b")


def alternate(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """The mean of the one factor that was trained in this round, exact, and half the payload: B in rounds 0, 2, …, A in 1, 3,
    …; with B = 0 at the start, A has no gradient.

    Before a round the server brings the factor that rests to orthogonal columns or rows of one norm: see `gauge`.
    Source: RoLoRA, Chen et al. 2024, arXiv:2409.02346. `error` is measured as `mean`'s is.
    """
    return average(reference, updates, weights, "a" if options.round % 2 else "b")


def share_a(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """A = Σ p_k A_k; each site trains both factors and keeps its own B, which never travels.

    There is no one product to be exact about: `error` is that of the adapters as the server knows them, with the B of the
    reference in each, and so 0. Source: FedSA-LoRA, Guo et al. 2024, arXiv:2410.01463.
    """
    return average(reference, updates, weights, "a")


def share_b(reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options) -> Aggregate:
    """B = Σ p_k B_k; each site trains both factors and keeps its own A, which never travels. The mirror of `share_a`, for
    comparison."""
    return average(reference, updates, weights, "b")
