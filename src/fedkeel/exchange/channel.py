"""What happens to an update between training and aggregation: a list of steps, at the site and on the way back.

A site's update goes through its steps in the order of `tables.STEPS`, then through the codec, and each step then hears what
will arrive. A step that must remember something from round to round is given it, and gives it back (see `federation.kept`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.exchange.codecs import make_codec
from fedkeel.exchange.codecs.chain import CodecError, Shapes, as_float32
from fedkeel.recipe.schema import Recipe

Tensors = Mapping[str, Tensor]


class Step(Protocol):
    """One step of the channel, at a site. Tensors are float32 by flat name, and stay of their names and shapes."""

    def leaves(self, tensors: Tensors, memory: Tensors) -> Tensors:
        """What goes on to the next step in place of `tensors`. memory: what it gave back the last time, empty at first."""
        ...

    def arrived(self, left: Tensors, got: Tensors, memory: Tensors) -> Tensors:
        """What to remember. left: as it left this step. got: as the receiver decodes it."""
        ...


class Coder(Protocol):
    """What stands at a channel's end: a codec, or a site's part of a sum (`summands`). See `codecs.chain.Codec`."""

    def encode(self, tensors: Tensors, key: int) -> dict[str, Tensor]:
        """What travels."""
        ...

    def decode(self, encoded: Tensors, shapes: Shapes) -> dict[str, Tensor]:
        """What it stands for."""
        ...


@dataclass(frozen=True)
class Feedback:
    """Error feedback: what a lossy codec left out is added to the next update, so that it comes late and is not lost.

    Over any number of times, what arrived and the last memory add up to the updates. Raises CodecError if the memory is of
    other shapes. Source: Karimireddy et al. 2019 (arXiv:1901.09847), algorithm 2.
    """

    def leaves(self, tensors: Tensors, memory: Tensors) -> Tensors:
        """See `Step`."""
        total = {}
        for name, tensor in tensors.items():
            kept = memory.get(name, torch.zeros_like(tensor))
            if kept.shape != tensor.shape:
                raise CodecError(f"{name}: a residual of shape {tuple(kept.shape)} for a tensor of shape {tuple(tensor.shape)}")
            total[name] = as_float32(name, tensor) + kept
        return total

    def arrived(self, left: Tensors, got: Tensors, memory: Tensors) -> Tensors:
        """See `Step`. Of a tensor that did not leave this time, what is remembered stays."""
        return {**memory, **{name: tensor - got[name] for name, tensor in left.items()}}


def feedback(recipe: Recipe) -> Feedback | None:
    """Where codec_up loses something, and the rule finds factors in one basis: elsewhere what is left is in another one."""
    federation = recipe.federation
    steady = tables.RULES[federation.rule].keeps_basis and recipe.lora.one_rank
    return Feedback() if federation.error_feedback and federation.codec_up != "fp32" and steady else None


@dataclass(frozen=True)
class Channel:
    """A site's way to the server. steps: by name, in order."""

    codec: Coder
    steps: Mapping[str, Step]

    def send(self, tensors: Tensors, memory: Mapping[str, Tensors], key: int) -> tuple[dict[str, Tensor], dict[str, Tensors]]:
        """(what travels, what each step remembers). memory: step -> what it remembered; of steps that are not here, it stays.

        key: of what the codec draws. Raises CodecError where something cannot be sent.
        """
        passed = []
        for name, step in self.steps.items():
            tensors = step.leaves(tensors, memory.get(name, {}))
            passed.append((name, step, tensors))
        encoded = self.codec.encode(tensors, key)
        if not passed:
            return encoded, dict(memory)
        got = self.codec.decode(encoded, {name: tuple(t.shape) for name, t in tensors.items()})
        return encoded, {**memory, **{name: step.arrived(left, got, memory.get(name, {})) for name, step, left in passed}}


def channel_of(recipe: Recipe, codec: Coder | None = None) -> Channel:
    """The channel of the recipe's sites. codec: in place of `codec_up`."""
    steps = {name: step for name, entry in tables.STEPS.items() if (step := entry.load()(recipe)) is not None}
    return Channel(codec or make_codec(recipe.federation.codec_up), steps)
