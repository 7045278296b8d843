"""Where rows come from: the embedded `pydocs`, JSON Lines files in four common forms, or a Hugging Face data set.

Every source ends in the same `Record`s, sorted by an id made from the content, so that the order of lines in a file, or of
files in a folder, changes nothing.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedkeel.recipe.schema import Data
from fedkeel.rng import derive
from fedkeel.types import FedKeelError, Record

SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


class DataError(FedKeelError):
    """A row or file that cannot be used; the text names the file and line."""


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a .jsonl or .jsonl.gz file; place is `file:line`."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                place = f"{path}:{number}"
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{place}: not JSON ({error.msg}); one JSON object a line belongs here") from error
                if not isinstance(value, dict):
                    raise DataError(f"{place}: {type(value).__name__} where a JSON object belongs")
                yield place, value
    except FileNotFoundError as error:
        raise DataError(f"data file not found: {path}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _text(value: Any, place: str, key: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{place}: {key!r} holds {type(value).__name__} where text belongs")
    return value.strip()


def _messages(row: Mapping[str, Any], place: str) -> tuple[tuple[str, str], ...]:
    """Chat turns from `messages` (role, content) or ShareGPT's `conversations` (from, value)."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list):
        raise DataError(f"{place}: a list of turns belongs under messages or conversations")
    read = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise DataError(f"{place}: a turn is {type(turn).__name__} where an object with role and content belongs")
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{place}: role {role!r} is unknown; one of {', '.join(ROLES)} belongs here")
        read.append((ROLES[role], _text(turn.get("content", turn.get("value")), place, "content")))
    while read and read[-1][0] != "assistant":
        read.pop()  # nothing to learn from what follows the last answer
    if not read or not read[-1][1]:
        raise DataError(f"{place}: a conversation without an assistant's answer has nothing to train on")
    return tuple(read)


@lru_cache(maxsize=1024)
def _spoken(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Labels as words. Remembered: a task's labels are the same in each of its rows, and there may be hundreds."""
    return tuple(label.replace("_", " ") for label in labels)


def to_record(row: Mapping[str, Any], place: str, meta: Mapping[str, Any], config: Data) -> Record:
    """One row of any known form as a Record.

    Forms, told apart by their keys: chat (`messages` or ShareGPT `conversations`), classification (`text`, `label`),
    and instruction or Alpaca (`instruction`, `input`, `output`). Underscores of a label become spaces: a label is
    scored by its words. meta: the `tasks_file`:
    {"tasks": {name: {"instruction", "labels", "label_domain": {label: group}}}, "references": {id: [...]}}.
    Raises DataError naming `place` if a row has no answer or no known form.
    """
    task = _text(row.get("task"), place, "task") or "default"
    about = meta.get("tasks", {}).get(task, {})
    listed = tuple(map(str, about.get("labels") or ()))
    labels = _spoken(listed)
    instruction = _text(row.get("instruction"), place, "instruction") or config.instruction or about.get("instruction", "")
    messages: tuple[tuple[str, str], ...] = ()
    if "messages" in row or "conversations" in row:
        messages = _messages(row, place)
        text, output, labels = "", messages[-1][1], ()
    elif "label" in row and "text" in row:
        text, output = _text(row["text"], place, "text"), _text(row["label"], place, "label").replace("_", " ")
        instruction = instruction or "Classify the text."
    elif "output" in row and ("instruction" in row or "input" in row):
        text, output = _text(row.get("input"), place, "input"), _text(row["output"], place, "output")
        labels = listed
    else:
        raise DataError(
            f"{place}: keys {sorted(row)} are of no known form; use text+label, instruction+input+output, or messages"
        )
    if not output:
        raise DataError(f"{place}: the row has no output (its answer is empty); every row needs an answer to learn from")
    if not (text or instruction or messages):
        raise DataError(f"{place}: the row has neither instruction nor input")
    if labels and output not in labels:
        raise DataError(f"{place}: label {output!r} is not among the labels that {config.tasks_file} lists for {task!r}")
    split = _text(row.get("split"), place, "split")
    if split and split not in SPLITS:
        raise DataError(f"{place}: split {split!r} is unknown; one of {', '.join(SPLITS)} belongs here")
    site = ""
    if config.site_column:
        if config.site_column not in row:
            raise DataError(f"{place}: no column {config.site_column!r} (data.site_column) to take the site's name from")
        site = str(row[config.site_column])
    content = json.dumps([task, instruction, text, output, messages, split or None, site])
    given = row.get("id")
    identity = hashlib.sha256(content.encode()).hexdigest()[:16] if given in (None, "") else str(given)
    references = tuple(meta.get("references", {}).get(identity, ())) or (output,)
    domains = about.get("label_domain") or {}
    if not isinstance(domains, dict):
        raise DataError(f"{config.tasks_file}: label_domain of {task!r} is not an object of label: group")
    group = str(domains.get(str(row.get("label")), domains.get(output, "")))
    return Record(identity, task, SPLITS.get(split, ""), output, instruction, text, site, references, labels, messages, group)


def _metadata(config: Data) -> Mapping[str, Any]:
    if not config.tasks_file:
        return {}
    path = Path(config.root) / config.tasks_file
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} (data.tasks_file) cannot be read: {error}") from error
    if isinstance(meta, dict) and not {"tasks", "references"} & set(meta):
        meta = {"tasks": meta}
    for key, belongs in (("tasks", dict), ("references", list)):
        values = meta.get(key, {}) if isinstance(meta, dict) else None
        if not isinstance(values, dict) or not all(isinstance(v, belongs) for v in values.values()):
            what = "task, an object with instruction and labels" if key == "tasks" else "row id, a list of accepted answers"
            raise DataError(f"{path} (data.tasks_file): under {key!r} belongs an object that holds, by {what}")
    return meta


