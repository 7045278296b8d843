"""The teacher of a site's round: the global model as it stood when the round began, and what it is trusted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.data.batches import Batch
from fedkeel.data.format import Example
from fedkeel.method.objective.compress import TopK, compress, restore
from fedkeel.method.objective.trust import layer_trust, trusts
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Distill
from fedkeel.types import Adapter, Forward, Global, Teacher


def counted_as(example: Example, by: str) -> str:
    """What evidence on a row is counted by: its task, or under by = "label" its task and label where it has one."""
    return f"{example.task}: {example.label}" if by == "label" and example.label else example.task


def held_positions(examples: Sequence[Example], by: str) -> dict[str, int]:
    """Supervised positions held, by what they are `counted_as`."""
    held: Counter[str] = Counter()
    for example in examples:
        held[counted_as(example, by)] += example.positions
    return dict(sorted(held.items()))


@dataclass(frozen=True)
class _Kept:
    """What the teacher said on one row."""

    top: TopK
    states: Sequence[Tensor]


class Guide:
    """The teacher on the rows of one site, for one round.

    It is an adapter swapped into the same base, in evaluation mode and without gradient. With `keep` (rows are met more
    than once in the round) what it says of a row is kept: its `config.cache` likeliest entries and the mass of all others,
    and its hidden states in bfloat16. The kept distribution is off by at most twice that mass in L1, see `compress`.
    """

    def __init__(
        self, model: Model, state: Global, examples: Sequence[Example], total: Mapping[str, int], config: Distill, keep: bool
    ) -> None:
        """state: as it came down. total: supervised positions held by all sites, by what they are `counted_as`."""
        self._model, self._config = model, config
        self.states = bool(config.weight) and config.align != "off" and config.align_weight > 0
        self._adapters: list[tuple[float, list[Tensor]]] = []
        memory = config.memory if state.memory is not None else 0.0
        parts: tuple[tuple[float, Adapter | None], ...] = ((1.0 - memory, state.adapter), (memory, state.memory))
        for share, adapter in parts:
            if share and adapter is not None:
                self._adapters.append((share, model.park(adapter)))
        self._trust = trusts(held_positions(examples, config.trust_by), total, config.task_trust, config.site_trust)
        self._layers: list[float] = []
        if self.states:
            taps, stack = model.taps, [path for path, _ in model.places.stack]
            self._layers = layer_trust(taps, stack, state.drift if config.layer_trust else {})
        self._keep = keep and config.cache > 0
        self._kept: dict[str, _Kept] = {}
        self._classes = 0  # V, known once the teacher has been asked

    def __call__(self, batch: Batch, examples: Sequence[Example]) -> Teacher:
        """What the teacher says at the supervised positions of `batch`, which was made of `examples`."""
        if all(e.record in self._kept for e in examples):
            logits, states = self._remembered(batch, examples)
        else:
            logits, states = self._asked(batch)
            if self._keep:
                self._remember(batch, examples, logits, states)
        device = logits.device
        trust = [self._trust[counted_as(e, self._config.trust_by)] for e in examples]
        weights = torch.tensor(trust, device=device)[batch.rows.to(device)]
        return Teacher(logits, weights[:, 0], weights[:, 1], states, self._layers)

    @torch.no_grad()
    def _asked(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        model = self._model
        was = model.net.training
        model.train(False)
        said: list[tuple[float, Forward]] = []
        for share, parked in self._adapters:
            with model.swapped(parked), model.autocast():
                said.append((share, model.forward(batch, self.states)))
        model.train(was)
        if len(said) == 1:
            return said[0][1].logits, said[0][1].states
        # (1 − μ) p_round + μ p_stage; a probability of 0 (a class that is not allowed) stays −inf
        mixed = sum(share * forward.logits.float().softmax(-1) for share, forward in said)
        assert isinstance(mixed, Tensor)
        states = [sum(share * forward.states[tap] for share, forward in said) for tap in range(len(said[0][1].states))]
        return mixed.log(), [s for s in states if isinstance(s, Tensor)]

    def _remember(self, batch: Batch, examples: Sequence[Example], logits: Tensor, states: Sequence[Tensor]) -> None:
        top = compress(logits, batch.targets.to(logits.device), self._config.cache)
        self._classes = logits.shape[1]
        rows = batch.rows.to(logits.device)
        for row, example in enumerate(examples):
            where = (rows == row).nonzero()[:, 0]
            self._kept[example.record] = _Kept(top.select(where), [s[where].to(torch.bfloat16) for s in states])

    def _remembered(self, batch: Batch, examples: Sequence[Example]) -> tuple[Tensor, Sequence[Tensor]]:
        kept = [self._kept[e.record] for e in examples]
        like = torch.zeros(len(batch.targets), self._classes, device=self._model.device)
        if batch.allowed is not None:
            like = like.masked_fill(~batch.allowed.to(self._model.device), float("-inf"))
        logits = restore(TopK.cat([k.top for k in kept]), like)
        states = [torch.cat([k.states[tap] for k in kept]).float() for tap in range(len(kept[0].states))]
        return logits, states
