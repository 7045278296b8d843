"""What a site's update tells a curious coordinator of the rows behind it: words of the rows, and which answers they have.

The coordinator knows the base, the adapter that it sent, the learning rate, and rows of its own of the same kind. Of the first
trained block's maps y = W₀ x + s B A x the gradient of A is s Bᵀ Σ_t δ_t x_tᵀ: each of its rows is a sum of what the tokens
are where they enter, and in the lowest block a token enters as itself. Words whose entry lies in the span of these rows were
there: exactly so while there are fewer tokens than rows (Petrov et al. 2024, arXiv:2405.15586), and beyond that by a pursuit of
few words that explain them together (Tropp, Gilbert & Strauss 2006). Where A has not moved, the gradient s Σ_t δ_t (A x_t)ᵀ of
B is read in the same way, in r dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedkeel.data.batches import Batch
from fedkeel.model.lora import Model
from fedkeel.types import Adapter

PICKS = 40  # words that the pursuit takes, at most
SHORT = 1500  # words that it chooses among: those that the span holds most of
PLACES = 12  # at which a word is looked at, where its place in a row shows
EPSILON = 1e-8  # of AdamW
SLIGHT = 1e-3  # of the largest singular value: below it is noise


class _Reached(Exception):
    """A map that reads something else."""


@dataclass(frozen=True)
class Entry:
    """Where words enter the adapter. paths: of the maps that read the same there. words: token ids. states, scaled: (words, d)
    unit rows, what each is as it enters with the mean taken off, and the same with all dimensions of one deviation."""

    paths: tuple[str, ...]
    words: Tensor
    states: Tensor
    scaled: Tensor


@torch.no_grad()
def entry_of(model: Model, words: Sequence[int], usual: Sequence[int]) -> Entry:
    """words: token ids that may have been there. usual: those of them that the mean and the spread are taken over.

    Each word is read alone: repeated at PLACES places where the first block is trained, and once where it is a higher one, so
    that there it is a guess, as what enters depends on all of a row.
    """
    first, branches = model.first, model.places.branches
    seen: dict[str, Tensor] = {}

    def keep(path: str, module: Any, inputs: tuple[Tensor, ...]) -> None:
        if seen and inputs[0].data_ptr() != next(iter(seen.values())).data_ptr():
            raise _Reached
        seen[path] = inputs[0]

    handles = [b.whole.register_forward_pre_hook(partial(keep, b.path)) for b in branches if b.block >= first]
    begin = model.tokenizer("")["input_ids"][:1]
    times, parts = 1 if first else PLACES, []
    paths: tuple[str, ...] = ()
    try:
        for start in range(0, len(words), 512):
            column = torch.tensor(words[start : start + 512])[:, None]
            ids = torch.cat([torch.tensor([begin] * len(column)).long().reshape(len(column), -1), column.repeat(1, times)], 1)
            ids = ids.to(model.device)
            seen.clear()
            more = {"decoder_input_ids": ids} if model.kind == "seq2seq" else {}
            with suppress(_Reached), model.autocast():
                model.net(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
            paths, whole = tuple(seen), next(iter(seen.values()))
            parts.append(whole[:, len(begin) :].float().mean(1).cpu())
    finally:
        for handle in handles:
            handle.remove()
    states, common = torch.cat(parts), torch.isin(torch.tensor(words), torch.tensor(usual))
    states = states - states[common].mean(0)
    spread = states[common].std(0).clamp_min(1e-6)
    return Entry(paths, torch.tensor(words), normalize(states, dim=1), normalize(states / spread, dim=1))


def gradient_of(change: Tensor, rate: float) -> Tensor:
    """The gradient, up to its sign, behind a first step of AdamW: |Δ| = rate · |g| / (|g| + ε), so |g| = ε |Δ| / (rate − |Δ|).

    Adam's division by |g| leaves hardly more than signs, and float32 still tells the rest: of a |g| of 1e-4, three digits.
    """
    share = (change.double().abs() / rate).clamp(max=1 - 2.0**-25)
    return (change.sign().double() * EPSILON * share / (1 - share)).float()


def pursue(groups: Sequence[tuple[Tensor, Tensor]], picks: int = PICKS) -> Tensor:
    """(V,): how likely each of V words was there, by (rows (m, d), states (V, d) of unit length) that tell of them.

    Each gets the share of its state that the span of the rows holds, at most ½; those that a pursuit picks get more, the sooner
    the more: in turn the word whose state, without what those before it explain, the span of what is left holds most of.
    """
    told = [(rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30), states) for rows, states in groups]
    first = sum((_held(rows, states) for rows, states in told), torch.zeros(len(groups[0][1]))) / len(groups)
    short = first.topk(min(SHORT, len(first))).indices
    left = [(rows, states[short]) for rows, states in told]
    lengths = [torch.ones(len(short)) for _ in left]
    scores = first / first.max().clamp_min(1e-30) / 2
    picked: list[int] = []
    for number in range(min(picks, len(short))):
        share = sum((_held(rows, states) / n.clamp_min(0.02) for (rows, states), n in zip(left, lengths, strict=True)))
        share = torch.where(torch.stack(lengths).amin(0) > 0.02, share, 0.0)
        share[picked] = 0.0
        word = int(share.argmax())
        if not float(share[word]) > 0:
            break
        picked.append(word)
        scores[short[word]] = 2 - number / picks
        for n, (rows, states) in enumerate(left):
            along = normalize(states[word], dim=0)
            left[n] = rows - (rows @ along)[:, None] * along, states - (states @ along)[:, None] * along
            lengths[n] = left[n][1].square().sum(1)
    return scores


def _held(rows: Tensor, states: Tensor) -> Tensor:
    """(V,): of each state the squared length within the span of the rows; where they span all dimensions, as noisy rows do that
    are more than these, each direction counts by its share of the rows' energy."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    kept = values > max(SLIGHT * float(values[0]), 1e-9)
    weights = torch.ones(int(kept.sum()))
    if len(weights) == rows.shape[1]:
        weights = (values / values[0].clamp_min(1e-30)).square()
    return ((states @ vectors[kept].T).square() * weights).sum(1)


def words_told(change: Mapping[str, Tensor], sent: Adapter, entry: Entry, rate: float) -> Tensor:
    """(V,): `pursue` on a site's change. sent: what it started from. rate: of its one step of AdamW, where the change came as
    exact as it left; 0: of any other, of which each entry is taken to be about as large as all."""
    named = [f"{path}.a" for path in entry.paths if f"{path}.a" in change]
    moved = torch.cat([change[name] for name in named]) if named else torch.zeros(0)
    if moved.any():
        moved = moved[moved.any(1)]
        return pursue([(gradient_of(moved, rate), entry.states) if rate else (moved, entry.scaled)])
    groups = []
    for path in entry.paths:
        rows = change.get(f"{path}.b", torch.zeros(1, 1))
        if rows.any():
            rows = rows[rows.any(1)]
            groups.append((gradient_of(rows, rate) if rate else rows, normalize(entry.states @ sent.lora[path].a.T, dim=1)))
    return pursue(groups) if groups else torch.zeros(len(entry.words))


@torch.no_grad()
def answers_of(model: Model, adapter: Adapter, batch: Batch) -> Tensor:
    """(V,): mean log chance of each answer, of a classifier a class, else a token, at the supervised positions of `batch`. What
    became likelier through a site's change is what the site taught."""
    model.write(adapter)
    with model.autocast():
        logits = model.forward(batch).logits
    return logits.float().log_softmax(-1).clamp_min(-100).mean(0).cpu()
