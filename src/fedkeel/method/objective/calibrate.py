"""What the task loss asks of labels that a site does not hold: offsets on the logits of what leads to them.

An answer is a string of tokens (of a classifier, its class alone), and a task's labels form a trie. At each place of the right
answer some next tokens lead to labels, each to those below it; every other token is left alone. Sources: FedRS (Li & Zhan, KDD
2021) for `restricted`, logit adjustment (Menon et al. 2021, FedLC: Zhang et al. 2022) for `prior`, both carried over to tries.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Offset = Callable[[Sequence[int], Sequence[int], Any], float]


def restricted(below: Sequence[int], here: Sequence[int], options: Any) -> float:
    """−inf for a token that leads to labels without a row only, so that the softmax is without it; else 0.

    below, here: rows that the site holds of each label below the token, and of each label still possible before it.
    """
    return 0.0 if any(below) else -math.inf


def prior(below: Sequence[int], here: Sequence[int], options: Any) -> float:
    """κ (log of the labels' share of the site's rows − log of what it would be with equal counts), counts raised by ε: a rare
    label must be the likelier in itself to be as likely here. `options.kappa`, `options.epsilon`. Arguments as `restricted`."""
    counted = math.log(sum(n + options.epsilon for n in below) / sum(n + options.epsilon for n in here))
    return float(options.kappa * (counted - math.log(len(below) / len(here))))


def nodes(answer: Sequence[int], labels: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int], dict[int, list[int]]]]:
    """Of each node of the labels' trie on the answer's way: (place, the labels still possible before it, next token -> those of
    them below it). answer, labels: tokens; labels are told by their index."""
    possible = list(range(len(labels)))
    for place, taken in enumerate(answer):
        below: dict[int, list[int]] = defaultdict(list)
        for label in possible:
            if place < len(labels[label]):
                below[labels[label][place]].append(label)
        yield place, possible, below
        possible = below[taken]


def along(
    answer: Sequence[int], labels: Sequence[Sequence[int]], counts: Sequence[int], offset: Offset, options: Any
) -> list[tuple[int, int, float]]:
    """(place, token, offset) along the right answer, where the offset is not 0.

    answer: its tokens. labels: those of every label of the task, `answer` among them. counts: rows of each at the site.
    """
    found = []
    for place, possible, below in nodes(answer, labels):
        here = [counts[label] for label in possible]
        for token, leads in below.items():
            value = offset([counts[label] for label in leads], here, options)
            if value:
                found.append((place, token, value))
    return found
