"""Fingerprints of what decides a run beside its recipe: a run goes on only with what it began with."""

from __future__ import annotations

import hashlib
import inspect
from collections import defaultdict
from collections.abc import Callable

from fedkeel import tables
from fedkeel.model.digest import tokenizer_digest
from fedkeel.model.lora import Model
from fedkeel.runs.prepare import Prepared

BASE, WORDS = "the base", "the tokenizer or its chat template"  # what they are of, as a person would say it


def prints_of(prepared: Prepared, base: str, model: Model) -> dict[str, str]:
    """What it is -> its fingerprint: the base, its words, the rows of each site, and code of one's own. base: its digest, taken
    before base shifts change it."""
    held: dict[str, list[str]] = defaultdict(list)
    for stage in (*prepared.stages, *prepared.unseen):
        for site, by_split in stage.rows.items():
            held[site] += [repr(record) for rows in by_split.values() for record in rows]
    rows = {f"the rows of {site}": hashlib.sha256("\n".join(told).encode()).hexdigest() for site, told in held.items()}
    words = tokenizer_digest(model.tokenizer)
    return {BASE: base, WORDS: words, **rows, **own_code()}


def own_code() -> dict[str, str]:
    """Fingerprints of functions that were given from Python as terms and rules, which no version of a package stands for."""
    given = [(f"the {table.kind} {name}", e.code) for table in (tables.TERMS, tables.RULES) for name, e in table.items()]
    return {what: hashlib.sha256(_source(code).encode()).hexdigest() for what, code in given if not isinstance(code, str)}


def _source(code: Callable[..., object]) -> str:
    """Of a function; of one that was typed at a prompt, what it was compiled to."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        compiled = getattr(code, "__code__", None)
        return repr(code) if compiled is None else repr((compiled.co_code, compiled.co_consts, compiled.co_names))
