"""What the frozen base says of a prompt, whatever the adapter: the features of the analytic anchor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedkeel.method.objective.anchor import chances, features_of
from fedkeel.types import Head

if TYPE_CHECKING:
    from fedkeel.model.lora import Model

ROWS = 32  # prompts at once


@dataclass(frozen=True)
class Beside:
    """Analytic classifiers that are served beside an adapter. weight: of their log chances. alone: in place of the
    adapter's."""

    heads: Mapping[str, Head]
    weight: float = 1.0
    alone: bool = False

    def together(self, own: Tensor, task: str, labels: Sequence[str], features: Tensor) -> Tensor:
        """What labels of rows of one task score, (rows, labels): own + weight · the head's log chances.

        own: log chances of the adapter's model, or logits. features: (rows, d) of the rows' prompts.
        """
        if task not in self.heads:
            return own
        told = chances(self.heads[task], features, labels).log().to(own)
        return told if self.alone else own + self.weight * told


class Features:
    """Of one model's base: what `Model.pooled` makes of a prompt's hidden states, as whole numbers, see `anchor.features_of`.
    Each prompt is worked out once and kept, in two bytes a number.

    Only while no base shift moves the frozen maps.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._held: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(rows, d) int16."""
        keys = [tuple(prompt) for prompt in prompts]
        fresh = sorted({key for key in keys if key not in self._held}, key=lambda key: (len(key), key))
        for start in range(0, len(fresh), ROWS):
            chunk = fresh[start : start + ROWS]
            self._held |= zip(chunk, features_of(self._pooled(chunk)), strict=True)
        return torch.stack([self._held[key] for key in keys])

    @torch.no_grad()
    def _pooled(self, prompts: Sequence[tuple[int, ...]]) -> list[Tensor]:
        model = self._model
        assert model.initial is not None
        width = max(map(len, prompts))
        pad = model.tokenizer.pad_token_id
        ids = torch.tensor([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts], device=model.device)
        mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=model.device)
        was = model.net.training
        model.train(False)
        try:
            with model.swapped(model.park(model.initial)), model.autocast():
                return [part.float().cpu() for part in model.pooled(ids, mask)]
        finally:
            model.train(was)
