"""Small real tokenizers and tiny random models of the shapes that users bring, built here without a network.

Everything is made once a session, under one temporary folder: `tokenizer(name)` loads a tokenizer from its folder as
FedKeel would, `base(name)` is the folder of a model with its tokenizer, as `model.base` takes it.
"""

from __future__ import annotations

import atexit
import json
import os
import tempfile
from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of transformers: nothing here may ask a network

import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fedkeel.model.lora import Model
from fedkeel.model.quiet import quiet
from fedkeel.recipe.schema import LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig

LAYERS, HEADS, HIDDEN, INNER = 2, 4, 32, 48

TEXT = """The keel is the part of a boat that keeps its course when the wind turns.
A site trains on rows of its own and sends back only what it has learned.
Classify the text by its topic: sport, business, science or world.
Answer the question in one short sentence. Question: what is the capital of France? Answer: Paris.
Translate into German: the red house stands near the river. Das rote Haus steht nahe am Fluss.
Say whether the review is positive or negative. The film was long, dull and far too loud.
What should I cook tonight? Try a soup of lentils, carrots and a little cumin.
Options: yes, no, maybe. Sum up the story. Write a title for the following text.
Numbers 0 1 2 3 4 5 6 7 8 9 10 20 42 100 1999 and signs like + - * / = ( ) [ ] { } < > are common in code.
def add(a, b): return a + b  # adds two numbers
How are you today? I am fine, thank you. And what about the weather? It rains, so stay at home.
No news is good news, said the old captain, and turned the boat toward the open sea.
""".splitlines()

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# marks every turn but the last: what a model saw as the last turn looks otherwise once an answer follows
REWRITING = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{% if not loop.last %} (earlier){% endif %}")
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _byte_level(specials: list[str]) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=specials, initial_alphabet=alphabet))
    return made


def _with_template(made: Tokenizer, template: str, *names: str) -> Tokenizer:
    made.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(n, made.token_to_id(n)) for n in names]
    )
    return made


def _gpt2() -> tuple[Tokenizer, dict[str, Any]]:
    end = "<|endoftext|>"
    return _byte_level([end]), {"bos_token": end, "eos_token": end, "unk_token": end}


def _opt() -> tuple[Tokenizer, dict[str, Any]]:
    made = _with_template(_byte_level(["<s>", "<pad>", "</s>"]), "</s> $A", "</s>")
    return made, {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}


def _roberta() -> tuple[Tokenizer, dict[str, Any]]:
    made = _with_template(_byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]), "<s> $A </s>", "<s>", "</s>")
    names = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return made, {**names, "pad_token": "<pad>", "unk_token": "<unk>"}


def _llama2(template: str | None = LLAMA2) -> tuple[Tokenizer, dict[str, Any]]:
    """SentencePiece-like: Metaspace, no merge across words, bytes for what the vocabulary lacks."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    specials = ["<unk>", "<s>", "</s>"]
    learned.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=350, special_tokens=specials))
    bpe = json.loads(learned.to_str())["model"]
    vocabulary = bpe["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(m) for m in bpe["merges"]]
    made = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(specials)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    return _with_template(made, "<s> $A", "<s>"), names


def _llama3() -> tuple[Tokenizer, dict[str, Any]]:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made = _byte_level(specials)
    digits = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    names = {"bos_token": specials[0], "eos_token": "<|eot_id|>", "chat_template": LLAMA3}
    return _with_template(made, f"{specials[0]} $A", specials[0]), names


def _chatml(template: str = CHATML) -> tuple[Tokenizer, dict[str, Any]]:
    made = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": template}


def _bert() -> tuple[Tokenizer, dict[str, Any]]:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=350, special_tokens=specials))
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    return _with_template(made, "[CLS] $A [SEP]", "[CLS]", "[SEP]"), names


def _t5() -> tuple[Tokenizer, dict[str, Any]]:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=250, special_tokens=specials, unk_token="<unk>"))
    return _with_template(made, "$A </s>", "</s>"), {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


TOKENIZERS = {
    "gpt2": _gpt2,
    "opt": _opt,
    "roberta": _roberta,
    "llama2": _llama2,
    "llama2-plain": lambda: _llama2(None),
    "llama3": _llama3,
    "chatml": _chatml,
    "chatml-rewriting": lambda: _chatml(REWRITING),
    "bert": _bert,
    "t5": _t5,
}
# causal tokenizers and the text that ends an answer with them, after the answer itself
ENDS = {
    "gpt2": "<|endoftext|>",
    "opt": "</s>",
    "llama2-plain": "</s>",
    "llama2": " </s>",
    "llama3": "<|eot_id|>",
    "chatml": "<|im_end|>",
}

_split = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_grouped = {**_split, "num_key_value_heads": 2, "max_position_embeddings": 256}
_gemma = {**_grouped, "head_dim": 8, "hidden_activation": "gelu_pytorch_tanh"}
_bart = {"d_model": HIDDEN, "max_position_embeddings": 256}
for _side in ("encoder", "decoder"):
    _bart |= {f"{_side}_layers": LAYERS, f"{_side}_attention_heads": HEADS, f"{_side}_ffn_dim": INNER}
_t5_sizes = {"d_model": HIDDEN, "d_kv": 8, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS}
_encoder = {**_split, "max_position_embeddings": 256}
# name -> (kind, tokenizer, config); model_type is the name up to a colon
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("causal", "llama2", _grouped),
    "mistral": ("causal", "llama2-plain", {**_grouped, "sliding_window": 6}),
    "qwen2": ("causal", "chatml", _grouped),
    "qwen3": ("causal", "chatml", {**_grouped, "head_dim": 8}),
    "smollm3": ("causal", "llama3", {**_grouped, "no_rope_layers": [1, 0]}),
    "gemma": ("causal", "llama2-plain", _gemma),
    "gemma2": (
        "causal",
        "llama2",
        {
            **_gemma,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": 4.0,
        },
    ),
    "phi": ("causal", "gpt2", {**_encoder, "partial_rotary_factor": 0.5}),
    "phi3": ("causal", "llama3", {**_grouped, "original_max_position_embeddings": 256}),
    "gpt2": ("causal", "gpt2", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": INNER, "n_positions": 256}),
    "gpt_neox": ("causal", "gpt2", {**_encoder, "rotary_pct": 0.5}),
    "opt": (
        "causal",
        "opt",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "word_embed_proj_dim": HIDDEN,
            "max_position_embeddings": 256,
        },
    ),
    "bert": ("classifier", "bert", _encoder),
    "roberta": ("classifier", "roberta", _encoder),
    "deberta-v2": (
        "classifier",
        "bert",
        {**_encoder, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": HIDDEN},
    ),
    "distilbert": ("classifier", "bert", {"dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS, "n_heads": HEADS}),
    "modernbert": ("classifier", "bert", {**_encoder, "local_attention": 8, "cls_token_id": 2, "sep_token_id": 3}),
    "t5": ("seq2seq", "t5", {**_t5_sizes, "decoder_start_token_id": 0}),
    "t5:gated": (
        "seq2seq",
        "t5",
        {**_t5_sizes, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
    ),
    "bart": ("seq2seq", "roberta", {**_bart, "decoder_start_token_id": 2, "forced_eos_token_id": None}),
}
CAUSAL = [name for name, (kind, _, _) in ARCHITECTURES.items() if kind == "causal"]
ENCODERS = [name for name, (kind, _, _) in ARCHITECTURES.items() if kind == "classifier"]
SEQ2SEQ = [name for name, (kind, _, _) in ARCHITECTURES.items() if kind == "seq2seq"]
# a decoder with a map for each of q, k and v, one that fuses them, one that also holds its maps transposed; an encoder; both
FAMILIES = ("llama", "phi3", "gpt2", "bert", "t5")


def quickly(kept: Collection[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters of which `make test` walks those that are kept, and `make slow` the others."""
    return [value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in every]


