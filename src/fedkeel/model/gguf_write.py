"""A federated adapter, or the whole model, as a GGUF file for llama.cpp and what builds on it. Needs `fedkeel[gguf]`.

Layout and names are llama.cpp's: github.com/ggml-org/ggml, docs/gguf.md, and its conversion of LoRA adapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.files import replaced
from fedkeel.model.bases import ModelError
from fedkeel.model.gguf import need_gguf
from fedkeel.model.lora import Model
from fedkeel.types import Adapter

if TYPE_CHECKING:
    from gguf import GGUFWriter

TYPES = ("f16", "bf16", "f32")  # of a whole model's matrices
ROTATED_IN_PAIRS = "llama"  # llama.cpp rotates neighbours of a head there, where Hugging Face rotates its halves

# How a byte-level tokenizer cuts a text into words before it merges: its JSON -> the name that llama.cpp knows it by.
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(digits: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": _WORDS % digits}, "behavior": "Isolated", "invert": False}
    return [split, {**_BYTES, "use_regex": False}]


WORDS = {
    "gpt-2": [{**_BYTES, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**_BYTES, "use_regex": True}],
    "llama-bpe": _split("{1,3}"),
    "qwen2": _split(""),
}


def save_adapter_gguf(model: Model, adapter: Adapter, file: Path) -> None:
    """An adapter of the model as a LoRA of llama.cpp, in float32; `llama-cli -m BASE.gguf --lora FILE` takes it.

    Raises ModelError where there is no such thing: another architecture, or more in the adapter than branches.
    """
    need_gguf(f"'{file}'")
    arch = _arch(model)
    if adapter.dense:
        raise ModelError(f"'{file}': a LoRA of llama.cpp holds branches only, and {min(adapter.dense)} is trained whole")
    from gguf import GGUFType

    with _written(file, arch) as writer:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string("adapter.type", "lora")
        rank = max(factors.a.shape[0] for factors in adapter.lora.values())
        writer.add_float32("adapter.lora.alpha", float(rank))  # a scale of 1 for all: their own are in B
        names = _Names(model, arch)
        for path, factors in adapter.lora.items():
            more = rank - factors.a.shape[0]  # llama.cpp takes the rank from each pair, and its scale with it
            name = names(f"{path}.weight")
            writer.add_tensor(f"{name}.lora_a", np.pad(factors.a.numpy(), ((0, more), (0, 0))))
            b = names.turned(f"{path}.weight", factors.scale * factors.b)
            writer.add_tensor(f"{name}.lora_b", np.pad(b.numpy(), ((0, 0), (0, more))))


def save_merged_gguf(model: Model, file: Path, kind: str = "f16", ends: Sequence[int] = ()) -> None:
    """Base and adapter in one, with the tokenizer and its chat template. kind: one of TYPES; vectors stay in float32. ends:
    tokens that end an answer; one that is not the tokenizer's own is written as the end of a turn.

    `model` is of no further use after it. Raises ModelError for what llama.cpp would not read as it was trained: another
    architecture, a stretched rotation, a tokenizer that is not byte-level BPE with words it knows.
    """
    need_gguf(f"'{file}'")
    arch = _arch(model)
    words = _tokenizer(model)
    about = model.net.config
    rotation = getattr(about, "rope_parameters", None) or {}
    if rotation.get("rope_type", "default") != "default":
        raise ModelError(
            f"'{file}': rotations of type {rotation['rope_type']!r} are not written; see docs/serve.md for another way"
        )
    names = _Names(model, arch)
    with _written(file, arch) as writer:
        _write_shape(writer, about, float(rotation["rope_theta"]), kind)
        _write_words(writer, model, *words)
        for end in [end for end in ends if end != model.tokenizer.eos_token_id][:1]:
            writer.add_eot_token_id(end)
        for name, tensor in _merged(model):
            writer.add_tensor(names(name), *_packed(names.turned(name, tensor), kind))


@contextmanager
def _written(file: Path, arch: str) -> Iterator[GGUFWriter]:
    """A GGUFWriter that puts everything out when the block ends well; the file is whole then or not there."""
    from gguf import GGUFWriter

    with replaced(file) as partial, closing(GGUFWriter(partial, arch)) as writer:
        yield writer
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _arch(model: Model) -> str:
    about = model.net.config
    known = {name: entry.gguf for name, entry in tables.ARCHITECTURES.items() if entry.gguf}
    if model.kind != "causal" or about.model_type not in known:
        raise ModelError(f"GGUF is written of {', '.join(known)}, not of {model.config.base!r} ({about.model_type})")
    return known[about.model_type]


class _Names:
    """llama.cpp's names of a model's tensors, and its order of their rows."""

    def __init__(self, model: Model, arch: str) -> None:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        self._about = model.net.config
        number = next(number for number, name in MODEL_ARCH_NAMES.items() if name == arch)
        self._map = get_tensor_name_map(number, self._about.num_hidden_layers)
        self._pairs = arch == ROTATED_IN_PAIRS

    def __call__(self, name: str) -> str:
        """Of a parameter by its name in Hugging Face layout. Raises ModelError for one that llama.cpp has no place for."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(f"llama.cpp has no place for {name} in this architecture")
        return found

    def turned(self, name: str, tensor: Tensor) -> Tensor:
        """Rows of queries' and keys' maps from halves to pairs, where llama.cpp rotates those."""
        part = name.split(".")[-2]
        if not self._pairs or part not in ("q_proj", "k_proj"):
            return tensor
        heads = self._about.num_attention_heads if part == "q_proj" else self._about.num_key_value_heads
        return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def _merged(model: Model) -> Iterator[tuple[str, Tensor]]:
    merged = model.merged()
    tied = merged.config.tie_word_embeddings
    for name, tensor in merged.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, tensor.detach().to("cpu", torch.float32)


