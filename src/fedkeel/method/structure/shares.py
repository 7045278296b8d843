"""Ranks dealt over the stages of a stream: each stage trains its own, and those of the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from fedkeel.model.places import Places
from fedkeel.recipe.schema import Recipe
from fedkeel.types import Adapter

AXES = {"a": 0, "b": 1}  # of a factor, the one that counts ranks


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
            for factor, axis in AXES.items():
                weight = getattr(branch, factor).get_parameter("weight")
                if weight.requires_grad:  # not of a branch that is held out of the round
                    undo.callback(weight.register_hook(partial(only, ranks, axis)).remove)
        yield


def only(ranks: range, axis: int, tensor: Tensor, others: Tensor | None = None) -> Tensor:
    """`tensor` where it is of these ranks, which `axis` counts, and `others` elsewhere; without them 0."""
    mixed = torch.zeros_like(tensor) if others is None else others.clone()
    mixed.narrow(axis, ranks.start, len(ranks)).copy_(tensor.narrow(axis, ranks.start, len(ranks)))
    return mixed


def within(ranks: range, before: Adapter, after: Adapter) -> Adapter:
    """`after` in these ranks of every branch, and `before` in the others."""
    lora = {}
    for path, old in before.lora.items():
        new = after.lora[path]
        lora[path] = replace(old, a=only(ranks, AXES["a"], new.a, old.a), b=only(ranks, AXES["b"], new.b, old.b))
    return replace(after, lora=lora)
