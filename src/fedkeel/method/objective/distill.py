"""Differentiated distillation guidance: what a site takes from the global model, by token, task, site and layer (method.md §2).

KL(teacher ‖ student) splits into a gold part and a rest (Zhao et al. 2022, DKD, arXiv:2203.08679, eq. 7):

    KL(p ‖ q) = TCKD + (1 − p_y) · NCKD

TCKD is the KL of the two-way split gold / not gold, NCKD the KL among the not-gold entries, renormalised. `distill`
weighs each by its own gate. Plain distillation (FedGKD, 2107.00051) is gold="constant", rest="kl"; FedNTD (2106.03097)
is gold="off", rest="constant".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from fedkeel.method.objective.logits import HIDDEN, wide
from fedkeel.method.objective.terms import Moment
from fedkeel.types import Forward, Loss, Teacher

GOLD = ("sigmoid", "hard", "constant", "off")
REST = ("kl", "entropy", "constant", "off")
ALIGN = ("off", "cka", "cosine")

FLOOR = 0.1  # least share of beta that the entropy gate leaves
# Logits worked on at once, on a CPU and on CUDA: half a megabyte stays in a core's cache; a GPU wants large blocks.
BLOCK = (2**17, 2**25)
SHORT = 1e-6  # vectors shorter than this are not scaled up to length 1, so that a zero state has a finite gradient


@dataclass(frozen=True)
class Guidance:
    """Settings of `distill`. Raises ValueError where one is out of its domain.

    temperature: τ > 0 of both divergences. gold: the gate a of the gold part, see `gold_gate`; kappa: κ > 0, its softness
    in nats. rest: the gate b of the rest, see `rest_gate`; beta: ≥ 0, its height, which rest="kl" does not use.
    align: how hidden states are compared, `linear_cka` or `mean_cosine`; align_weight: η ≥ 0.
    """

    temperature: float = 1.0
    gold: str = "sigmoid"
    kappa: float = 1.0
    rest: str = "kl"
    beta: float = 1.0
    align: str = "off"
    align_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("gold", GOLD), ("rest", REST), ("align", ALIGN)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} = {getattr(self, name)!r} is not one of {', '.join(known)}")
        if not (self.temperature > 0 and self.kappa > 0 and self.beta >= 0 and self.align_weight >= 0):
            raise ValueError(f"temperature and kappa must be > 0, beta and align_weight ≥ 0: {self}")


@dataclass(frozen=True)
class Distilled:
    """loss: scalar with gradient, in nats per supervised position. gold_gate, rest_gate: (N,) a and b, for the log."""

    loss: Tensor
    gold_gate: Tensor
    rest_gate: Tensor


@dataclass(frozen=True)
class Split:
    """Distributions at N positions, said in two steps: gold or not, and if not, which entry. Natural logs, no gradient.

    gold, rest: (N,) log p_y and log(1 − p_y), each precise where the other is 0. among: (N, V) log(p_c / (1 − p_y)), about
    HIDDEN at gold and at entries not allowed; chance: its exponential, 0 there. Where nothing but gold is allowed, rest is
    about HIDDEN as well and every chance 0.
    """

    gold: Tensor
    rest: Tensor
    among: Tensor
    chance: Tensor

    def entropy(self) -> Tensor:
        """(N,) entropy of the whole distribution, in nats, ≥ 0: of the first step, and of the second where it is taken."""
        second = -(self.chance * self.among).sum(-1)
        return self.rest.exp() * (second - self.rest) - self.gold.exp() * self.gold


def split(logits: Tensor, gold: Tensor, temperature: float = 1.0) -> Split:
    """Split softmax(logits / temperature). logits: (N, V), −inf where an entry is not allowed; gold: (N,) int64, allowed."""
    # a copy, in place from here on: moving memory is what this costs at a large V
    among, at = wide(logits.detach(), copy=True), gold[:, None]
    if temperature != 1:
        among /= temperature
    of_gold = among.gather(1, at)
    among.scatter_(1, at, HIDDEN).clamp_min_(HIDDEN)
    top = among.amax(-1, keepdim=True).clamp_min(HIDDEN / 2)  # so that hidden entries stay hidden where all are
    among -= top
    chance = among.exp()
    total = chance.sum(-1, keepdim=True).clamp_min(1.0)  # the top entry alone adds 1; less only where all are hidden
    chance /= total
    among -= total.log()
    # logit of p_y. A sum of not-gold entries, never 1 − p_y, which is 0 in float32 once p_y > 1 − 3e-8.
    margin = ((of_gold - top) - total.log()).squeeze(1)
    return Split(logsigmoid(margin), logsigmoid(-margin), among, chance)


def _divergences(student: Split, teacher: Split) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD, (N,) each."""
    p, rest = teacher.gold.exp(), teacher.rest.exp()
    two_way = p * (teacher.gold - student.gold) + rest * (teacher.rest - student.rest)
    return two_way, (teacher.among - student.among).mul_(teacher.chance).sum(-1)


