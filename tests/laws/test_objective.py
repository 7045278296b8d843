"""Laws of loss terms, over the table of all terms; the task loss against a slow loop."""

from __future__ import annotations

import math

import pytest
import torch
from builders import numbers
from torch import Tensor

from fedkeel.objective import TERMS, objective
from fedkeel.objective.task import task_loss
from fedkeel.types import Forward

ALL_TERMS = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


def forward_of(logits: Tensor, targets: list[int]) -> Forward:
    return Forward(logits, torch.tensor(targets, dtype=torch.int64), torch.arange(len(targets)))


def slow_task_loss(logits: Tensor, targets: list[int]) -> float:
    """−log softmax at the target, position by position, in Python floats."""
    total = 0.0
    for row, target in zip(logits.tolist(), targets, strict=True):
        top = max(row)
        total -= row[target] - top - math.log(sum(math.exp(value - top) for value in row))
    return total / len(targets)


def test_task_loss_by_hand() -> None:
    # softmax of (0, log 3) is (1/4, 3/4)
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, math.log(3.0)]])
    assert float(task_loss(forward_of(logits, [0, 1]))) == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-6)


def test_task_loss_equals_the_slow_loop() -> None:
    logits = 5 * numbers(1, 13, 29)
    targets = [(7 * i) % 29 for i in range(13)]
    assert float(task_loss(forward_of(logits, targets))) == pytest.approx(slow_task_loss(logits, targets), rel=1e-6)
    assert float(objective(forward_of(logits, targets))) == pytest.approx(slow_task_loss(logits, targets), rel=1e-6)


def test_masked_classes_take_no_part() -> None:
    logits = numbers(2, 6, 4).requires_grad_()
    masked = torch.cat([logits, torch.full((6, 3), float("-inf"))], dim=1)
    targets = [0, 3, 1, 2, 2, 0]
    alone, within = task_loss(forward_of(logits, targets)), task_loss(forward_of(masked, targets))
    assert within.item() == pytest.approx(alone.item(), rel=1e-7)
    (gradient,) = torch.autograd.grad(within, logits)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(gradient, torch.autograd.grad(alone, logits)[0], rtol=0, atol=1e-7)


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = (4 * numbers(3, 40, 500)).to(torch.bfloat16)
    targets = [(13 * i) % 500 for i in range(40)]
    loss = task_loss(forward_of(logits, targets))
    assert loss.dtype == torch.float32
    # bfloat16 has three digits: a sum in it would be off in the third
    assert float(loss) == pytest.approx(slow_task_loss(logits.float(), targets), rel=1e-6)


@ALL_TERMS
def test_no_position_is_an_error(term) -> None:
    with pytest.raises(ValueError, match="without supervised positions"):
        term(forward_of(torch.zeros(0, 5), []))


@ALL_TERMS
def test_terms_are_means_per_position(term) -> None:
    logits, targets = numbers(4, 9, 7), [i % 7 for i in range(9)]
    once = term(forward_of(logits, targets))
    twice = term(forward_of(logits.repeat(2, 1), targets * 2))
    assert once >= 0
    assert once.shape == ()
    assert float(twice) == pytest.approx(float(once), rel=1e-6)


@pytest.mark.parametrize("micro", [1, 2, 3, 8])
def test_micro_batches_give_the_gradient_of_the_whole(micro: int) -> None:
    """Eight rows at once, 4 × 2 and 8 × 1, each weighted by n_micro / n_step; rows differ in their number of positions."""
    lengths = [1, 7, 2, 5, 3, 1, 9, 4]
    inputs = [numbers(10 + i, n, 6) for i, n in enumerate(lengths)]
    targets = [[(i + 3 * j) % 11 for j in range(n)] for i, n in enumerate(lengths)]

    def gradient(size: int, weighted: bool = True) -> Tensor:
        weight = numbers(99, 6, 11).requires_grad_()
        for start in range(0, 8, size):
            flat = [t for row in targets[start : start + size] for t in row]
            loss = objective(forward_of(torch.cat(inputs[start : start + size]) @ weight, flat))
            (loss * (len(flat) / sum(lengths) if weighted else size / 8)).backward()
        return weight.grad

    torch.testing.assert_close(gradient(micro), gradient(8), rtol=0, atol=1e-6)
    if micro < 8:  # a mean over rows instead is another objective: this test can tell
        assert (gradient(micro, weighted=False) - gradient(8)).abs().max() > 1e-3
