"""What a site has evidence on, and so what its task loss may ask for: labels that its rows of this stage hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from fedkeel import tables
from fedkeel.data.batches import Batch
from fedkeel.data.format import Example
from fedkeel.method.objective.calibrate import along
from fedkeel.recipe.schema import Evidence
from fedkeel.types import Offsets


def calibration_of(examples: Sequence[Example], config: Evidence) -> Calibration | None:
    """The recipe's, of a site with these training rows in this stage; None for plain cross-entropy."""
    return Calibration(examples, config) if tables.CALIBRATIONS[config.task].code else None


class Calibration:
    """Offsets on the logits of a site's rows by the recipe's `evidence.task`; free text and chats have none.

    examples: all training rows of the site in this stage.
    """

    def __init__(self, examples: Sequence[Example], config: Evidence) -> None:
        self._config, self._offset = config, tables.CALIBRATIONS[config.task].load()
        self._counts = Counter((e.task, e.label) for e in examples if e.label)
        self._known: dict[tuple[str, tuple[str, ...], tuple[int, ...]], list[tuple[int, int, float]]] = {}

    def __call__(self, batch: Batch, examples: Sequence[Example]) -> Offsets | None:
        """Of a batch's positions; None where nothing is changed, so that the loss is then the plain one to the bit."""
        first = torch.searchsorted(batch.rows, torch.arange(len(examples))).tolist()  # positions of a row stand together
        places, tokens, values = [], [], []
        for row, example in enumerate(examples):
            for place, token, value in self._of(example):
                places.append(first[row] + place)
                tokens.append(token)
                values.append(value)
        if not places:
            return None
        return Offsets(torch.tensor(places), torch.tensor(tokens), torch.tensor(values))

    def _of(self, example: Example) -> list[tuple[int, int, float]]:
        if len(example.options) < 2:
            return []
        key = (example.task, example.labels, example.answer)
        if key not in self._known:
            counts = [self._counts[example.task, label] for label in example.labels]
            self._known[key] = along(example.answer, example.options, counts, self._offset, self._config)
        return self._known[key]
