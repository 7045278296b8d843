"""What privacy costs: a DP-SGD step against a plain one, clipping and noise of an update, and secure aggregation of a round, as
ratios in one run.

    python benchmarks/privacy.py [--repeats 5] [--shapes keel-nano llama-20m]

Both kinds of step are `train.train_round` on the same rows, in turns; the drawn rows of a private step are fixed to a batch, as
a draw is of a batch on average. Ratios are medians over the repeats. Secure aggregation: a round of 16 sites and a million
numbers, its keys, shares, masks and their removal, against the same round's messages and aggregation without, and against the
round with the training of ten plain steps a site (of the last shape).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step_cost import base_of, noisy, rows_of

import fedkeel.federation.train
from fedkeel.exchange.channel import channel_of
from fedkeel.exchange.codecs import header_of, seal
from fedkeel.exchange.messages import SCHEMA, layout, pack, shapes_of
from fedkeel.exchange.summands import summand
from fedkeel.federation.kept import Kept
from fedkeel.federation.masked import run_masked_round
from fedkeel.federation.masking import KINDS, masks_of, prepare
from fedkeel.federation.server import Roster, run_round
from fedkeel.federation.train import Round, train_round
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Federation, Privacy
from fedkeel.types import Adapter, Global, Reply, Request

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


class Sites:
    """Sites that train nothing: each gives the same change, masked or not."""

    def __init__(self, names: list[str], like: Adapter) -> None:
        self.like, self.change = like, {"w": torch.full_like(like.dense["w"], 1e-3)}
        self.kept = {name: Kept() for name in names}

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        return [Reply(r.site, self._answer(header_of(r.payload), r.site)) for r in requests]

    def _answer(self, header: dict[str, Any], site: str) -> bytes:
        about = {"schema": SCHEMA, "round": 0, "layout": layout(self.like), "site": site}
        if header["kind"] in KINDS:
            return prepare(header, self.like, site, self.kept[site])
        if "masked" in header:
            masks = masks_of(header["masked"], 0, site, self.kept[site])
            adds = summand("fp32", len(masks.among), {})
            form, whole = adds.form(shapes_of(self.change), 0), masks.over(adds.numbers(self.change, []))
            return seal({**about, "kind": "masked"}, form.packed(whole))
        told = {"site": site, "positions": 1, "stats": {"loss": 1.0}, "seconds": "0", "held": 0, "tasks": {}}
        return pack("update", 0, self.like, self.change, "fp32", **told)


def aggregation(masks: bool, sites: int, numbers: int) -> float:
    """Seconds of a round without its training."""
    names, like = [f"site-{n:02}" for n in range(sites)], Adapter({}, {"w": torch.zeros(numbers)})
    roster = Roster(names, Federation(weighting="uniform"), 1, privacy=Privacy(masks=masks))
    begin = time.perf_counter()
    (run_masked_round if masks else run_round)(Global(0, like), Sites(names, like), roster)
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
    plain, behind = (min(aggregation(masks, 16, 10**6) for _ in range(args.repeats)) for masks in (False, True))
    share = (behind - plain) / (plain + 16 * 10 * results[-1]["plain"])
    print(f"a round of 16 sites and a million numbers without its training: {plain:.2f} s, behind masks {behind:.2f} s")
    print(f"masks add {100 * share:.1f} % to that round with ten steps a site of {args.shapes[-1]}")
    told = {"plain_s": plain, "masked_s": behind, "share_of_a_round": share}
    more = {"batch": BATCH, "repeats": args.repeats, "channel_s_a_million": seconds, "masks": told}
    print(json.dumps({"results": results, **more}))


if __name__ == "__main__":
    main()
