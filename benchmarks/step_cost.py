"""What a training step costs: plain LoRA, + distillation, + structure, joint (anchored), R-Drop, the method by evidence; in one
run, as ratios.

    python benchmarks/step_cost.py [--repeats 5] [--shapes keel-nano llama-20m] [--variants NAME …] [--device cpu]

Each variant is `train.train_round` itself, on the same rows with the same batches; variants take turns, so that a machine
whose speed drifts does not favour one. Ratios are medians over the repeats of (variant / plain of the same repeat). Peak
memory is measured in processes of their own, the median of PEAKS for each variant: the most resident memory, which differs by a
hundredth from process to process, or on CUDA the most allocated.
"joint, cached" makes three local epochs; its plain is plain with three local epochs. Rows are classified, by one of eight
labels; the anchor's features are worked out beforehand, as they are once in a federation and not once a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import resident

from fedkeel.data.format import Example
from fedkeel.federation.evidence import known_sums
from fedkeel.federation.train import Round, train_round
from fedkeel.method.objective.anchor import head_of
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.rng import numpy_generator, seed_torch
from fedkeel.types import Adapter, Global, Lora

STRUCTURES = ["structure.heads=0.03", "structure.channels=0.03", "structure.rank=0.1", "structure.ramp=0.0"]
DISTILL = ["distill.weight=1.0", "distill.ramp=0.0"]
STEPS = "train.local_steps=4"
EVIDENCE = ["evidence.task=restricted", "evidence.anchor=1.0"]
SKIP = ["structure.skip=0.5", "structure.ramp=0.0"]
EPOCHS = ["train.local_steps=0", "train.local_epochs=3"]
JOINT = [STEPS, *DISTILL, *STRUCTURES, "structure.mode=anchored"]
VARIANTS = {
    "plain": [STEPS],
    "distillation": [STEPS, *DISTILL],
    "structure": [STEPS, *STRUCTURES],
    "joint": JOINT,
    "joint, every 2nd": [*JOINT, "distill.every=2"],
    "joint, CKA": [*JOINT, "distill.align=cka"],
    "R-Drop": [STEPS, *STRUCTURES, "structure.mode=rdrop"],
    "by evidence": [STEPS, *EVIDENCE],
    "skip": [STEPS, *SKIP],
    "exit": [STEPS, "exit.weight=0.3"],
    "by evidence, skip, exit": [STEPS, *EVIDENCE, *SKIP, "exit.weight=0.3"],
    "plain, 3 epochs": EPOCHS,
    "joint, cached": [*EPOCHS, *DISTILL, *STRUCTURES, "structure.mode=anchored"],
}
PEAKS = 3
AGAINST = {"joint, cached": "plain, 3 epochs"}
# hidden, intermediate, layers, heads, KV heads, vocabulary
SHAPES = {
    "llama-20m": (384, 1024, 8, 6, 2, 8192),
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-0.5b": (1024, 4096, 24, 16, 8, 32000),
    "llama-1b": (2048, 8192, 16, 32, 8, 32000),
}


def base_of(shape: str, folder: Path) -> str:
    """`keel-nano` itself, or a Llama of random weights in `folder` with keel-nano's tokenizer."""
    if shape == "keel-nano":
        return shape
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedkeel.model.load import load_tokenizer

    hidden, inner, layers, heads, groups, vocabulary = SHAPES[shape]
    tokenizer = load_tokenizer(load_recipe(None).model)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    seed_torch(1, "bench", shape)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows_of(recipe: Recipe, count: int, length: int, answer: int) -> list[Example]:
    """Random tokens: `count` rows of `length` tokens, of which the last `answer`, supervised, are one of eight labels. Of those
    the rows hold six."""
    rng = numpy_generator(recipe.seed, "bench rows")
    options = tuple(tuple(rng.integers(8, 1000, answer).tolist()) for _ in range(8))
    labels = tuple(f"label {n}" for n in range(8))
    return [
        Example(
            f"row-{n}",
            "task",
            (*rng.integers(8, 1000, length - answer).tolist(), *options[n % 6]),
            (False,) * (length - answer) + (True,) * answer,
            label=labels[n % 6],
            labels=labels,
            options=options,
        )
        for n in range(count)
    ]