def _slope(student: Split, teacher: Split, gold: Tensor, for_two_way: Tensor, for_among: Tensor) -> Tensor:
    """(N, V) gradient of Σ (for_two_way · TCKD + for_among · NCKD) in z = logits / τ. Overwrites the student's `chance`.

    With m = z_y − logsumexp(other z), the logit of q_y:  dTCKD/dm = q_y − p_y,  dm/dz_c = −q̂_c and dm/dz_y = 1,
    dNCKD/dz_c = q̂_c − p̂_c, for c ≠ y and q̂, p̂ renormalised among those. Written out, it needs the two softmaxes only.
    """
    pull = for_two_way * (student.gold.exp() - teacher.gold.exp())
    gradient = (student.chance - teacher.chance).mul_(for_among[:, None])  # the difference first: exactly 0 where the two agree
    gradient -= student.chance.mul_(pull[:, None])
    return gradient.scatter_(1, gold[:, None], pull[:, None])


class _Divergences(torch.autograd.Function):
    """TCKD and NCKD of the student's logits, (N,) each, at temperature 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, gold: Tensor) -> Any:
        p, q = split(teacher, gold), split(logits, gold)
        ctx.save_for_backward(gold, p.gold, p.rest, p.among, p.chance, q.gold, q.rest, q.among, q.chance)
        ctx.dtype = logits.dtype
        return _divergences(q, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, for_two_way: Tensor, for_among: Tensor) -> Any:
        gold, p_gold, p_rest, p_among, p_chance, q_gold, q_rest, q_among, q_chance = ctx.saved_tensors
        p, q = Split(p_gold, p_rest, p_among, p_chance), Split(q_gold, q_rest, q_among, q_chance.clone())
        return _slope(q, p, gold, for_two_way, for_among).to(ctx.dtype), None, None


class _Guided(torch.autograd.Function):
    """mean_i [u_i a_i TCKD_i + v_i b_i NCKD_i], and a and b, with the gradient found on the way, block of rows by block.

    A block stays in the processor's cache through the dozen passes that this takes, and its memory serves the next: at 256
    rows of 8,192 entries that is 1.5 times as fast as whole matrices, and one of them is held instead of six.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Teacher, gold: Tensor, guidance: Guidance) -> Any:
        n, tau = len(gold), guidance.temperature
        rows = max(1, BLOCK[logits.device.type == "cuda"] // logits.shape[1])
        gradient = torch.empty_like(logits)
        loss, a, b = torch.empty(3, n, dtype=wide(logits[:0]).dtype, device=logits.device)
        softer = tau != 1 and (guidance.gold in ("sigmoid", "hard") or guidance.rest == "entropy")
        for at in (slice(start, start + rows) for start in range(0, n, rows)):
            student, said, y = logits[at], teacher.logits[at], gold[at]
            q, p = split(student, y, tau), split(said, y, tau)
            plain = (split(student, y), split(said, y)) if softer else (q, p)
            a[at] = gold_gate(*plain, guidance)
            b[at] = rest_gate(*plain, p, guidance)
            for_two_way, for_among = tau**2 * teacher.gold_trust[at] * a[at], tau**2 * teacher.rest_trust[at] * b[at]
            two_way, among = _divergences(q, p)
            loss[at] = for_two_way * two_way + for_among * among
            gradient[at] = _slope(q, p, y, for_two_way / (tau * n), for_among / (tau * n))
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(a, b)
        return loss.mean(), a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor, _a: Tensor, _b: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer.to(gradient.dtype), None, None, None


def _check(student: Tensor, teacher: Tensor, gold: Tensor) -> None:
    if student.shape != teacher.shape or gold.shape != student.shape[:1]:
        raise ValueError(f"shapes disagree: {tuple(student.shape)}, {tuple(teacher.shape)}, {tuple(gold.shape)}")


def gold_kl(student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
    """TCKD: KL(teacher ‖ student) of the two-way split gold / not gold, (N,), in nats, ≥ 0 up to rounding.

    student, teacher: (N, V) logits of any float type, −inf at the same entries (not allowed); sums run in float32, for
    float64 logits in float64. gold: (N,) int64, an allowed entry. No gradient reaches `teacher`.
    Raises ValueError if the shapes disagree. Source: Zhao et al. 2022, arXiv:2203.08679, eq. 7.
    """
    _check(student, teacher, gold)
    return _Divergences.apply(student, teacher, gold)[0]


def not_gold_kl(student: Tensor, teacher: Tensor, gold: Tensor) -> Tensor:
    """NCKD: KL(teacher ‖ student) among the entries that are not gold, renormalised, (N,), in nats, ≥ 0 up to rounding.

    Arguments, precision, gradient, errors and source as `gold_kl`. 0 where nothing but gold is allowed.
    """
    _check(student, teacher, gold)
    return _Divergences.apply(student, teacher, gold)[1]


def gold_gate(student: Split, teacher: Split, guidance: Guidance) -> Tensor:
    """a, (N,) in [0, 1], without gradient: how far to listen on the gold entry. Both splits are at temperature 1.

    sigmoid: sigmoid((log p_y − log q_y) / κ), ½ where both know the answer equally well. hard: 1 where the teacher gives it
    more, else 0 (after FedMKT, 2406.02224). constant: 1. off: 0.
    """
    lead = teacher.gold - student.gold
    if guidance.gold == "sigmoid":
        return torch.sigmoid(lead / guidance.kappa)
    if guidance.gold == "hard":
        return (lead > 0).to(lead.dtype)
    return torch.full_like(lead, float(guidance.gold == "constant"))


def rest_gate(student: Split, teacher: Split, softened: Split, guidance: Guidance) -> Tensor:
    """b, (N,) in [0, max(1, β)], without gradient: how far to listen among the other entries.

    student, teacher: at temperature 1. softened: the teacher at `guidance.temperature`.
    kl: 1 − p_y of `softened`, as in plain distillation. entropy: β · max(0.1, H(q) / (H(p) + H(q))), more where the teacher
    is the more certain of the two; β/2 where both are wholly certain. constant: β. off: 0.
    """
    if guidance.rest == "kl":
        return softened.rest.exp()
    if guidance.rest == "entropy":
        p, q = teacher.entropy() + 1e-12, student.entropy() + 1e-12  # 0 / 0 becomes ½
        return guidance.beta * (q / (p + q)).clamp_min(FLOOR)
    return torch.full_like(softened.rest, guidance.beta if guidance.rest == "constant" else 0.0)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """Cosines of the rows of (N, d) tensors, (N,) in [−1, 1]; ½ where one of the two is 0, 1 where both are.

    As 1 − ½ ‖x̂ − ŷ‖², which is the product of unit vectors but exactly 1, with gradient exactly 0, where they agree.
    """
    x, y = (v / v.norm(dim=-1, keepdim=True).clamp_min(SHORT) for v in (x, y))
    return 1 - (x - y).square().sum(-1) / 2


def mean_cosine(x: Tensor, y: Tensor) -> Tensor:
    """Mean over positions of the cosine between the rows of x and y, (N, d) each: a scalar in [−1, 1].

    Rows shorter than 1e-6 count as in `_cosine`, and have a finite gradient. No gradient reaches `y`.
    """
    return _cosine(wide(x), wide(y.detach())).mean()


def _similarities(x: Tensor) -> Tensor:
    """The U-centred Gram matrix of (N, d) states, as one row (1, N²), of states scaled to about unit length.

    U-centring leaves the diagonal out and makes every row and column sum to 0 over the other entries, which takes the bias
    out: Székely and Rizzo 2014, arXiv:1310.2926.
    """
    n = len(x)
    x = wide(x)
    x = x - x.mean(0)  # U-centring undoes any shift; taken off first, a large one costs no digits
    x = x / x.detach().square().sum(-1).mean().sqrt().clamp_min(SHORT)
    off = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    gram = (x @ x.T) * off
    rows = gram.sum(1) / (n - 2)
    return ((gram - rows[:, None] - rows + rows.sum() / (n - 1)) * off).view(1, -1)


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Debiased linear CKA of x (N, d) and y (N, d'): a scalar in [−1, 1], about 0 for unrelated states whatever N and d.

    HSIC(x, y) / √(HSIC(x, x) HSIC(y, y)) with the unbiased HSIC of Song et al. 2012 (JMLR 13), as in Nguyen et al. 2021,
    arXiv:2010.15327. That HSIC is the inner product of U-centred Gram matrices, so the ratio is their cosine
    and keeps within [−1, 1]; a negative one says less than chance. Rotation, shift and scale of either side change nothing.
    Where all positions of one side are equal, it is ½ with a finite gradient (see `_cosine`). No gradient reaches `y`.
    Raises ValueError for N < 4, where it is not defined. It couples the positions: not a mean over them.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"debiased CKA needs the same positions on both sides, at least four: {len(x)}, {len(y)}")
    return _cosine(_similarities(x), _similarities(y.detach())).squeeze(0)


def _misalignment(forward: Forward, guidance: Guidance) -> Tensor | float:
    """Σ_l π_l (1 − align_l), in [0, 2]; 0 for CKA on fewer than four positions, where it is not defined."""
    teacher = forward.teacher
    if teacher is None or not forward.states:
        raise ValueError(f"align = {guidance.align!r} compares hidden states, but no layer is tapped")
    if guidance.align == "cka" and len(forward.targets) < 4:
        return 0.0
    align = linear_cka if guidance.align == "cka" else mean_cosine
    layers = zip(teacher.layer_trust, forward.states, teacher.states, strict=True)
    return torch.stack([trust * (1 - align(x, y)) for trust, x, y in layers]).sum()


def distill(forward: Forward, guidance: Guidance) -> Distilled:
    """τ² · mean_i [u_i a_i TCKD_i + v_i b_i NCKD_i] + η · Σ_l π_l (1 − align_l), in nats per position; method.md §2.

    u, v, π: gold_trust, rest_trust and layer_trust of the teacher. TCKD, NCKD and the 1 − p_y in b are at temperature τ;
    what else the gates read is at 1. ≥ 0 up to rounding. Gradient reaches the student's logits and states only, through
    the divergences and not through the gates. A mean over positions but for CKA, which couples the micro-batch.
    Raises ValueError without a position or a teacher, where shapes disagree, or if states to align are missing.
    """
    teacher, gold = forward.teacher, forward.targets
    if not len(gold):
        raise ValueError("a micro-batch without supervised positions has no distillation loss")
    if teacher is None:
        raise ValueError("a forward without a teacher has no distillation loss")
    _check(forward.logits, teacher.logits, gold)
    loss, a, b = _Guided.apply(forward.logits, teacher, gold, guidance)
    if guidance.align != "off" and guidance.align_weight:
        loss = loss + guidance.align_weight * _misalignment(forward, guidance)
    return Distilled(loss, a, b)


def guided(forward: Forward, options: Any) -> Loss:
    """The term: `distill` with the settings of a recipe's [distill]; its gates, and the teacher's trusts, are logged."""
    guidance = Guidance(
        options.temperature,
        options.gold,
        options.kappa,
        options.rest,
        options.beta,
        options.align,
        options.align_weight,
    )
    found = distill(forward, guidance)
    assert forward.teacher is not None
    trusts = {"w_gold": forward.teacher.gold_trust, "w_rest": forward.teacher.rest_trust}
    return Loss(found.loss, gates={"a": found.gold_gate, "b": found.rest_gate, **trusts})


def guidance_weight(options: Any, moment: Moment) -> float:
    """λ_d: rises linearly from 0 to options.weight over the first options.ramp of the run. With options.every n, in every n-th
    step n times that: the steps with a teacher carry the weight of those without, so that the strength of the whole stays."""
    if moment.step % options.every:
        return 0.0
    ramped = options.weight * min(1.0, moment.progress / options.ramp) if options.ramp else options.weight
    return float(options.every * ramped)
