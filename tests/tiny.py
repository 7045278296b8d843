"""A tiny base model, and the rows of a tiny federation of three wards: what many tests and the golden runs work on."""

from __future__ import annotations

import json
from pathlib import Path

import torch

COLOURS, SIZES = ["red", "green", "blue"], ["small", "large", "old", "new"]
THINGS, VERBS = ["cat", "dog", "bird", "tree", "house", "river", "stone"], ["sings", "runs", "sleeps"]
BASELINES = "evaluation.baselines=base,local,centralised"  # beside the federation; `overrides` alone has none
WORDS = [*COLOURS, *SIZES, *THINGS, *VERBS, "near", "under", "over"]


def write_base(folder: Path) -> None:
    """A random Llama of 2 layers, 32 wide, with a byte-level BPE and a chat template, in Hugging Face layout."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<end>", "<user>", "<assistant>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(WORDS)] * 4,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<end>")
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def tiny_rows() -> list[dict[str, str]]:
    """72 rows of three departments: say which colour stands in the line (classification), or repeat a word (free)."""
    rows = []
    for number in range(72):
        colour, thing, verb = WORDS[number % 3], WORDS[7 + number % 7], WORDS[14 + number % 3]
        split = ("train", "train", "train", "train", "validation", "test")[number // 2 % 6]
        row = {"department": f"ward-{number % 3}", "split": split, "input": f"the {colour} {thing} {verb} {number}"}
        if number % 2:
            rows.append({**row, "task": "colour", "instruction": "Which colour?", "output": colour})
        else:
            rows.append({**row, "task": "echo", "instruction": "Repeat the verb.", "output": verb})
    return rows


def write_data(folder: Path) -> None:
    """`rows.jsonl` (see `tiny_rows`), `reversed.jsonl` (the same lines backwards) and `tasks.json`."""
    lines = [json.dumps(row) + "\n" for row in tiny_rows()]
    (folder / "rows.jsonl").write_text("".join(lines))
    (folder / "reversed.jsonl").write_text("".join(reversed(lines)))
    (folder / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))


def overrides(base: Path, data: Path, out: Path) -> list[str]:
    """key=value of a federation of three sites that takes a second, without baselines."""
    return [
        "name=tiny",
        f"out={out}",
        "threads=1",
        f"model.base={base}",
        "model.precision=fp32",
        "lora.rank=4",
        "data.source=jsonl",
        f"data.root={data}",
        'data.files=["rows.jsonl"]',
        "data.tasks_file=tasks.json",
        "data.site_column=department",
        "data.max_length=128",
        "train.local_steps=2",
        "train.batch_size=4",
        "train.lr=0.01",
        "federation.rounds=3",
        "evaluation.max_new_tokens=4",
        "evaluation.validation_rows=4",
        "evaluation.baselines=[]",
    ]
