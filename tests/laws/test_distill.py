"""Distillation guidance by value: against definitions in Python floats, by hand, at extremes; alignment; the cache."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from builders import numbers
from torch import Tensor

from fedkeel.method.objective.compress import TopK, compress, restore
from fedkeel.method.objective.distill import (
    ALIGN,
    GOLD,
    REST,
    Guidance,
    distill,
    gold_gate,
    gold_kl,
    linear_cka,
    mean_cosine,
    not_gold_kl,
    rest_gate,
    split,
)
from fedkeel.types import Forward, Teacher

GATES = list(product(GOLD, REST))
FEDGKD = {"gold": "constant", "rest": "kl"}


def forward_of(
    student: Tensor, teacher: Tensor, targets: list[int], u: Tensor | None = None, v: Tensor | None = None
) -> Forward:
    ones, gold = torch.ones(len(targets)), torch.tensor(targets, dtype=torch.int64)
    guide = Teacher(teacher, ones if u is None else u, ones if v is None else v)
    return Forward(student, gold, torch.arange(len(targets)), teacher=guide)


def some_logits(seed: int, n: int = 7, v: int = 9, spread: float = 2.0) -> tuple[Tensor, Tensor, list[int]]:
    """Student, teacher and targets, with entries that a row does not allow, other ones in each row."""
    student, teacher = spread * numbers(2 * seed, n, v), spread * numbers(2 * seed + 1, n, v)
    targets = [(5 * i) % v for i in range(n)]
    for i, target in enumerate(targets):
        for j in range(i % 4):
            student[i, (target + 2 + j) % v] = teacher[i, (target + 2 + j) % v] = -math.inf
    return student, teacher, targets


def with_states(forward: Forward, mine: list[Tensor], theirs: list[Tensor], trust: tuple[float, ...]) -> Forward:
    return replace(forward, states=mine, teacher=replace(forward.teacher, states=theirs, layer_trust=trust))


# slow twins: the definitions, position by position, in Python floats


def probabilities(row: list[float], temperature: float = 1.0) -> list[float]:
    top = max(row)
    weights = [math.exp((value - top) / temperature) for value in row]
    return [w / sum(weights) for w in weights]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def entropy(p: list[float]) -> float:
    return -sum(a * math.log(a) for a in p if a)


def others(row: list[float], gold: int) -> list[float]:
    return row[:gold] + row[gold + 1 :]


def slow_parts(student: list[float], teacher: list[float], gold: int, temperature: float) -> tuple[float, float, float]:
    """TCKD, NCKD and p_y of one position."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    two_way = kl([p[gold], sum(others(p, gold))], [q[gold], sum(others(q, gold))])
    among = kl(probabilities(others(teacher, gold), temperature), probabilities(others(student, gold), temperature))
    return two_way, among, p[gold]


def slow_gates(student: list[float], teacher: list[float], gold: int, guidance: Guidance) -> tuple[float, float]:
    p, q = probabilities(teacher), probabilities(student)
    lead = math.log(p[gold]) - math.log(q[gold])
    a = {"sigmoid": 1 / (1 + math.exp(-lead / guidance.kappa)), "hard": float(lead > 0), "constant": 1.0, "off": 0.0}
    ratio = max(0.1, entropy(q) / (entropy(p) + entropy(q)))
    kept = 1 - probabilities(teacher, guidance.temperature)[gold]
    b = {"kl": kept, "entropy": guidance.beta * ratio, "constant": guidance.beta, "off": 0.0}
    return a[guidance.gold], b[guidance.rest]


def slow_distill(forward: Forward, guidance: Guidance) -> float:
    teacher, total = forward.teacher, 0.0
    given = (forward.logits, teacher.logits, forward.targets, teacher.gold_trust, teacher.rest_trust)
    for q, p, gold, u, v in zip(*(tensor.tolist() for tensor in given), strict=True):
        two_way, among, _ = slow_parts(q, p, gold, guidance.temperature)
        a, b = slow_gates(q, p, gold, guidance)
        total += u * a * two_way + v * b * among
    return guidance.temperature**2 * total / len(forward.targets)


