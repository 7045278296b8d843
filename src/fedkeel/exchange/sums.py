"""Messages about what rows say through the frozen base: sums up, classifiers and their trial down, its outcome up; once a
stage.

gather  ↓  nothing but the stage        sums      ↑  G and M of each task, rows of each label
trial   ↓  W and (G + λ I)⁻¹            foretold  ↑  of each label the rows that the others foretell
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedkeel.exchange.codecs import EnvelopeError, Wire, open_envelope, seal
from fedkeel.exchange.heads import WIDEST, heads_packed, heads_unpacked, heads_wire
from fedkeel.exchange.messages import SCHEMA, about, check_promised, read_counts
from fedkeel.method.objective.anchor import SCALES
from fedkeel.model.features import BOUND
from fedkeel.types import Adapter, Head, Reply, Sums

MOST_ROWS = 2**31  # of a site and stage: sums over 8,192 of such stay below 2⁶²
MOST_NATS = 1e9  # of a row at one of SCALES: its leverage is cut at 1 − 10⁻⁶


def pack_gather(round: int, stage: int, like: Adapter) -> bytes:
    """The question for sums of the rows of `stage`."""
    return seal(about("gather", round, like, stage=stage), {})


def triangle(square: Tensor) -> Tensor:
    """The upper triangle of a symmetric matrix, row by row, (d (d + 1) / 2,)."""
    return square[tuple(torch.triu_indices(*square.shape))]


def squared(packed: Tensor, width: int) -> Tensor:
    """The symmetric matrix of a `triangle`."""
    rows, columns = torch.triu_indices(width, width)
    square = torch.zeros(width, width, dtype=packed.dtype)
    square[rows, columns] = packed
    square[columns, rows] = packed
    return square


def _tensors(known: Mapping[str, Sums]) -> dict[str, Tensor]:
    """Whole numbers of eight bytes: of each task by its number, G as its `triangle` and M by sorted labels."""
    tensors = {}
    for number, (_, sums) in enumerate(sorted(known.items())):
        tensors[f"gram/{number}"] = triangle(sums.gram)
        tensors[f"moments/{number}"] = torch.stack([sums.moments[label] for label in sorted(sums.moments)])
    return tensors


def pack_sums(site: str, round: int, like: Adapter, known: Mapping[str, Sums]) -> bytes:
    """What a site answers to `pack_gather`: by task, in whole numbers of four bytes where they fit, else of eight."""
    tensors = _tensors(known)
    wide = any(int(t.abs().max()) >= 2**31 for t in tensors.values())
    width = next((len(s.gram) for s in known.values()), 0)
    tasks = {task: dict(sums.rows) for task, sums in sorted(known.items())}
    header = about("sums", round, like, site=site, wide=wide, width=width, tasks=tasks)
    return seal(header, {name: t.to(torch.int64 if wide else torch.int32) for name, t in tensors.items()})


def read_sums(reply: Reply, round: int, stage: int, like: Adapter) -> dict[str, Sums]:
    """What `pack_sums` packed, of rows of `stage`. Raises EnvelopeError for anything else, and for sums that no rows could
    have."""

    def expected(header: dict[str, Any]) -> Wire:
        check_promised(header, about("sums", round, like, site=reply.site))
        tasks, width = _tasks(header), header.get("width")
        if type(width) is not int or not 0 <= width <= WIDEST or type(header.get("wide")) is not bool:
            raise EnvelopeError(f"the message reports sums of {width!r} features")
        kind = torch.int64 if header["wide"] else torch.int32
        wire: Wire = {}
        for number, rows in enumerate(tasks.values()):
            wire[f"gram/{number}"] = (kind, (width * (width + 1) // 2,))
            wire[f"moments/{number}"] = (kind, (len(rows), width))
        return wire

    header, sent = open_envelope(reply.payload, expected=expected)
    found = {}
    for number, (task, rows) in enumerate(_tasks(header).items()):
        gram = squared(sent[f"gram/{number}"].to(torch.int64), header["width"])
        moments = sent[f"moments/{number}"].to(torch.int64)
        count = sum(rows.values())
        if count > MOST_ROWS:
            raise EnvelopeError(f"the sums of task {task} are of {count} rows; at most {MOST_ROWS} are taken")
        most, counts = int(gram.abs().max()), torch.tensor(list(rows.values()))
        if most > count * BOUND**2 or int(gram.diagonal().min()) < 0 or bool((moments.abs().amax(1) > counts * BOUND).any()):
            raise EnvelopeError(f"the sums of task {task} are not those of {count} rows")
        # whole numbers are exact: what is below 0 by more than rounding can make it is no sum of h hᵀ
        least = 1.0 + 1e-9 * most
        if torch.linalg.cholesky_ex(gram.double() + least * torch.eye(len(gram), dtype=torch.float64)).info:
            raise EnvelopeError(f"the sums of task {task} are not those of any rows: their matrix has an eigenvalue below 0")
        found[task] = Sums(gram, dict(zip(rows, moments, strict=True)), rows, stage=stage)
    return found


def pack_known(known: Mapping[str, Sums]) -> bytes:
    """Sums of all rows so far, for a file of the run's own."""
    told = [
        {"task": task, "rows": dict(sums.rows), "hits": dict(sums.hits), "nats": list(sums.nats), "stage": sums.stage}
        for task, sums in sorted(known.items())
    ]
    return seal({"schema": SCHEMA, "kind": "known", "tasks": told}, _tensors(known))


