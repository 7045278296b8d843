"""Interpolated modified Kneser-Ney n-grams of keel-nano's training text: what a small LM has to beat.

    python pretrain/ngram.py --data ../shared/data/lm --tokenizer build/keel-nano/tokenizer.json \
        --out results/keel-nano/ngram.json --bytes

Same documents and same BPE tokens as `pretrain.py`, each document as `<|bos|> text`. Two differences, both in favour of
the n-gram: it reads across the pieces into which the LM's context cuts a long document, and it spends no probability on
`<|end|>`, which it never sees. `--bytes` adds a second n-gram over UTF-8 bytes. Every order up to the asked one is
reported, so that the best of them can be the one to beat.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", sections 2.7 and 3;
raw counts for n-grams that begin with <|bos|> and the fallback discounts as in KenLM (Heafield et al. 2013).
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from corpus import KINDS, heldout_documents, training_documents

# KenLM's, for where counts of counts give no estimate: in a vocabulary of bytes hardly one is rare.
FALLBACK = (0.0, 0.5, 1.0, 1.5)
BYTE_BOS = 256


class Table(NamedTuple):
    """The G distinct n-grams of one order, all int64; the id of an n-gram is its place in `keys`.

    keys: (G,) ascending, id of the first n - 1 tokens in the table below x vocabulary + last token.
    raw: (G,) occurrences, 0 for the unigram <|bos|>, which is only ever a context.
    left: (G,) distinct tokens seen before it, 0 for what begins a document; empty in the highest table counted.
    """

    keys: NDArray[np.int64]
    raw: NDArray[np.int64]
    left: NDArray[np.int64]


class Level(NamedTuple):
    """One order of a fitted model: p(w | h) = share of hw (0 if unseen) + rest of h x p(w | h without its first token).

    keys, share: (G,) as in `Table`. rest: (C,), by id of the context in the level below; 1 where nothing followed it.
    discounts: what is taken from a count of 0, 1, 2, and 3 or more.
    """

    keys: NDArray[np.int64]
    share: NDArray[np.float64]
    rest: NDArray[np.float64]
    discounts: NDArray[np.float64]


def _flatten(documents: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All tokens in a row, and the place of each in its document, both (T,)."""
    sizes = np.array([len(d) for d in documents])
    tokens = np.fromiter((t for d in documents for t in d), np.int64, sizes.sum())
    return tokens, np.arange(len(tokens)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def count(documents: Sequence[Sequence[int]], order: int, vocabulary: int) -> list[Table]:
    """The tables of orders 1 to `order`. Each document begins with <|bos|>, which occurs nowhere else."""
    tokens, place = _flatten(documents)
    tables: list[Table] = []
    ids = np.zeros(len(tokens), np.int64)  # of the (n-1)-gram that ends at each token; the empty one is 0
    for n in range(1, order + 1):
        here = np.flatnonzero(place >= n - 1)
        keys, first, inverse = np.unique(
            np.roll(ids, 1)[here] * vocabulary + tokens[here], return_index=True, return_inverse=True
        )
        raw = np.bincount(inverse[place[here] > 0], minlength=len(keys))
        if tables:
            # Each distinct n-gram is one distinct left neighbour of the (n-1)-gram in which it ends.
            left = np.bincount(ids[here[first]], minlength=len(tables[-1].keys))
            tables[-1] = tables[-1]._replace(left=left)
        tables.append(Table(keys, raw, np.empty(0, np.int64)))
        ids = np.full(len(tokens), -1)
        ids[here] = inverse
    return tables


def discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """What to take from a count of 0, 1, 2, and 3 or more: (4,). Source: Chen and Goodman 1999, eq. 26."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in range(1, 5))
    if n1 and n2 and n3:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if (found[1:] > 0).all():  # else a seen context would leave nothing for the unseen token
            return found
    return np.array(FALLBACK)


def fit(tables: Sequence[Table], vocabulary: int) -> list[Level]:
    """The model whose highest order is that of the last table; cut `tables` for a lower one."""
    levels: list[Level] = []
    contexts = 1
    for table in tables:
        counts = table.raw if len(levels) == len(tables) - 1 else np.where(table.left > 0, table.left, table.raw)
        taken = discounts(counts)
        loss = taken[np.minimum(counts, 3)]
        context = table.keys // vocabulary
        total = np.bincount(context, counts, minlength=contexts)
        # A context whose every occurrence ends a document has total 0 and leaves all to the level below.
        rest = np.divide(np.bincount(context, loss, minlength=contexts), total, np.ones(contexts), where=total > 0)
        share = np.divide(counts - loss, total[context], np.zeros(len(counts)), where=counts > 0)
        levels.append(Level(table.keys, share, rest, taken))
        contexts = len(table.keys)
    return levels


def probabilities(levels: Sequence[Level], documents: Sequence[Sequence[int]], vocabulary: int) -> NDArray[np.float64]:
    """The probability of each token but the leading <|bos|>, given what precedes it in its document, in order: (T,)."""
    tokens, place = _flatten(documents)
    p = np.full(len(tokens), 1 / vocabulary)
    ids = np.zeros(len(tokens), np.int64)
    for level in levels:
        context = np.roll(ids, 1)
        # Nothing reaches over the start of a document: no table has an n-gram with <|bos|> inside it.
        here = np.flatnonzero(context >= 0)
        context = context[here]
        keys = context * vocabulary + tokens[here]
        at = np.minimum(np.searchsorted(level.keys, keys), len(level.keys) - 1)
        seen = level.keys[at] == keys
        p[here] = np.where(seen, level.share[at], 0.0) + level.rest[context] * p[here]
        ids = np.full(len(tokens), -1)
        ids[here[seen]] = at[seen]
    return p[place > 0]


def heldout_bits(
    levels: Sequence[Level],
    documents: Sequence[tuple[str, str]],
    encode: Callable[[str], list[int]],
    vocabulary: int,
) -> dict[str, dict[str, float]]:
    """Bits per byte and perplexity per token, by kind and of all, counted as `pretrain.heldout_bits` counts them.

    `encode` turns a text into <|bos|> and its tokens; every token of the text is predicted exactly once.
    """
    encoded = [encode(text) for _, text in documents]
    nats = -np.log(probabilities(levels, encoded, vocabulary))
    kinds = np.repeat([kind for kind, _ in documents], [len(ids) - 1 for ids in encoded])
    table: dict[str, dict[str, float]] = {}
    for kind in (*KINDS, "all"):
        mine = nats if kind == "all" else nats[kinds == kind]
        size = sum(len(text.encode()) for k, text in documents if kind in (k, "all"))
        if size:
            bits = float(mine.sum()) / math.log(2) / size
            perplexity = math.exp(mine.mean())
            table[kind] = {"bits_per_byte": bits, "perplexity": perplexity, "tokens": len(mine), "bytes": size}
    return table


def study(
    train: Sequence[tuple[str, str]],
    heldout: Sequence[tuple[str, str]],
    encode: Callable[[str], list[int]],
    vocabulary: int,
    order: int,
) -> dict[str, object]:
    """Models of orders 2 to `order`: the last one's held-out table and discounts, and `all` bits per byte of each."""
    begin = time.time()
    documents = [encode(text) for _, text in train]
    tables = count(documents, order, vocabulary)
    by_order = {}
    for n in range(2, order + 1):
        levels = fit(tables[:n], vocabulary)
        heldout_table = heldout_bits(levels, heldout, encode, vocabulary)
        by_order[n] = heldout_table["all"]["bits_per_byte"]
        print(f"order {n}: {by_order[n]:.4f} bits per byte, {len(tables[n - 1].keys):,} {n}-grams", flush=True)
    return {
        "order": order,
        "vocabulary": vocabulary,
        "train_tokens": sum(map(len, documents)) - len(documents),
        "ngrams": [len(t.keys) for t in tables],
        "discounts": [level.discounts[1:].round(4).tolist() for level in levels],
        "bits_per_byte_by_order": by_order,
        "heldout": heldout_table,
        "seconds": round(time.time() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the `lm` folder of the text pack")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--order", type=int, default=5, help="at least 2")
    parser.add_argument(
        "--bytes", type=int, nargs="?", const=9, metavar="ORDER", help="also over UTF-8 bytes, of order 9 unless told"
    )
    args = parser.parse_args()
    train, heldout = training_documents(args.data), heldout_documents(args.data)
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    bos = tokenizer.token_to_id("<|bos|>")

    result: dict[str, object] = {
        "train": {
            kind: {
                "documents": sum(k == kind for k, _ in train),
                "bytes": sum(len(text.encode()) for k, text in train if k == kind),
            }
            for kind in KINDS
        },
        "bpe": study(train, heldout, lambda text: [bos, *tokenizer.encode(text).ids], tokenizer.get_vocab_size(), args.order),
    }
    if args.bytes:
        result["bytes"] = study(train, heldout, lambda text: [BYTE_BOS, *text.encode()], BYTE_BOS + 1, args.bytes)
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")

    models = {name: result[name] for name in ("bpe", "bytes") if name in result}
    print("held-out bits per byte".ljust(24), *(f"{name} {m['order']}-gram".rjust(14) for name, m in models.items()))
    for kind in (*KINDS, "all"):
        print(kind.ljust(24), *(f"{m['heldout'][kind]['bits_per_byte']:14.4f}" for m in models.values()))
    print(json.dumps({name: m["heldout"]["all"] for name, m in models.items()}))


if __name__ == "__main__":
    main()
