"""Batches: which rows an optimiser step meets, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedkeel.data.format import Example
from fedkeel.data.forms import DataError
from fedkeel.rng import numpy_generator

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Batch:
    """inputs: what the model's forward takes, each (rows, tokens). Position n of N is token `columns[n]` of row `rows[n]`
    (of the decoder, for an encoder-decoder); `targets[n]` is what must be predicted there. allowed: (N, V) or None. tasks: of
    each row of a classifier.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    targets: Tensor
    allowed: Tensor | None = None
    tasks: Sequence[str] = ()


def epoch_batches(lengths: Sequence[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """One epoch as batches of indices, each index once, rows of similar length together.

    Rows are shuffled, cut into windows of 16 batches, sorted by length within a window, and the batches shuffled: little
    padding, and still nearly any row can meet any other. The last batch of the epoch may be short.
    """
    order = rng.permutation(len(lengths)).tolist()
    window = 16 * batch_size
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: lengths[i])
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def batches_per_epoch(rows: int, batch_size: int) -> int:
    """ceil(rows / batch_size)."""
    return -(-rows // batch_size)


def batch_indices(lengths: Sequence[int], batch_size: int, seed: int, site: str, steps: range) -> list[list[int]]:
    """The batches of a site's optimiser steps `steps`, counted from the start of the stage.

    A pure function of its arguments: a resumed or moved run meets the same rows in the same order.
    """
    size = batches_per_epoch(len(lengths), batch_size)
    epochs = {
        epoch: epoch_batches(lengths, batch_size, numpy_generator(seed, "batches", site, epoch))
        for epoch in {step // size for step in steps}
    }
    return [epochs[step // size][step % size] for step in steps]


def padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str = "cpu", left: bool = False
) -> tuple[Tensor, Tensor]:
    """(rows, T) tokens and the mask of those that are real. left: padded there, so that every row ends in the last column."""
    width = max(map(len, rows))

    def filled(tokens: Sequence[int], filler: int) -> list[int]:
        gap = [filler] * (width - len(tokens))
        return [*gap, *tokens] if left else [*tokens, *gap]

    real = torch.tensor([filled([1] * len(row), 0) for row in rows], device=device)
    return torch.tensor([filled(row, pad) for row in rows], device=device), real


def collate(examples: Sequence[Example], kind: str, pad: int, classes: int = 0) -> Batch:
    """One batch, padded on the right. Raises DataError if a row has no supervised position, naming it."""
    for example in examples:
        if not example.positions:
            raise DataError(f"row {example.record} (task {example.task}) has no supervised position")
    inputs = dict(zip(("input_ids", "attention_mask"), padded([e.ids for e in examples], pad), strict=True))
    if kind == "classifier":
        rows = torch.arange(len(examples))
        allowed = torch.zeros(len(examples), classes, dtype=torch.bool)
        for row, example in enumerate(examples):
            allowed[row, list(example.allowed) or slice(None)] = True
        targets = torch.tensor([e.target for e in examples])
        return Batch(inputs, rows, torch.zeros_like(rows), targets, allowed, [e.task for e in examples])
    if kind == "seq2seq":
        places = [(r, c, t) for r, e in enumerate(examples) for c, t in enumerate(e.decoder)]
        inputs["labels"], _ = padded([e.decoder for e in examples], -100)
    else:
        places = [(r, c - 1, e.ids[c]) for r, e in enumerate(examples) for c in range(1, len(e.ids)) if e.supervised[c]]
    rows, columns, targets = (torch.tensor(column) for column in zip(*places, strict=True))
    return Batch(inputs, rows, columns, targets)
