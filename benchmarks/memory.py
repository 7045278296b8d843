"""Whether a long federation grows: memory, Python's objects and open files after each round, and their slopes.

    python benchmarks/memory.py [--rounds 100] [--sites 16] [--burn-in 20] [--rule mean] [--set KEY=VALUE ...]
    PYTHONMALLOC=malloc python benchmarks/memory.py     # all that Python allocates is in `in use` too

A whole run in one process of the tests' tiny model: sampling, messages both ways with error feedback, aggregation, checkpoint,
rows on disk. Slopes are by least squares over the rounds after the burn-in, each behind a garbage collection, with their
standard errors; t is their ratio, and the last column the slope of the second half alone.

`in use` is what the process asked malloc for and did not give back (mallinfo2 of glibc 2.33 and later): a leak is there,
whoever has it, and free memory that an allocator keeps is not. `resident` holds both, and moves in steps of pages until free
memory lies where it is found again; rounds are not independent, so its t overstates. Python's blocks are objects of any kind,
those too that its garbage collector does not know.

Two things that would be seen and are none of the run's are kept out. CPython's cache of attributes has 4096 places and fills
for hundreds of rounds, as PyTorch and pybind11 look attributes up by a new string each time (`__dlpack__` is one), and a place
keeps its string: it is emptied first. And what is measured goes into an array that is there before the first round: a list that
grows, or one of gc.get_objects(), would be seen itself. Last line: JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
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

COLUMNS = ("resident, KB", "in use, KB", "Python's blocks", "open files")
MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


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


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h, in bytes."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in MALLINFO)


class Measuring:
    """A Watch that measures behind each round. found: rounds × COLUMNS."""

    def __init__(self, rounds: int) -> None:
        self.found = np.zeros((rounds, len(COLUMNS)))
        self._mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if self._mallinfo is None:
            sys.exit("benchmarks/memory.py needs mallinfo2, of glibc 2.33 and later")
        self._mallinfo.restype = Mallinfo

    def round(self, leg: str, done: int, rounds: int, result: Any) -> None:
        gc.collect()
        sys._clear_type_cache()
        info = self._mallinfo()
        in_use = (info.uordblks + info.hblkhd) / 1e3
        self.found[done - 1] = resident(), in_use, sys.getallocatedblocks(), len(os.listdir("/proc/self/fd"))

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
    watch = Measuring(args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        base, out = Path(folder) / "base", Path(folder) / "out"
        tiny.write_base(base)
        tiny.write_data(Path(folder))
        given = [*tiny.overrides(base, Path(folder), out), *SMALL]
        shape = [f"federation.rounds={args.rounds}", f"partition.sites={args.sites}", f"federation.rule={args.rule}"]
        recipe = load_recipe(None, [*given, *shape, *args.set])
        execute(prepare(recipe), RunFolder(out / "memory"), watch)
    python = os.environ.get("PYTHONMALLOC", "pymalloc")
    told: dict[str, Any] = {"benchmark": "memory", **vars(args), "allocator": python}
    print(f"{'after each round':<20}{'first':>10}{'burnt in':>10}{'last':>10}{'slope':>10}{'s.e.':>8}{'t':>7}{'2nd half':>10}")
    for name, values in zip(COLUMNS, watch.found.T.tolist(), strict=True):
        after = values[args.burn_in :]
        (b, error), (late, _) = slope(after), slope(after[len(after) // 2 :])
        t = b / error if error else 0.0
        print(f"{name:<20}{values[0]:>10.0f}{after[0]:>10.0f}{values[-1]:>10.0f}{b:>10.3f}{error:>8.3f}{t:>7.1f}{late:>10.3f}")
        told[name] = {"slope": b, "standard_error": error, "second_half": late, "last": values[-1]}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
