"""Self-speculation: the lower blocks draft the next tokens, and all blocks check them in one pass; the answer stays the same.

Source: Leviathan et al. 2023 (arXiv:2211.17192) for the counts, Elhoushi et al. 2024 (LayerSkip, arXiv:2404.16710 §4.3) for
drafts of the model's own lower blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fedkeel.data.batches import collate
from fedkeel.data.format import Example
from fedkeel.data.forms import DataError
from fedkeel.evidence.measure.run import Finished, MeasureError, Settings, UnmeasuredError
from fedkeel.model.depth import without
from fedkeel.model.lora import Model
from fedkeel.scores.evaluate import answered, choose
from fedkeel.types import Record, Row

SHARES = (0.25, 0.5, 0.75, 0.9)  # of the blocks that draft
AHEAD = 4  # tokens drafted before a pass that checks them
ROWS = 64  # most test rows a task whose answers are drafted


class Drafted(NamedTuple):
    """What answers took. tokens: said. foretold: of those, what a draft behind the true ones would have said. passes: of all
    blocks."""

    tokens: int
    foretold: int
    passes: int


def together(parts: Sequence[Drafted]) -> Drafted:
    """Of several answers."""
    return Drafted(*map(sum, zip(*parts, strict=True)))


def drafted(foretold: Sequence[bool], ahead: int = AHEAD) -> Drafted:
    """Of one answer, for each of whose tokens it is known whether a draft behind the true ones would have said it.

    Each pass of all blocks checks `ahead` drafted tokens: it keeps those before the first wrong one and adds its own next.
    """
    at = passes = 0
    while at < len(foretold):
        kept = foretold[at : at + ahead]
        at += (list(kept).index(False) if False in kept else len(kept)) + 1
        passes += 1
    return Drafted(len(foretold), sum(foretold), passes)


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    return {"rows": _most(settings), "ahead": AHEAD, "shares": list(SHARES)} if settings.speculation else None


def _most(settings: Settings) -> int:
    return min(settings.rows or ROWS, ROWS)


@torch.no_grad()
def speculation(run: Finished) -> list[Row]:
    """By share of the blocks that draft: how much they foretell, the tokens that a pass of all blocks yields, and how many
    fewer blocks are run a token, a pass over several tokens counted once. None of an encoder, which says no text."""
    model = run.served()
    stack, forms = model.places.stack, model.places.forms
    if model.kind == "classifier" or len(forms) < 2:
        return []
    records = choose(run.prepared.stages[-1].all("test"), "test", _most(run.settings))
    if not records:
        raise MeasureError(f"{run.folder}: its data has no test row")
    records = [record for record in records if _fits(run, record)]
    if not records:
        length = run.recipe.data.max_length
        raise UnmeasuredError(f"not measured, as data.max_length = {length} leaves no prompt of a test row room for an answer")
    drafts = {share: max(1, min(len(stack) - 1, round(share * len(stack)))) for share in SHARES}
    found: dict[int, list[Drafted]] = {kept: [] for kept in drafts.values()}
    done = 0
    with model.autocast():
        for batch in answered(model, run.formatter, records, run.recipe.evaluation):
            examples = [_example(run, *one) for one in batch]
            for kept in found:
                with without([block for _, block in stack[kept:]], forms[kept:]):
                    found[kept] += map(drafted, foretold(model, examples))
            done += len(batch)
            run.watch("speculation", done, len(records))
    rows = []
    for share, kept in drafts.items():
        part, blocks, total = f"speculation/{share:g}", len(stack), together(found[kept])
        rows += [
            run.row(f"{part}/blocks", float(kept), "blocks"),
            run.row(f"{part}/acceptance", total.foretold / total.tokens, "share"),
            run.row(f"{part}/tokens_a_pass", total.tokens / total.passes, "tokens"),
            run.row(f"{part}/speed_up", total.tokens * blocks / (total.passes * (blocks + AHEAD * kept)), "ratio"),
        ]
    return rows


def _fits(run: Finished, record: Record) -> bool:
    """Whether the model can answer it in words: a row whose labels were compared needed less room."""
    try:
        run.formatter.prompt_ids(record, run.recipe.evaluation.max_new_tokens)
    except DataError:
        return False
    return True


def _example(run: Finished, record: Any, prompt: tuple[int, ...], tokens: Sequence[int]) -> Example:
    """The prompt with the model's own answer behind it, its end included."""
    ends = run.formatter.ends(record)
    said = tuple(tokens[: next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))])
    if run.model.kind == "seq2seq":
        return Example(record.id, record.task, prompt, decoder=said)
    return Example(record.id, record.task, (*prompt, *said), (False,) * len(prompt) + (True,) * len(said))


def foretold(model: Model, examples: Sequence[Example]) -> Iterator[list[bool]]:
    """Of each example, for each token of its answer: whether the model, as it is now, finds it the likeliest there."""
    forward = model.forward(collate(examples, model.kind, model.tokenizer.pad_token_id))
    hits, rows = (forward.logits.argmax(-1) == forward.targets).tolist(), forward.rows.tolist()
    for number in range(len(examples)):
        yield [hit for hit, row in zip(hits, rows, strict=True) if row == number]
