"""Pull what a model makes of a row towards the mean that all sites' rows of its label have.

Source: FedProto, Tan et al. 2022 (AAAI), arXiv:2105.00243, eq. 6. There prototypes are means of trained states, exchanged every
round; here they are means of the frozen base's features, of which the analytic anchor's sums tell once a stage.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedkeel.method.objective.terms import Moment
from fedkeel.types import Forward


def to_prototype(forward: Forward, options: Any) -> Tensor:
    """The mean over the micro-batch's rows of the mean squared difference of a row's pooled state and its label's prototype,
    both with each part's mean 0 and deviation 1, so that about 2 is as far as chance; rows of a label without prototype count
    as 0. Raises ValueError if there is no position."""
    if not len(forward.targets):
        raise ValueError("a micro-batch without supervised positions has no prototype loss")
    if forward.prototypes is None:
        return forward.logits.new_zeros(())
    states, means = forward.prototypes
    return (states.float() - means.to(states.device)).square().mean(1).sum() / len(forward.targets)


def prototype_weight(options: Any, moment: Moment) -> float:
    """λ_p, from the first step on."""
    return float(options.prototype)