def chosen(*lists: Iterable[str]) -> list[Any]:
    """Names of architectures for `parametrize`, of which one of each family is tried in every run and the rest is slow."""
    names = [name for names in lists for name in names]
    return quickly(FAMILIES, names)


_FOLDER = tempfile.TemporaryDirectory(prefix="fedkeel-shapes-")
atexit.register(_FOLDER.cleanup)


@cache
def _built(name: str) -> transformers.PreTrainedTokenizerFast:
    backend, names = TOKENIZERS[name]()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


@cache
def tokenizer(name: str) -> Any:
    """The tokenizer of this shape, saved and loaded again, with a padding token as `load_tokenizer` gives it one."""
    folder = Path(_FOLDER.name) / f"tokenizer-{name}"
    _built(name).save_pretrained(folder)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    if loaded.pad_token_id is None:
        loaded.pad_token = loaded.eos_token
    return loaded


@cache
def base(name: str) -> str:
    """A folder with a tiny random model of this architecture and its tokenizer, in Hugging Face layout.

    Weights are wide (σ = 0.2; 0.1 for T5, whose attention scores are not scaled down), so that a wrong position, mask or
    scale moves the logits by far more than rounding.
    """
    kind, shape, sizes = ARCHITECTURES[name]
    words = _built(shape)
    ids = {"pad_token_id": words.pad_token_id, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    if kind == "seq2seq" and name.startswith("t5"):
        del ids["bos_token_id"]  # as T5's own configs: a decoder begins with its padding
    config = transformers.AutoConfig.for_model(name.partition(":")[0], vocab_size=len(words), **(ids | sizes))
    auto = {
        "causal": transformers.AutoModelForCausalLM,
        "classifier": transformers.AutoModelForMaskedLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[kind]
    torch.manual_seed(len(name))
    made = auto.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1 if name.startswith("t5") else 0.2)
    folder = Path(_FOLDER.name) / name.replace(":", "-")
    with quiet():
        made.save_pretrained(folder)
        words.save_pretrained(folder)
    return str(folder)


def make(name: str, classes: tuple[str, ...] = (), seed: int = 1, weights: bool = True, **options: Any) -> Model:
    """This architecture as FedKeel loads it, float32 on the CPU. options: of `schema.Model` or `schema.LoraConfig`."""
    of_model = {k: v for k, v in options.items() if k in ModelConfig.__dataclass_fields__}
    of_lora = {k: v for k, v in options.items() if k not in of_model}
    if ARCHITECTURES[name][0] == "classifier":
        classes = classes or ("sport", "business news", "science")
    config = ModelConfig(**{"base": base(name), "precision": "fp32", **of_model})
    return Model(config, LoraConfig(**{"rank": 4, "alpha": 12.0, **of_lora}), seed, classes, weights)


def randomise(model: Model, seed: int = 3) -> None:
    """A non-zero adapter: every trained tensor drawn anew, so that B @ A and its scale show in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
