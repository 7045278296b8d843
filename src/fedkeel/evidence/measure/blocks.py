"""Which blocks of a model can go: their influence, and the score and seconds without the least of them.

Source: block influence, Men et al. 2024 (ShortGPT, arXiv:2403.03853 eq. 1).
"""

from __future__ import annotations

import time
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedkeel.data.batches import Batch, collate
from fedkeel.evidence.measure.run import Finished, Settings, UnmeasuredError
from fedkeel.model.depth import kept_blocks, states_of, without
from fedkeel.scores.evaluate import choose, overall, score
from fedkeel.types import Row

SHARES = (0.1, 0.2, 0.3)  # of the blocks that are left out, as the damage family `depth` cuts off the top
ROWS = 64  # most validation rows a task whose states are looked at


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    return {"rows": settings.rows, "shares": list(SHARES)} if "depth" in settings.damages else None


class _Influence:
    """1 − E[cos(x, y)] of each block over the real positions of batches, x being what it is given and y what it gives."""

    def __init__(self, blocks: int) -> None:
        self.sums, self.positions, self._real = [0.0] * blocks, 0, torch.empty(0)

    def begin(self, batch: Batch) -> None:
        """Before a pass over a batch."""
        real = batch.inputs["labels"] != -100 if "labels" in batch.inputs else batch.inputs["attention_mask"].bool()
        self._real = real
        self.positions += int(real.sum())

    def see(self, number: int, block: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """A hook behind block `number`."""
        x: Tensor = given[0] if given else named["hidden_states"]
        alike = nn.functional.cosine_similarity(x.double(), states_of(output).double(), dim=-1)
        self.sums[number] += float((1 - alike)[self._real.to(alike.device)].sum())


@torch.no_grad()
def influence(run: Finished) -> list[float]:
    """Of each block of the stack that predicts, from the lowest; on validation rows. Raises UnmeasuredError."""
    model = run.served()
    records = choose(run.prepared.stages[-1].all("validation"), "validation", min(run.settings.rows or ROWS, ROWS))
    if not records:
        raise UnmeasuredError("not measured, as there are no validation rows to weigh blocks by")
    examples = sorted(run.formatter.encode_all(records), key=lambda e: (e.length, e.record))
    found, size = _Influence(len(model.places.stack)), run.recipe.evaluation.batch_size
    with ExitStack() as undo, model.autocast():
        for number, (_, block) in enumerate(model.places.stack):
            undo.callback(block.register_forward_hook(partial(found.see, number), with_kwargs=True).remove)
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            batch = collate(chunk, model.kind, model.tokenizer.pad_token_id, len(model.classes))
            found.begin(batch)
            model.forward(batch)
    return [total / found.positions for total in found.sums]


def blocks(run: Finished) -> list[Row]:
    """Influence by block; scores, and seconds of scoring as a share of those with all blocks, without the least of them."""
    model = run.model
    stack, forms = model.places.stack, model.places.forms
    if len(forms) < 2:
        raise UnmeasuredError(f"not measured, as the blocks of {run.recipe.model.base!r} are not known")
    weighed = influence(run)
    rows = [run.row(f"blocks/influence/{n}", value, "ratio", split="validation") for n, value in enumerate(weighed)]
    records, whole = [s.record for s in run.clean], 0.0
    for step, share in enumerate((0.0, *SHARES)):
        kept = kept_blocks(len(stack), 1 - share, weighed)
        gone = [n for n in range(len(stack)) if n not in kept]
        served, began = run.served(), time.perf_counter()
        with without([stack[n][1] for n in gone], [forms[n] for n in gone]) if gone else nullcontext():
            scored = score(served, run.formatter, records, run.recipe.evaluation)
        seconds = time.perf_counter() - began
        whole = whole or seconds
        if share:
            part = f"blocks/{share:g}"
            rows += [
                run.row(f"{part}/kept", float(len(kept)), "blocks"),
                run.row(f"{part}/score", overall(scored), "share"),
                run.row(f"{part}/seconds", seconds / whole, "ratio"),
            ]
        run.watch("blocks", step + 1, 1 + len(SHARES))
    return rows
