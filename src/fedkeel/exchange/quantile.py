"""A clipping bound that follows a quantile of the lengths of the sites' changes, by a noised count of those below it.

Andrew, Thakkar, McMahan & Ramaswamy 2021, arXiv:1905.03871, algorithm 1: with bᵢ = 1 where ‖Δᵢ‖ ≤ C_t,

    b̄_t = ½ + (Σ_i (bᵢ − ½) + N(0, σ_b²)) / n,    C_{t+1} = C_t · exp(−η (b̄_t − γ)).

A site is in the count by ±½, so that the change with z_Δ · C and the count with σ_b are together one Gaussian of z
(`noise.of_change`), and ε is that of a fixed bound. Every C is a function of what is private already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fedkeel.exchange.clip import length
from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.noise import of_count
from fedkeel.recipe.schema import Privacy
from fedkeel.rng import secret_normal

LEAST, MOST = 2.0**-100, 2.0**100  # of C, with room for its products in float32
_TOLD = re.compile(r"[+-]\d\.\d{12}e[+-]\d\d")


def as_now(privacy: Privacy, clip: float) -> Privacy:
    """What holds in a round whose bound is `clip`; 0: none was made yet, and the recipe's is the first."""
    return replace(privacy, clip=clip) if privacy.quantile and clip else privacy


def side(change: Mapping[str, Tensor], privacy: Privacy) -> float:
    """bᵢ − ½ of a site, behind its own part of the noise where the sites add it. privacy: as now."""
    own = 0.5 if length(change) <= privacy.clip else -0.5
    if privacy.noise_at == "coordinator":
        return own
    return own + of_count(privacy, 0) / math.sqrt(privacy.together) * float(secret_normal(()))


def next_bound(privacy: Privacy, total: float, count: int, asked: int) -> float:
    """C_{t+1} for a `total` of the sides of `count` sites, of `asked`; noised here where the coordinator adds it. privacy: as
    now. Raises ValueError where C leaves what float32 holds."""
    if privacy.noise_at == "coordinator":
        total += of_count(privacy, asked) * float(secret_normal(()))
    bound = math.log(privacy.clip) - privacy.clip_rate * (0.5 + total / count - privacy.quantile)
    if not math.log(LEAST) < bound < math.log(MOST):
        raise ValueError(
            f"the clipping bound became e^{bound:.4g}; a lower privacy.clip_rate, or noise of the count that is small beside "
            f"the number of sites, keeps it"
        )
    return math.exp(bound)


def told(side: float) -> str:
    """A side as it travels: of one width, so that a message's bytes say nothing of it."""
    return f"{side:+.12e}"


def heard(text: Any, privacy: Privacy) -> float:
    """The side that a site told. Raises EnvelopeError for what is none."""
    value = float(text) if isinstance(text, str) and _TOLD.fullmatch(text) else math.nan
    if math.isnan(value) or (privacy.noise_at == "coordinator" and abs(value) != 0.5):
        raise EnvelopeError(f"the message says {text!r} where it belongs whether its change was within the clipping bound")
    return value


def read_bound(value: Any) -> float:
    """C of a header, 0 where it names none. Raises EnvelopeError."""
    if value == 0 or (type(value) is float and LEAST < value < MOST):
        return float(value)
    raise EnvelopeError(f"the message reports a clipping bound of {value!r}")
