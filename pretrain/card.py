"""Model card, curves and held-out table of keel-nano, from what the run and the n-grams have written.

    python pretrain/card.py --run build/keel-nano

Every number comes from a file or from the code that trained. On a run that still goes on, the newest held-out reading
stands in for the final one and the card says so; send it elsewhere with `--results` and `--card`. The curves are drawn with
matplotlib, which FedKeel does not depend on: `pip install matplotlib` first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

import pretrain
from corpus import KINDS, training_documents

# kind: what it is, source, licence; from the text pack's own README, section "Sources".
SOURCES = {
    "howto": ("goals and solutions of PIQA", "allenai/natural-instructions", "AFL 3.0"),
    "narratives": ("contexts of CosmosQA (personal stories)", "allenai/natural-instructions", "CC BY 4.0"),
    "novels": (
        "English novels first published before 1923",
        "computationalstylistics/100_english_novels",
        "public domain",
    ),
    "stories": ("five-sentence stories of ROCStories", "allenai/natural-instructions (task105)", "CC BY-SA 4.0"),
    "textbook_sociology": (
        "*Introduction to Sociology 2e*, attribution: OpenStax College",
        "philschatz/sociology-book",
        "CC BY 3.0",
    ),
    "wikitext2": ("WikiText-2 (Wikipedia articles)", "pytorch/examples", "CC BY-SA 3.0"),
}

CARD = """# keel-nano

A {parameters} language model for English text, trained from scratch for FedKeel and shipped inside it, so that a
federation can be run, tested and taught without a download. Weights in bf16 safetensors.
{partial}
## Architecture

{architecture}

## Training

```
{command}
```

{steps:,} steps, {tokens:,} tokens ({epochs:.1f} passes of {epoch_tokens:,} tokens), {seconds:,.0f} seconds on CPU.
Muon on the matrices of the blocks, AdamW on embeddings and norms; see `pretrain/pretrain.py`.
The run shared its machine and was stopped and resumed from its checkpoints with fewer steps to go: `--steps 2600` up to
step 1,000, `--steps 2200` up to 1,750, then `--steps 1900 --threads 1`. So its learning rate was flat up to step 1,320,
fell to half its peak by 1,750 and from a fifth to zero in the last 150 steps. The command above does it in one go.
Training loss, mean of the last {row_steps} steps: {train_nats:.3f} nats per token. Curves: `results/keel-nano/`.

| kind | text | source (GitHub) | licence | documents | MB |
|---|---|---|---|---|---|
{data}

The weights come under FedKeel's Apache-2.0 licence; each source text keeps its licence and its attribution as listed.
The held-out text is of the same six kinds and in none of
the training files. Rows that serve as task rows elsewhere in the text pack were left out of `howto`, `narratives` and
`stories`; those tasks still share their source with this text.

## Held-out text

Bits per byte (fewer is better) and, in brackets, perplexity per token, on {heldout_bytes:,} bytes. keel-nano and the
{order}-gram predict the same {heldout_tokens:,} BPE tokens. Both n-grams are interpolated modified Kneser-Ney of the
same documents (`pretrain/ngram.py`).

| kind | keel-nano | {order}-gram | {byte_order}-gram over bytes | keel-nano against {order}-gram |
|---|---|---|---|---|
{heldout}

keel-nano needs fewer bits than the {order}-gram on {wins} of {kinds} kinds, and {verdict} over all.

## Chat format

`{chat}`

An answer ends with `<|end|>`. In an epoch {chat_share:.0%} of the documents are one user turn and one answer
(goal and solution, beginning and continuation, or a gap with four options): each is drawn with probability
{chat_draw:.0%}, a how-to line four times as often, and stays plain text where it does not split.
`<|system|>` has its token, but pretraining never uses it.

## Intended use

Small federations offline, tests of a federated set-up, teaching, first comparisons of methods on a CPU.

## What it cannot do

- Facts and reasoning: it is a {parameters} model trained on {megabytes:.0f} MB of text. Treat what it says as made up.
- Long text: it reads and writes at most {context} tokens.
- Anything but English prose: it was shown no other language, no code and no arithmetic to speak of.
- Safety: neither the text nor the model was filtered or aligned. The novels carry the attitudes of their time.
- Proof for large models: a method that wins on keel-nano has not been shown to win on one.
"""


def clean(rows: list[dict]) -> list[dict]:
    """The rows of `curve.jsonl` as one run: a row replaces all that a start cut off earlier wrote from its step on."""
    kept: list[dict] = []
    for row in rows:
        # A held-out row comes beside the training row of its own step.
        while kept and (
            kept[-1]["step"] > row["step"]
            or (kept[-1]["step"] == row["step"] and ("heldout" in kept[-1] or "heldout" not in row))
        ):
            kept.pop()
        kept.append(row)
    return kept


def seconds(train: list[dict]) -> float:
    """Training time of cleaned rows; the clock of each row starts anew when the run is resumed."""
    clock = [row["seconds"] for row in train]
    return sum(now for now, after in zip(clock, [*clock[1:], 0.0], strict=True) if after < now)


def plot(train: list[dict], heldout: list[dict], ngrams: dict, out: Path) -> None:
    """Training loss and held-out bits per byte into the picture `out`. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = {row["step"]: row["tokens"] / 1e6 for row in train}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(tokens.values(), [row["train_nats"] for row in train], color="C0")
    left.set(title="Training loss", xlabel="training tokens (millions)", ylabel="nats per token")
    bits = [row["heldout"]["all"]["bits_per_byte"] for row in heldout]
    right.plot([tokens[row["step"]] for row in heldout], bits, "o-", color="C0", label="keel-nano")
    for name, label, style in (("bpe", "gram", "--"), ("bytes", "gram over bytes", ":")):
        level = ngrams[name]["heldout"]["all"]["bits_per_byte"]
        right.axhline(level, color="C1", linestyle=style, label=f"{ngrams[name]['order']}-{label}")
    right.set(title="Held-out text", xlabel="training tokens (millions)", ylabel="bits per byte", xlim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=150)