def read_known(payload: bytes) -> dict[str, Sums]:
    """What `pack_known` packed. Raises EnvelopeError."""
    header, sent = open_envelope(payload)
    if header.get("kind") != "known" or not isinstance(header.get("tasks"), list):
        raise EnvelopeError("these are no sums of rows")
    found = {}
    for number, told in enumerate(header["tasks"]):
        moments = sent[f"moments/{number}"].clone()
        gram = squared(sent[f"gram/{number}"], moments.shape[1])
        named = dict(zip(sorted(told["rows"]), moments, strict=True))
        found[told["task"]] = Sums(gram, named, told["rows"], told["hits"], told["nats"], told["stage"])
    return found


def pack_trial(round: int, stage: int, like: Adapter, heads: Mapping[str, Head], inverses: Mapping[str, Tensor]) -> bytes:
    """The classifiers of a stage's tasks, and what each row's own part in them is taken out by."""
    told, tensors = heads_packed(heads)
    for number, task in enumerate(sorted(heads)):
        tensors[f"inverse/{number}"] = triangle(inverses[task]).float()
    return seal(about("trial", round, like, stage=stage, heads=told), tensors)


def read_trial(payload: bytes) -> tuple[dict[str, Head], dict[str, Tensor]]:
    """What `pack_trial` packed: classifiers, and (G + λ I)⁻¹, by task. Raises EnvelopeError for anything else."""

    def expected(header: dict[str, Any]) -> Wire:
        wire = heads_wire(header.get("heads"))
        for number, told in enumerate(header["heads"]):
            wire[f"inverse/{number}"] = (torch.float32, (told["width"] * (told["width"] + 1) // 2,))
        return wire

    header, sent = open_envelope(payload, expected=expected)
    heads = heads_unpacked(header["heads"], sent)
    return heads, {t: squared(sent[f"inverse/{n}"], heads[t].weight.shape[1]) for n, t in enumerate(sorted(heads))}


def pack_foretold(
    site: str, round: int, like: Adapter, outcome: Mapping[str, tuple[Mapping[str, int], Sequence[float]]]
) -> bytes:
    """What a site answers to `pack_trial`: task -> (label -> hits, nats at each scale)."""
    told = {task: {"hits": dict(hits), "nats": list(nats)} for task, (hits, nats) in sorted(outcome.items())}
    return seal(about("foretold", round, like, site=site, tasks=told), {})


def read_foretold(reply: Reply, round: int, like: Adapter, given: Mapping[str, Sums]) -> dict[str, Sums]:
    """The site's own sums with the outcome of the trial. given: what it answered before. Raises EnvelopeError."""

    def expected(header: dict[str, Any]) -> Wire:
        check_promised(header, about("foretold", round, like, site=reply.site))
        return {}

    header, _ = open_envelope(reply.payload, expected=expected)
    tasks = header.get("tasks")
    if not isinstance(tasks, dict) or tasks.keys() != given.keys():
        raise EnvelopeError("the outcome of the trial is not that of the tasks whose sums were sent")
    found = {}
    for task, told in tasks.items():
        hits, nats = read_counts(told.get("hits") if isinstance(told, dict) else None), told.get("nats")
        if not all(hits[label] <= given[task].rows.get(label, 0) for label in hits):
            raise EnvelopeError(f"task {task}: more rows foretold than there are")
        most = MOST_NATS * sum(given[task].rows.values())
        fit = isinstance(nats, list) and len(nats) == len(SCALES)
        if not fit or not all(type(v) is float and 0 <= v <= most for v in nats):
            raise EnvelopeError(f"task {task}: nats {nats!r:.80} where {len(SCALES)} numbers belong, at most {most:g} each")
        found[task] = replace(given[task], hits=hits, nats=nats)
    return found


def _tasks(header: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    tasks = header.get("tasks")
    if not isinstance(tasks, dict):
        raise EnvelopeError("the message reports no tasks")
    found = {task: read_counts(rows) for task, rows in tasks.items()}
    if any(not rows or not all(rows.values()) for rows in found.values()):
        raise EnvelopeError("the message reports a task without rows, or a label without any")
    return found
