"""What a step of a real language model costs: FedKeel, FedKeel without the cache of lower blocks, and TRL's SFTTrainer.

    fedkeel fetch smollm2; pip install trl; python benchmarks/llm.py [--repeats 3] [--base smollm2] [--rows 32] [--length 128]

All train the same LoRA (rank 8, upper half of the blocks) on the same rows (docstrings of this Python, prompts masked) in
batches of 8, on one thread, weights in float32 under bf16 autocast. TRL runs as it comes, and without the gradient
checkpointing that it turns on by itself. Each run is a process of its own, they take turns, and peak memory is the most that
one held, Python and all. Seconds are medians over steps, ratios medians over repeats. FedKeel is timed once its rows are
kept. What keeping them saves is measured within one process, with and without in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from machine import resident

from fedkeel.data.batches import collate
from fedkeel.data.format import Example
from fedkeel.federation.train import Round, train_round
from fedkeel.model.load import base_location
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import prepare
from fedkeel.types import Global

BATCH, STEPS = 8, 8
MICRO = "fedkeel, micro-batches of 4"
OURS = {"fedkeel": True, "fedkeel, no cache": False, MICRO: True}  # whether lower blocks are kept
TRL = {"trl": True, "trl, no checkpointing": False}  # whether gradients are checkpointed


def recipe_of(args: argparse.Namespace, *more: str) -> Recipe:
    given = [f"model.base={args.base}", "model.precision=bf16", "lora.layers=upper-half", "lora.rank=8", "lora.alpha=16"]
    given += [f"data.max_length={args.length}", f"train.batch_size={BATCH}", f"train.local_steps={STEPS}", "train.lr=1e-3"]
    return load_recipe(None, [*given, "train.warmup=0", "train.final_lr=1", "threads=1", *more])


def rows_of(recipe: Recipe, model: Model, count: int, length: int) -> list[Example]:
    """The longest rows there are, no more than `length` tokens, in the order of their ids."""
    prepared = prepare(recipe)
    formatter = formatter_of(model, prepared)
    found = [formatter.encode(r) for r in prepared.stages[-1].all("train")]
    longest = sorted((e for e in found if e is not None and e.length <= length), key=lambda e: (-e.length, e.record))
    return sorted(longest[:count], key=lambda e: e.record)


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    recipe = recipe_of(args, f"train.micro_batch_size={4 if args.run == MICRO else 0}")
    model = Model(recipe.model, recipe.lora, 1)
    if not OURS[args.run]:
        model.lower = None  # whole batches through all blocks
    rows = rows_of(recipe, model, args.rows, args.length)
    start = model.read()

    def a_round(number: int) -> None:
        train_round(model, rows, Round("site", 4, recipe, Global(number, start), {"task": 10**6}))

    @torch.no_grad()
    def a_pass() -> None:
        with model.remembering(), model.autocast():
            for at in range(0, len(rows), BATCH):
                model.forward(collate(rows[at : at + BATCH], model.kind, model.tokenizer.pad_token_id))

    a_round(0), a_pass()
    step = statistics.median(timed(lambda: a_round(1)) for _ in range(3)) / STEPS
    found = {"step": step, "peak": resident(), "tokens": sum(e.length for e in rows)}
    if args.run == "fedkeel":  # the same without the cache, in turns within this process
        taken: dict[str, list[float]] = {"step": [], "pass": []}
        for _ in range(5):
            kept = timed(lambda: a_round(1)), timed(a_pass)
            lower, model.lower = model.lower, None
            plain = timed(lambda: a_round(1)), timed(a_pass)
            model.lower = lower
            for name, one, other in zip(taken, kept, plain, strict=True):
                taken[name].append(one / other)
        found |= {f"{name}_to_plain": statistics.median(ratios) for name, ratios in taken.items()}
    return found


def run_trl(args: argparse.Namespace) -> dict[str, float]:
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    recipe = recipe_of(args)
    model = Model(recipe.model, recipe.lora, 1, weights=False)
    rows = rows_of(recipe, model, args.rows, args.length)
    about, words = model.net.peft_config["default"], model.tokenizer
    taken: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            taken.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken[-1] += time.perf_counter()

    labels = [[i if kept else -100 for i, kept in zip(e.ids, e.supervised, strict=True)] for e in rows]
    data = Dataset.from_dict({"input_ids": [list(e.ids) for e in rows], "labels": labels})
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            transformers.AutoModelForCausalLM.from_pretrained(base_location(args.base), dtype=torch.float32),
            SFTConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                max_steps=2 * STEPS,
                learning_rate=1e-3,
                lr_scheduler_type="constant",
                use_cpu=True,
                bf16=True,
                gradient_checkpointing=TRL[args.run],
                dataset_kwargs={"skip_prepare_dataset": True},
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=data,
            processing_class=words,
            peft_config=LoraConfig(
                r=8,
                lora_alpha=16,
                target_modules=sorted(about.target_modules),
                layers_to_transform=about.layers_to_transform,
                task_type="CAUSAL_LM",
            ),
            callbacks=[Clock()],
        )
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        assert trained == sum(p.numel() for p in model.parameters()), "not the same LoRA"
        trainer.train()
    positions = sum(e.length for e in rows)
    return {"step": statistics.median(taken[STEPS:]), "tokens": positions, "peak": resident()}


def in_its_own_process(name: str, argv: Sequence[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *argv, "--run", name]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        print(json.dumps(run_ours(args) if args.run in OURS else run_trl(args)))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    names, found = [*OURS, *TRL], {}
    for repeat in range(args.repeats):
        for name in names:
            print(f"repeat {repeat + 1} of {args.repeats}: {name}", file=sys.stderr)
            found.setdefault(name, []).append(in_its_own_process(name, sys.argv[1:]))

    def ratio(of: str, to: str, what: str) -> float:
        return round(statistics.median(a[what] / b[what] for a, b in zip(found[of], found[to], strict=True)), 3)

    rows = []
    print(f"{'run':<29}{'s / step':>10}{'to TRL':>8}{'peak MB':>10}{'to TRL':>8}")
    for name in names:
        row = {
            "run": name,
            "step_s": round(statistics.median(r["step"] for r in found[name]), 3),
            "step_to_trl": ratio(name, "trl", "step"),
            "peak_mb": round(statistics.median(r["peak"] for r in found[name])),
            "peak_to_trl": ratio(name, "trl", "peak"),
        }
        rows.append(row)
        print(f"{name:<29}{row['step_s']:>10}{row['step_to_trl']:>8}{row['peak_mb']:>10}{row['peak_to_trl']:>8}")
    cache = {what: round(statistics.median(r[f"{what}_to_plain"] for r in found["fedkeel"]), 3) for what in ("step", "pass")}
    print(f"with the cache to without, in turns in one process: a step {cache['step']}, a pass {cache['pass']}")
    told = {"benchmark": "llm", "base": Path(args.base).name, "rows": args.rows, "tokens": int(found["trl"][0]["tokens"])}
    print(json.dumps({**told, "batch": BATCH, "repeats": args.repeats, "cache": cache, "results": rows}))


if __name__ == "__main__":
    main()
