"""The objective of a site's training: a weighted sum of terms, each a function of `Forward`.

A term returns its mean per supervised position, in nats. The training loop alone weights micro-batches, by
n_micro / n_step, so that 1 × 8 rows and 4 × 2 rows give the same step (METHOD §4).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fedkeel.objective.task import task_loss
from fedkeel.types import Forward

TERMS: dict[str, Callable[[Forward], Tensor]] = {"task": task_loss}


def objective(forward: Forward) -> Tensor:
    """The scalar that a site minimises on one micro-batch, in nats per supervised position."""
    return TERMS["task"](forward)
