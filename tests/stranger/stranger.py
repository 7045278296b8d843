"""A package of somebody else's that adds one of each kind to FedKeel: one function, one line in a table.

`stranger-0.1.dist-info` beside it is what an installer writes of a `pyproject.toml` with

    [project.entry-points.fedkeel]
    stranger = "stranger:register"
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedkeel import tables


def register() -> None:
    """What the entry point names; called once, before a recipe is read. Imports nothing heavy."""
    tables.TERMS["flat"] = tables.Term(flat, options=Flat, row="flat_loss")
    tables.STRUCTURES["blink"] = tables.Structure("stranger:blink")
    tables.RULES["first"] = tables.Rule("stranger:first", keeps_basis=True, apart=False)
    tables.CODECS["mirror"] = tables.Codec("stranger:Mirror")
    tables.PARTITIONS["alternating"] = tables.Partition(alternating, options=Alternating)
    tables.FORMS["quiz"] = tables.Form("stranger:quiz", keys=(("question",), ("answers",)))
    tables.MEASURES["weight"] = tables.Measure("stranger:weight", columns=(tables.Column("‖BA‖", "adapter_weight"),))
    tables.ARCHITECTURES["starcoder2"] = tables.Architecture(
        targets=("q_proj", "v_proj", "c_fc"), attention=("self_attn.o_proj",), down=("mlp.c_proj",)
    )
    tables.METRICS["first_letter"] = tables.Metric(first_letter, title="first letter")
    tables.DAMAGES["mute"] = tables.Damage(
        "stranger:mute", axis="factor on branches", none=1.0, strengths=(0.0,), branches=True
    )
    tables.TRACKERS["lines"] = tables.Tracker("stranger:Lines")


@dataclass(frozen=True)
class Flat:
    """[term.flat] of a recipe."""

    weight: float = 0.0
    power: float = 2.0


def flat(forward: Any, options: Flat) -> Any:
    """Mean |logit|^power: keeps logits small."""
    return forward.logits.abs().pow(options.power).mean()


def blink(places: Any, amount: float, draw: Any) -> list[Any]:
    """Whole branches rest in a pass, each with probability `amount`; those that stay make up for it."""
    from fedkeel.rng import counter_uniform, derive

    def hook(name: str, module: Any, inputs: Any, output: Any) -> Any:
        if not draw.active:
            return None
        import torch

        chance = amount * draw.strength
        stays = counter_uniform(derive(draw.key, name), torch.zeros(1, dtype=torch.int64)).item() >= chance
        return output * (stays / (1 - chance))

    return [branch.b.register_forward_hook(partial(hook, branch.path)) for branch in places.branches]


def first(reference: Any, updates: Iterable[Any], weights: Mapping[str, float], options: Any) -> Any:
    """What the first site says."""
    from fedkeel.method.aggregate.common import Aggregate

    return Aggregate(list(updates)[0].adapter, 0.5)  # noqa: RUF015 -- all are gone through, and so checked


class Mirror:
    """Sends −x in float32."""

    name, unbiased = "mirror", True

    def wire(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        import torch

        return {name: (torch.float32, shape) for name, shape in shapes.items()}

    def encode(self, tensors: Mapping[str, Any], key: int) -> dict[str, Any]:
        return {name: -tensor.float() for name, tensor in tensors.items()}

    def decode(self, encoded: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        return {name: -tensor for name, tensor in encoded.items()}

    def bound(self, tensor: Any) -> Any:
        return tensor * 0


@dataclass(frozen=True)
class Alternating:
    """[scheme.alternating] of a recipe."""

    names: tuple[str, ...] = ("left", "right")


def alternating(deal: Any) -> dict[str, list[int]]:
    """Rows in turn to the sites that its options name."""
    names = deal.own.names
    return {name: list(range(n, len(deal.records), len(names))) for n, name in enumerate(names)}


def quiz(row: Mapping[str, Any], about: Any) -> Any:
    """{"question": …, "answers": [right, …]}"""
    from fedkeel.data.forms import Parts

    return Parts(row["answers"][0], row["question"], about.instruction)


def weight(run: Any) -> list[Any]:
    """Σ ‖scale · BA‖² over the maps."""
    total = sum(float(factors.dense().square().sum()) for factors in run.served().read().lora.values())
    return [run.row("adapter_weight", total, "norm", split="")]


def first_letter(prediction: str, references: Sequence[str]) -> float:
    """Whether the answer begins as a right one does."""
    return float(prediction[:1] in {reference[:1] for reference in references})


def mute(model: Any, factor: float, seed: int, undo: ExitStack) -> None:
    """Scale all branches by `factor`."""
    for branch in model.places.branches:
        undo.callback(branch.b.register_forward_hook(lambda module, inputs, output: factor * output).remove)


class Lines:
    """A tracker that writes points as lines of JSON."""

    def __init__(self, folder: Path, run: str) -> None:
        self._file = (folder / "points.jsonl").open("w")

    def log(self, points: Sequence[Any]) -> None:
        self._file.writelines(f"{json.dumps([p.tag, p.step])}\n" for p in points)

    def close(self, finished: bool) -> None:
        self._file.close()
