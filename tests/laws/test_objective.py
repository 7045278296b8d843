"""Laws of loss terms, over the tables of all terms; the short terms against slow loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
import torch
from builders import numbers
from torch import Tensor

from fedkeel import tables
from fedkeel.method.objective.consistency import self_consistency, symmetric_kl
from fedkeel.method.objective.distill import GOLD, REST, Guidance, distill
from fedkeel.method.objective.proximal import proximal
from fedkeel.method.objective.task import task_loss
from fedkeel.recipe.schema import Exit, Recipe
from fedkeel.types import Forward, Loss, Offsets, Parameters, Soft, Teacher

Term = Callable[[Forward], Tensor]
PAIRS = [self_consistency, symmetric_kl]


def of_entry(name: str) -> Term:
    """A term of the table, at the default options of its section."""
    entry = tables.TERMS[name]
    options = getattr(Recipe(), entry.section) if entry.section else None

    def term(forward: Forward) -> Tensor:
        found = entry.load()(forward, options)
        return found.value if isinstance(found, Loss) else found

    return term


def anchored(forward: Forward) -> Tensor:
    """The term of the anchor, whose distributions are made of the teacher's logits over the entries that are allowed."""
    teacher, entry = forward.teacher, tables.TERMS["anchor"]
    place, token = torch.isfinite(teacher.logits).nonzero(as_tuple=True)
    soft = Soft(place, token, teacher.logits.detach().float().softmax(-1)[place, token], teacher.gold_trust)
    return entry.load()(replace(forward, anchor=soft), Recipe().evidence)


def early(forward: Forward) -> Tensor:
    """The term of an exit, whose logits are the student's; the full depth is the teacher."""
    seen = replace(forward, exit=forward.logits, logits=forward.teacher.logits)
    return tables.TERMS["exit"].load()(seen, Exit(teach="self"))


def vacant(forward: Forward) -> Tensor:
    """The term among absent labels: those that the teacher finds unlikely, gold never."""
    absent = torch.isfinite(forward.teacher.logits) & (forward.teacher.logits < 1)
    absent[torch.arange(len(absent)), forward.targets] = False
    place, token = absent.nonzero(as_tuple=True)
    offsets = Offsets(place, token, torch.full(place.shape, -math.inf))
    return tables.TERMS["vacant"].load()(replace(forward, offsets=offsets), None)


def of_guidance(guidance: Guidance) -> Term:
    return lambda forward: distill(forward, guidance).loss


# every pair of gates, at another temperature than 1; then an alignment. CKA is not here: it couples the positions of a
# micro-batch, so that it is no mean over them (tests/laws/test_distill.py has its laws); nor what reads no logits
# (tests/test_prototype.py).
READ = [name for name, entry in tables.TERMS.items() if not entry.once and not entry.couples and name != "prototype"]
LAWS: dict[str, Term] = (
    {name: of_entry(name) for name in READ}
    | {f"{a}-{b}": of_guidance(Guidance(2.0, gold=a, rest=b, kappa=0.5, beta=0.7)) for a, b in product(GOLD, REST)}
    | {"anchor": anchored, "exit": early, "vacant": vacant}
    | {"cosine": of_guidance(Guidance(align="cosine", align_weight=0.5))}
)
ALL_TERMS = pytest.mark.parametrize("term", LAWS.values(), ids=LAWS.keys())


def forward_of(logits: Tensor, targets: list[int]) -> Forward:
    return Forward(logits, torch.tensor(targets, dtype=torch.int64), torch.arange(len(targets)))


def full_forward(seed: int, n: int, v: int) -> Forward:
    """A `Forward` with all that a term may look at: a teacher, unequal trusts and two tapped layers."""
    trusts = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) + 0.5
    states = [numbers(1000 * seed + i, n, 5) for i in range(4)]
    teacher = Teacher(2 * numbers(1000 * seed + 8, n, v), trusts[0], trusts[1], states[2:], (0.25, 0.75))
    targets = torch.tensor([(7 * i) % v for i in range(n)], dtype=torch.int64)
    passes = {"again": teacher.logits, "clean": teacher.logits}
    return Forward(2 * numbers(1000 * seed + 9, n, v), targets, torch.arange(n), states[:2], teacher, **passes)


