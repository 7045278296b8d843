"""A teacher's distributions in little memory: the largest log-probabilities, and how much the others hold together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fedkeel.method.objective.logits import wide


@dataclass(frozen=True)
class TopK:
    """Distributions at N positions: k entries each exactly, the rest as one sum.

    values: (N, k) log-probabilities, −inf at entries not allowed. indices: (N, k) int64, their places in [0, V).
    tail: (N,) the log of the mass outside them, −inf if there is none. entries: (N,) int64, how many allowed entries share it.
    """

    values: Tensor
    indices: Tensor
    tail: Tensor
    entries: Tensor

    def select(self, index: Tensor | slice) -> TopK:
        """The positions that `index` names, in its order."""
        return TopK(self.values[index], self.indices[index], self.tail[index], self.entries[index])

    @staticmethod
    def cat(parts: Sequence[TopK]) -> TopK:
        """The positions of all parts, one after the other. All must keep the same k."""
        return TopK(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(TopK)))


def compress(logits: Tensor, gold: Tensor, k: int = 64) -> TopK:
    """The gold entry and the k − 1 most probable others (all entries where V ≤ k), with the mass of what is left.

    logits: (N, V), −inf where an entry is not allowed. gold: (N,) int64, an allowed entry. k ≥ 1, else ValueError.
    No gradient is kept. With m = exp(tail) and e = entries, `restore` gives p̂ with ‖p − p̂‖₁ ≤ 2 m and KL(p ‖ p̂) ≤ m log e:
    both 0 where no allowed entry is left out. The probability of gold is exact, and so are those of all kept entries.
    """
    if k < 1 or gold.shape != logits.shape[:1]:
        raise ValueError(f"k must be ≥ 1 and gold (N,): k = {k}, {tuple(logits.shape)}, {tuple(gold.shape)}")
    every = wide(logits.detach()).log_softmax(-1)
    first = every.scatter(1, gold[:, None], float("inf"))  # gold before all others
    indices = first.topk(min(k, every.shape[1]), dim=1).indices
    left = every.scatter(1, indices, float("-inf"))
    return TopK(every.gather(1, indices), indices, left.logsumexp(-1), (left > float("-inf")).sum(-1))


def restore(top: TopK, like: Tensor) -> Tensor:
    """(N, V) log-probabilities: the kept ones exactly, the tail spread evenly over the allowed entries not kept.

    like: (N, V), −inf at exactly the entries that were −inf when compressed, such as the student's logits; nothing else of
    it is read. Error: see `compress`.
    """
    share = top.tail - top.entries.clamp_min(1).log()  # entries = 0 goes with tail = −inf
    spread = share[:, None].expand(like.shape).masked_fill(like.detach() == float("-inf"), float("-inf"))
    return spread.scatter(1, top.indices, top.values)
