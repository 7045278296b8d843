"""Candidate answers of a row as one tree behind its prompt: what several begin with runs once, and everything in one pass.

A row is then one sequence, the prompt and the tree's inner nodes; each node sees the prompt and the nodes above it, and stands
at the position that it would have in its answer. The same numbers as a pass of each prompt with each answer, but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkeel.data.batches import padded
from fedkeel.model.lora import Model

# Positions whose logits are worked out at once, (positions, vocabulary): bounds memory however many labels a task has.
POSITIONS = 1024


@dataclass(frozen=True)
class Tree:
    """One row. ids: the prompt, then the inner nodes, each behind the node above it. above: a node's parent, counted like
    `ids`; of a first token the prompt's last. asked: (where, token, answer): log p(token) behind `where` counts for that
    answer.
    """

    prompt: int
    ids: tuple[int, ...]
    above: tuple[int, ...]
    asked: tuple[tuple[int, int, int], ...]

    @property
    def positions(self) -> tuple[int, ...]:
        """Of each token of `ids` in its answer."""
        found = list(range(self.prompt))
        for parent in self.above:
            found.append(found[parent] + 1)
        return tuple(found)

    def sees(self) -> Tensor:
        """(tokens, tokens): whether the row's token may look at the column's."""
        seen = torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril()
        for node, parent in enumerate(self.above, self.prompt):
            seen[node] = seen[parent]
            seen[node, node] = True
        return seen


def tree(prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Tree:
    """The tree of `answers`, none of which is empty, behind `prompt`, which is not empty either."""
    ids, above, asked = list(prompt), [], []
    nodes: dict[tuple[int, int], int] = {}  # (parent, token) -> node
    for number, answer in enumerate(answers):
        at = len(prompt) - 1
        for place, token in enumerate(answer):
            asked.append((at, token, number))
            if place + 1 == len(answer):
                break
            if (at, token) not in nodes:
                nodes[at, token] = len(ids)
                ids.append(token)
                above.append(at)
            at = nodes[at, token]
    return Tree(len(prompt), tuple(ids), tuple(above), tuple(asked))


def over_trees(model: Model, trees: Sequence[Tree], answers: Sequence[int]) -> list[list[float]]:
    """log p(answer | prompt) in nats, of each tree's answers. answers: how many each has."""
    found = []
    for start, stop in parts([len({where for where, _, _ in one.asked}) for one in trees], len(trees)):
        found += _together(model, trees[start:stop], answers[start:stop])
    return found


def parts(positions: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of rows that go through the model together: up to `most` that keep within POSITIONS, and at least one.

    positions: of each row, those whose logits are worked out.
    """
    start, held = 0, 0
    for number, need in enumerate(positions):
        if number > start and (held + need > POSITIONS or number - start == most):
            yield start, number
            start, held = number, 0
        held += need
    if start < len(positions):
        yield start, len(positions)


def _together(model: Model, trees: Sequence[Tree], answers: Sequence[int]) -> list[list[float]]:
    width, device = max(len(t.ids) for t in trees), model.device
    pad = model.tokenizer.pad_token_id
    ids, _ = padded([t.ids for t in trees], pad, device)
    positions, _ = padded([t.positions for t in trees], 0, device)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)  # padding looks at itself: no row of a softmax is empty
    for row, one in enumerate(trees):
        sees[row, : len(one.ids), : len(one.ids)] = one.sees()
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": model.as_mask(sees[:, None].to(device)),
        "position_ids": positions,
        "use_cache": False,
    }
    places = sorted({(row, where) for row, one in enumerate(trees) for where, _, _ in one.asked})
    index = {place: n for n, place in enumerate(places)}
    rows, columns = (torch.tensor(c, device=device) for c in zip(*places, strict=True))
    logits, _ = model.logits_at(inputs, rows, columns)
    asked = [(row, index[row, where], token, answer) for row, one in enumerate(trees) for where, token, answer in one.asked]
    at, tokens = (torch.tensor(c, device=device) for c in zip(*((n, token) for _, n, token, _ in asked), strict=True))
    logits = logits.float()
    told = (logits[at, tokens] - logits.logsumexp(-1)[at]).tolist()
    sums = [[0.0] * count for count in answers]
    for (row, _, _, answer), value in zip(asked, told, strict=True):
        sums[row][answer] += value
    return sums