def noisy(adapter: Adapter) -> Adapter:
    """A teacher that is not the base: B drawn too, where a fresh adapter has 0."""
    generator = torch.Generator()
    lora = {p: Lora(m.a, 0.02 * torch.randn(m.b.shape, generator=generator), m.scale) for p, m in adapter.lora.items()}
    return Adapter(lora, adapter.dense)


class Bench:
    """One model and its rows; `seconds` times one variant's round."""

    def __init__(self, base: str, device: str, rows: int, length: int, answer: int) -> None:
        self._given = [f"model.base={base}", f"model.device={device}", f"train.batch_size={min(16, rows)}", "seed=1"]
        recipe = load_recipe(None, self._given)
        self.model = Model(recipe.model, recipe.lora, 1)
        self.adapter = noisy(self.model.read())
        self.rows = rows_of(recipe, rows, length, answer)
        self.heads = {task: head_of(sums, 0.1) for task, sums in known_sums(self.model.features, self.rows, 0).items()}

    def seconds(self, variant: str) -> float:
        recipe = load_recipe(None, [*self._given, *VARIANTS[variant]])
        self.model.write(self.adapter)
        begin = time.perf_counter()
        # the second of four rounds: ramps are over, nothing is annealed yet
        state = Global(1, self.adapter, heads=self.heads)
        train_round(self.model, self.rows, Round("site", 4, recipe, state, {"task": 10**6}))
        if recipe.model.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - begin


def peak(base: str, device: str, variant: str, sizes: list[int]) -> float:
    """MB at most, of a fresh process that runs one variant."""
    command = [
        sys.executable,
        __file__,
        "--peak",
        variant,
        "--base",
        base,
        "--device",
        device,
        "--rows",
        str(sizes[0]),
        "--length",
        str(sizes[1]),
        "--answer",
        str(sizes[2]),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["keel-nano", "llama-20m"], choices=["keel-nano", *SHAPES])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="plain is always one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--answer", type=int, default=16, help="supervised positions a row")
    parser.add_argument("--base", default="", help=argparse.SUPPRESS)
    parser.add_argument("--peak", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [args.rows, args.length, args.answer]
    if args.peak:
        Bench(args.base, args.device, *sizes).seconds(args.peak)
        print(torch.cuda.max_memory_allocated() / 1e6 if args.device.startswith("cuda") else resident())
        return
    results = []
    variants = [name for name in VARIANTS if name in {"plain", *args.variants, *map(AGAINST.get, args.variants)}]
    print(f"{'base':<14}{'variant':<25}{'s / round':>10}{'ratio':>7}{'peak MB':>9}{'ratio':>7}")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as folder:
            base = base_of(shape, Path(folder))
            bench = Bench(base, args.device, *sizes)
            taken: dict[str, list[float]] = {name: [] for name in variants}
            for repeat in range(args.repeats + 1):
                for name in variants:
                    seconds = bench.seconds(name)
                    if repeat:  # the first repeat warms caches and allocator
                        taken[name].append(seconds)
            del bench
            memory = {n: statistics.median(peak(base, args.device, n, sizes) for _ in range(PEAKS)) for n in variants}
        for name, seconds in taken.items():
            plain = AGAINST.get(name, "plain")
            row = {
                "base": shape,
                "variant": name,
                "seconds": round(statistics.median(seconds), 3),
                "ratio": round(statistics.median(a / b for a, b in zip(seconds, taken[plain], strict=True)), 3),
                "peak_mb": round(memory[name], 1),
                "peak_ratio": round(memory[name] / memory[plain], 3),
            }
            results.append(row)
            print(f"{shape:<14}{name:<25}{row['seconds']:>10}{row['ratio']:>7}{row['peak_mb']:>9}{row['peak_ratio']:>7}")
    print(
        json.dumps(
            {
                "benchmark": "step_cost",
                "device": args.device,
                "rows": args.rows,
                "length": args.length,
                "answer": args.answer,
                "repeats": args.repeats,
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
