"""A model's adapter on disk in PEFT's format, or merged into its base in Hugging Face layout."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from fedkeel.files import as_others
from fedkeel.model.adapted import PREFIX
from fedkeel.model.bases import ModelError
from fedkeel.model.lora import Model
from fedkeel.model.quiet import quiet
from fedkeel.types import Adapter

CLASSES = "fedkeel_classes.json"  # beside an adapter, where its base is an encoder


def save_adapter(model: Model, folder: Path, adapter: Adapter | None = None) -> None:
    """The adapter in PEFT format; `PeftModel.from_pretrained(base, folder)` loads it.

    adapter: what to write instead of the model's own, for the same maps but of whatever ranks.
    An encoder's classes are written beside it, and with the `label-text` head their frozen embeddings, with the `analytic` one
    its classifiers, without which the adapter's hidden states could not be turned into class scores.
    """
    config = copy.deepcopy(model.net.peft_config["default"])
    config.inference_mode = True
    tensors = peft.get_peft_model_state_dict(model.net)
    if adapter is None:
        own = model.read()
        if any(factors.a.shape[0] < config.r for factors in own.lora.values()):
            adapter = own  # a site of a lower rank: its padding stays here
    if adapter is not None:
        tensors |= _evened(config, adapter)
    # `save_pretrained` of the model writes the same two files, and most of its time a card, which says nothing
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    whole = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(whole, folder / "adapter_model.safetensors", {"format": "pt"})
    _save_classes(model, folder)
    as_others(folder)


def _evened(config: peft.LoraConfig, adapter: Adapter) -> dict[str, Tensor]:
    """One rank and scale for all maps, as servers of adapters expect: rows of 0 fill up, scales go into B. `config` says so."""
    config.r = max(m.a.shape[0] for m in adapter.lora.values())
    config.use_rslora, config.lora_alpha = False, config.r
    tensors = {}
    for path, factors in adapter.lora.items():
        more, where = config.r - factors.a.shape[0], f"{PREFIX}{path}.lora"
        tensors[f"{where}_A.weight"] = nn.functional.pad(factors.a, (0, 0, 0, more))
        tensors[f"{where}_B.weight"] = nn.functional.pad(factors.scale * factors.b, (0, more))
    return tensors


def _ending(settings: GenerationConfig, end: int | list[int]) -> GenerationConfig:
    """The base's settings with this end; without them where transformers would not save them."""
    settings.eos_token_id = end
    try:
        settings.validate(strict=True)
    except ValueError:
        return GenerationConfig(
            bos_token_id=settings.bos_token_id,
            eos_token_id=end,
            pad_token_id=settings.pad_token_id,
            decoder_start_token_id=settings.decoder_start_token_id,
        )
    return settings


def _save_classes(model: Model, folder: Path) -> None:
    if model.kind != "classifier":
        return
    head = "linear" if model.label_text is None else "label-text" if model.by_head is None else "analytic"
    about: dict[str, Any] = {"head": head, "classes": model.classes}
    if model.by_head is not None:
        blocks = model.kept or range(max(1, len(model.places.stack)))
        about["depths"] = [sum(n < behind for n in blocks) / len(blocks) for behind in model.depths]
        about["labels"] = {task: [model.classes[n] for n in at.tolist()] for task, (at, _) in model.by_head.parts.items()}
        tensors = {task: weight.cpu().contiguous() for task, (_, weight) in model.by_head.parts.items()}
        save_file(tensors, folder / "label_heads.safetensors")
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / CLASSES).write_text(text + "\n")
    if model.label_text is not None:
        save_file({"embeddings": model.label_text.embeddings.cpu()}, folder / "label_embeddings.safetensors")


