"""What the server makes of a reply before it counts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

import torch

from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.messages import read_counts, unpack
from fedkeel.types import Adapter, Reply, Update

STAT = re.compile(r"[a-z][a-z0-9_]{0,63}")
MOST_STATS = 64
OWN_ROWS = {"positions", "failed", "score", "own_score", "accuracy", "rouge_l", "exact_match", "rows", "aggregation_error",
            "aggregation_seconds", "bytes_up", "bytes_down", "site_seconds", "test_seconds"}  # fmt: skip


def screen(
    reply: Reply, round: int, reference: Adapter, max_norm: float, names: Collection[str] | None = None, codec: str = "",
    log: int = 0,
) -> Update:  # fmt: skip
    """A reply as an Update, or EnvelopeError saying why it is refused: malformed, another round or layout, not finite,
    no positions, or a change longer than `max_norm` (Euclidean, all tensors together).

    names, codec: what it must carry and through what, see `messages.unpack`; what it does not carry is the reference's.
    log: base shifts there are.
    """
    if reply.error:
        raise EnvelopeError(reply.error)
    header, change = unpack(reply.payload, "update", round, reference, names, codec)
    if header.get("site") != reply.site:
        raise EnvelopeError(f"the message says it is from site {header.get('site')!r}, not {reply.site!r}")
    positions, stats = header.get("positions"), header.get("stats")
    if type(positions) is not int or not 1 <= positions <= 2**53 or not isinstance(stats, dict):
        raise EnvelopeError(f"the message reports {positions!r} supervised positions and stats {stats!r}")
    held = header.get("held", 0)
    if type(held) is not int or not 0 <= held <= log:
        raise EnvelopeError(f"the message reports {held!r} base shifts held, of {log} that there are")
    # they become Rows, beside those that the server measures itself
    odd = [name for name in stats if not STAT.fullmatch(name) or name in OWN_ROWS]
    if odd or len(stats) > MOST_STATS:
        raise EnvelopeError(f"the message reports {len(stats)} stats, or one under a name that is not for sites: {odd[:3]}")
    try:
        stats = {name: float(value) for name, value in (stats | {"loss": stats["loss"], "seconds": header["seconds"]}).items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EnvelopeError(f"the message's numbers cannot be read: {error!r}") from error
    counts = read_counts(header.get("tasks"))
    if not all(map(math.isfinite, stats.values())):
        raise EnvelopeError(f"the message reports stats that are not finite: {stats!r}")
    norm = float(torch.sqrt(sum((t.double().square().sum() for t in change.values()), torch.zeros(()))))
    if norm > max_norm:
        raise EnvelopeError(f"the change has norm {norm:.3g}, over federation.max_update_norm = {max_norm:g}")
    old = reference.tensors()
    new = {name: old[name] + t for name, t in change.items()}
    for name, tensor in new.items():
        if not torch.isfinite(tensor).all():  # two large numbers can add up to infinity
            raise EnvelopeError(f"{name} is not finite once the change is added")
    adapter = reference.with_tensors(old | new)
    return Update(reply.site, adapter, positions, {**stats, "update_norm": norm}, counts, held)
