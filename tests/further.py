"""Tiny random models of further architectures: mixtures of experts, and hybrid and recurrent ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from shapes import base

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
    ),
}
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 16,
            **_MAMBA,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "rwkv": ("RwkvConfig", {"attention_hidden_size": 32, "context_length": 256}),
    "bamba": ("BambaConfig", {"attn_layer_indices": [1], **_MAMBA}),
    "jamba": (
        "JambaConfig",
        {
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "minimax": ("MiniMaxConfig", {"num_local_experts": 2, "layer_types": ["linear_attention", "full_attention"]}),
    "recurrent_gemma": (
        "RecurrentGemmaConfig",
        {"block_types": ["recurrent", "attention"], "lru_width": 32, "attention_window_size": 64},
    ),
}


def further(name: str, folder: Path) -> Path:
    """A tiny random model of this architecture with a tokenizer, in `folder`."""
    shutil.copytree(base("qwen3"), folder)
    (folder / "model.safetensors").unlink()
    kind, more = {**EXPERTS, **HYBRIDS}[name]
    words = transformers.AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(3)
    config = getattr(transformers, kind)(**{**SHAPE, "vocab_size": len(words), **more})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
