"""Blocks of a stack that hand on what they are given: a shorter model within a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn


def passed(block: nn.Module, length: int, states: Tensor, *others: Any, **named: Any) -> Any:
    """What `block` gives when it does nothing: the states as they came.

    length: of the tuple that the block gives; 0: it gives the states alone. T5's blocks hand on their relative positions to
    the next one, so those stand in the tuple as they came too.
    """
    if not length:
        return states
    given = inspect.signature(type(block).forward).bind_partial(block, states, *others, **named).arguments
    kept = [value for name, value in given.items() if name.endswith("position_bias")]
    return (states, *[*kept, *[None] * length][: length - 1])


def states_of(output: Any) -> Tensor:
    """The hidden states in what a block gives."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def kept_blocks(blocks: int, depth: float, order: Sequence[int] = ()) -> list[int]:
    """Numbers of the blocks that are left at a share `depth` of them: the lowest, or what is left when those that `order` names
    first have gone. The first block stays always: in T5 it makes what the others read of relative positions.

    Raises ValueError for an order that is not one of all blocks but the first.
    """
    left = blocks - min(round(round((1 - depth) * blocks, 9)), blocks - 1)  # 0.9 is no tenth short of 1 in binary
    if not order:
        return list(range(left))
    if sorted(order) != list(range(1, blocks)):
        raise ValueError(f"{list(order)} is no order of the blocks 1 to {blocks - 1}")
    return sorted({*range(blocks)} - {*order[: blocks - left]})


class Patch:
    """Another forward of a module, until it is removed; those of one module go in the other order than they came."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._before = module, module.__dict__.get("forward")
        module.forward = forward

    def remove(self) -> None:
        """The forward that it had before."""
        self._module.__dict__.pop("forward", None)
        if self._before is not None:
            self._module.forward = self._before


@contextmanager
def whole(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While it lasts, `blocks` run as they were made, whatever patches they have."""
    lifted = [(block, block.__dict__.pop("forward")) for block in blocks if "forward" in block.__dict__]
    try:
        yield
    finally:
        for block, forward in lifted:
            block.forward = forward


@contextmanager
def without(blocks: Sequence[nn.Module], forms: Sequence[int], begin: Tensor | None = None) -> Iterator[None]:
    """While it lasts, `blocks` are not run. forms: of each, the length of its tuple, see `passed`. begin: what the first of
    them hands on instead of what it is given."""
    with ExitStack() as undo:
        for number, (block, length) in enumerate(zip(blocks, forms, strict=True)):
            first = begin if number == 0 else None
            undo.callback(Patch(block, partial(_handed_on, block, length, first)).remove)
        yield


def _handed_on(block: nn.Module, length: int, begin: Tensor | None, states: Tensor, *others: Any, **named: Any) -> Any:
    return passed(block, length, states if begin is None else begin, *others, **named)
