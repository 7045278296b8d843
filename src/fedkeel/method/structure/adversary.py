"""A second low-rank pair that ascends in the backward pass in which the first descends."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw
from fedkeel.model.places import Places
from fedkeel.rng import counter_normal, derive


class Adversary:
    """One pair (B2, A2) a LoRA branch, of the branch's rank: y += strength · B2 A2 x. It looks for the nearest worse weights.

    It is no random draw, so unlike the other structures it is not unbiased: it is the identity while B2 = 0, which is how
    every round begins, and at strength 0. It ascends the whole objective of the site; B2 A2 carries no α/r. Its parameters
    are no part of the model: they are never listed, saved or sent.
    Source: Bi-LoRA, arXiv:2508.19564.
    """

    def __init__(self, places: Places, amount: float, draw: Draw) -> None:
        """amount: ρ > 0, the largest sqrt(Σ ‖B2 A2‖_F²) over all branches. Raises StructureError if there is no branch."""
        places.need(places.branches, "adversary")
        self._draw, self._radius, self._branches = draw, amount, places.branches
        self.pairs: list[tuple[nn.Parameter, nn.Parameter]] = []  # (B2, A2), in the order of the branches
        for branch in places.branches:
            d_out, rank, d_in = branch.shape
            device = next(branch.a.parameters()).device
            b2, a2 = torch.zeros(d_out, rank, device=device), torch.zeros(rank, d_in, device=device)
            self.pairs.append((nn.Parameter(b2), nn.Parameter(a2)))
        self.reset(0)

    @torch.no_grad()
    def reset(self, key: int) -> None:
        """Begin a round: B2 = 0 and A2 ~ N(0, 1/d_in), from `key`."""
        for branch, (b2, a2) in zip(self._branches, self.pairs, strict=True):
            counters = torch.arange(a2.numel(), device=a2.device).view_as(a2)
            a2.copy_(counter_normal(derive(key, "adversary", branch.path), counters) / math.sqrt(a2.shape[1]))
            b2.zero_()
        self._clear()

    def attach(self) -> list[RemovableHandle]:
        """Put the pairs behind their modules."""
        return [
            branch.whole.register_forward_hook(partial(self._add, *pair))
            for branch, pair in zip(self._branches, self.pairs, strict=True)
        ]

    def _add(self, b2: Tensor, a2: Tensor, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not self._draw.active:
            return None
        change = nn.functional.linear(nn.functional.linear(inputs[0].to(a2.dtype), a2), b2)
        return output + (self._draw.strength * change).to(output.dtype)

    @torch.no_grad()
    def ascend(self, lr: float) -> None:
        """After the backward pass: θ2 += lr · grad / ‖grad‖ over all pairs together, then back into the ball of radius ρ.

        B2 A2 is scaled by min(1, ρ / norm), half of it (the root) in each factor. Gradients are cleared.
        """
        moved = [(p, p.grad) for pair in self.pairs for p in pair if p.grad is not None]
        if moved:
            length = torch.stack([g.square().sum() for _, g in moved]).sum().sqrt()
            for parameter, gradient in moved:
                parameter.add_(gradient * (lr / length.clamp_min(1e-30)))
            shrink = (self._radius / self._norm().clamp_min(1e-30)).clamp_max(1.0).sqrt()
            for b2, a2 in self.pairs:
                b2.mul_(shrink)
                a2.mul_(shrink)
        self._clear()

    @torch.no_grad()
    def norm(self) -> float:
        """sqrt(Σ ‖B2 A2‖_F²) over all branches."""
        return float(self._norm())

    def _norm(self) -> Tensor:
        # ‖B A‖² = Σ (BᵀB ⊙ AAᵀ): r × r numbers a branch instead of d_out × d_in
        squares = [((b2.T @ b2) * (a2 @ a2.T)).sum() for b2, a2 in self.pairs]
        return torch.stack(squares).sum().clamp_min(0.0).sqrt()

    def _clear(self) -> None:
        for pair in self.pairs:
            for parameter in pair:
                parameter.grad = None
