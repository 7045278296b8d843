"""How much was trained."""

from __future__ import annotations

from fedkeel.evidence.measure.run import Finished
from fedkeel.types import Row


def size(run: Finished) -> list[Row]:
    """The trained parameters of the model."""
    count = sum(p.numel() for p in run.model.parameters())
    return [run.row("trainable_parameters", float(count), "parameters", split="")]
