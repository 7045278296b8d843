"""One site's round outside a federation, for tests of the method: rows, models without dropout, and plain descent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import shapes
import torch
import transformers
from torch import Tensor

import fedkeel.federation.train
from fedkeel.data.batches import Batch, batch_indices, collate
from fedkeel.data.format import Example, Formatter
from fedkeel.federation.train import Round, train_round
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.types import Adapter, Global, Record

CLASSES = ("sport", "business news", "science", "world")
# class names stand for two tasks: `topic` may answer any of three, `side` two others
ALLOWED = {"topic": CLASSES[:3], "side": CLASSES[2:]}


def records(count: int = 12, labelled: bool = False) -> list[Record]:
    """Rows of two tasks, of unequal lengths; `labelled` ones with their candidates, otherwise free answers."""
    found = []
    for n in range(count):
        task = "side" if n % 3 == 2 else "topic"
        labels = ALLOWED[task]
        text = " ".join(shapes.TEXT[n % 5].split()[: 2 + (5 * n) % 9])
        answer = labels[n % len(labels)] if labelled else " ".join(shapes.TEXT[(n + 3) % 9].split()[: 1 + n % 3])
        found.append(Record(f"r{n:02}", task, "train", answer, input=text, labels=labels if labelled else ()))
    return found


@cache
def steady_base(name: str) -> str:
    """`shapes.base(name)` with every kind of dropout at 0."""
    folder = Path(shapes.base(name)).with_name(Path(shapes.base(name)).name + "-steady")
    shutil.copytree(shapes.base(name), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {key: 0.0 for key in config if "dropout" in key}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def recipe_of(*overrides: str) -> Recipe:
    """Steps of four rows with all schedules flat, but for what `overrides` say."""
    flat = ["distill.ramp=0", "structure.ramp=0", "structure.anneal=0", "train.warmup=0", "train.final_lr=1"]
    return load_recipe(None, ["train.local_steps=3", "train.batch_size=4", "train.lr=0.01", *flat, *overrides])


def setting(name: str, seed: int = 3, **options: Any) -> tuple[Model, list[Example]]:
    """A model of this architecture with a non-zero adapter and no dropout, and twelve encoded rows."""
    kind = shapes.ARCHITECTURES[name][0]
    model = shapes.make(name, classes=CLASSES if kind == "classifier" else (), base=steady_base(name), **options)
    shapes.randomise(model, seed)
    formatter = Formatter(model.tokenizer, kind, 128, classes=model.classes)
    return model, formatter.encode_all(records(labelled=kind == "classifier"))


def whole_batch(model: Model, examples: Sequence[Example]) -> Batch:
    return collate(examples, model.kind, model.tokenizer.pad_token_id, len(model.classes))


def other(adapter: Adapter, seed: int = 9, size: float = 0.3) -> Adapter:
    """The adapter moved by noise."""
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + size * torch.randn(t.shape, generator=generator) for n, t in sorted(adapter.tensors().items())}
    return adapter.with_tensors(moved)


def train(
    model: Model,
    examples: Sequence[Example],
    recipe: Recipe,
    state: Global | None = None,
    rounds: int = 2,
    total: Mapping[str, int] | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Tensors and stats after one round from `state` (default: round 0 from the model's own adapter)."""
    state = state or Global(0, model.read())
    model.write(state.adapter)
    _, stats = train_round(model, examples, Round("here", rounds, recipe, state, total or {}))
    return model.read().tensors(), stats


def batches_of(examples: Sequence[Example], recipe: Recipe, steps: range, key: str = "here") -> list[list[Example]]:
    found = batch_indices([e.length for e in examples], recipe.train.batch_size, recipe.seed, key, steps)
    return [[examples[i] for i in batch] for batch in found]


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference of any number."""
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


def agree(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> bool:
    """Whether two trainings from `start` ended in one place, up to a thousandth of how far they went."""
    return apart(got, expected) < 1e-3 * apart(got, start)


@contextmanager
def plain_descent() -> Iterator[None]:
    """w − lr · g in place of AdamW, whose first steps are signs and would blow rounding up; no clipping in effect at
    `train.clip_norm=1e9`."""

    def descent(parameters: Any, lr: float, **_: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedkeel.federation.train.torch.optim, "AdamW", descent)
        yield


def assert_loads_in_peft(adapter: Path, model: Model, base: Path) -> None:
    """Plain PEFT on a fresh base gives the logits of the trained `model`, which are not those of the base alone."""
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    bare = fresh(input_ids=ids).logits
    loaded = peft.PeftModel.from_pretrained(fresh, adapter).eval()
    ours = model.net(input_ids=ids).logits
    assert (loaded(input_ids=ids).logits - ours).abs().max().item() < 1e-5
    assert (bare - ours).abs().max().item() > 1e-2