def architecture(model: Path) -> tuple[str, str]:
    """(parameters in words, one paragraph) of the saved model."""
    config = json.loads((model / "config.json").read_text())
    with safe_open(model / "model.safetensors", framework="np") as weights:
        sizes = [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118 (not a dict)
    total = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in sizes)
    text = (
        f"`{config['architectures'][0]}`, {total:,} parameters: {config['num_hidden_layers']} blocks, width "
        f"{config['hidden_size']}, feed-forward {config['intermediate_size']} (SwiGLU),\n"
        f"{config['num_attention_heads']} heads of {config['head_dim']} with {config['num_key_value_heads']} key-value "
        f"heads, rotary positions, RMSNorm, tied embeddings. Context\n{config['max_position_embeddings']} tokens. "
        f"Byte-level BPE of {config['vocab_size']:,} entries, in which digits stand alone."
    )
    return f"{total / 1e6:.1f} M-parameter", text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the --out of pretrain.py")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/lm"), help="the `lm` folder of the text pack")
    parser.add_argument("--ngram", type=Path, default=Path("results/keel-nano/ngram.json"))
    parser.add_argument("--results", type=Path, default=Path("results/keel-nano"), help="folder for curves and tables")
    parser.add_argument("--card", type=Path, default=Path("src/fedkeel/keel_nano/README.md"))
    args = parser.parse_args()
    curve = clean([json.loads(line) for line in (args.run / "curve.jsonl").read_text().splitlines()])
    train = [row for row in curve if "heldout" not in row]
    readings = [row for row in curve if "heldout" in row]
    ngrams = json.loads(args.ngram.read_text())
    finished = (args.run / "heldout.json").exists()
    if not finished and not readings:
        raise SystemExit(f"{args.run} has no held-out reading yet")
    table = json.loads((args.run / "heldout.json").read_text()) if finished else readings[-1]["heldout"]
    # The comparison is worth nothing unless both sides counted the same tokens and bytes.
    five, over_bytes = ngrams["bpe"]["heldout"], ngrams["bytes"]["heldout"]
    for kind in (*KINDS, "all"):
        if any(table[kind][unit] != five[kind][unit] for unit in ("tokens", "bytes")):
            raise SystemExit(f"{kind}: keel-nano and the n-gram were not read on the same text")

    for folder in (args.results, args.card.parent):
        folder.mkdir(parents=True, exist_ok=True)
    (args.results / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    (args.results / "heldout.json").write_text(json.dumps(table, indent=1) + "\n")
    plot(train, readings, ngrams, args.results / "loss.png")

    # An epoch as the run itself draws it: the share of chats follows from what splits, not from a constant.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.run)
    epoch = pretrain.epoch_stream(training_documents(args.data), tokenizer, seed=0)
    chats, documents = ((epoch == token).sum().item() for token in (pretrain.USER, pretrain.BOS))
    turns = [{"role": "system", "content": "…"}, {"role": "user", "content": "…"}]
    tokenizer.chat_template = pretrain.CHAT_TEMPLATE
    chat = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    gain = {k: 1 - table[k]["bits_per_byte"] / five[k]["bits_per_byte"] for k in (*KINDS, "all")}
    data = [
        f"| {k} | {' | '.join(SOURCES[k])} | {ngrams['train'][k]['documents']:,} | {ngrams['train'][k]['bytes'] / 1e6:.2f} |"
        for k in KINDS
    ]
    heldout = [
        f"| {k} | {table[k]['bits_per_byte']:.4f} ({table[k]['perplexity']:.1f}) "
        f"| {five[k]['bits_per_byte']:.4f} ({five[k]['perplexity']:.1f}) "
        f"| {over_bytes[k]['bits_per_byte']:.4f} | {-gain[k]:+.1%} |"
        for k in (*KINDS, "all")
    ]
    parameters, paragraph = "small", "Not saved yet."
    if finished:
        parameters, paragraph = architecture(args.run / "model")
    text = CARD.format(
        parameters=parameters,
        architecture=paragraph,
        partial="" if finished else f"\n**This run is not finished: numbers of step {readings[-1]['step']:,}.**\n",
        command=next(line.strip() for line in pretrain.__doc__.splitlines() if "pretrain.py" in line),
        steps=train[-1]["step"],
        tokens=train[-1]["tokens"],
        epoch_tokens=len(epoch),
        epochs=train[-1]["tokens"] / len(epoch),
        seconds=seconds(train),
        row_steps=train[-1]["step"] - train[-2]["step"],
        train_nats=train[-1]["train_nats"],
        data="\n".join(data),
        heldout="\n".join(heldout),
        heldout_bytes=table["all"]["bytes"],
        heldout_tokens=table["all"]["tokens"],
        order=ngrams["bpe"]["order"],
        byte_order=ngrams["bytes"]["order"],
        wins=sum(gain[k] > 0 for k in KINDS),
        kinds=len(KINDS),
        verdict=f"{abs(gain['all']):.1%} {'fewer' if gain['all'] > 0 else 'more'}",
        chat=chat,
        chat_share=chats / documents,
        chat_draw=pretrain.CHAT_SHARE,
        megabytes=sum(row["bytes"] for row in ngrams["train"].values()) / 1e6,
        context=pretrain.CONTEXT,
    )
    args.card.write_text(text)
    print(f"{args.card}: {len(text.splitlines())} lines")


if __name__ == "__main__":
    main()
