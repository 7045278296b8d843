"""Finding and loading a base model: names, configuration, tokenizer, kind, and errors that say what would be right."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from fedkeel import tables
from fedkeel.model.bases import ModelError, of_table
from fedkeel.model.gguf import dequantised
from fedkeel.model.places import in_block
from fedkeel.model.quiet import quiet
from fedkeel.recipe.schema import Model as ModelConfig


def base_location(base: str) -> str:
    """A folder for `base`, which is a base of the table, a folder or a GGUF file, or an id of the hub as it stands.

    Raises ModelError for a base that was not fetched, a path that is not there, or a GGUF file that cannot be read.
    """
    if base in tables.BASES:
        return str(of_table(base))
    path = Path(base).expanduser()
    if path.is_dir():
        return str(path)
    if path.suffix == ".gguf":
        return str(dequantised(path))
    if base.startswith((".", "/", "~")):
        raise ModelError(f"model.base = {base!r}: no such folder")
    return base


@contextmanager
def _loading(base: str) -> Iterator[None]:
    """One clear error for the many ways in which loading can fail, and no bars or advice from it."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.base = {base!r} cannot be loaded: {reason}. Name {', '.join(tables.BASES)}, a local folder in "
            f"Hugging Face layout, a GGUF file, or a hub id that this machine can reach or has in its cache"
        ) from error
    except Exception as error:
        if type(error).__name__ != "UnpicklingError":  # by its name, as nothing here imports pickle
            raise
        raise ModelError(
            f"model.base = {base!r} cannot be loaded: its pickled weights (pytorch_model*.bin) are torn, or ask for more than "
            f"tensors; nothing of them was run. Weights in safetensors belong there"
        ) from error


def _load(call: Any, base: str, where: str, **options: Any) -> Any:
    with _loading(base):
        return call.from_pretrained(where, trust_remote_code=False, **options)


def load_tokenizer(config: ModelConfig) -> Any:
    """The base model's tokenizer, with a padding token."""
    where = base_location(config.base)
    tokenizer = _load(transformers.AutoTokenizer, config.base, where, **_revision(config, where))
    tokenizer.chat_template = _template(config, tokenizer.chat_template)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"model.base = {config.base!r}: its tokenizer has neither a padding, end nor unknown token to pad with"
        )
    # Lengths are held by `Formatter`; the tokenizer's own warning about them would come for rows that are then cut.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _template(config: ModelConfig, own: str | dict[str, str] | None) -> str | None:
    """The chat template that a recipe asks for. own: the tokenizer's, or its several by name."""
    asked, named = config.chat_template, own if isinstance(own, dict) else {}
    if not asked and isinstance(own, str | None):
        return own
    if asked == "none":
        return None
    if (asked or "default") in named:
        return named[asked or "default"]
    if "{" in asked:
        return asked
    known = ", ".join(["'none'", *map(repr, sorted(named))])
    raise ModelError(f"model.chat_template = {asked[:200]!r}: {known}, or a file with a Jinja template belongs here")


def _revision(config: ModelConfig, where: str) -> dict[str, Any]:
    return {"local_files_only": True} if Path(where).is_dir() else {"revision": config.revision}


def load_config(config: ModelConfig) -> Any:
    """The base model's own configuration; reads one small file."""
    where = base_location(config.base)
    return _load(transformers.AutoConfig, config.base, where, **_revision(config, where))


