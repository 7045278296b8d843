"""The proximal term: a site's weights stay near those that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedkeel.method.objective.logits import wide
from fedkeel.method.objective.terms import Moment
from fedkeel.types import Parameters


def proximal(parameters: Sequence[Tensor], anchors: Sequence[Tensor]) -> Tensor:
    """½ Σ ‖w − w0‖² over all pairs of tensors, a scalar ≥ 0; the caller applies μ. No gradient reaches `anchors`.

    It depends on no position: once an optimiser step is enough, not once a micro-batch.
    Raises ValueError if the two differ in number or shape, or are empty. Source: Li et al. 2018, FedProx, arXiv:1812.06127.
    """
    if not parameters or [w.shape for w in parameters] != [w0.shape for w0 in anchors]:
        raise ValueError(f"{len(parameters)} parameters and {len(anchors)} anchors do not pair up in number and shape")
    pairs = zip(parameters, anchors, strict=True)
    return torch.stack([(wide(w) - wide(w0.detach())).square().sum() for w, w0 in pairs]).sum() / 2


def to_start(parameters: Parameters, options: Any = None) -> Tensor:
    """The term: `proximal` to where the round began."""
    return proximal(parameters.now, parameters.start)


def proximal_weight(options: Any, moment: Moment) -> float:
    """μ. options: a recipe's [train]."""
    return float(options.proximal)
