"""The pretraining text of keel-nano: documents, held-out documents, and the chat-shaped share of them.

A document is (kind, text). `novels`, `textbook_sociology` and `wikitext2` are running text, one paragraph a line:
consecutive lines are joined up to about `CHUNK` characters, so that the model sees context across paragraphs. The other
kinds have one story, post or instruction a line. Training and held-out text are cut in the same way.
"""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

KINDS = ("howto", "narratives", "novels", "stories", "textbook_sociology", "wikitext2")
RUNNING = ("novels", "textbook_sociology", "wikitext2")
CHUNK = 1800


def _documents(kind: str, lines: list[str]) -> list[tuple[str, str]]:
    if kind not in RUNNING:
        return [(kind, line) for line in lines]
    documents: list[tuple[str, str]] = []
    chunk: list[str] = []
    for line in lines:
        if chunk and sum(map(len, chunk)) + len(line) > CHUNK:
            documents.append((kind, "\n".join(chunk)))
            chunk = []
        chunk.append(line)
    if chunk:
        documents.append((kind, "\n".join(chunk)))
    return documents


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    return [line.strip() for line in data.decode().splitlines() if line.strip()]


def training_documents(root: Path) -> list[tuple[str, str]]:
    """Every training document under `root` (the `lm` folder), in a fixed order."""
    documents = []
    for kind in KINDS:
        paths = sorted((root / kind).glob("*.txt.gz")) if kind == "novels" else [root / f"{kind}.txt.gz"]
        for path in paths:
            documents += _documents(kind, _lines(path))
    return documents


def heldout_documents(root: Path) -> list[tuple[str, str]]:
    """Every held-out document under `root/heldout`, in a fixed order."""
    return [d for kind in KINDS for d in _documents(kind, _lines(root / "heldout" / f"{kind}.txt"))]


def as_chat(kind: str, text: str, rng: random.Random) -> tuple[str, str] | None:
    """`text` as (user turn, assistant turn), or None where it does not split.

    A how-to line becomes goal -> solution. Anything else becomes either beginning -> continuation or a cloze with four
    options taken from the text itself. This gives the chat tokens of the tokenizer a meaning before any fine-tuning.
    """
    if kind == "howto":
        goal, colon, solution = text.partition(": ")
        return (goal, solution) if colon and solution else None
    if rng.random() < 0.5:
        stops = [m.end() for m in re.finditer(r"[.!?]\s", text)]
        stops = [s for s in stops if 0.2 * len(text) < s < 0.8 * len(text)]
        if not stops:
            return None
        cut = rng.choice(stops)
        return "Continue: " + text[:cut].strip(), text[cut:].strip()
    sentences = [s for s in re.split(r"(?<=[.!?])\s", text) if 40 < len(s) < 400]
    words = sorted({w for s in sentences for w in re.findall(r"\b[a-z]{4,12}\b", s)})
    if not sentences or len(words) < 8:
        return None
    sentence = rng.choice(sentences)
    inside = re.findall(r"\b[a-z]{4,12}\b", sentence)
    if not inside:
        return None
    answer = rng.choice(inside)
    options = rng.sample([w for w in words if w not in inside] or [w for w in words if w != answer], 1)
    options += [*rng.sample([w for w in words if w != answer and w not in options], 2), answer]
    rng.shuffle(options)
    blank = re.sub(rf"\b{answer}\b", "____", sentence, count=1)
    return f"Fill the gap: {blank}\nOptions: {', '.join(options)}", answer
