"""Which maps of a base get a branch, and which do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import peft
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedkeel import tables
from fedkeel.model.bases import ModelError
from fedkeel.model.load import Base
from fedkeel.model.places import in_block
from fedkeel.recipe.schema import LoraConfig


def _block(path: str) -> int:
    """Number of the block that a path lies in; −1 outside of all."""
    at = in_block(path)
    return -1 if at is None else at.number


def _linear(net: Any) -> list[str]:
    """Paths of the linear maps, but for the output projection, whose weights may be the input embedding's too, and for routers
    of experts that are maps by their class alone: what they give is no tensor that a change could be added to."""
    head = net.get_output_embeddings()
    maps = ((path, m) for path, m in net.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head)
    return [path for path, m in maps if "Router" not in type(m).__name__]


def _is(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _checked(net: nn.Module, base: Base, asked: Sequence[str], linear: Sequence[str]) -> None:
    """Raise ModelError unless every name of lora.targets is that of a map that can have a branch."""
    for name in asked:
        if any(_is(path, name) for path in linear):
            continue
        others = [type(m).__name__ for path, m in net.named_modules() if _is(path, name)]
        why = "no map has that name"
        if others:
            why = "it is the output projection" if others[0] in ("Linear", "Conv1D") else f"it is no linear map ({others[0]})"
        known = sorted({path.rpartition(".")[2] for path in linear if not path.rpartition(".")[2].isdigit()})
        raise ModelError(
            f"lora.targets names {name!r}, and in {base.config.base!r} ({base.about.model_type}) {why}; of {', '.join(known)}"
        )


def targets_in(net: Any, base: Base, lora: LoraConfig) -> tuple[list[str] | str, list[int] | None]:
    """PEFT's (target_modules, layers_to_transform): the names asked for, else attention and feed-forward maps of the
    architecture, else every linear map of its blocks. Raises ModelError for a name that fits no map.

    Fused experts (one tensor of many matrices) get no branch: the product of PEFT's factors is not their change, so that what
    is averaged would not be what was trained.
    """
    linear = _linear(net)
    _checked(net, base, lora.targets, linear)
    names = lora.targets or tables.ARCHITECTURES.get(base.about.model_type, tables.Architecture()).targets
    layers = lora.blocks(base.about.num_hidden_layers) if lora.layers else None
    # PEFT turns names of maps that a base keeps fused into their tensors; it finds a block's number behind the name of what it
    # lies in, and an encoder's stack may be the outermost. Whole paths leave it no choice.
    routed = any("Router" in type(m).__name__ for m in net.modules())
    if _fused(net) or routed or (layers is not None and base.kind == "classifier" and names):
        within = [path for path in linear if _block(path) >= 0 and (layers is None or _block(path) in layers)]
        chosen = [path for path in within if not names or any(_is(path, name) for name in names)]
        return (_not_fused(net, chosen) if _fused(net) else chosen), None
    return list(names) or "all-linear", layers


def _fused(net: nn.Module) -> bool:
    """Whether blocks hold tensors of many matrices."""
    return any(p.dim() == 3 and not _convolves(net, name) and _block(name) >= 0 for name, p in net.named_parameters())


def _not_fused(net: nn.Module, paths: Sequence[str]) -> list[str]:
    """Those that PEFT takes as they are: it reads `gate_proj` of a shared expert as that of all experts."""
    trial = peft.LoraConfig(target_modules=list(paths))
    convert_peft_config_for_transformers(trial, net, None)
    return [path for path in paths if path in (trial.target_modules or ())]


def _convolves(net: nn.Module, name: str) -> bool:
    return isinstance(net.get_submodule(name.rpartition(".")[0]), nn.Conv1d)


def without_branch(net: Any, lora: LoraConfig, blocks: int) -> tuple[str, ...]:
    """Matrices of the blocks that train none, where the recipe names no targets: their names, a block's number as `*`.

    net: with its branches.
    """
    if lora.targets:
        return ()
    chosen = set(lora.blocks(blocks)) if lora.layers else None
    found = set()
    for name, parameter in net.named_parameters():
        path = name.removeprefix("base_model.model.")
        owner = net.get_submodule(name.rpartition(".")[0])
        bare = parameter.dim() < 2 or parameter.requires_grad or isinstance(owner, nn.Embedding) or ".base_layer." in path
        if not bare and _block(path) >= 0 and (chosen is None or _block(path) in chosen):
            found.add(re.sub(r"(?<=\.)\d+(?=\.)", "*", path).removesuffix(".weight"))
    return tuple(sorted(found))
