"""Which blocks of a model can go: their influence, and the score and seconds without the least of them.

Sources: block influence, Men et al. 2024 (ShortGPT, arXiv:2403.03853 eq. 1), weighed anew whenever a block has gone, as Song et
al. 2024 do (SLEB, arXiv:2402.09025): of two blocks that do the same each looks idle beside the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedkeel.data.batches import Batch, collate
from fedkeel.evidence.measure.run import Finished, Settings, UnmeasuredError
from fedkeel.model.depth import kept_blocks, states_of, without
from fedkeel.model.lora import Model
from fedkeel.scores.evaluate import choose, overall, score
from fedkeel.types import Row

SHARES = (0.1, 0.2, 0.3)  # of the blocks that are left out, as the damage family `depth` cuts off the top
ROWS = 64  # most validation rows a task whose states are looked at


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    return {"rows": settings.rows, "shares": list(SHARES), "order": "turns"} if "depth" in settings.damages else None


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


class Weighed:
    """Validation rows of a run, by which its blocks are weighed. Raises UnmeasuredError where there are none."""

    def __init__(self, run: Finished) -> None:
        records = choose(run.prepared.stages[-1].all("validation"), "validation", min(run.settings.rows or ROWS, ROWS))
        if not records:
            raise UnmeasuredError("not measured, as there are no validation rows to weigh blocks by")
        self._model, self._size = run.served(), run.recipe.evaluation.batch_size
        self._examples = sorted(run.formatter.encode_all(records), key=lambda e: (e.length, e.record))

    @torch.no_grad()
    def influence(self, gone: Sequence[int] = ()) -> list[float]:
        """Of each block of the stack that predicts, from the lowest, while those of `gone` are left out, which have none."""
        model = self._model
        stack = model.places.stack
        found = _Influence(len(stack))
        with ExitStack() as undo, model.autocast():
            undo.enter_context(left_out(model, gone))
            for number, (_, block) in enumerate(stack):
                undo.callback(block.register_forward_hook(partial(found.see, number), with_kwargs=True).remove)
            for start in range(0, len(self._examples), self._size):
                chunk = self._examples[start : start + self._size]
                batch = collate(chunk, model.kind, model.tokenizer.pad_token_id, len(model.classes))
                found.begin(batch)
                model.forward(batch)
        return [total / found.positions for total in found.sums]


def left_out(model: Model, gone: Sequence[int]) -> AbstractContextManager[None]:
    """While it lasts, these blocks are not run."""
    stack, forms = model.places.stack, model.places.forms
    return without([stack[n][1] for n in gone], [forms[n] for n in gone]) if gone else nullcontext()


def order_of(blocks: int, influence: Callable[[Sequence[int]], Sequence[float]]) -> list[int]:
    """The blocks but the first, in the order in which they go: each time the one of least influence while those before it are
    left out, of equal ones the highest. For half of the blocks; the rest go by what they have then.

    influence: blocks that are left out -> that of every block.
    """
    order: list[int] = []
    while len(order) < blocks - 1:
        weighed = influence(sorted(order))
        least = sorted({*range(1, blocks)} - {*order}, key=lambda n: (weighed[n], -n))
        order += least[:1] if len(order) < blocks // 2 else least
    return order


def blocks(run: Finished) -> list[Row]:
    """Influence by block, and the order in which they go; scores, and seconds of scoring as a share of those with all blocks,
    without the first of that order."""
    model = run.model
    count = len(model.places.stack)
    if len(model.places.forms) < 2:
        raise UnmeasuredError(f"not measured, as the blocks of {run.recipe.model.base!r} are not known")
    weighed, steps = Weighed(run), count // 2 + 2 + len(SHARES)
    done: list[list[float]] = []

    def influence(gone: Sequence[int]) -> Sequence[float]:
        done.append(weighed.influence(gone))
        run.watch("blocks", len(done), steps)
        return done[-1]

    order = order_of(count, influence)
    rows = [run.row(f"blocks/influence/{n}", value, "ratio", split="validation") for n, value in enumerate(done[0])]
    rows += [run.row(f"blocks/turn/{n}", float(turn), "turn", split="validation") for turn, n in enumerate(order, 1)]
    records, whole = [s.record for s in run.clean], 0.0
    for step, share in enumerate((0.0, *SHARES)):
        kept = kept_blocks(count, 1 - share, order)
        served, began = run.served(), time.perf_counter()
        with left_out(served, [n for n in range(count) if n not in kept]):
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
        run.watch("blocks", steps - len(SHARES) + step, steps)
    return rows
