"""Answers of a model, by our own settings: what a base's `generation_config.json` asks for changes no score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from fedkeel.model.lora import Model
from fedkeel.model.quiet import quiet


@contextmanager
def _own_settings(net: Any) -> Iterator[None]:
    """While it lasts, `net`, a transformers model, has no settings of its own but the token that a decoder begins with."""
    before = net.generation_config
    start = net.config.get_text_config(decoder=True)
    net.generation_config = GenerationConfig(
        bos_token_id=getattr(start, "bos_token_id", None),
        decoder_start_token_id=getattr(net.config, "decoder_start_token_id", None),
    )
    try:
        yield
    finally:
        net.generation_config = before


@torch.no_grad()
def generate(
    model: Model,
    prompts: tuple[Tensor, Tensor],
    ends: Sequence[int],
    tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
) -> Tensor:
    """(rows, at most `tokens`) new tokens behind each prompt, filled up with padding behind its end.

    prompts: (rows, T) tokens and mask, padded on the left (an encoder-decoder: on the right). ends: tokens that end an answer.
    temperature: 0 takes the likeliest token each time, else one is drawn by torch's generator from the whole distribution.
    streamer: as `transformers` takes it.
    """
    ids, mask = prompts
    chosen = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    with quiet(), _own_settings(model.net.get_base_model()):
        out = model.net.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=bool(temperature),
            num_beams=1,
            use_cache=True,
            max_new_tokens=tokens,
            pad_token_id=model.tokenizer.pad_token_id,
            eos_token_id=list(ends),
            streamer=streamer,
            **chosen,
        )
    # a decoder begins with its start token, which in BART is the one that ends an answer
    found: Tensor = out[:, 1:] if model.kind == "seq2seq" else out[:, ids.shape[1] :]
    return found
