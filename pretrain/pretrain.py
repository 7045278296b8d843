"""Pretrain keel-nano, the small Llama-architecture LM that ships inside FedKeel.

    python pretrain/pretrain.py --data ../shared/data/lm --out build/keel-nano

Byte-level BPE of 4,096 entries; 3.1 M parameters with tied embeddings; Muon (Jordan 2024) on the matrices of the blocks
and AdamW on embeddings and norms; linear warm-up, flat, then linear decay to zero; windows of 256 tokens for the first 70 %
of the steps (a quarter cheaper a token), of 512 after that. Writes the tokenizer, a checkpoint
every `--every` steps (the run resumes from it by itself), `curve.jsonl`, and at the end the model in bf16 safetensors.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from corpus import KINDS, as_chat, heldout_documents, training_documents

SPECIAL = ["<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, BOS, END, SYSTEM, USER, ASSISTANT = range(6)
CONTEXT = 512
MICRO = 2048  # tokens a micro-batch: small enough to stay in this cache, measured fastest of 512 to 4,096
CHAT_SHARE = 0.12
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts: list[str], out: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE; digits stand alone, so that numbers of any length are made of the same ten pieces."""
    bpe = Tokenizer(models.BPE())
    split = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+|\s+(?!\S)|\s+"
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=SPECIAL[3:],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def epoch_stream(documents: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """One epoch as a single (tokens,) int64 stream: documents in a fresh order, a share of them as chat turns."""
    rng = random.Random(seed)
    order = list(range(len(documents)))
    rng.shuffle(order)
    plain, chats = [], []
    for i in order:
        kind, text = documents[i]
        chat = as_chat(kind, text, rng) if rng.random() < CHAT_SHARE * (4 if kind == "howto" else 1) else None
        chats.append(chat)
        plain.append(text if chat is None else chat[0])
    first = tokenizer.backend_tokenizer.encode_batch(plain)
    second = iter(tokenizer.backend_tokenizer.encode_batch([c[1] for c in chats if c is not None]))
    ids: list[int] = []
    for encoding, chat in zip(first, chats, strict=True):
        if chat is None:
            ids += [BOS, *encoding.ids, END]
        else:
            ids += [BOS, USER, *encoding.ids, END, ASSISTANT, *next(second).ids, END]
    return torch.tensor(ids)


@torch.no_grad()
def heldout_bits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[tuple[str, str]]) -> dict:
    """Per kind: bits per byte, and perplexity per token, of documents read from their first token on.

    Each document is `<|bos|> text`; a document longer than the context is read in pieces that each begin with
    `<|bos|>`. Every token of the text is predicted exactly once; the closing `<|end|>` is not counted.
    """
    model.eval()
    nats, tokens, size = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    pieces = []
    for kind, text in documents:
        ids = tokenizer.backend_tokenizer.encode(text).ids
        size[kind] += len(text.encode())
        tokens[kind] += len(ids)
        pieces += [(kind, [BOS, *ids[i : i + CONTEXT - 1]]) for i in range(0, len(ids), CONTEXT - 1)]
    pieces.sort(key=lambda p: (p[0], len(p[1])))
    for start in range(0, len(pieces), 16):
        batch = pieces[start : start + 16]
        width = max(len(p) for _, p in batch)
        ids = torch.tensor([p + [PAD] * (width - len(p)) for _, p in batch])
        keep = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for _, p in batch])
        logits = model(input_ids=ids, attention_mask=keep).logits.float()
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        for (kind, _), value in zip(batch, (losses * keep[:, 1:]).sum(1).tolist(), strict=True):
            nats[kind] += value
    model.train()

    def summary(n: float, t: int, b: int) -> dict:
        return {"bits_per_byte": n / math.log(2) / b, "perplexity": math.exp(n / t), "tokens": t, "bytes": b}

    table = {kind: summary(nats[kind], tokens[kind], size[kind]) for kind in KINDS}
    table["all"] = summary(sum(nats.values()), sum(tokens.values()), sum(size.values()))
    return table


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at `step`: 3 % warm-up, flat, the last 40 % linear to zero."""
    return min(1.0, (step + 1) / (0.03 * steps), (steps - step) / (0.4 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the `lm` folder of the text pack")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--batch", type=int, default=4, help="micro-batches of 2,048 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints and held-out readings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    documents = training_documents(args.data)
    heldout = heldout_documents(args.data)
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer([text for _, text in documents], args.out)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        attention_bias=False,
        mlp_bias=False,
    )
    model = LlamaForCausalLM(config)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(documents):,} documents", flush=True)

    checkpoint = args.out / "checkpoint.pt"
    step = epoch = position = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        step, epoch, position = state["step"], state["epoch"], state["position"]
    stream = epoch_stream(documents, tokenizer, args.seed + epoch)
    begin, first = time.time(), step
    curve = (args.out / "curve.jsonl").open("a")
    running, counted = 0.0, 0
    while step < args.steps:
        for optimiser in (muon, adam):
            for group in optimiser.param_groups:
                group["lr"] = args.lr * rate(step, args.steps)
        context = CONTEXT // 2 if step < 0.7 * args.steps else CONTEXT
        for _ in range(args.batch):
            if position + MICRO + 1 > len(stream):
                epoch, position = epoch + 1, 0
                stream = epoch_stream(documents, tokenizer, args.seed + epoch)
            window = stream[position : position + MICRO + 1]
            position += MICRO
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = model.model(input_ids=window[:-1].view(-1, context)).last_hidden_state
                logits = model.lm_head(hidden)
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), window[1:])
            (loss / args.batch).backward()
            running, counted = running + loss.item(), counted + 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if step % 25 == 0:
            tokens = (step - first) * args.batch * MICRO
            row = {"step": step, "epoch": epoch, "train_nats": running / counted, "tokens": step * args.batch * MICRO}
            row["seconds"] = round(time.time() - begin, 1)
            print(json.dumps(row), f"{tokens / row['seconds']:.0f} tokens/s", flush=True)
            print(json.dumps(row), file=curve, flush=True)
            running, counted = 0.0, 0
        if step % args.every == 0 or step == args.steps:
            table = heldout_bits(model, tokenizer, heldout)
            row = {"step": step, "heldout": table}
            print(json.dumps(row), file=curve, flush=True)
            print(f"step {step}: held-out {table['all']['bits_per_byte']:.4f} bits/byte", flush=True)
            state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            torch.save({**state, "step": step, "epoch": epoch, "position": position}, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    table = heldout_bits(LlamaForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32), tokenizer, heldout)
    (args.out / "heldout.json").write_text(json.dumps(table, indent=1) + "\n")
    print(json.dumps(table["all"]))


if __name__ == "__main__":
    main()
