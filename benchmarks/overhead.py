"""What the system costs on top of the optimiser steps it exists for.

    python benchmarks/overhead.py [--sites 4 16 64] [--steps 4] [--repeats 3]

For each number of sites: seconds of whole rounds (sampling, messages both ways, screening, aggregation with its measured
error, checkpoint, rows on disk; no scoring) over seconds of a bare loop that takes the very same optimiser steps on the very
same batches with plain torch. Both alternate inside one run, one thread, and the ratio is of the medians. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedkeel.data.batches import batch_indices, collate
from fedkeel.data.format import Example, Formatter
from fedkeel.data.sites import make_sites
from fedkeel.data.sources import load_records
from fedkeel.federation.client import Site
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.server import Roster, run_round
from fedkeel.federation.train import learning_rate
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.legs import Leg, Stage
from fedkeel.runs.rows import round_rows
from fedkeel.types import Global


def bare_loop(model: Model, sites: Mapping[str, Sequence[Example]], recipe: Recipe, round: int) -> None:
    """The optimiser steps of one round of every site, with nothing around them."""
    train = recipe.train
    model.train()
    for name, examples in sites.items():
        optimiser = torch.optim.AdamW(model.parameters(), weight_decay=train.weight_decay)
        steps = range(round * train.local_steps, (round + 1) * train.local_steps)
        lengths = [e.length for e in examples]
        for step, indices in zip(steps, batch_indices(lengths, train.batch_size, recipe.seed, name, steps), strict=True):
            optimiser.param_groups[0]["lr"] = learning_rate(train, step, recipe.federation.rounds * train.local_steps)
            batch = collate([examples[i] for i in indices], model.kind, model.tokenizer.pad_token_id)
            with model.autocast():
                forward = model.forward(batch)
            torch.nn.functional.cross_entropy(forward.logits.float(), forward.targets).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    model.train(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps a site and round")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="key=value, such as model.base=PATH")
    args = parser.parse_args()
    results = []
    print(f"{'sites':>5} {'whole s/round':>14} {'bare s/round':>13} {'ratio':>6} {'aggregation':>12}")
    for count in args.sites:
        recipe = load_recipe(
            None,
            [
                "data.source=pydocs",
                "partition.scheme=iid",
                f"partition.sites={count}",
                f"train.local_steps={args.steps}",
                "train.batch_size=16",
                f"federation.rounds={args.repeats + 1}",
                "threads=1",
                *args.overrides,
            ],
        )
        torch.set_num_threads(1)
        records = load_records(recipe.data, recipe.seed)
        sites = make_sites(records, recipe)
        model = Model(recipe.model, recipe.lora, recipe.seed)
        formatter = Formatter(model.tokenizer, model.kind, recipe.data.max_length)
        examples = {name: formatter.encode_all(held["train"]) for name, held in sites.rows.items()}
        rounds = recipe.federation.rounds
        transport = LocalTransport(model, {name: Site(name, [rows], rounds, recipe) for name, rows in examples.items()})
        roster = Roster(list(examples), recipe.federation, recipe.seed)
        leg = Leg("federated", "federated", rounds, [Stage(recipe, {name: len(rows) for name, rows in examples.items()})])
        state = Global(0, model.read())
        whole, bare, aggregation = [], [], []
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder) / "run")
            progress = run.open(recipe, resume=False, fresh=False)
            for repeat in range(args.repeats + 1):
                begin, cpu = time.perf_counter(), time.process_time()
                result = run_round(state, transport, roster)
                cpu = time.process_time() - cpu
                state = result.state
                run.write_checkpoint("federated", state)
                run.save(progress, round_rows(leg, 0, result, "bench", cpu))
                middle = time.perf_counter()
                bare_loop(model, examples, recipe, repeat)
                end = time.perf_counter()
                if repeat:  # the first repeat warms caches and allocator
                    whole.append(middle - begin)
                    bare.append(end - middle)
                    aggregation.append(result.aggregation_seconds)
        row = {
            "sites": count,
            "whole_seconds": round(statistics.median(whole), 3),
            "bare_seconds": round(statistics.median(bare), 3),
            "ratio": round(statistics.median(whole) / statistics.median(bare), 3),
            "aggregation_seconds": round(statistics.median(aggregation), 3),
        }
        results.append(row)
        print(
            f"{count:>5} {row['whole_seconds']:>14.3f} {row['bare_seconds']:>13.3f} {row['ratio']:>6.3f} "
            f"{row['aggregation_seconds']:>12.3f}"
        )
    print(json.dumps({"benchmark": "overhead", "steps": args.steps, "repeats": args.repeats, "results": results}))


if __name__ == "__main__":
    main()
