"""Sharpness-aware steps: the gradient of where the loss is worst nearby."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def backward_at_worst(parameters: Sequence[Tensor], radius: float, backward: Callable[[], object]) -> None:
    """Replace the gradients in `parameters` by those at w + radius · g/‖g‖, g the gradients there now; w is restored exactly.

    backward: adds gradients at the present w. Where g = 0 nothing changes.
    Source: sharpness-aware minimisation at the sites, FedSAM (Qu et al. 2022, arXiv:2206.02618, eq. 5).
    """
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]))
    if not float(norm) or not math.isfinite(float(norm)):
        return
    with torch.no_grad():
        here = [p.detach().clone() for p in parameters]
        for p in parameters:
            if p.grad is not None:
                p.add_(p.grad, alpha=radius / float(norm))
            p.grad = None
    backward()
    with torch.no_grad():
        for p, old in zip(parameters, here, strict=True):
            p.copy_(old)
