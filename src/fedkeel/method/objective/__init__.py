"""The objective of a site's training: a weighted sum of terms (METHOD §4).

A term returns its mean per supervised position, in nats. The training loop alone weights terms and micro-batches, the
latter by n_micro / n_step, so that 1 × 8 rows and 4 × 2 rows give the same step. To add a term: one file, and one line in
a table here; tests/laws/test_objective.py then runs over it. The proximal term is of weights, not positions, and stands
apart.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedkeel.method.objective.consistency import self_consistency, symmetric_kl
from fedkeel.method.objective.distill import Guidance, distill
from fedkeel.method.objective.task import task_loss
from fedkeel.types import Forward

# Terms of one pass: `Forward` -> scalar.
TERMS: dict[str, Callable[[Forward], Tensor]] = {
    "task": task_loss,
    "distill": lambda forward: distill(forward, Guidance()).loss,
}

# Terms of two passes over the same positions, by the mode of L_struct that takes them: (N, V) logits twice -> scalar.
# `self` wants the clean pass first and sends no gradient there.
PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "self": self_consistency,
    "rdrop": symmetric_kl,
}