def plain_kl(student: Tensor, teacher: Tensor, temperature: float) -> list[float]:
    pairs = zip(teacher.tolist(), student.tolist(), strict=True)
    return [kl(probabilities(p, temperature), probabilities(q, temperature)) for p, q in pairs]


def slow_hsic(k: Tensor, m: Tensor) -> float:
    """The unbiased estimator of Song et al. 2012 in its own form, with the diagonals set to 0."""
    n = len(k)
    a = [[0.0 if i == j else float(k[i, j]) for j in range(n)] for i in range(n)]
    b = [[0.0 if i == j else float(m[i, j]) for j in range(n)] for i in range(n)]
    every = range(n)
    trace = sum(a[i][j] * b[j][i] for i in every for j in every)
    sums = sum(map(sum, a)) * sum(map(sum, b)) / ((n - 1) * (n - 2))
    cross = sum(a[i][j] * b[j][h] for i in every for j in every for h in every) * 2 / (n - 2)
    return (trace + sums - cross) / (n * (n - 3))


def slow_cka(x: Tensor, y: Tensor) -> float:
    k, m = x.double() @ x.double().T, y.double() @ y.double().T
    return slow_hsic(k, m) / math.sqrt(slow_hsic(k, k) * slow_hsic(m, m))


def biased_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


# the two parts


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_parts_add_up_to_plain_kl(temperature: float) -> None:
    student, teacher, targets = some_logits(1)
    q, p, gold = student / temperature, teacher / temperature, torch.tensor(targets)
    p_y = torch.tensor([probabilities(row)[y] for row, y in zip(p.tolist(), targets, strict=True)])
    whole = gold_kl(q, p, gold) + (1 - p_y) * not_gold_kl(q, p, gold)
    torch.testing.assert_close(whole, torch.tensor(plain_kl(student, teacher, temperature)), rtol=1e-6, atol=1e-6)


def test_the_parts_equal_their_definitions() -> None:
    student, teacher, targets = some_logits(2)
    slow = [slow_parts(q, p, y, 1.0) for q, p, y in zip(student.tolist(), teacher.tolist(), targets, strict=True)]
    found = gold_kl(student, teacher, torch.tensor(targets)), not_gold_kl(student, teacher, torch.tensor(targets))
    for i in range(2):
        torch.testing.assert_close(found[i], torch.tensor([s[i] for s in slow]), rtol=1e-5, atol=1e-6)


def test_what_a_split_says() -> None:
    logits, _, targets = some_logits(3)
    parts = split(logits, torch.tensor(targets), 2.0)
    for i, (row, y) in enumerate(zip(logits.tolist(), targets, strict=True)):
        p = probabilities(row, 2.0)
        among = [0.0 if c == y else value / (1 - p[y]) for c, value in enumerate(p)]
        assert float(parts.gold[i].exp()) == pytest.approx(p[y], rel=1e-6)
        assert float(parts.rest[i].exp()) == pytest.approx(1 - p[y], rel=1e-6)
        assert float(parts.entropy()[i]) == pytest.approx(entropy(p), rel=1e-6)
        assert parts.chance[i].tolist() == pytest.approx(among, rel=1e-5, abs=1e-9)
        assert parts.among[i].exp().tolist() == pytest.approx(among, rel=1e-5, abs=1e-9)


# the whole term


def test_distill_by_hand() -> None:
    """Three classes, gold first: p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2).

    TCKD = ½ log 2 + ½ log(½ / ¾) = ½ log 4/3. Among the others p̂ = (½, ½), q̂ = (⅓, ⅔): NCKD = ½ log 9/8.
    a = sigmoid(log 2) = 2/3, b = 1 − p_y = 1/2.
    """
    student, teacher = torch.tensor([[0.25, 0.25, 0.5]]).log(), torch.tensor([[0.5, 0.25, 0.25]]).log()
    gold = torch.tensor([0])
    assert float(gold_kl(student, teacher, gold)) == pytest.approx(0.1438410362, rel=1e-6)
    assert float(not_gold_kl(student, teacher, gold)) == pytest.approx(0.0588915178, rel=1e-6)
    found = distill(forward_of(student, teacher, [0]), Guidance())
    assert float(found.gold_gate) == pytest.approx(2 / 3, rel=1e-6)
    assert float(found.rest_gate) == pytest.approx(1 / 2, rel=1e-6)
    assert float(found.loss) == pytest.approx(2 / 3 * 0.1438410362 + 1 / 2 * 0.0588915178, rel=1e-6)
    found = distill(forward_of(student, teacher, [0], torch.tensor([3.0]), torch.tensor([0.5])), Guidance())
    assert float(found.loss) == pytest.approx(3 * 2 / 3 * 0.1438410362 + 0.5 * 1 / 2 * 0.0588915178, rel=1e-6)


