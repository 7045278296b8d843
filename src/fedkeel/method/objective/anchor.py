"""The analytic anchor: a ridge classifier on features of the frozen base, of sums over sites and stages, and its use as
teacher.

    W = M (G + λ I)⁻¹,  G = Σ h hᵀ,  M_l = Σ h over the rows of label l

Sums do not depend on which site held a row, nor on when it came: nothing is forgotten, and skew means nothing (Fed3R: Fanì et
al. 2024, arXiv:2405.14297; AFL: He et al. 2024, arXiv:2405.16240; analytic class-incremental learning: Zhuang et al. 2022,
arXiv:2205.14922). Features are put on a grid of whole numbers, so that their sums are exact, in any order.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fedkeel.method.objective.calibrate import nodes
from fedkeel.method.objective.logits import HIDDEN, wide
from fedkeel.method.objective.terms import Moment
from fedkeel.types import Forward, Head, Soft, Sums

RIDGES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
SCALES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0)  # of scores in a softmax, of which the likeliest is taken


class SumsError(ValueError):
    """Sums of which no classifier can be made."""


def sums_of(features: Tensor, labels: Sequence[str], stage: int = 0) -> Sums:
    """Of one task's rows, which came in `stage`. features: (rows, d) int16. labels: of each row."""
    wide_ = features.double()  # products of whole numbers under 2⁵³ are exact
    gram = (wide_.T @ wide_).to(torch.int64)
    at: dict[str, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        at[label].append(row)
    moments = {label: features[rows].to(torch.int64).sum(0) for label, rows in sorted(at.items())}
    return Sums(gram, moments, dict(sorted(Counter(labels).items())), stage=stage)


def added(parts: Iterable[Sums]) -> Sums:
    """The sums of all rows of several. Raises SumsError where their features differ in number."""
    gram: Tensor | None = None
    moments: dict[str, Tensor] = {}
    rows, hits, nats = Counter[str](), Counter[str](), [0.0] * len(SCALES)
    stage = 0
    for part in parts:
        if gram is not None and gram.shape != part.gram.shape:
            raise SumsError(f"features of {len(part.gram)} numbers beside such of {len(gram)}")
        gram = part.gram if gram is None else gram + part.gram
        for label, moment in part.moments.items():
            moments[label] = moments[label] + moment if label in moments else moment
        stage = max(stage, part.stage)
        rows.update(part.rows)
        hits.update(part.hits)
        nats = [a + b for a, b in zip(nats, part.nats or [0.0] * len(SCALES), strict=True)]
    if gram is None:
        raise ValueError("no sums")
    return Sums(gram, dict(sorted(moments.items())), dict(sorted(rows.items())), dict(sorted(hits.items())), nats, stage)


def inverse(sums: Sums, ridge: float) -> Tensor:
    """(G + λ I)⁻¹, (d, d) float64, in units of whole features; λ = ridge · the mean of G's diagonal, under ridge = 0
    `cross_validated`. Raises SumsError for sums that no rows have."""
    gram = sums.gram.double()
    try:
        strength = (ridge or cross_validated(sums)) * float(gram.diagonal().mean())
        return torch.cholesky_inverse(torch.linalg.cholesky(gram + strength * torch.eye(len(gram), dtype=torch.float64)))
    except RuntimeError as error:  # LinAlgError
        raise SumsError(f"sums that no rows have: {error}") from error


def cross_validated(sums: Sums) -> float:
    """The one of RIDGES with the least n · RSS / (n − tr G (G + λ I)⁻¹)², which sums alone tell: generalised cross-validation
    (Golub, Heath and Wahba 1979, Technometrics 21)."""
    values, vectors = torch.linalg.eigh(sums.gram.double())
    values = values.clamp_min(0)
    turned = (moments_of(sums) @ vectors).square().sum(0)  # Σ over labels
    count, mean = sum(sums.rows.values()), float(sums.gram.diagonal().double().mean())

    def error(ridge: float) -> float:
        shifted = values + ridge * mean
        left = count - float((turned * (shifted + ridge * mean) / shifted.square()).sum())
        free = count - float((values / shifted).sum())
        return count * max(left, 0.0) / max(free, 1e-6) ** 2

    return min(RIDGES, key=error)


def moments_of(sums: Sums) -> Tensor:
    """M, (labels, d) float64, by sorted labels."""
    return torch.stack([sums.moments[label].double() for label in sorted(sums.moments)])


def head_of(sums: Sums, ridge: float, means: bool = False) -> Head:
    """The classifier that sums make, and with `means` the mean of each label's features. Its scale is the one of SCALES under
    which held-out rows cost the fewest nats; its trust in a label the share of the label's rows that the others foretell, 0 of
    one whose rows were never foretold."""
    labels = tuple(sorted(sums.moments))
    weight = (moments_of(sums) @ inverse(sums, ridge)).float()
    scale = min(zip(sums.nats, SCALES, strict=True))[1] if any(sums.nats) else SCALES[len(SCALES) // 2]
    trust = torch.tensor([sums.hits.get(label, 0) / sums.rows[label] for label in labels])
    counts = torch.tensor([[float(sums.rows[label])] for label in labels], dtype=torch.float64)
    return Head(labels, weight, scale, trust, sums.stage, (moments_of(sums) / counts).float() if means else None)


def _columns(labels: Sequence[str], known: Sequence[str]) -> Tensor:
    """Where each of `labels` stands among the known ones, (rows,) int64."""
    place = {label: column for column, label in enumerate(known)}
    return torch.tensor([place[label] for label in labels])


def left_out(features: Tensor, labels: Sequence[str], known: tuple[str, ...], weight: Tensor, inv: Tensor) -> Tensor:
    """Scores of each row as if the classifier had been made without it, (rows, labels) float64, by the closed form

        s₋ᵢ = (sᵢ − hᵢᵢ yᵢ) / (1 − hᵢᵢ),  hᵢᵢ = xᵢᵀ (G + λ I)⁻¹ xᵢ

    (λ held). features: rows that are in the sums. known: the classifier's labels. inv: (G + λ I)⁻¹."""
    x = features.double()
    leverage = ((x @ inv.double()) * x).sum(1, keepdim=True)
    wanted = torch.nn.functional.one_hot(_columns(labels, known), len(known)).double()
    return (x @ weight.double().T - leverage * wanted) / (1 - leverage).clamp_min(1e-6)


def foretold(scores: Tensor, labels: Sequence[str], known: Sequence[str]) -> tuple[dict[str, int], list[float]]:
    """(label -> rows whose label has the highest score, nats of the labels in total at each of SCALES). scores: (rows,
    labels)."""
    wanted = _columns(labels, known)
    right = (scores.argmax(1) == wanted).tolist()
    hits = Counter(label for label, hit in zip(labels, right, strict=True) if hit)
    nats = [float(-(a * scores).log_softmax(1).gather(1, wanted[:, None]).sum()) for a in SCALES]
    return dict(sorted(hits.items())), nats


def along(
    answer: Sequence[int], labels: Sequence[Sequence[int]], chance: Sequence[float]
) -> list[tuple[int, int, float, float]]:
    """(place, token, its probability there, what the place weighs) along the right answer, at places where labels part.

    The KL between two distributions over label strings is the sum over all nodes of their trie of the KL of the next token
    there, a node weighing what the first distribution gives to the labels below it; these are the terms of the nodes on the
    answer's way. answer: its tokens. labels: those of every label. chance: of each, adding up to 1.
    """
    found = []
    for place, _, below in nodes(answer, labels):
        mass = math.fsum(chance[label] for leads in below.values() for label in leads)
        if len(below) > 1 and mass > 0:
            found += [(place, token, math.fsum(chance[i] for i in leads) / mass, mass) for token, leads in below.items()]
    return found


def listed_log_softmax(logits: Tensor, place: Tensor, token: Tensor) -> Tensor:
    """(M,) log softmax over the listed entries of a position alone: entry `token[m]` of position `place[m]`. logits: (N, V)."""
    values = wide(logits)
    listed = values[place, token].clamp_min(HIDDEN)
    most = torch.full((len(values),), -math.inf, device=values.device, dtype=values.dtype)
    most = most.scatter_reduce(0, place, listed.detach(), "amax")
    total = torch.zeros_like(most).index_add(0, place, (listed - most[place]).exp())
    return listed - most[place] - total.log()[place]


def kl_to_soft(logits: Tensor, soft: Soft) -> Tensor:
    """Σ_n w_n KL(t_n ‖ q_n) / N, q being the softmax of the listed entries of a position alone. logits: (N, V)."""
    place, token = soft.place.to(logits.device), soft.token.to(logits.device)
    log_q = listed_log_softmax(logits, place, token)
    chance = soft.value.to(log_q)
    each = torch.special.xlogy(chance, chance) - chance * log_q
    return (soft.weight.to(log_q)[place] * each).sum() / len(logits)


def to_anchor(forward: Forward, options: Any) -> Tensor:
    """The term, in nats a position: `kl_to_soft` from what the analytic classifier says; 0 where it says nothing. Raises
    ValueError if there is no position."""
    if not len(forward.targets):
        raise ValueError("a micro-batch without supervised positions has no anchor loss")
    return forward.logits.new_zeros(()) if forward.anchor is None else kl_to_soft(forward.logits, forward.anchor)


def anchor_weight(options: Any, moment: Moment) -> float:
    """λ_a, from the first step on: unlike a global model, the anchor knows as much then as later."""
    return float(options.anchor)