def _packed(tensor: Tensor, kind: str) -> tuple[Any, tuple[int, ...] | None, Any]:
    """What `add_tensor` takes: values, their shape where that is not the values' own, and their type."""
    from gguf import GGMLQuantizationType

    if tensor.dim() < 2 or kind == "f32":
        return tensor.numpy(), None, None
    if kind == "f16":
        if float(tensor.abs().max()) > torch.finfo(torch.float16).max:
            raise ModelError("a weight is too large for 16 bits of type f16; write bf16 or f32")
        return tensor.to(torch.float16).numpy(), None, None
    return tensor.to(torch.bfloat16).view(torch.uint8).numpy(), None, GGMLQuantizationType.BF16


def _write_shape(writer: GGUFWriter, about: Any, theta: float, kind: str) -> None:
    from gguf import GGUFType, LlamaFileType

    head = getattr(about, "head_dim", None) or about.hidden_size // about.num_attention_heads
    types = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16}
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(int(types[kind]))
    writer.add_block_count(about.num_hidden_layers)
    writer.add_context_length(about.max_position_embeddings)
    writer.add_embedding_length(about.hidden_size)
    writer.add_feed_forward_length(about.intermediate_size)
    writer.add_head_count(about.num_attention_heads)
    writer.add_head_count_kv(about.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(about.rms_norm_eps)
    writer.add_vocab_size(about.vocab_size)


def _tokenizer(model: Model) -> tuple[str, Mapping[str, Any]]:
    """(llama.cpp's name for how it cuts words, the tokenizer's own JSON). Raises ModelError for one it would not cut alike."""
    told = json.loads(model.tokenizer.backend_tokenizer.to_str())
    before = told["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    name = next((name for name, known in WORDS.items() if known == steps), None)
    if told["model"]["type"] != "BPE" or name is None:
        raise ModelError(
            f"{model.config.base!r}: llama.cpp cuts words in ways of its own ({', '.join(WORDS)} are written here), and this "
            f"tokenizer is none of them; see docs/serve.md for another way"
        )
    return name, told


def _write_words(writer: GGUFWriter, model: Model, before: str, told: Mapping[str, Any]) -> None:
    from gguf import TokenType

    words, size = model.tokenizer, model.net.config.vocab_size
    added = {token["id"]: token for token in told["added_tokens"]}
    by_id = {number: word for word, number in words.get_vocab().items()}
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    kinds = [TokenType.NORMAL if number in by_id else TokenType.UNUSED for number in range(size)]
    for number, token in added.items():
        kinds[number] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    merges = told["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(before)
    writer.add_token_list(tokens)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(words("a")["input_ids"][:1] == [words.bos_token_id])
    for add, number in (
        (writer.add_bos_token_id, words.bos_token_id),
        (writer.add_eos_token_id, words.eos_token_id),
        (writer.add_pad_token_id, words.pad_token_id),
        (writer.add_unk_token_id, words.unk_token_id),
    ):
        if number is not None:
            add(number)
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)