def cut(model: Model, kept: Sequence[int]) -> None:
    """Leave these blocks of the stack that predicts, in order; its config says so. What stands above the blocks stays.

    kept: see `depth.kept_blocks`. `model` is good for saving alone after it. Raises ModelError where the blocks of the
    architecture are not known.
    """
    stack = model.places.stack
    if not model.places.forms:
        raise ModelError(f"{model.config.base!r}: its blocks are not known, so none can be left out")
    base = model.net.get_base_model()
    holder, _, name = stack[0][0].rpartition(".")[0].rpartition(".")
    setattr(base.get_submodule(holder), name, nn.ModuleList(stack[n][1] for n in kept))
    model.kept = tuple(kept)
    for config in {id(c): c for c in (base.config, base.config.get_text_config(decoder=True))}.values():
        sizes = ("num_decoder_layers", "decoder_layers") if config.is_encoder_decoder else ("num_hidden_layers",)
        for size in sizes:
            if hasattr(config, size):
                setattr(config, size, len(kept))
        for name, value in list(vars(config).items()):  # `layer_types`, `no_rope_layers`: of each block, what it is
            if "layer" in name and isinstance(value, list) and len(value) == len(stack):
                setattr(config, name, [value[n] for n in kept])


def _check_cut(model: Model, net: nn.Module) -> None:
    """Raise ModelError where the config of a cut model makes another model: one whose blocks differ by number, as experts do in
    some."""
    if not model.kept:
        return
    with torch.device("meta"):
        said = {name: t.shape for name, t in type(net)(net.config).state_dict().items()}
    held = {name: t.shape for name, t in net.state_dict().items()}
    if odd := sorted(name for name in said.keys() | held.keys() if said.get(name) != held.get(name)):
        raise ModelError(
            f"{model.config.base!r}: its config says by number what a block is, and without some of them {odd[0]} is another; "
            f"leave out the top ones, or none"
        )


def save_with_base(model: Model, folder: Path) -> None:
    """The adapter in PEFT format, and in `base` below it the base that it stands upon, in Hugging Face layout and its own type
    of numbers: of a model that is no longer that of the recipe, see `cut`. `model` is of no further use after it."""
    folder.mkdir(parents=True, exist_ok=True)
    net = model.net
    config = copy.deepcopy(net.peft_config["default"])
    # whole paths: blocks have other numbers now
    paths = [path for path, module in net.get_base_model().named_modules() if hasattr(module, "lora_A")]
    if not paths:
        raise ModelError(f"{model.config.base!r}: none of the blocks that are left has an adapter; keep more of them")
    config.target_modules, config.layers_to_transform, config.inference_mode = paths, None, True
    config.base_model_name_or_path = "./base"
    config.save_pretrained(folder)
    tensors = {name: t.detach().cpu().contiguous() for name, t in peft.get_peft_model_state_dict(net).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    _save_classes(model, folder)
    _save_whole(model, net.unload(), folder / "base")
    model.tokenizer.save_pretrained(folder)
    as_others(folder)


def _save_whole(model: Model, net: Any, folder: Path, ends: Sequence[int] = ()) -> None:
    """`net`, made of the model's, in Hugging Face layout and the base's own type of numbers, with the tokenizer. ends: as of
    `save_merged`."""
    net = net.to(model.stored)
    _check_cut(model, net)
    net.config.use_cache, net.config.dtype = True, model.stored
    if model.kind == "classifier" and model.label_text is None:
        net.config.id2label = dict(enumerate(model.classes))
        net.config.label2id = {name: n for n, name in enumerate(model.classes)}
    if ends:
        net.config.eos_token_id = ends[0] if len(ends) == 1 else list(ends)
        net.generation_config = _ending(net.generation_config, net.config.eos_token_id)
    with quiet():
        net.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def save_merged(model: Model, folder: Path, ends: Sequence[int] = ()) -> None:
    """Base and adapter in one, in Hugging Face layout and the base's own type of numbers, with the tokenizer and an encoder's
    classes, see `save_adapter`.

    ends: tokens that end an answer; both configs then say so. `model` is of no further use after it.
    """
    _save_whole(model, model.merged(), folder, ends)
    _save_classes(model, folder)
