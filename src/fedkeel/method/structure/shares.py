"""Ranks dealt over the stages of a stream: each stage trains its own, and those of the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor

from fedkeel.model.places import Places
from fedkeel.recipe.schema import Recipe
from fedkeel.types import Adapter


def ranks_of(rank: int, stages: int, stage: int) -> range:
    """The ranks, of `rank` in all, that stage `stage` (from 0) of `stages` trains: equal shares, as far as they can be."""
    return range(rank * stage // stages, rank * (stage + 1) // stages)


def trained_ranks(recipe: Recipe, stage: int) -> range:
    """The ranks of the adapter that stage `stage` (from 0) trains."""
    rank = recipe.lora.rank
    return ranks_of(rank, len(recipe.stream.stages), stage) if recipe.stream.slices else range(rank)


@contextmanager
def shared(places: Places, ranks: range) -> Iterator[None]:
    """While it lasts, gradients reach these ranks alone, rows of A and columns of B of every branch that is trained.

    Source: O-LoRA, Wang et al. 2023, arXiv:2310.14152, where each task has a LoRA pair of its own beside the frozen earlier
    ones; side by side in one, they are one adapter of the sum of their ranks.
    """
    places.need(places.branches, "slices")
    with ExitStack() as undo:
        for branch in places.branches:
            for module, axis in ((branch.a, 0), (branch.b, 1)):
                weight = module.get_parameter("weight")
                if weight.requires_grad:  # not of a branch that is held out of the round
                    undo.callback(weight.register_hook(partial(only, ranks, axis)).remove)
        yield


def only(ranks: range, axis: int, tensor: Tensor) -> Tensor:
    """`tensor` where it is of these ranks, which `axis` counts, and 0 elsewhere."""
    kept = tensor.new_zeros(tensor.shape)
    kept.narrow(axis, ranks.start, len(ranks)).copy_(tensor.narrow(axis, ranks.start, len(ranks)))
    return kept


def within(ranks: range, before: Adapter, after: Adapter) -> Adapter:
    """`after` in these ranks of every branch, and `before` in the others."""
    lora = {}
    for path, old in before.lora.items():
        a, b = old.a.clone(), old.b.clone()
        a[ranks.start : ranks.stop] = after.lora[path].a[ranks.start : ranks.stop]
        b[:, ranks.start : ranks.stop] = after.lora[path].b[:, ranks.start : ranks.stop]
        lora[path] = replace(old, a=a, b=b)
    return replace(after, lora=lora)
