"""Fingerprints of weights: whether two machines, or two days, hold the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedkeel.model.lora import Model


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and numbers of tensors, in the order of their names; the type that holds a number does not count, as
    a machine chooses it by what it computes in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        flat = flat.float() if flat.is_floating_point() else flat
        bits = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(bits)
    return digest.hexdigest()


def base_digest(model: Model) -> str:
    """`digest_of` the frozen weights, as they are now: base shifts change them."""
    return digest_of({name: p for name, p in model.net.named_parameters() if not p.requires_grad})


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 over all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    rest = [tokenizer.chat_template, {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}]
    return hashlib.sha256((told + json.dumps(rest, sort_keys=True)).encode()).hexdigest()
