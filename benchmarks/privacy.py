"""What privacy costs: a DP-SGD step against a plain one, and clipping and noise of an update, as ratios in one run.

    python benchmarks/privacy.py [--repeats 5] [--shapes keel-nano llama-20m]

Both kinds of step are `train.train_round` on the same rows, in turns; the drawn rows of a private step are fixed to a batch, as
a draw is of a batch on average. Ratios are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from step_cost import base_of, noisy, rows_of

import fedkeel.federation.train
from fedkeel.exchange.channel import channel_of
from fedkeel.federation.train import Round, train_round
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.types import Global

ROW = ["privacy.unit=row", "privacy.clip=0.1", "privacy.noise=1.0", "federation.weighting=uniform"]
SITE = ["privacy.unit=site", "privacy.clip=0.1", "privacy.noise=1.0", "federation.weighting=uniform"]
BATCH, STEPS = 16, 4


def steps(base: str, repeats: int) -> dict[str, float]:
    """Seconds of a plain and of a private round of STEPS steps, and their ratio."""
    given = [f"model.base={base}", f"train.batch_size={BATCH}", f"train.local_steps={STEPS}", "seed=1"]
    plain, private = load_recipe(None, given), load_recipe(None, [*given, *ROW])
    model = Model(plain.model, plain.lora, 1)
    adapter, rows = noisy(model.read()), rows_of(plain, 64, 96, 16)
    taken: dict[str, list[float]] = {"plain": [], "private": []}
    for repeat in range(repeats + 1):
        for name, recipe in (("plain", plain), ("private", private)):
            model.write(adapter)
            begin = time.perf_counter()
            train_round(model, rows, Round("site", 4, recipe, Global(1, adapter)))
            if repeat:  # the first warms up
                taken[name].append(time.perf_counter() - begin)
    ratios = [b / a for a, b in zip(taken["plain"], taken["private"], strict=True)]
    return {**{name: statistics.median(t) / STEPS for name, t in taken.items()}, "ratio": statistics.median(ratios)}


def channel(numbers: int) -> float:
    """Seconds to clip and noise an update of so many numbers."""
    recipe, tensors = load_recipe(None, SITE), {"w": torch.randn(numbers)}
    begin = time.perf_counter()
    channel_of(recipe).send(tensors, {}, 1)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["keel-nano", "llama-20m"])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    fedkeel.federation.train.drawn = lambda rows, recipe: list(range(recipe.train.batch_size))
    print(f"{'base':<12}{'plain, s a step':>17}{'private':>9}{'ratio':>7}")
    results = []
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            found = steps(base_of(shape, Path(folder)), args.repeats)
        print(f"{shape:<12}{found['plain']:>17.3f}{found['private']:>9.3f}{found['ratio']:>7.2f}", flush=True)
        results.append({"base": shape, **found})
    seconds = min(channel(10**6) for _ in range(args.repeats))
    print(f"clipping and noise of a million numbers: {seconds:.3f} s")
    print(json.dumps({"results": results, "batch": BATCH, "repeats": args.repeats, "channel_s_a_million": seconds}))


if __name__ == "__main__":
    main()
