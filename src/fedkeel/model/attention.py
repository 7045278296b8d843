"""Attention of a bf16 pass on a CPU, trained in float32: torch's bf16 kernel takes four times as long for its backward pass.

Measured by `benchmarks/llm.py`. Passes without gradients keep the bf16 kernel, which is the quicker one there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "fedkeel_sdpa_float32"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`sdpa_attention_forward`, its arguments and its result of (rows, tokens, heads, d); in float32 where it is trained."""
    if not query.requires_grad or not torch.is_autocast_enabled(query.device.type):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:
        attention_mask = _in_float32(attention_mask)
    options = {name: _in_float32(value) for name, value in options.items()}  # T5's bias of positions
    with torch.autocast(query.device.type, enabled=False):
        out, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(torch.bfloat16), weights


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def train_in_float32(net: Any) -> None:
    """Give `net`, a transformers model, this attention where it would use torch's own (`sdpa`) and can be given another."""
    if net.config._attn_implementation == "sdpa" and net._can_set_attn_implementation():
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        net.set_attn_implementation(NAME)
