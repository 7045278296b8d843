"""Whether a long federation grows: resident memory and open files after each round, and their slope.

    python benchmarks/memory.py [--rounds 100] [--sites 16] [--burn-in 20] [--rule mean] [--set KEY=VALUE ...]

A whole run in one process of the tests' tiny model: sampling, messages both ways with error feedback, aggregation, checkpoint,
rows on disk. The slope is by least squares over the rounds after the burn-in, each behind a garbage collection, with its
standard error; t is their ratio. What is resident moves in steps of an allocator and stays after a peak, so rounds are not
independent and t overstates: the last column is the slope of the second half alone, which a leak keeps, and the
line of Python objects has no noise. Last line: JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedkeel.recipe.load import load_recipe
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

SMALL = [
    "name=memory", "lora.rank=4", "data.site_column=", "data.max_length=96", "train.local_steps=1", "train.batch_size=2",
    "partition.scheme=iid", "federation.codec_up=int8", "evaluation.baselines=[]", "evaluation.validation_rows=0",
    "evaluation.samples=0", "keep_checkpoints=2",
]  # fmt: skip


def resident() -> float:
    """KB that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e3


def slope(values: list[float]) -> tuple[float, float]:
    """(slope, its standard error) of values over their number, by least squares."""
    n = len(values)
    middle, mean = (n - 1) / 2, sum(values) / n
    spread = sum((x - middle) ** 2 for x in range(n))
    b = sum((x - middle) * (y - mean) for x, y in enumerate(values)) / spread
    left = sum((y - mean - b * (x - middle)) ** 2 for x, y in enumerate(values))
    return b, math.sqrt(left / (n - 2) / spread)


class Measuring:
    """A Watch that measures behind each round."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.files: list[float] = []
        self.objects: list[float] = []

    def round(self, leg: str, done: int, rounds: int, result: Any) -> None:
        gc.collect()
        self.memory.append(resident())
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.objects.append(len(gc.get_objects()))

    def __getattr__(self, name: str) -> Any:
        return lambda *given: None  # whatever else a Watch is told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--burn-in", type=int, default=20)
    parser.add_argument("--rule", default="mean")
    parser.add_argument("--set", nargs="*", default=[], help="further key=value of the recipe")
    args = parser.parse_args()
    torch.set_num_threads(1)
    watch = Measuring()
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base", Path(folder) / "out"
        tiny.write_base(base)
        tiny.write_data(Path(folder))
        given = [*tiny.overrides(base, Path(folder), out), *SMALL]
        shape = [f"federation.rounds={args.rounds}", f"partition.sites={args.sites}", f"federation.rule={args.rule}"]
        recipe = load_recipe(None, [*given, *shape, *args.set])
        execute(prepare(recipe), RunFolder(out / "memory"), watch)
    told: dict[str, Any] = {"benchmark": "memory", **vars(args)}
    print(f"{'after each round':<20}{'first':>10}{'burnt in':>10}{'last':>10}{'slope':>10}{'s.e.':>8}{'t':>7}{'2nd half':>10}")
    for name, values in (("resident, KB", watch.memory), ("open files", watch.files), ("Python objects", watch.objects)):
        after = values[args.burn_in :]
        (b, error), (late, _) = slope(after), slope(after[len(after) // 2 :])
        t = b / error if error else 0.0
        print(f"{name:<20}{values[0]:>10.0f}{after[0]:>10.0f}{values[-1]:>10.0f}{b:>10.3f}{error:>8.3f}{t:>7.1f}{late:>10.3f}")
        told[name] = {"slope": b, "standard_error": error, "second_half": late, "last": values[-1]}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
