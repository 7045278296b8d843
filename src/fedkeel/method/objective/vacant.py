"""Guidance on what a site has no evidence on: among the labels that it holds no row of, the global model is the teacher."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fedkeel.method.objective.anchor import kl_to_soft, listed_log_softmax
from fedkeel.types import Forward, Soft


def vacant(forward: Forward, options: Any) -> Tensor:
    """The term, in nats a position: Σ_n KL(p̂_n ‖ q̂_n) / N, p̂ of the teacher and q̂ of the student renormalised among what the
    restricted softmax leaves out; 0 of a position that leaves nothing out, or one entry, which is nothing to choose from.

    Raises ValueError if there is no position. Source: vacant-class distillation of FedVLS, Guo et al. 2024, arXiv:2401.02329,
    carried over to tries of label strings.
    """
    if not len(forward.targets):
        raise ValueError("a micro-batch without supervised positions has no loss among absent labels")
    teacher, offsets = forward.teacher, forward.offsets
    if teacher is None or offsets is None:
        return forward.logits.new_zeros(())
    device = forward.logits.device
    absent = offsets.value == -math.inf
    place, token = (t[absent].to(device) for t in (offsets.place, offsets.token))
    chance = listed_log_softmax(teacher.logits.detach(), place, token).exp()
    return kl_to_soft(forward.logits, Soft(place, token, chance, chance.new_ones(len(forward.targets))))
