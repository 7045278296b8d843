"""The exactness table of docs/exchange.md: every rule's distance from Σ_k p_k scale_k B_k A_k, formed in full.

    python tools/exactness.py            # rewrites the table in docs/exchange.md

Five sites with 100 to 248 positions, maps of (10, 14), (24, 9) and (12, 12), random factors; ranks 1, 4 and 2 with scales α/r
and α/√r where a rule takes them, else rank 3. `tests/test_exchange_docs.py` fails where page and rules disagree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.files import write_atomic
from fedkeel.method.aggregate.rule import Options, aggregator
from fedkeel.method.aggregate.weighting import weights
from fedkeel.types import Adapter, Lora, Update

PAGE = Path(__file__).resolve().parent.parent / "docs" / "exchange.md"
MARKS = ("<!-- exactness -->\n", "<!-- /exactness -->\n")
SHAPES = {"layer.0.q": (10, 14), "layer.0.up": (24, 9), "layer.1.q": (12, 12)}
RANKS, SCALES = (1, 4, 2), (8 / 1, 8 / 4, 8 / math.sqrt(2))


def adapter_of(seed: int, rank: int, scale: float) -> Adapter:
    draw = torch.Generator().manual_seed(seed)
    lora = {
        path: Lora(torch.randn(rank, d_in, generator=draw), torch.randn(d_out, rank, generator=draw), scale)
        for path, (d_out, d_in) in SHAPES.items()
    }
    return Adapter(lora)


def dense(path: str, updates: Sequence[Update], shares: Mapping[str, float]) -> Tensor:
    """The slow, obvious sum."""
    return sum(
        (
            shares[u.site] * u.adapter.lora[path].scale * (u.adapter.lora[path].b.double() @ u.adapter.lora[path].a.double())
            for u in updates
        ),
        torch.zeros(SHAPES[path], dtype=torch.float64),
    )


def measured(name: str) -> float:
    """‖W_rule − W_exact‖ / ‖W_exact‖ over all maps, in float64."""
    rule, reference = tables.RULES[name], adapter_of(0, 3, 2.0)
    updates = []
    for k in range(5):
        own = adapter_of(k + 1, RANKS[k % 3], SCALES[k % 3]) if rule.mixed else adapter_of(k + 1, 3, 2.0)
        common = [f for f in "ab" if f not in rule.trained(0) & rule.shared]
        lora = {p: replace(m, **{f: getattr(reference.lora[p], f) for f in common}) for p, m in own.lora.items()}
        updates.append(Update(f"site-{k}", Adapter(lora), 100 + 37 * k))
    shares = weights(updates, "positions")
    result = aggregator(name)(reference, updates, shares, Options(hostile=int(rule.withstands)))
    lost = total = 0.0
    for path, factors in result.adapter.lora.items():
        got = factors.scale * (factors.b.double() @ factors.a.double())
        if path in result.shift:
            left, right = result.shift[path]
            got = got + left.double() @ right.double()
        exact = dense(path, updates, shares)
        lost, total = lost + float((got - exact).square().sum()), total + float(exact.square().sum())
    return math.sqrt(lost / total)


def sends(factors: frozenset[str]) -> str:
    return " and ".join(f.upper() for f in sorted(factors))


def table() -> str:
    lines = [
        "| rule | up | down | ranks may differ | claims to be exact | measured error |",
        "|---|---|---|---|---|---|",
    ]
    for name, rule in tables.RULES.items():
        first, second = (rule.trained(r) & rule.shared for r in (0, 1))
        up = sends(first) if first == second else f"{sends(first)}, {sends(second)} by turns"
        down = sends(rule.down) + (", base shift" if rule.shifts else "")
        error = measured(name)
        shown = "under 1e-6" if error < 1e-6 else f"{100 * error:.0f} %"
        exact = "on what is shared" if rule.personal else "yes" if rule.exact else "no"
        lines.append(f"| `{name}` | {up} | {down} | {'yes' if rule.mixed else 'no'} | {exact} | {shown} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/exchange.md with the table as it is now."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2]


if __name__ == "__main__":
    write_atomic(PAGE, page())
