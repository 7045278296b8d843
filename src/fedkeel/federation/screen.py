"""What the server makes of a reply before it counts."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedkeel import tables
from fedkeel.exchange.clip import length
from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.messages import read_counts, unpack
from fedkeel.exchange.quantile import heard
from fedkeel.recipe.schema import Privacy
from fedkeel.types import Adapter, Reply, Update

STAT = re.compile(r"[a-z][a-z0-9_]{0,63}")
MOST_STATS = 64
# rows that the server writes itself; a site may not tell a number under such a name
OWN_ROWS = {
    "positions",
    "failed",
    "score",
    "own_score",
    "rows",
    "aggregation_error",
    "aggregation_seconds",
    "bytes_up",
    "bytes_down",
    "site_seconds",
    "test_seconds",
}


@dataclass(frozen=True)
class Expected:
    """What a reply is held to. reference: what the site started from. names: the tensors that must come; None: all.

    codec: what they must have come through; empty: any. max_norm: of the change, Euclidean, all tensors together. log: base
    shifts there are. privacy: as it is now; where it has a unit, a site tells nothing beside its change but its side of the
    clipping bound, if that follows a quantile.
    """

    round: int
    reference: Adapter
    names: Collection[str] | None = None
    codec: str = ""
    max_norm: float = math.inf
    log: int = 0
    privacy: Privacy = field(default_factory=Privacy)


def screen(reply: Reply, expected: Expected) -> Update:
    """A reply as an Update, or EnvelopeError saying why it is refused: malformed, another round or layout, not finite, no
    positions, or too long a change. What it does not carry is the reference's."""
    if reply.error:
        raise EnvelopeError(reply.error)
    reference = expected.reference
    header, change = unpack(reply.payload, "update", expected.round, reference, expected.names, expected.codec)
    if header.get("site") != reply.site:
        raise EnvelopeError(f"the message says it is from site {header.get('site')!r}, not {reply.site!r}")
    positions = header.get("positions")
    if type(positions) is not int or not 1 <= positions <= 2**53 or not isinstance(header.get("stats"), dict):
        raise EnvelopeError(f"the message reports {positions!r} supervised positions and stats {header.get('stats')!r}")
    held = header.get("held", 0)
    if type(held) is not int or not 0 <= held <= expected.log:
        raise EnvelopeError(f"the message reports {held!r} base shifts held, of {expected.log} that there are")
    silent = expected.privacy.unit != "none"
    if silent and (positions != 1 or header["stats"]):
        raise EnvelopeError("the message tells numbers about its site's rows, which privacy.unit keeps there")
    stats = {} if silent else _stats(header)
    side = heard(header.get("side"), expected.privacy) if expected.privacy.quantile else 0.0
    counts = read_counts(header.get("tasks"))
    norm = length(change)
    if norm > expected.max_norm:
        raise EnvelopeError(f"the change has norm {norm:.3g}, over federation.max_update_norm = {expected.max_norm:g}")
    old = reference.tensors()
    new = {name: old[name] + t for name, t in change.items()}
    for name, tensor in new.items():
        if not torch.isfinite(tensor).all():  # two large numbers can add up to infinity
            raise EnvelopeError(f"{name} is not finite once the change is added")
    adapter = reference.with_tensors(old | new)
    return Update(reply.site, adapter, positions, {**stats, "update_norm": norm}, counts, held, side)


def _stats(header: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that a site tells; they become Rows, beside those that the server measures itself."""
    stats = header["stats"]
    own = OWN_ROWS | set(tables.METRICS)
    odd = [name for name in stats if not STAT.fullmatch(name) or name in own]
    if odd or len(stats) > MOST_STATS:
        raise EnvelopeError(f"the message reports {len(stats)} stats, or one under a name that is not for sites: {odd[:3]}")
    try:
        stats = {name: float(value) for name, value in (stats | {"loss": stats["loss"], "seconds": header["seconds"]}).items()}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EnvelopeError(f"the message's numbers cannot be read: {error!r}") from error
    if not all(map(math.isfinite, stats.values())):
        raise EnvelopeError(f"the message reports stats that are not finite: {stats!r}")
    return stats