@pytest.mark.parametrize(("gold", "rest"), GATES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distill_equals_its_definition(gold: str, rest: str, temperature: float) -> None:
    u, v = torch.rand(2, 7, generator=torch.Generator().manual_seed(1))
    forward = forward_of(*some_logits(4), u, v)
    guidance = Guidance(temperature, gold, 0.7, rest, 1.3)
    found = distill(forward, guidance)
    assert float(found.loss) == pytest.approx(slow_distill(forward, guidance), rel=1e-5, abs=1e-7)
    rows = zip(forward.logits.tolist(), forward.teacher.logits.tolist(), forward.targets.tolist(), strict=True)
    gates = [slow_gates(q, p, y, guidance) for q, p, y in rows]
    assert found.gold_gate.tolist() == pytest.approx([a for a, _ in gates], rel=1e-5)
    assert found.rest_gate.tolist() == pytest.approx([b for _, b in gates], rel=1e-5)


@pytest.mark.parametrize(("gold", "rest"), GATES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distill_is_its_parts_under_gates_that_carry_no_gradient(gold: str, rest: str, temperature: float) -> None:
    student, teacher, targets = some_logits(5)
    student.requires_grad_()
    u, v = torch.rand(2, 7, generator=torch.Generator().manual_seed(2))
    guidance = Guidance(temperature, gold, 0.7, rest, 1.3)
    y = torch.tensor(targets)
    plain = split(student, y), split(teacher, y)
    a = gold_gate(*plain, guidance).detach()
    b = rest_gate(*plain, split(teacher, y, temperature), guidance).detach()
    q, p = student / temperature, teacher / temperature
    composed = temperature**2 * (u * a * gold_kl(q, p, y) + v * b * not_gold_kl(q, p, y)).mean()
    found = distill(forward_of(student, teacher, targets, u, v), guidance)
    assert not found.gold_gate.requires_grad
    assert not found.rest_gate.requires_grad
    assert found.loss.item() == pytest.approx(composed.item(), rel=1e-6, abs=1e-8)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (found.loss, composed)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype) -> None:
    student, teacher, targets = some_logits(3)
    guidance, u, v = Guidance(temperature=2.0, rest="entropy", beta=0.7), numbers(8, 7).abs(), numbers(9, 7).abs()

    def found() -> list[Tensor]:
        mine = student.to(dtype).requires_grad_()
        result = distill(forward_of(mine, teacher.to(dtype), targets, u, v), guidance)
        (3 * result.loss).backward()
        assert mine.grad is not None
        assert mine.grad.dtype is dtype
        return [result.loss.detach(), result.gold_gate, result.rest_gate, mine.grad]

    whole = found()
    monkeypatch.setattr(
        sys.modules["fedkeel.method.objective.distill"], "BLOCK", (rows * 9, 0)
    )  # a function shadows the module
    for one, other in zip(whole, found(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradient_equals_finite_differences(temperature: float) -> None:
    """In float64, which stays float64; the entries not allowed are held out of the differences."""
    student, teacher, targets = (t.double() if isinstance(t, Tensor) else t for t in some_logits(6))
    allowed = student > -math.inf
    gold = torch.tensor(targets)
    guidance = Guidance(temperature, gold="constant", rest="constant", beta=0.6)

    def scattered(values: Tensor) -> Tensor:
        return torch.full_like(student, -math.inf).masked_scatter(allowed, values)

    values = student[allowed].requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gold_kl(scattered(z), teacher, gold), values)
    assert torch.autograd.gradcheck(lambda z: not_gold_kl(scattered(z), teacher, gold), values)
    assert torch.autograd.gradcheck(lambda z: distill(forward_of(scattered(z), teacher, targets), guidance).loss, values)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fedgkd_is_a_setting(temperature: float) -> None:
    student, teacher, targets = some_logits(7)
    found = distill(forward_of(student, teacher, targets), Guidance(temperature, **FEDGKD)).loss
    wanted = temperature**2 * sum(plain_kl(student, teacher, temperature)) / len(targets)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_fedntd_is_a_setting(temperature: float) -> None:
    """β times the KL of two softmaxes over the classes that are not true, as FedNTD takes it."""
    student, teacher, targets = some_logits(8)
    total = 0.0
    for q, p, y in zip(student.tolist(), teacher.tolist(), targets, strict=True):
        total += kl(probabilities(others(p, y), temperature), probabilities(others(q, y), temperature))
    guidance = Guidance(temperature, gold="off", rest="constant", beta=0.3)
    found = distill(forward_of(student, teacher, targets), guidance).loss
    assert float(found) == pytest.approx(0.3 * temperature**2 * total / len(targets), rel=1e-5)


@pytest.mark.parametrize(("gold", "rest"), GATES)
@pytest.mark.parametrize("align", ALIGN)
def test_a_student_like_its_teacher_pays_nothing(gold: str, rest: str, align: str) -> None:
    student, _, targets = some_logits(9)
    states = numbers(1, 7, 5)
    student.requires_grad_()
    states.requires_grad_()
    forward = forward_of(student, student.detach(), targets)
    forward = with_states(forward, [states], [states.detach()], (1.0,))
    guidance = Guidance(2.0, gold, rest=rest, align=align, align_weight=2.0)
    loss = distill(forward, guidance).loss
    assert loss.item() == 0
    for slope in torch.autograd.grad(loss, [student, states], allow_unused=True):
        assert slope is None or slope.abs().max() < 1e-7


@pytest.mark.parametrize("kappa", [0.25, 1.0, 4.0])
def test_sigmoid_gate_by_hand(kappa: float) -> None:
    """Equally good: ½. Three times as good: 1 / (1 + 3^(−1/κ)); a third as good: what is left of 1."""
    student = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.6, 0.4]]).log()
    teacher = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.2, 0.8]]).log()
    gate = distill(forward_of(student, teacher, [0, 0, 0]), Guidance(kappa=kappa)).gold_gate
    high = 1 / (1 + 3 ** (-1 / kappa))
    assert gate.tolist() == pytest.approx([0.5, high, 1 - high], rel=1e-5)
    assert distill(forward_of(student, teacher, [0, 0, 0]), Guidance(gold="hard")).gold_gate.tolist() == [0, 1, 0]


