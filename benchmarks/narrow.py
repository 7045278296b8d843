"""What masked sums in few bits lose, by their width and the number of sites, beside the codecs that they stand for.

    python benchmarks/narrow.py RECIPE [key=value ...]

The recipe's sites train two rounds, exchanged exactly. Of the second round's changes the mean over the first n sites is
compared with the mean of what would have come: through a codec, each site by itself, and behind masks in m bits a number, by
the reach that the first round made. The error is the length of the difference by the length of the mean; error feedback, which
brings it a round later, is left out. Bytes are those of a message's tensors by the codec's own. A star: the width taken.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.exchange.channel import Channel
from fedkeel.exchange.clip import length
from fedkeel.exchange.codecs import Wire, make_codec
from fedkeel.exchange.codecs.quantize import matrix_of
from fedkeel.exchange.messages import shapes_of
from fedkeel.exchange.summands import Narrow
from fedkeel.recipe.load import load_recipe
from fedkeel.rng import derive
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare
from fedkeel.runs.watch import Watch

Change = Mapping[str, Tensor]
PLAIN = [
    "federation.codec_up=fp32",
    "federation.rounds=2",
    "evaluation.baselines=[]",
    "evaluation.test_rows=1",
    "federation.weighting=uniform",
]
SITES = (4, 8, 16, 32)


class Quiet(Watch):
    """A watch that tells nothing."""


def changes(recipe: Path, given: Sequence[str]) -> list[dict[str, Tensor]]:
    """What each site would send, in the order in which they are asked, round by round."""
    heard: list[dict[str, Tensor]] = []
    real = Channel.send

    def send(self: Any, tensors: Change, memory: Any, key: int) -> Any:
        heard.append({name: t.clone() for name, t in tensors.items()})
        return real(self, tensors, memory, key)

    with mock.patch.object(Channel, "send", send), TemporaryDirectory() as folder:
        meant = load_recipe(recipe, [*given, *PLAIN, f"out={folder}"])
        execute(prepare(meant), RunFolder(Path(folder) / meant.name), Quiet())
    return heard


@dataclass(frozen=True)
class Wide(Narrow):
    """`Narrow` of another width. bits: m."""

    @property
    def width(self) -> int:
        return self.bits


def mean(many: Sequence[Change]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name].double() for one in many]).mean(0) for name in many[0]}


def error(coder: Any, sites: Sequence[Change]) -> float:
    """Of the mean of what arrives, relative to the mean of what was sent."""
    shapes, exact = shapes_of(sites[0]), mean(sites)
    got = mean([coder.decode(coder.encode(one, derive(1, "up", n)), shapes) for n, one in enumerate(sites)])
    return length({name: got[name] - exact[name] for name in exact}) / length(exact)


def size(wire: Wire) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in wire.values())


def reach_after(adds: Narrow, sites: Sequence[Change]) -> dict[str, Tensor]:
    """What a first round of these changes makes."""
    total = sum(adds.numbers(adds.encode(one, n), []) for n, one in enumerate(sites))
    return adds.means(total, range(len(sites)), shapes_of(sites[0]))[2]


def main() -> None:
    torch.set_num_threads(1)
    heard = changes(Path(sys.argv[1]), sys.argv[2:])
    first, second = heard[: len(heard) // 2], heard[len(heard) // 2 :]
    shapes = shapes_of(first[0])
    print(f"{sum(map(math.prod, shapes.values())):,} numbers, {len(first)} sites")
    print(f"{'codec':<7}{'sites':>6}{'own error':>11}   behind masks: bits, times the bytes, error")
    results = []
    for spec in ("int8", "int4"):
        codec = make_codec(spec)
        for count in (n for n in SITES if n <= len(first)):
            own = error(codec, second[:count])
            taken = Narrow(count, tables.CODECS[spec].bits, {}).width
            cells = []
            for bits in range(max(taken - 2, (2 * count).bit_length()), taken + 3):
                flat = {name: torch.full((min(matrix_of(s)),), 0.01) for name, s in shapes.items()}
                adds = Wide(count, bits, reach_after(Wide(count, bits, flat), first[:count]))
                ratio = size(adds.form(shapes, 0).wire()) / size(codec.wire(shapes))
                off = error(adds, second[:count])
                cells.append(f"{bits}{'*' if bits == taken else ''}: {ratio:.2f}, {off:.3f}")
                results.append({"codec": spec, "sites": count, "bits": bits, "bytes": ratio, "error": off, "own": own})
            print(f"{spec:<7}{count:>6}{own:>11.3f}   {'   '.join(cells)}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