def kind_of(config: ModelConfig, base_config: Any) -> str:
    """`causal`, `seq2seq` or `classifier`: what `model.kind = "auto"` means for this base."""
    if config.kind != "auto":
        return config.kind
    if base_config.is_encoder_decoder:
        return "seq2seq"
    names = " ".join(base_config.architectures or ())
    causal = type(base_config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    encoder = type(base_config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if "ForCausalLM" in names or "LMHeadModel" in names or (causal and not encoder):
        return "causal"
    return "classifier"


@dataclass(frozen=True)
class Base:
    """A base model as it is to be built.

    about: its own configuration, see `load_config`. kind: see `kind_of`. head: classes of a fresh classification head; 0: none.
    dtype: of its weights.
    """

    config: ModelConfig
    about: Any
    kind: str
    head: int
    dtype: torch.dtype

    @property
    def _auto(self) -> Any:
        if self.head:
            return transformers.AutoModelForSequenceClassification
        return {
            "causal": transformers.AutoModelForCausalLM,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "classifier": transformers.AutoModel,
        }[self.kind]

    def load(self) -> Any:
        """Its modules with its weights; what a checkpoint lacks of an encoder, such as a head, is drawn by torch's generator.

        Raises ModelError if it cannot be loaded, or lacks tensors of a language model.
        """
        where = base_location(self.config.base)
        options = _revision(self.config, where) | ({"num_labels": self.head} if self.head else {})
        net, info = _load(self._auto, self.config.base, where, dtype=self.dtype, output_loading_info=True, **options)
        # what is missing was drawn at random: only what is trained from there may be
        missing = sorted(name for name in info["missing_keys"] if not self._may_be_fresh(net, name))
        if missing:
            what = "a whole encoder" if self.kind == "classifier" else f"a {self.kind} model; is it a language model, and whole"
            raise ModelError(
                f"model.base = {self.config.base!r} lacks {len(missing)} tensors of {what} ({', '.join(missing[:3])})"
            )
        if extra := sorted(name for name in info["unexpected_keys"] if _behind_the_last(net, name)):
            raise ModelError(
                f"model.base = {self.config.base!r} holds {len(extra)} tensors of blocks that its config.json does not count "
                f"({', '.join(extra[:3])}); without them it is another model: set its number of layers to what is there"
            )
        if self.kind == "causal" and _looks_ahead(net, self.about):
            raise ModelError(
                f"model.base = {self.config.base!r} ({self.about.model_type}) reads what comes after a token too, and so "
                f"learns no language: set model.kind = 'classifier', or is_decoder in its config.json if it was trained as one"
            )
        return net

    def _may_be_fresh(self, net: Any, name: str) -> bool:
        """Whether a parameter may be missing in the checkpoint: an encoder's pooler, which without a head is not used, and a
        classification head."""
        if self.kind != "classifier":
            return False
        return "pooler" in name.split(".") or (self.head > 0 and name.split(".")[0] in heads_of(net))

    def outline(self) -> Any:
        """Its modules on torch's `meta` device, without weights. Raises ModelError if they cannot be built."""
        about = copy.deepcopy(self.about)
        if self.head:
            about.num_labels = self.head
        with torch.device("meta"), _loading(self.config.base):
            return self._auto.from_config(about, trust_remote_code=False)


@torch.no_grad()
def _looks_ahead(net: Any, about: Any) -> bool:
    """Whether a token's logits change with a later token, in a base of a family that may: of encoders, and XLNet."""
    if type(about) not in transformers.MODEL_FOR_MASKED_LM_MAPPING and about.model_type != "xlnet":
        return False
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    one, other = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    return bool((one - other).abs().max() > 0.01 * one.abs().max())


def _behind_the_last(net: Any, name: str) -> bool:
    """Whether a tensor of a checkpoint is of a block whose number is above those of its stack in `net`."""
    at = in_block(name)
    if at is None:
        return False
    prefix = net.base_model_prefix
    for path in (at.stack, at.stack.removeprefix(f"{prefix}."), f"{prefix}.{at.stack}"):
        try:
            blocks = net.get_submodule(path)
        except AttributeError:
            continue
        return isinstance(blocks, torch.nn.ModuleList) and at.number >= len(blocks)
    return False


def heads_of(net: Any) -> list[str]:
    """The modules of a classifier that lie outside of its encoder, by name."""
    return [
        name
        for name, module in net.named_children()
        if name != net.base_model_prefix and next(module.parameters(), None) is not None
    ]


def device_of(config: ModelConfig, here: bool = True) -> torch.device:
    """The device that a recipe names. Raises ModelError where none has that name, or with `here` none on this machine."""
    try:
        device = torch.device(config.device)
        if here:
            torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, ValueError, ImportError, NotImplementedError) as error:
        told = str(error).strip().partition("\n")[0]
        raise ModelError(f"model.device = {config.device!r} cannot be used on this machine: {told}; 'cpu' can") from error
    return device


def uses_bf16(precision: str, device: str) -> bool:
    """Whether training runs under bf16 autocast: asked for, or `auto` and the machine computes in it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()