def test_the_hard_gate_reads_temperature_one() -> None:
    """p_y = .46 > q_y = .42 at τ = 1. At τ = 4 the teacher's even others weigh more: .36 < .40."""
    student, teacher = torch.tensor([[0.42, 0.57, 0.01]]).log(), torch.tensor([[0.46, 0.27, 0.27]]).log()
    q, p = (float(split(logits, torch.tensor([0]), 4.0).gold) for logits in (student, teacher))
    assert p < q
    assert distill(forward_of(student, teacher, [0]), Guidance(4.0, gold="hard")).gold_gate.tolist() == [1]


def test_entropy_gate_by_hand() -> None:
    """Equal entropies, a certain teacher, a certain student (the floor), both certain; β = 2."""
    flat, half, sure = [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -math.inf, -math.inf], [0.0, -200.0, -200.0, -200.0]
    student = torch.tensor([flat, half, sure, sure])
    teacher = torch.tensor([flat, half, flat, sure])
    forward = forward_of(student, teacher, [0, 1, 2, 0])
    assert distill(forward, Guidance(rest="entropy", beta=2.0)).rest_gate.tolist() == pytest.approx([1, 1, 0.2, 1])
    # teacher log 2 against student log 4
    forward = forward_of(torch.tensor([flat]), torch.tensor([[0.0, 0.0, -200.0, -200.0]]), [0])
    assert float(distill(forward, Guidance(rest="entropy")).rest_gate) == pytest.approx(2 / 3)


