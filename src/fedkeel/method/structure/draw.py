"""What structures draw from: the key, strength and rows of the present forward pass, and numbers that depend on them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.rng import counter_uniform, derive

# The row of what all rows of a batch share, such as DeBERTa's relative positions. A step has fewer rows than that.
SHARED = (1 << 20) - 1


@dataclass
class Draw:
    """What the hooks read while they run; the training loop sets its fields before every forward pass.

    key: of (seed, site, round, step, pass), from `rng.derive`; micro-batches of a step share it. strength: the schedule, in
    [0, 1], multiplies every amount. row: index, in the optimiser step, of the micro-batch's first row. rows: of the
    micro-batch; some models flatten (rows, time) on the way, and only with it such a row is still known (0: every leading
    index counts as a row). on: off, every structure is the identity.
    dropped, units: running counts for the log, of units dropped and drawn; the caller puts them back to 0.
    """

    key: int = 0
    strength: float = 0.0
    row: int = 0
    rows: int = 0
    on: bool = False
    dropped: Tensor | float = 0.0  # a tensor while it counts, so that no step waits for the device
    units: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is to happen in this pass."""
        return self.on and self.strength > 0.0

    def rows_of(self, x: Tensor) -> tuple[int, int, int]:
        """(first row, rows, leading indices a row) of x: (rows, …), (rows · time, …), or of what all rows share."""
        rows = self.rows or x.shape[0]
        if x.shape[0] % rows:
            return SHARED, 1, x.shape[0]
        return self.row, rows, x.shape[0] // rows


class Sheet:
    """Random numbers of one pass for all places of a structure, drawn together: a hook then costs a multiplication.

    units: numbers a place. fill: (key, counters) -> what the hooks multiply by, both (places, rows, max units). Each number
    depends on the draw's key, the structure's name, its place, row of the step and unit alone, so it does not matter which
    rows are drawn together. per_row: False draws once a step, for all rows.
    """

    def __init__(
        self, draw: Draw, name: str, units: Sequence[int], fill: Callable[[int, Tensor], Tensor], per_row: bool = True
    ) -> None:
        self._draw, self._name, self._units, self._fill, self._per_row = draw, name, units, fill, per_row
        self._drawn_for: tuple[object, ...] = ()
        self._drawn: dict[object, list[Tensor]] = {}

    def take(self, place: int, x: Tensor) -> Tensor:
        """The numbers of one place for x, (leading dimension of x, 1, …, units of the place), float32."""
        draw = self._draw
        first, rows, each = draw.rows_of(x) if self._per_row else (0, 1, 1)
        drawn_for = (draw.key, draw.strength, draw.row, draw.rows)
        if drawn_for != self._drawn_for:
            self._drawn_for, self._drawn = drawn_for, {}
        which = (first, rows, x.device)
        if which not in self._drawn:
            drawn = self._fill(derive(draw.key, self._name), self._counters(first, rows, x.device))
            self._drawn[which] = [of[:, :units] for of, units in zip(drawn.unbind(), self._units, strict=True)]
        numbers = self._drawn[which][place]
        if each > 1:
            numbers = numbers.repeat_interleave(each, 0)
        return numbers.reshape(numbers.shape[0], *[1] * (x.dim() - 2), -1)

    def _counters(self, first: int, rows: int, device: torch.device) -> Tensor:
        place = torch.arange(len(self._units), device=device)[:, None, None] << 44
        row = torch.arange(first, first + rows, device=device)[:, None] << 20
        return place + row + torch.arange(max(self._units), device=device)


def gates(draw: Draw, name: str, units: Sequence[int], chances: Sequence[float], per_row: bool = True) -> Sheet:
    """Gates of mean 1: 0 with probability p = strength · chance, else 1/(1 − p). chances: one a place, in [0, 1)."""

    def fill(key: int, counters: Tensor) -> Tensor:
        p = draw.strength * torch.tensor(chances, device=counters.device)[:, None, None]
        lost = counter_uniform(key, counters) < p
        real = torch.arange(max(units), device=counters.device) < torch.tensor(units, device=counters.device)[:, None, None]
        draw.dropped += (lost & real).sum()
        draw.units += counters.shape[1] * sum(units)
        return ~lost / (1.0 - p)

    return Sheet(draw, name, units, fill, per_row)


def scaled(x: Tensor, numbers: Tensor) -> Tensor:
    """x · numbers in the type of x; the product is taken in float32, where 1/(1 − p) is not rounded to eight bits."""
    return (x * numbers).to(x.dtype)
