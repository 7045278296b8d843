"""Ranks dealt over the stages of a stream: each stage trains its own, and those of the others stay as they are."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.model.places import Places


def ranks_of(rank: int, stages: int, stage: int) -> range:
    """The ranks, of `rank` in all, that stage `stage` (from 0) of `stages` trains: equal shares, as far as they can be."""
    return range(rank * stage // stages, rank * (stage + 1) // stages)


def share(places: Places, ranks: range) -> list[RemovableHandle]:
    """Let gradients reach these ranks alone, rows of A and columns of B of every branch, until the handles are removed.

    Source: O-LoRA, Wang et al. 2023, arXiv:2310.14152, where each task has a LoRA pair of its own beside the frozen earlier
    ones; side by side in one, they are one adapter of the sum of their ranks.
    """
    places.need(places.branches, "slices")
    handles = []
    for branch in places.branches:
        for module, axis in ((branch.a, 0), (branch.b, 1)):
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            handles.append(weight.register_hook(partial(only, ranks, axis)))
    return handles


def only(ranks: range, axis: int, tensor: Tensor) -> Tensor:
    """`tensor` where it is of these ranks, which `axis` counts, and 0 elsewhere."""
    kept = tensor.new_zeros(tensor.shape)
    kept.narrow(axis, ranks.start, len(ranks)).copy_(tensor.narrow(axis, ranks.start, len(ranks)))
    return kept