def test_no_trust_switches_a_position_off() -> None:
    student, teacher, targets = some_logits(10)
    student.requires_grad_()
    on = torch.tensor([1.0, 0, 0, 1, 1, 0, 1])
    loss = distill(forward_of(student, teacher, targets, on, on), Guidance()).loss
    (slope,) = torch.autograd.grad(loss, student)
    assert ((slope != 0).any(-1) == on.bool()).all()
    here = on.bool()
    alone = distill(forward_of(student[here], teacher[here], [t for t, o in zip(targets, on, strict=True) if o]), Guidance())
    assert loss.item() == pytest.approx(alone.loss.item() * 4 / 7, rel=1e-6)
    # each trust rules its own part
    ones = torch.ones(7)
    for u, v, guidance in ((ones, 0 * ones, Guidance(rest="off")), (0 * ones, ones, Guidance(gold="off"))):
        found = distill(forward_of(student, teacher, targets, u, v), Guidance()).loss
        assert found.item() == pytest.approx(distill(forward_of(student, teacher, targets), guidance).loss.item(), rel=1e-6)


@pytest.mark.parametrize(("gold", "rest"), GATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_extremes_stay_finite(gold: str, rest: str, dtype: torch.dtype) -> None:
    big, no = 1e4, -math.inf
    student = torch.tensor(
        [[big, -big, 0], [-big, big, 0], [big, big, big], [big, no, no], [-big, no, 0], [30, 0, 0]], dtype=dtype
    )
    teacher = torch.tensor(
        [[-big, big, 0], [big, -big, 0], [-big, -big, 0], [-big, no, no], [big, no, 0], [90, 0, 1]], dtype=dtype
    )
    student.requires_grad_()
    found = distill(forward_of(student, teacher, [0] * 6), Guidance(0.5, gold, rest=rest))
    (slope,) = torch.autograd.grad(found.loss, student)
    for tensor in (found.loss, found.gold_gate, found.rest_gate, slope):
        assert tensor.isfinite().all()
    assert found.loss.item() >= 0
    assert (slope[3] == 0).all()  # one entry allowed: nothing to learn
    assert slope[4, 1] == 0


def test_the_rest_is_precise_where_gold_rounds_to_one() -> None:
    """p_y = 1 − 2 e^−40 is 1 in float32; NCKD and 1 − p_y are read off the other entries and keep their digits."""
    student, teacher = torch.tensor([[50.0, 0.0, 0.0]]), torch.tensor([[40.0, 0.0, math.log(3.0)]])
    gold = torch.tensor([0])
    # p̂ = (¼, ¾), q̂ = (½, ½)
    assert float(not_gold_kl(student, teacher, gold)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)
    assert float(rest_gate(*[split(teacher, gold)] * 3, Guidance())) == pytest.approx(4 * math.exp(-40), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"kappa": 0.0},
        {"beta": -1.0},
        {"align_weight": -0.1},
        {"gold": "Sigmoid"},
        {"rest": "gold"},
        {"align": "none"},
    ],
)
def test_settings_out_of_their_domain_are_errors(change: dict[str, float | str]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Guidance(**change)


def test_what_distill_lacks_is_said() -> None:
    student, teacher, targets = some_logits(11)
    forward = forward_of(student, teacher, targets)
    with pytest.raises(ValueError, match="without a teacher"):
        distill(replace(forward, teacher=None), Guidance())
    with pytest.raises(ValueError, match="no layer is tapped"):
        distill(forward, Guidance(align="cka", align_weight=1.0))
    with pytest.raises(ValueError, match="shapes disagree"):
        distill(forward_of(student, teacher[:, :-1], targets), Guidance())
    for part in (gold_kl, not_gold_kl):
        with pytest.raises(ValueError, match="shapes disagree"):
            part(student, teacher, torch.tensor(targets[:-1]))


# alignment


@pytest.mark.parametrize("align", ["cka", "cosine"])
def test_alignment_adds_its_layers_by_their_trust(align: str) -> None:
    mine, theirs = [numbers(i, 7, 5) for i in range(2)], [numbers(i + 2, 7, 5) for i in range(2)]
    forward = with_states(forward_of(*some_logits(12)), mine, theirs, (0.2, 0.8))
    one = {"cka": linear_cka, "cosine": mean_cosine}[align]
    wanted = 0.5 * (0.2 * (1 - one(mine[0], theirs[0])) + 0.8 * (1 - one(mine[1], theirs[1])))
    found = distill(forward, Guidance(align=align, align_weight=0.5)).loss - distill(forward, Guidance()).loss
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_cka_is_left_out_below_four_positions() -> None:
    forward = with_states(forward_of(*some_logits(13, n=3)), [numbers(1, 3, 5)], [numbers(2, 3, 5)], (1.0,))
    found = distill(forward, Guidance(align="cka", align_weight=1.0)).loss
    assert found == distill(forward, Guidance()).loss
    with pytest.raises(ValueError, match="at least four"):
        linear_cka(numbers(1, 3, 5), numbers(2, 3, 5))


@pytest.mark.parametrize(("n", "d", "e"), [(4, 3, 3), (6, 5, 9), (9, 2, 30)])
def test_cka_equals_the_slow_twin(n: int, d: int, e: int) -> None:
    x, y = numbers(1, n, d), torch.cat([numbers(1, n, d)[:, :2], numbers(2, n, e)], 1)
    assert float(linear_cka(x, y)) == pytest.approx(slow_cka(x, y), abs=1e-5)


def test_cka_ignores_rotation_scale_and_shift() -> None:
    x, y = numbers(3, 20, 6), numbers(3, 20, 6) + numbers(4, 20, 6)
    turn = torch.linalg.qr(numbers(5, 6, 6)).Q
    plain = float(linear_cka(x, y))
    assert 0.1 < plain < 0.9
    for changed in (x @ turn, 1e3 * x, 1e-3 * x, x + 100 * numbers(6, 6)):
        assert float(linear_cka(changed, y)) == pytest.approx(plain, abs=1e-4)
        assert float(linear_cka(y, changed)) == pytest.approx(plain, abs=1e-4)
    assert float(linear_cka(x, 3 * x @ turn + 1)) == pytest.approx(1, abs=1e-6)
    assert abs(float(linear_cka(x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1])), y)) - plain) > 0.01  # no free stretch


