"""What terms share about logits: their precision, and the entries that a row does not allow."""

from __future__ import annotations

import torch
from torch import Tensor

# Stands for −inf, the logit of an entry that a row does not allow. Its probability is exactly 0 all the same, while the
# difference of two such log-probabilities stays finite, so that probability 0 times that difference is 0 and not NaN.
HIDDEN = -1e30


def wide(logits: Tensor, copy: bool = False) -> Tensor:
    """The same logits in the precision that sums run in: float64 stays, any other type becomes float32.

    copy: in memory of their own even where the type is right.
    """
    return logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32, copy=copy)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax of (N, V) logits, ≤ 0, in nats, as `wide`; about HIDDEN where the logit is −inf, with gradient 0."""
    return wide(logits).clamp_min(HIDDEN).log_softmax(-1)
