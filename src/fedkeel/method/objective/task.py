"""The task itself: cross-entropy at supervised positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from fedkeel.method.objective.logits import wide
from fedkeel.types import Forward, Loss


def task_loss(forward: Forward) -> Tensor:
    """Mean cross-entropy of `targets` under `logits`, in nats per supervised position; sums run as in `wide`.

    Classes that a row does not allow carry logits of −inf; they take no part in the normalisation. Nor do entries whose
    offset is −inf.
    Raises ValueError if there is no position.
    """
    if not len(forward.targets):
        raise ValueError("a micro-batch without supervised positions has no task loss")
    logits, offsets = wide(forward.logits), forward.offsets
    if offsets is not None:
        where = (offsets.place.to(logits.device), offsets.token.to(logits.device))
        logits = logits.index_put(where, offsets.value.to(logits), accumulate=True)
    return cross_entropy(logits, forward.targets)


def task(forward: Forward, options: Any = None) -> Loss:
    """The term: `task_loss`, where there are two disturbed passes the mean of both (R-Drop); what is logged is the first's."""
    first = task_loss(forward)
    if forward.again is None:
        return Loss(first)
    return Loss((first + task_loss(replace(forward, logits=forward.again))) / 2, told=first)
