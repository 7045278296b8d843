"""General text: how far tuning moved the model from its base."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkeel.data.batches import padded
from fedkeel.evidence.measure.run import Finished, MeasureError, Settings, UnmeasuredError, digest
from fedkeel.model.lora import Model
from fedkeel.rng import derive
from fedkeel.scores.metrics import kl_divergence, perplexity_ratio
from fedkeel.types import Row

LOGITS = 2**25  # most logits of general text at once, unless one paragraph has more
DIVERGED = 2**22  # most of them that are compared at once, in float64


def _paragraphs(files: Sequence[Path], limit: int) -> list[str]:
    """The paragraphs of each file, one a line, at most `limit` a file (0: all): the first by a hash of their text."""
    chosen = []
    for path in files:
        try:
            lines = {line.strip() for line in path.read_text(encoding="utf-8").splitlines()} - {""}
        except UnicodeDecodeError as error:
            raise MeasureError(f"{path} is no text in UTF-8: {error}") from error
        chosen += sorted(lines, key=lambda line: (derive(0, "general", line), line))[: limit or None]
    return chosen


@torch.no_grad()
def _log_chances(model: Model, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Of every token behind another one: (N, V) log probabilities of what could stand there, float32; (N,) what does."""
    ids, mask = padded(texts, model.tokenizer.pad_token_id, model.device)
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    with model.autocast():
        logits, _ = model.logits_at({"input_ids": ids, "attention_mask": mask}, rows, columns)
    return logits.float().log_softmax(-1).cpu(), ids[rows, columns + 1].cpu()


def against_base(
    model: Model, base: Model, texts: Sequence[Sequence[int]], advance: Callable[[int], None] = lambda texts: None
) -> tuple[float, float]:
    """(KL(base ‖ tuned) in nats, mean over tokens; perplexity ratio) of a causal model on texts of two tokens or more.

    base: the same model, or another one where the frozen maps of `model` have been shifted; its adapter is switched off.
    """
    divergence = 0.0
    tuned_nats: list[float] = []
    base_nats: list[float] = []
    for chunk in _chunks(sorted(texts, key=len), LOGITS // len(model.tokenizer)):
        tuned, gold = _log_chances(model, chunk)
        with base.net.disable_adapter():
            before, _ = _log_chances(base, chunk)
        step = max(1, DIVERGED // tuned.shape[1])
        for at in (slice(start, start + step) for start in range(0, len(gold), step)):
            divergence += kl_divergence(before[at], tuned[at]) * len(gold[at])
        for log_chances, nats in ((tuned, tuned_nats), (before, base_nats)):
            nats += (-log_chances.gather(1, gold[:, None])[:, 0]).tolist()
        advance(len(chunk))
    return divergence / len(base_nats), perplexity_ratio(tuned_nats, base_nats)


def _chunks(texts: Sequence[Sequence[int]], tokens: int) -> Iterable[Sequence[Sequence[int]]]:
    """Texts in order, shortest first, as many together as have `tokens` tokens when padded, and at least one."""
    begin = 0
    for end in range(1, len(texts) + 1):
        if end == len(texts) or (end + 1 - begin) * len(texts[end]) > tokens:
            yield texts[begin:end]
            begin = end


def about(settings: Settings) -> dict[str, Any] | None:
    """See `tables.Measure`."""
    if not settings.general:
        return None
    return {"files": {p.name: digest([p]) for p in settings.general}, "rows": settings.general_rows}


def general(run: Finished) -> list[Row]:
    """KL to base and perplexity ratio on general text; of a causal model alone."""
    if run.model.kind != "causal":
        raise UnmeasuredError(f"not measured, as a {run.model.kind} predicts no next token of a text")
    model, recipe = run.served(), run.recipe
    # the base has no shifts in it, and the model has
    base = Model(recipe.model, recipe.lora, recipe.seed, run.prepared.classes) if model.shifts else model
    paragraphs = _paragraphs(run.settings.general, run.settings.general_rows)
    texts = [model.tokenizer(p)["input_ids"][: recipe.data.max_length] for p in paragraphs]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise MeasureError(f"{', '.join(map(str, run.settings.general))}: no paragraph of two tokens or more")
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        run.watch("general", done, len(texts))

    divergence, ratio = against_base(model, base, texts, advance)
    return [
        run.row("kl_to_base", divergence, "nats", split="general"),
        run.row("perplexity_ratio", ratio, "ratio", split="general"),
    ]