def test_cka_of_unrelated_states_is_about_zero() -> None:
    """Few positions in many dimensions: the biased estimate takes noise for likeness."""
    pairs = [(numbers(2 * i, 8, 200), numbers(2 * i + 1, 8, 200)) for i in range(200)]
    found = torch.stack([linear_cka(x, y) for x, y in pairs])
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(200)
    assert float(found.std()) < 0.4
    assert sum(biased_cka(x, y) for x, y in pairs) / 200 > 0.8
    assert ((found >= -1) & (found <= 1)).all()


def test_cka_gradient_equals_finite_differences() -> None:
    x, y = numbers(7, 6, 3).double().requires_grad_(), numbers(8, 6, 4).double()
    assert torch.autograd.gradcheck(lambda z: linear_cka(z, y), x)
    y = numbers(9, 6, 3).double()
    assert torch.autograd.gradcheck(lambda z: mean_cosine(z, y), x)


def test_mean_cosine_by_hand() -> None:
    x, y = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 5.0], [-1.0, 0.0]])
    assert float(mean_cosine(x, y)) == pytest.approx((24 / 25 + 0 - 1) / 3, abs=1e-6)


@pytest.mark.parametrize("align", [linear_cka, mean_cosine])
def test_alignment_pulls_the_student_only(align) -> None:
    x, y = numbers(10, 6, 3).requires_grad_(), numbers(11, 6, 3).requires_grad_()
    mine, theirs = torch.autograd.grad(align(x, y), [x, y], allow_unused=True)
    assert mine.abs().max() > 1e-3
    assert theirs is None


@pytest.mark.parametrize("align", [linear_cka, mean_cosine])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-20, 0.1, 1e4])
def test_states_without_variance_have_finite_gradients(align, dtype: torch.dtype, size: float) -> None:
    y = numbers(1, 5, 8).to(dtype)
    for x, other in ((torch.full((5, 8), size, dtype=dtype), y), (y, torch.full((5, 8), size, dtype=dtype))):
        mine = x.clone().requires_grad_()
        value = align(mine, other)
        assert value.dtype == torch.float32
        assert -1 <= value.item() <= 1
        assert torch.autograd.grad(value, mine)[0].isfinite().all()


