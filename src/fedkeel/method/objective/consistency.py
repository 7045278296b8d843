"""Structural consistency: two passes over the same positions, under different structures, should say the same."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedkeel.method.objective.logits import log_probabilities
from fedkeel.method.objective.terms import Moment
from fedkeel.types import Forward


def _check(first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise ValueError(f"shapes disagree: {tuple(first.shape)}, {tuple(second.shape)}")
    if not len(first):
        raise ValueError("a micro-batch without supervised positions has no consistency loss")


def self_consistency(clean: Tensor, perturbed: Tensor) -> Tensor:
    """Mean KL(clean ‖ perturbed), in nats per position, ≥ 0 up to rounding. No gradient reaches `clean`.

    clean, perturbed: (N, V) logits of the student without and with perturbation, −inf at the same entries (not allowed).
    Raises ValueError if the shapes disagree or N = 0. Mode `self` of method.md §3.
    """
    _check(clean, perturbed)
    p, q = log_probabilities(clean.detach()), log_probabilities(perturbed)
    return (p.exp() * (p - q)).sum(-1).mean()


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """Mean ½ (KL(first ‖ second) + KL(second ‖ first)), in nats per position, ≥ 0. The gradient reaches both.

    first, second: (N, V) logits of two perturbed passes, −inf at the same entries (not allowed).
    Raises ValueError if the shapes disagree or N = 0. Source: Liang et al. 2021, R-Drop, arXiv:2106.14448.
    """
    _check(first, second)
    p, q = log_probabilities(first), log_probabilities(second)
    # Σ p (log p − log q) + Σ q (log q − log p), gathered entry by entry: no summand is negative
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


def rdrop(forward: Forward, options: Any = None) -> Tensor:
    """The term of structure.mode `rdrop`: `symmetric_kl` of the two disturbed passes. Raises ValueError without the second."""
    if forward.again is None:
        raise ValueError("R-Drop compares two disturbed passes, and there is one")
    return symmetric_kl(forward.logits, forward.again)


def rdrop_weight(options: Any, moment: Moment) -> float:
    """options.weight where anything is disturbed at all. options: a recipe's [structure]."""
    return float(options.weight) if moment.strength or moment.dropout else 0.0


def to_clean(forward: Forward, options: Any = None) -> Tensor:
    """The term of structure.mode `self`: `self_consistency` with the clean pass. Raises ValueError without one."""
    if forward.clean is None:
        raise ValueError("self-consistency compares with a clean pass, and there is none")
    return self_consistency(forward.clean, forward.logits)


def self_weight(options: Any, moment: Moment) -> float:
    """options.weight in every options.every-th step in which structures are on. options: a recipe's [structure]."""
    return float(options.weight) if moment.strength and moment.step % options.every == 0 else 0.0
