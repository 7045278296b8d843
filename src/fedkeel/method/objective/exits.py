"""Early exits: what the model would say if it ended at an earlier block, through its own last norm and output map."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedkeel.method.objective.consistency import self_consistency
from fedkeel.method.objective.task import task_loss
from fedkeel.method.objective.terms import Moment
from fedkeel.recipe.schema import Exit
from fedkeel.types import Forward


def exit_block(options: Exit, blocks: int, first: int, uniform: float, progress: float) -> int:
    """Index of the block behind which a step's exit is, from 0; −1 where there is none to choose.

    blocks: of the stack. first: index of the lowest that is trained. uniform: in [0, 1). progress: of the run, in [0, 1).
    """
    lowest = max(first, math.ceil(options.least * blocks) - 1, 0)
    count = blocks - 1 - lowest  # the last block is the full depth
    if count < 1:
        return -1
    open_ = count if not options.deepen else max(1, math.ceil(count * min(1.0, progress / options.deepen)))
    return blocks - 2 - int(uniform * open_)


def early(forward: Forward, options: Any) -> Tensor:
    """The term, in nats a position: cross-entropy of the exit's logits, or their divergence from those of the full depth,
    without gradient there. 0 where there is no exit. Raises ValueError if there is no position.

    Source: LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710, eq. 3, with one exit a step; self-distillation: Zhang et al.
    2019, arXiv:1905.08094.
    """
    if not len(forward.targets):
        raise ValueError("a micro-batch without supervised positions has no exit loss")
    if forward.exit is None:
        return forward.logits.new_zeros(())
    taught = []
    if options.teach != "self":
        taught.append(task_loss(replace(forward, logits=forward.exit)))
    if options.teach != "labels":
        taught.append(self_consistency(forward.logits, forward.exit))
    return torch.stack(taught).mean()


def exit_weight(options: Exit, moment: Moment) -> float:
    """λ_e."""
    return options.weight