# the teacher cache


def cached(logits: Tensor, targets: list[int], k: int) -> tuple[TopK, Tensor, Tensor]:
    """What is kept; p and what is restored of it, in float64 probabilities."""
    top = compress(logits, torch.tensor(targets), k)
    return top, logits.double().softmax(-1), restore(top, logits).double().exp()


def test_few_entries_are_kept_whole() -> None:
    logits, _, targets = some_logits(14, v=64)
    top, _, _ = cached(logits, targets, 64)
    assert top.values.shape == top.indices.shape == (7, 64)
    assert top.entries.tolist() == [0] * 7
    assert top.tail.tolist() == [-math.inf] * 7
    assert torch.equal(restore(top, logits), logits.log_softmax(-1))


@pytest.mark.parametrize("k", [1, 2, 8, 64])
@pytest.mark.parametrize("spread", [0.0, 0.3, 2.0, 30.0])
def test_restored_within_the_stated_error(k: int, spread: float) -> None:
    student, teacher, targets = some_logits(15, n=12, v=200, spread=spread)
    top, p, back = cached(teacher, targets, k)
    mass, places = top.tail.double().exp(), torch.arange(12)
    torch.testing.assert_close(back.sum(-1), torch.ones(12).double(), rtol=0, atol=1e-5)
    assert (restore(top, teacher)[teacher == -math.inf] == -math.inf).all()
    assert (restore(top, student)[teacher > -math.inf] > -math.inf).all()
    torch.testing.assert_close(back[places, targets], p[places, targets], rtol=1e-5, atol=0)
    assert ((p - back).abs().sum(-1) <= 2 * mass + 1e-5).all()
    # KL(p ‖ p̂) ≤ m log e
    shift = torch.special.xlogy(p, p).sum(-1) - torch.special.xlogy(p, back).sum(-1)
    limit = mass * top.entries.clamp_min(1).log()
    assert (shift <= limit + 1e-5).all()
    # KL(p ‖ q) − KL(p̂ ‖ q) is that much and, as p and p̂ differ by at most m within the tail, m · range of log q there
    q = student.double().log_softmax(-1)
    outside = torch.ones_like(q, dtype=torch.bool).scatter(1, top.indices, False) & (teacher > -math.inf)
    low, high = q.masked_fill(~outside, math.inf).amin(-1), q.masked_fill(~outside, -math.inf).amax(-1)
    true, through = ((torch.special.xlogy(x, x) - (x * q).nan_to_num()).sum(-1) for x in (p, back))
    assert ((true - through).abs() <= limit + mass * (high - low).clamp_min(0) + 1e-4).all()


def test_gold_is_always_kept_and_the_others_are_the_largest() -> None:
    logits = torch.arange(10.0).repeat(3, 1)
    top = compress(logits, torch.tensor([0, 5, 9]), 3)
    assert [sorted(row) for row in top.indices.tolist()] == [[0, 8, 9], [5, 8, 9], [7, 8, 9]]
    assert top.entries.tolist() == [7, 7, 7]


def test_guidance_through_the_cache_is_that_of_the_teacher() -> None:
    student, teacher, targets = some_logits(16, v=100, spread=4.0)
    back = restore(compress(teacher, torch.tensor(targets), 99), student)
    for gold, rest in GATES:
        losses = [distill(forward_of(student, p, targets), Guidance(2.0, gold, rest=rest)).loss for p in (teacher, back)]
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-4, abs=1e-7)


def test_a_cache_is_cut_and_joined_by_position() -> None:
    logits, _, targets = some_logits(17, v=50)
    whole = compress(logits, torch.tensor(targets), 8)
    joined = TopK.cat([whole.select(slice(4, 7)), whole.select(torch.tensor([2, 0]))])
    order = torch.tensor([4, 5, 6, 2, 0])
    assert torch.equal(restore(joined, logits[order]), restore(whole, logits)[order])
    assert torch.equal(joined.entries, whole.entries[order])


@pytest.mark.parametrize(("k", "n"), [(0, 2), (4, 3)])
def test_what_cannot_be_compressed_is_an_error(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="k must be"):
        compress(torch.zeros(2, 5), torch.zeros(n, dtype=torch.int64), k)
