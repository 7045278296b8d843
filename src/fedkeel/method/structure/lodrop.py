"""FedLoDrop: columns of A and rows of B left out."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw, Sheet, gates, scaled
from fedkeel.model.places import Places


def lodrop(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Train diag(m_B) B A diag(m_A) of every branch: random columns of A and rows of B are 0, one draw a module and step.

    amount: the probability p, in [0, 1), of a column and of a row. What is kept is scaled by 1/(1 − p) in each mask; the two
    are independent, so the mean is B A. Masks are on the branch's input (…, d_in) and output (…, d_out).
    Raises StructureError if there is no branch.
    Source: FedLoDrop, arXiv:2510.12078, which draws by the round and sends less by it; here a step draws, and all is sent.
    """
    places.need(places.branches, "lodrop")
    count = len(places.branches)
    columns = gates(draw, "lodrop columns", [b.shape[2] for b in places.branches], [amount] * count, per_row=False)
    rows = gates(draw, "lodrop rows", [b.shape[0] for b in places.branches], [amount] * count, per_row=False)
    handles = []
    for i, branch in enumerate(places.branches):
        handles.append(branch.a.register_forward_pre_hook(partial(_drop_columns, draw, columns, i)))
        handles.append(branch.b.register_forward_hook(partial(_drop_rows, draw, rows, i)))
    return handles


def _drop_columns(draw: Draw, sheet: Sheet, place: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    return (scaled(inputs[0], sheet.take(place, inputs[0])), *inputs[1:]) if draw.active else None


def _drop_rows(draw: Draw, sheet: Sheet, place: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    return scaled(output, sheet.take(place, output)) if draw.active else None
