"""What a stage learns stays out of the way of what was learnt before: its rows of A are orthogonal to the earlier ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedkeel.method.objective.logits import wide
from fedkeel.types import Parameters


def orthogonal(parameters: Parameters, options: Any) -> Tensor:
    """The term: Σ over branches of Σ |A_before A_nowᵀ|, a scalar ≥ 0, A_now being the rows that this stage trains and A_before
    those of the stages before it, without gradient; 0 in the first stage.

    It depends on no position: once an optimiser step is enough. Source: O-LoRA, Wang et al. 2023, arXiv:2310.14152, as its
    published code (cmnfriend/O-LoRA) sums entries, of which its weight of 0.5 is; eq. 8 of the paper has their squares.
    """
    begin, end = parameters.ranks.start, parameters.ranks.stop
    overlaps = [wide(a[:begin].detach()) @ wide(a[begin:end]).T for a in parameters.downs]
    return torch.stack([overlap.abs().sum() for overlap in overlaps]).sum()
