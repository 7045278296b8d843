"""What the frozen base says of a prompt, whatever the adapter: the features of the analytic anchor, and its classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.data.batches import padded
from fedkeel.types import Head

STEP = 2.0**-6  # of the grid, where a feature's deviation is 1
BOUND = 512  # most of a feature, in steps
ROWS = 32  # prompts at once


def features_of(parts: Sequence[Tensor]) -> Tensor:
    """(rows, d) whole numbers, int16: of each part, (rows, its width), a row less its mean, over its deviation, in steps of
    the grid, cut at ± BOUND; then a 1, for the intercept."""
    whole = (standardised([part.double() for part in parts]) / STEP).round().clamp(-BOUND, BOUND)
    return torch.cat([whole, torch.full_like(whole[:, :1], 1 / STEP)], 1).to(torch.int16)


def _standard(part: Tensor) -> Tensor:
    """Each row less its mean, over its deviation."""
    centred = part - part.mean(1, keepdim=True)
    return centred / centred.std(1, keepdim=True, correction=0).clamp_min(1e-12)


def standardised(parts: Sequence[Tensor]) -> Tensor:
    """(rows, d): parts side by side, of each a row less its mean, over its deviation. parts: (rows, its width) each."""
    return torch.cat([_standard(part) for part in parts], 1)


def chances(head: Head, features: Tensor, labels: Sequence[str]) -> Tensor:
    """softmax(a · scores) over `labels`, (rows, labels) float32; a label without evidence has score 0. features: (rows, d)."""
    return (head.scale * scores_of(head, features, labels)).softmax(-1)


def scores_of(head: Head, features: Tensor, labels: Sequence[str]) -> Tensor:
    """weight[l] · h of each of `labels`, (rows, labels) float32; 0 of a label without evidence."""
    whole = features.float() @ head.weight.T
    place = {label: column for column, label in enumerate(head.labels)}
    columns = torch.tensor([place.get(label, -1) for label in labels])
    return whole[:, columns.clamp_min(0)] * (columns >= 0)


@dataclass(frozen=True)
class Beside:
    """Analytic classifiers, served beside an adapter. weight: of their log chances. alone: labels are scored by them, without a
    pass of the adapter's model."""

    heads: Mapping[str, Head]
    weight: float = 1.0
    alone: bool = False

    def together(self, own: Tensor, task: str, labels: Sequence[str], features: Tensor) -> Tensor:
        """What the labels of a row of a task that has a head score, (labels,): own + weight · the head's log chances.

        own: log chances of the adapter's model, or logits. features: (d,) of the row's prompt.
        """
        return own + self.weight * chances(self.heads[task], features[None], labels)[0].log().to(own)


def by_label(head: Head) -> Tensor:
    """a (W, w₀) of a classifier: (labels, d + 1), upon states of deviation 1."""
    return head.scale / STEP * head.weight


class ByHead:
    """Class scores of an encoder by its tasks' analytic classifiers: a (W x + w₀), x being what is pooled of a row's states, at
    each depth less its mean and over its deviation. Of the frozen base these are the classifiers' own scores, up to the
    grid; of an adapted model's they are what training bends. A label without evidence scores 0.
    """

    def __init__(self, heads: Mapping[str, Head], classes: Sequence[str], device: torch.device) -> None:
        self.parts = {}
        place = {label: column for column, label in enumerate(classes)}
        for task, head in sorted(heads.items()):
            known = [n for n, label in enumerate(head.labels) if label in place]
            columns = torch.tensor([place[head.labels[n]] for n in known], device=device)
            self.parts[task] = columns, by_label(head)[known].to(device)

    def __call__(self, pooled: Sequence[Tensor], tasks: Sequence[str], otherwise: Tensor) -> Tensor:
        """(rows, V). pooled: (rows, d) at each depth. tasks: of each row. otherwise: (rows, V), for rows of a task without
        classifier."""
        x = standardised([part.float() for part in pooled])
        x, scores = torch.cat([x, torch.ones_like(x[:, :1])], 1), otherwise
        for task, (columns, weight) in self.parts.items():
            rows = torch.tensor([n for n, of in enumerate(tasks) if of == task], dtype=torch.int64, device=x.device)
            mine = torch.zeros(len(rows), otherwise.shape[1], device=x.device).index_copy(1, columns, x[rows] @ weight.T)
            scores = scores.index_copy(0, rows, mine.to(scores))
        return scores


class Features:
    """Of one base: what is pooled of a prompt's hidden states, as whole numbers, see `features_of`. Each prompt is worked out
    once and kept, in two bytes a number.

    Only while no base shift moves the frozen maps.
    """

    def __init__(self, pooled: Callable[[Tensor, Tensor], Sequence[Tensor]], pad: int) -> None:
        """pooled: (ids, mask), each (rows, tokens) and padded with `pad` on the right -> parts, (rows, width) each."""
        self._pooled, self._pad = pooled, pad
        self._held: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(rows, d) int16."""
        keys = [tuple(prompt) for prompt in prompts]
        fresh = sorted({key for key in keys if key not in self._held}, key=lambda key: (len(key), key))
        for start in range(0, len(fresh), ROWS):
            chunk = fresh[start : start + ROWS]
            self._held |= zip(chunk, features_of(self._pooled(*padded(chunk, self._pad))), strict=True)
        return torch.stack([self._held[key] for key in keys])