def _hub_rows(config: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.source = 'hub' needs the extra: pip install 'fedkeel[hub]'") from error
    try:
        loaded = datasets.load_dataset(config.dataset, config.subset or None)
    except Exception as error:  # the library raises many unrelated types for a wrong id, a missing file or no network
        raise DataError(f"data set {config.dataset!r} cannot be loaded: {type(error).__name__}: {error}") from error
    for split, rows in loaded.items():
        feature = rows.features.get("label")
        for number, row in enumerate(rows):
            if isinstance(feature, datasets.ClassLabel) and isinstance(row["label"], int):
                row["label"] = feature.int2str(row["label"]) if row["label"] >= 0 else None  # -1: withheld
            # a set of one split has not been divided, whatever that split is called
            if split in SPLITS and len(loaded) > 1 and "split" not in row:
                row["split"] = split
            yield f"{config.dataset}[{split}][{number}]", row


def _with_splits(records: Iterable[Record], config: Data, seed: int) -> Iterator[Record]:
    """Rows without a split get one from a hash of their id: nothing but the row itself decides."""
    for record in records:
        if record.split:
            yield record
            continue
        share = derive(seed, "split", record.id) / 2**63
        if share < config.test_share:
            yield replace(record, split="test")
        elif share < config.test_share + config.validation_share:
            yield replace(record, split="validation")
        else:
            yield replace(record, split="train")


def unique_ids(records: list[Record]) -> list[Record]:
    """Sorted by id and content; an id that occurs again (a row that stands twice) gets a running suffix."""
    seen: Counter[str] = Counter()
    unique = []
    for record in sorted(records, key=lambda r: (r.id, r.task, r.split, r.site, r.instruction, r.input, r.output, r.messages)):
        seen[record.id] += 1
        unique.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}~{seen[record.id]}"))
    return unique


def read_rows(config: Data) -> list[Record]:
    """All rows of JSON Lines files or of a Hugging Face data set as they stand there: without a split where they have none.

    A task whose rows are all `text, label` without a list of labels gets the labels of its own rows, sorted.
    Raises DataError on a missing or malformed file, or a row without an answer.
    """
    meta = _metadata(config)
    if config.source == "hub":
        rows: Iterable[tuple[str, dict[str, Any]]] = _hub_rows(config)
    else:
        rows = (pair for name in config.files for pair in read_json_lines(Path(config.root) / name))
    read, classified = [], set()
    for place, row in rows:
        if config.tasks and (_text(row.get("task"), place, "task") or "default") not in config.tasks:
            continue
        answer = row["label"] if row.get("label") is not None else row.get("output")
        if str(answer) in config.drop_labels:
            continue
        record = to_record(row, place, meta, config)
        if "label" in row and "text" in row and not record.labels and not record.messages:
            classified.add(record.task)
        read.append(record)
    own = {t: tuple(sorted({r.output for r in read if r.task == t})) for t in classified}
    read = [replace(r, labels=own[r.task]) if r.task in own else r for r in read]
    dropped = {*config.drop_labels, *(label.replace("_", " ") for label in config.drop_labels)}
    if dropped:
        left = {labels: tuple(v for v in labels if v not in dropped) for labels in {r.labels for r in read}}
        read = [replace(r, labels=left[r.labels]) for r in read]
    return read


def load_records(config: Data, seed: int) -> list[Record]:
    """All rows of the source, each with a split, sorted by id; see `read_rows`.

    Raises DataError as it does, or on a source with no training row.
    """
    if config.source == "pydocs":
        from fedkeel.data import pydocs

        tasks = config.tasks or tuple(pydocs.INSTRUCTIONS)
        found = pydocs.records(Path(config.root) if config.root else None, seed, config.rows_per_site or 240, tasks)
    else:
        # in this order: a row that stands twice is in one split
        found = unique_ids(list(_with_splits(read_rows(config), config, seed)))
    if config.tasks:
        missing = set(config.tasks) - {r.task for r in found}
        if missing:
            raise DataError(f"data.tasks names {sorted(missing)}, but no row is of that task")
        found = [r for r in found if r.task in config.tasks]
    if not any(r.split == "train" for r in found):
        where = config.dataset or config.root or config.source
        raise DataError(f"no training row in {where}: {len(found)} rows read, none with split `train`")
    return sorted(found, key=lambda r: r.id)
