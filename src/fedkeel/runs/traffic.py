"""What messages take, before any is sent: their bytes, found by sealing zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fedkeel import tables
from fedkeel.data.format import Example
from fedkeel.exchange.codecs import make_codec, seal
from fedkeel.exchange.messages import Way, about, names_of, pack, pack_global, shapes_of
from fedkeel.exchange.summands import summand
from fedkeel.exchange.sums import pack_foretold, pack_gather, pack_sums, pack_trial
from fedkeel.method.objective.anchor import SCALES
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.legs import Cast
from fedkeel.types import Adapter, Global, Head, Lora, Sums

NATS = 0.1234567890123456  # a number as long as most are

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of an adapter, by their names in `Adapter.tensors`."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of a federation. down, up: one message of a round each way, where they are longest. rounds: all messages of all
    rounds and sites. gathered: those of the analytic anchor, (down, up), which come once a stage."""

    down: int
    up: int
    rounds: int
    gathered: tuple[int, int]


def traffic(cast: Cast, stages: Sequence[Mapping[str, Sequence[Example]]], shapes: Shapes, width: int) -> Traffic:
    """Of the federation of `cast`, without retries and what masks take beside.

    stages: of each, by site, what it trains on. shapes: of the adapter. width: features that the anchor sees of a row.
    """
    recipe, like = cast.recipe, zeros(shapes)
    sites = min(recipe.federation.sites_per_round or len(cast.sites), len(cast.sites))
    evidence, by_head = recipe.evidence, recipe.model.head == "analytic"
    heads: dict[str, Head] = {}
    longest, rounds, gathered = (0, 0), 0, (0, 0)
    told: set[str] = set()
    for stage, rows in enumerate(stages):
        if evidence.asked or by_head:
            fresh = {site: _counts(e for e in held if e.record not in told) for site, held in rows.items() if held}
            told.update(e.record for held in rows.values() for e in held)  # what is replayed is in the sums already
            now, asked = _gathered(fresh, heads, stage, like, width)
            heads |= {t: replace(h, mean=h.weight.clone()) for t, h in now.items()} if evidence.prototype else now
            gathered = gathered[0] + asked[0], gathered[1] + asked[1]
        teaches = evidence.anchor or evidence.prototype
        sent = {task: head for task, head in heads.items() if by_head or (teaches and head.stage == stage)}
        first, *later = map(len, cast.rounds(stage))
        # in the first round of a stage the memory is the global adapter, which comes down anyway
        for asks, remembers in ((first, False), (sum(later), stage > 0)):
            each = payload_bytes(shapes, recipe, sites, sent, remembers)
            longest = max(longest, each, key=sum)
            rounds += asks * sum(each)
    return Traffic(*longest, rounds, gathered)


def _counts(examples: Iterable[Example]) -> dict[str, Counter[str]]:
    """Task -> label -> rows."""
    found: dict[str, Counter[str]] = {}
    for example in examples:
        if example.label:
            found.setdefault(example.task, Counter())[example.label] += 1
    return found


def _gathered(
    fresh: Mapping[str, Mapping[str, Counter[str]]], before: Mapping[str, Head], stage: int, like: Adapter, width: int
) -> tuple[dict[str, Head], tuple[int, int]]:
    """(classifiers of a stage's tasks, all zeros; bytes of the anchor's messages, down and up).

    fresh: site -> task -> label -> rows. Sealed are sums of one feature, as G of thousands takes gigabytes; the other numbers,
    of four bytes each, are added.
    """
    one, square = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    labels: dict[str, set[str]] = {task: set(head.labels) for task, head in before.items()}
    down, up = len(pack_gather(0, stage, like)) * len(fresh), 0
    for site, tasks in fresh.items():
        sums = {task: Sums(square, dict.fromkeys(rows, one), rows, stage=stage) for task, rows in tasks.items()}
        outcome = {task: (rows, [NATS] * len(SCALES)) for task, rows in tasks.items()}
        up += len(pack_sums(site, 0, like, sums)) + _others(map(len, tasks.values()), width)
        up += len(pack_foretold(site, 0, like, outcome)) if tasks else 0
        for task, rows in tasks.items():
            labels.setdefault(task, set()).update(rows)
    held = {task: tuple(sorted(labels[task])) for task in sorted({task for tasks in fresh.values() for task in tasks})}
    if held:
        narrow = {task: _zero_head(names, 1, stage) for task, names in held.items()}
        trial = len(pack_trial(0, stage, like, narrow, dict.fromkeys(held, square.double())))
        down += len(fresh) * (trial + _others(map(len, held.values()), width))
    return {task: _zero_head(names, width, stage) for task, names in held.items()}, (down, up)


def _others(labels: Iterable[int], width: int) -> int:
    """Bytes of a triangle and of a row for each label, of some tasks of so many labels, above those of one feature."""
    return sum(4 * (width * (width + 1) // 2 - 1 + count * (width - 1)) for count in labels)


def _zero_head(labels: tuple[str, ...], width: int, stage: int) -> Head:
    return Head(labels, torch.zeros(len(labels), width), SCALES[0], torch.zeros(len(labels)), stage)


def payload_bytes(
    shapes: Shapes, recipe: Recipe, sites: int = 1, heads: Mapping[str, Head] | None = None, remembers: bool = False
) -> tuple[int, int]:
    """(down, up): bytes of one message each way for an adapter of these shapes, by sealing one of zeros.

    True messages are a little longer: their headers carry names and numbers. Base shifts come on top: of rank up to that of
    all sites' adapters together, for every round that a site has not seen. sites: of a round, whose number decides how wide
    the numbers behind masks are; keys and shares come on top, 0.4 kB a pair of sites. heads: analytic classifiers that go
    down. remembers: in a later round of a later stage, in which distill.memory asks for a second adapter down.
    """
    adapter = zeros(shapes)
    stats = {"loss": NATS}
    more = {"site": "site-0", "positions": 10_000, "stats": stats, "seconds": "00000000.000", "tasks": {}}
    memory = adapter if remembers and recipe.distill.weight and recipe.distill.memory else None
    federation, state = recipe.federation, Global(0, adapter, memory, heads=heads or {})
    rule = tables.RULES[federation.rule]
    way = Way(federation.codec_down, names_of(adapter, rule.down))
    down = pack_global("global", state, way, tasks={}, unsent="0" * 16)
    sent = names_of(adapter, rule.trained(0) & rule.shared)
    changes = {name: t for name, t in adapter.tensors().items() if name in sent}
    if recipe.privacy.masks:
        return len(down), len(_masked(changes, adapter, recipe, sites))
    encoded = make_codec(federation.codec_up).encode(changes, 0)
    up = pack("update", 0, adapter, encoded, federation.codec_up, held=0, **more)
    return len(down), len(up)


def zeros(shapes: Shapes) -> Adapter:
    """An adapter of these shapes."""
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    paths = sorted(name[:-2] for name in made if name.endswith(".a") and f"{name[:-2]}.b" in made)
    lora = {p: Lora(made[f"{p}.a"], made[f"{p}.b"], 1.0) for p in paths}
    factors = {f"{p}.{x}" for p in paths for x in "ab"}
    return Adapter(lora, {n: t for n, t in made.items() if n not in factors})


def _masked(changes: Mapping[str, torch.Tensor], adapter: Adapter, recipe: Recipe, sites: int) -> bytes:
    """A change of zeros as it goes behind masks."""
    form = summand(recipe.federation.codec_up, sites, {}).form(shapes_of(changes), int(recipe.privacy.quantile > 0))
    zeros = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in form.wire().items()}
    return seal(about("masked", 0, adapter, site="site-0"), zeros)