def at(forward: Forward, index: Tensor | slice) -> Forward:
    """The positions of `forward` that `index` names."""
    teacher = forward.teacher
    chosen = Teacher(
        teacher.logits[index],
        teacher.gold_trust[index],
        teacher.rest_trust[index],
        [s[index] for s in teacher.states],
        teacher.layer_trust,
    )
    return Forward(
        forward.logits[index],
        forward.targets[index],
        forward.rows[index],
        [s[index] for s in forward.states],
        chosen,
        forward.again[index],
        forward.clean[index],
    )


def with_logits(forward: Forward, student: Tensor, teacher: Tensor) -> Forward:
    return replace(
        forward, logits=student, teacher=replace(forward.teacher, logits=teacher), again=teacher, clean=teacher, exit=teacher
    )


def gradient(term: Term, forward: Forward) -> Tensor:
    """Of the term, with respect to the student's logits; 0 where it does not depend on them."""
    logits = forward.logits.detach().requires_grad_()
    (found,) = torch.autograd.grad(term(replace(forward, logits=logits)), logits)
    return found


def slow_task_loss(logits: Tensor, targets: list[int]) -> float:
    """−log softmax at the target, position by position, in Python floats."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        top = max(row)
        total -= row[target] - top - math.log(sum(math.exp(value - top) for value in row))
    return total / len(targets)


def slow_kl(first: Tensor, second: Tensor) -> float:
    """Mean KL(softmax first ‖ softmax second) over the entries that are not −inf, in Python floats."""
    total = 0.0
    for row, other in zip(first.tolist(), second.tolist(), strict=True):
        x, y = ([math.exp(value) for value in r] for r in (row, other))
        p, q = [value / sum(x) for value in x], [value / sum(y) for value in y]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)
    return total / len(first)


@ALL_TERMS
def test_no_position_is_an_error(term: Term) -> None:
    with pytest.raises(ValueError, match="without supervised positions"):
        term(at(full_forward(1, 3, 5), slice(0, 0)))


@ALL_TERMS
def test_a_term_is_a_scalar_not_below_zero_and_a_mean_per_position(term: Term) -> None:
    forward = full_forward(2, 9, 7)
    once = term(forward)
    twice = term(at(forward, torch.arange(9).repeat(2)))
    assert once.shape == ()
    assert once >= -1e-7
    assert float(twice) == pytest.approx(float(once), rel=1e-5, abs=1e-7)


@ALL_TERMS
def test_the_order_of_positions_means_nothing(term: Term) -> None:
    forward = full_forward(3, 12, 7)
    order = torch.tensor([5, 0, 11, 3, 8, 1, 10, 2, 7, 4, 9, 6])
    assert float(term(at(forward, order))) == pytest.approx(float(term(forward)), rel=1e-5, abs=1e-7)


@ALL_TERMS
def test_a_class_that_a_row_does_not_allow_is_as_if_absent(term: Term) -> None:
    """Each position allows other classes: the same value and gradient as from each alone, with its own columns only."""
    n, v = 8, 6
    forward = full_forward(4, n, v)
    allowed = torch.rand(n, v, generator=torch.Generator().manual_seed(5)) < 0.6
    allowed[torch.arange(n), forward.targets] = True
    allowed[0] = allowed[1] = True
    allowed[2] = torch.arange(v) == forward.targets[2]  # nothing but gold: no answer to choose
    masked = with_logits(forward, *(z.masked_fill(~allowed, -math.inf) for z in (forward.logits, forward.teacher.logits)))
    value, slope = 0.0, torch.zeros(n, v)
    for i in range(n):
        columns = allowed[i].nonzero()[:, 0]
        one = at(forward, slice(i, i + 1))
        one = with_logits(one, one.logits[:, columns], one.teacher.logits[:, columns])
        one = replace(one, targets=(columns == forward.targets[i]).nonzero()[:, 0])
        value += float(term(one)) / n
        slope[i, columns] = gradient(term, one)[0] / n
    assert float(term(masked)) == pytest.approx(value, rel=1e-5, abs=1e-7)
    found = gradient(term, masked)
    assert (found[~allowed] == 0).all()
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-7)


@ALL_TERMS
def test_bfloat16_logits_are_summed_in_float32(term: Term) -> None:
    forward = full_forward(6, 40, 500)
    half = with_logits(forward, forward.logits.bfloat16(), forward.teacher.logits.bfloat16())
    single = with_logits(half, half.logits.float(), half.teacher.logits.float())
    assert term(half).dtype == torch.float32
    assert float(term(half)) == float(term(single))  # bfloat16 has three digits: a sum in it would be off in the third
    assert gradient(term, half).dtype == torch.bfloat16
    torch.testing.assert_close(gradient(term, half), gradient(term, single).bfloat16(), rtol=1e-2, atol=0)


@ALL_TERMS
def test_gradient_reaches_the_student_only(term: Term) -> None:
    forward = full_forward(7, 6, 5)
    given = [forward.logits, forward.teacher.logits, *forward.teacher.states]
    for tensor in given:
        tensor.requires_grad_()
    student, *teacher = torch.autograd.grad(term(forward), given, allow_unused=True)
    assert student is not None
    if term in (LAWS["task"], LAWS["rdrop"]):  # both passes are the student's
        assert teacher.pop(0) is not None
    assert teacher == [None] * len(teacher)


@ALL_TERMS
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_give_the_value_and_gradient_of_the_whole(term: Term, micro: int) -> None:
    """Eight rows at once, 4 × 2 and 8 × 1, each weighted by n_micro / n_step; rows differ in their number of positions."""
    lengths = torch.tensor([1, 7, 2, 5, 3, 1, 9, 4])
    rows = torch.arange(8).repeat_interleave(lengths)
    forward = full_forward(8, len(rows), 11)

    def step(size: int, weighted: bool = True) -> tuple[float, Tensor]:
        weight = torch.eye(11).requires_grad_()
        total = 0.0
        for start in range(0, 8, size):
            here = (rows >= start) & (rows < start + size)
            part = at(forward, here)
            share = float(here.float().mean()) if weighted else size / 8
            loss = share * term(replace(part, logits=part.logits @ weight))
            loss.backward()
            total += float(loss.detach())
        return total, weight.grad

    (value, slope), (whole, wanted) = step(micro), step(8)
    assert value == pytest.approx(whole, rel=1e-5, abs=1e-7)
    torch.testing.assert_close(slope, wanted, rtol=0, atol=2e-6)
    if micro < 3 and wanted.any():  # a mean over rows instead is another objective: this test can tell
        assert (step(micro, weighted=False)[1] - wanted).abs().max() > 1e-3


def test_task_loss_by_hand() -> None:
    # softmax of (0, log 3) is (1/4, 3/4)
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    assert float(task_loss(forward_of(logits, [0, 1]))) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-6)


def test_task_loss_equals_the_slow_loop() -> None:
    logits = 5 * numbers(1, 13, 29)
    targets = [(7 * i) % 29 for i in range(13)]
    assert float(task_loss(forward_of(logits, targets))) == pytest.approx(slow_task_loss(logits, targets), rel=1e-6)


def test_consistency_by_hand() -> None:
    # (1/2, 1/2) and (1/4, 3/4): KL one way is ½ log 2 + ½ log 2/3 = ½ log 4/3, the other way ¼ log ½ + ¾ log 3/2
    first, second = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    there, back = math.log(4 / 3) / 2, math.log(0.5) / 4 + 3 * math.log(1.5) / 4
    assert float(self_consistency(first, second)) == pytest.approx(there, rel=1e-6)
    assert float(self_consistency(second, first)) == pytest.approx(back, rel=1e-6)
    assert float(symmetric_kl(first, second)) == pytest.approx((there + back) / 2, rel=1e-6)


def test_consistency_equals_the_slow_loop() -> None:
    first, second = 2 * numbers(1, 9, 12), 2 * numbers(2, 9, 12)
    first[:, 3:5] = second[:, 3:5] = -math.inf
    there, back = slow_kl(first, second), slow_kl(second, first)
    assert float(self_consistency(first, second)) == pytest.approx(there, rel=1e-5)
    assert float(symmetric_kl(first, second)) == pytest.approx((there + back) / 2, rel=1e-5)
    assert symmetric_kl(first, second) == symmetric_kl(second, first)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_equal_passes_cost_nothing(pair: Callable[[Tensor, Tensor], Tensor]) -> None:
    logits = (3 * numbers(3, 5, 8)).requires_grad_()
    loss = pair(logits.detach(), logits)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-7


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.__name__)
def test_unlike_passes_are_an_error(pair: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="shapes disagree"):
        pair(torch.zeros(3, 4), torch.zeros(3, 5))


def test_proximal_by_hand() -> None:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    for weight in weights:
        weight.requires_grad_()
    anchors = [torch.tensor([0.0, 4.0], requires_grad=True), torch.tensor([[0.5]])]
    loss = proximal(weights, anchors)
    assert loss.item() == (1 + 4 + 6.25) / 2
    *pull, anchored = torch.autograd.grad(loss, [*weights, anchors[0]], allow_unused=True)
    assert [g.tolist() for g in pull] == [[1.0, -2.0], [[2.5]]]  # w − w0
    assert anchored is None
    assert proximal(weights, [w.detach() for w in weights]).item() == 0


def test_guidance_among_absent_labels_by_hand() -> None:
    # of the entries 0 to 3, 2 and 3 are absent: teacher (1/4, 3/4) among them, student (1/2, 1/2); the second place has one
    teacher = torch.tensor([[9.0, 0.0, 0.0, math.log(3.0)], [0.0, 0.0, 0.0, 5.0]])
    student = torch.tensor([[0.0, 7.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    ones = torch.ones(2)
    offsets = Offsets(torch.tensor([0, 0, 1]), torch.tensor([2, 3, 1]), torch.full((3,), -math.inf))
    seen = replace(forward_of(student, [1, 0]), teacher=Teacher(teacher, ones, ones), offsets=offsets)
    wanted = (math.log(0.5) / 4 + 3 * math.log(1.5) / 4) / 2  # a mean over both positions
    term = tables.TERMS["vacant"].load()
    assert float(term(seen, None)) == pytest.approx(wanted, rel=1e-6)
    assert float(term(replace(seen, offsets=None), None)) == 0  # every label is held
    nothing = torch.tensor([[0.0] + [-math.inf] * 3, [0.0, -math.inf, 0.0, 0.0]])  # a teacher that gives all of them 0
    assert math.isfinite(float(term(replace(seen, teacher=Teacher(nothing, ones, ones)), None)))
    shifted = replace(offsets, value=torch.tensor([-1.0, -2.0, 0.5]))  # of a prior: nothing is absent
    assert float(term(replace(seen, offsets=shifted), None)) == 0


def test_orthogonality_by_hand() -> None:
    # rows 0 and 1 were trained before, row 2 is: (3, 4) · (1, 0) = 3, (3, 4) · (1, 1) = 7; row 3 is of a later stage
    a = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 4.0], [9.0, 9.0]], requires_grad=True)
    orthogonal = tables.TERMS["orthogonal"].load()
    loss = orthogonal(Parameters([a], [a], [a, 2 * a.detach()], range(2, 3)), None)
    assert loss.item() == 3 + 7 + 4 * (3 + 7)
    (slope,) = torch.autograd.grad(loss, a)
    assert slope.tolist() == [[0, 0], [0, 0], [2, 1], [0, 0]]  # Σ sign (a_now · a) a
    assert orthogonal(Parameters([a], [a], [a], range(2)), None).item() == 0  # the first stage


def test_proximal_sums_half_precision_in_float32() -> None:
    # 4096 × 0.01²: a sum in bfloat16 stops growing long before its end
    weight, anchor = torch.full((4096,), 0.01).bfloat16(), torch.zeros(4096).bfloat16()
    assert float(proximal([weight], [anchor])) == pytest.approx(4096 * float(weight[0]) ** 2 / 2, rel=1e-5)


@pytest.mark.parametrize("anchors", [[], [torch.zeros(3)], [torch.zeros(1), torch.zeros(2)]])
def test_proximal_needs_pairs(anchors: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="pair up"):
        proximal([torch.zeros(2)] if anchors else [], anchors)
