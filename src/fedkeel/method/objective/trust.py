"""How far a site trusts the global model, task by task and as a whole: the weight w of method.md §2, and π over layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

FLOOR = 0.25  # of u, and of v on the rest part: what others say of the other answers is never ignored
EPSILON = 0.1  # of π: a layer on which the sites agree wholly counts at most eleven times as one with D = 1


def task_trust(own: int, others: int) -> float:
    """v in [0, 1): others' evidence on a task against mine, (1/own) / (1/own + 1/others); 0 where others have none.

    own > 0, others ≥ 0: supervised positions held.
    """
    return others / (own + others)


def site_trust(own: Mapping[str, int], total: Mapping[str, int]) -> float:
    """u in [FLOOR, 1]: the Jensen–Shannon divergence of my task histogram from everyone's, over its maximum, ln 2.

    own, total: supervised positions by task; at least one > 0 in `own`. Where nothing can be told apart, without any total
    or with a single task in all, the histograms say nothing about skew: 1. Source: ours; the divergence is Lin 1991.
    """
    mine, all_ = sum(own.values()), sum(total.values())
    if not all_ or len({*own, *total}) == 1:
        return 1.0
    divergence = 0.0
    for task in sorted({*own, *total}):
        p, q = own.get(task, 0) / mine, total.get(task, 0) / all_
        m = (p + q) / 2
        divergence += sum(x * math.log(x / m) / 2 for x in (p, q) if x)
    return min(1.0, max(FLOOR, divergence / math.log(2)))


def trusts(own: Mapping[str, int], total: Mapping[str, int], by_task: bool, by_site: bool) -> dict[str, tuple[float, float]]:
    """(weight of the gold part, weight of the rest part) for each task of a site.

    v, normalised so that its mean over the site's own positions is 1 and the strength of the whole term keeps its meaning,
    times u, which is one number a site and scales the term. On the rest part v is at least FLOOR. Where no task of a site
    has evidence from others, the gold part weighs 0. total: positions held by all sites, mine included; in the one round
    before I am counted too, others' are underestimated by mine. by_task, by_site: v ≡ 1, u ≡ 1 where False.
    """
    v = {task: task_trust(n, max(0, total.get(task, 0) - n)) if by_task else 1.0 for task, n in own.items()}
    u = site_trust(own, total) if by_site else 1.0
    mine = sum(own.values())
    gold_mean = sum(v[task] * n for task, n in own.items()) / mine
    rest_mean = sum(max(FLOOR, v[task]) * n for task, n in own.items()) / mine
    return {task: (u * v[task] / gold_mean if gold_mean else 0.0, u * max(FLOOR, v[task]) / rest_mean) for task in sorted(own)}


def layer_trust(taps: Sequence[str], stack: Sequence[str], drift: Mapping[str, float]) -> list[float]:
    """π over the tapped blocks: ∝ 1 / (EPSILON + D), sum 1, with D the mean drift of the blocks up to that tap.

    taps: tapped blocks from low to high; stack: all blocks of that stack in order; drift: D by block, see
    `aggregate.drift`. A block that it does not name (nothing there is trained) counts as 0, without any they are all equal.
    """
    raw, begin = [], 0
    for tap in taps:
        end = stack.index(tap) + 1
        blocks = [drift.get(path, 0.0) for path in stack[begin:end]]
        raw.append(1.0 / (EPSILON + sum(blocks) / len(blocks)))
        begin = end
    return [value / sum(raw) for value in raw]
