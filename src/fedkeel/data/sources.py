"""Where rows come from: the embedded `pydocs`, JSON Lines files in four common forms, or a Hugging Face data set.

Every source ends in the same `Record`s, sorted by an id made from the content, so that the order of lines in a file, or of
files in a folder, changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedkeel import tables
from fedkeel.data.forms import About, DataError, Parts, alike, name_of, site_of, spoken, text_of
from fedkeel.data.readers import FILE_SITE, file_rows
from fedkeel.data.splits import NAMES, split_of, with_splits
from fedkeel.recipe.schema import Data
from fedkeel.types import Record

COMMON = ("id", "split", "task")  # keys that a row of any form may have


def _present(row: Mapping[str, Any]) -> dict[str, Any]:
    """A null of a table is an absent key."""
    return {key: value for key, value in row.items() if value is not None}


def to_record(row: Mapping[str, Any], place: str, meta: Mapping[str, Any], config: Data, site: str = "") -> Record:
    """One row of any known form (`tables.FORMS`, told apart by their keys) as a Record. site: that holds it; empty: as
    data.site_column says.

    meta: the `tasks_file`:
    {"tasks": {name: {"instruction", "labels", "label_domain": {label: group}}}, "references": {id: [...]}}.
    Raises DataError naming `place` if a row has no answer or no known form.
    """
    nulls, row = sorted(key for key, value in row.items() if value is None), _present(row)
    task = name_of(row, "task", place) or "default"
    about = meta.get("tasks", {}).get(task, {})
    told = text_of(row, "instruction", place)
    told = told if told.strip() else config.instruction or about.get("instruction", "")
    form = form_of(row)
    if form is None:
        keys = sorted(key for key in row if key != FILE_SITE)
        raise DataError(
            f"{place}: keys {keys} are of no known form{f' ({nulls} are null)' if nulls else ''}; use text+label, "
            f"instruction+input+output, or messages{_hint(row)}"
        )
    listed = tuple(map(str, about.get("labels") or ()))
    parts: Parts = form.load()(row, About(place, told, listed))
    if not parts.output.strip():
        raise DataError(f"{place}: the row has no output (its answer is empty); every row needs an answer to learn from")
    if not (parts.input.strip() or parts.instruction.strip() or parts.messages):
        raise DataError(f"{place}: the row has neither instruction nor input")
    if parts.labels and parts.output not in parts.labels:
        raise DataError(f"{place}: label {parts.output!r} is not among the labels that {config.tasks_file} lists for {task!r}")
    named = name_of(row, "split", place)
    split = split_of(named) if named else ""
    if split is None:
        raise DataError(f"{place}: split {named!r} is unknown; one of {', '.join(NAMES)} belongs here")
    if config.site_column and not site:
        if config.site_column not in row:
            raise DataError(
                f"{place}: no value in column {config.site_column!r} (data.site_column) to take the site's name from"
            )
        site = site_of(row[config.site_column], f"{place}: column {config.site_column!r}")
    content = json.dumps([task, parts.instruction, parts.input, parts.output, parts.messages, named or None, site])
    given = row.get("id")
    identity = (
        hashlib.sha256(content.encode()).hexdigest()[:16] if given in (None, "") else text_of({"id": str(given)}, "id", place)
    )
    references = tuple(meta.get("references", {}).get(identity, ())) or (parts.output,)
    return Record(
        identity,
        task,
        split,
        parts.output,
        parts.instruction,
        parts.input,
        site,
        references,
        parts.labels,
        parts.messages,
        _group(row, task, parts.output, about, config),
        parts.unlearnt,
        (*_ignored(tuple(row), (*COMMON, config.site_column, *parts.used)), *parts.unused),
    )


def _hint(row: Mapping[str, Any]) -> str:
    """What would make a row without a known form one of a form that it nearly is of."""
    meant = {key.strip().lower(): key for key in row}
    for form in tables.FORMS.values():
        lacking = [either for either in form.keys if not any(key in row for key in either)]
        spelt = [(meant[key], key) for either in lacking for key in either if key in meant]
        if len(spelt) == len(lacking):
            return f": {' and '.join(f'{mine!r} is not {key!r}' for mine, key in spelt)}"
        if len(lacking) == 1 and len(form.keys) > 1:
            return f": {' or '.join(map(repr, lacking[0]))} is missing or empty"
    return ""


@lru_cache(maxsize=256)
def _ignored(keys: tuple[str, ...], used: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(keys) - set(used)))


def form_of(row: Mapping[str, Any]) -> tables.Form | None:
    """The first form whose keys the row has."""
    return next((form for form in tables.FORMS.values() if form.fits(row)), None)


def _group(row: Mapping[str, Any], task: str, output: str, about: Mapping[str, Any], config: Data) -> str:
    """The group that the tasks file puts the row's label into; empty where it names none."""
    domains = about.get("label_domain") or {}
    if not isinstance(domains, dict):
        raise DataError(f"{config.tasks_file}: label_domain of {task!r} is not an object of label: group")
    return str(domains.get(str(row.get("label")), domains.get(output, "")))


def metadata(config: Data) -> Mapping[str, Any]:
    """What data.tasks_file says; empty without one. Raises DataError naming the file."""
    if not config.tasks_file:
        return {}
    path = Path(config.root) / config.tasks_file
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(meta, ensure_ascii=False).encode()  # half a character is no text that could be written
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} (data.tasks_file) cannot be read: {error}") from error
    if isinstance(meta, dict) and not {"tasks", "references"} & set(meta):
        meta = {"tasks": meta}
    for key, belongs in (("tasks", dict), ("references", list)):
        values = meta.get(key, {}) if isinstance(meta, dict) else None
        if not isinstance(values, dict) or not all(isinstance(v, belongs) for v in values.values()):
            what = "task, an object with instruction and labels" if key == "tasks" else "row id, a list of accepted answers"
            raise DataError(f"{path} (data.tasks_file): under {key!r} belongs an object that holds, by {what}")
    for row, answers in meta.get("references", {}).items():
        if not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{path} (data.tasks_file): of row {row!r}, each accepted answer under 'references' is a text")
    for task, about in meta.get("tasks", {}).items():
        if not isinstance(about.get("instruction", ""), str) or not isinstance(about.get("labels") or [], list):
            raise DataError(
                f"{path} (data.tasks_file): of task {task!r}, text belongs under instruction and a list under labels"
            )
        labels = tuple(map(str, about.get("labels") or ()))
        twice = [label for label, count in Counter(map(alike, labels)).items() if count > 1]
        if twice:
            same = [label for label in labels if alike(label) == twice[0]]
            raise DataError(f"{path} (data.tasks_file): labels {same} of task {task!r} are the same words")
    return meta


def hub_rows(config: Data) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row of a Hugging Face data set. Raises DataError where it cannot be loaded."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("data.source = 'hub' needs the extra: pip install 'fedkeel[hub]'") from error
    try:
        loaded = datasets.load_dataset(config.dataset, config.subset or None)
    except Exception as error:  # the library raises many unrelated types for a wrong id, a missing file or no network
        raise DataError(f"data set {config.dataset!r} cannot be loaded: {type(error).__name__}: {error}") from error
    unknown = [name for name in loaded if split_of(name) is None]
    if unknown and len(loaded) > 1:
        raise DataError(
            f"data set {config.dataset!r} has splits of unknown meaning: {', '.join(unknown)}; names that begin with "
            f"{', '.join(NAMES)} are known. Save the rows that you want as JSON Lines, and set data.source = 'jsonl'"
        )
    for split, rows in loaded.items():
        for number, row in enumerate(with_label_names(rows)):
            if len(loaded) > 1 and row.get("split") is None:  # a set of one split has not been divided, whatever its name
                row["split"] = split
            yield f"{config.dataset}[{split}][{number}]", row


def with_label_names(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data set; where it numbers its labels, by their names."""
    named = getattr(rows.features.get("label"), "int2str", None)
    for row in rows:
        if named is not None and isinstance(row["label"], int):
            row["label"] = named(row["label"]) if row["label"] >= 0 else None  # -1: withheld
        yield row


def unique_ids(records: list[Record]) -> list[Record]:
    """Sorted by id and content; an id that occurs again (a row that stands twice) gets a running suffix."""
    seen: Counter[str] = Counter()
    unique = []
    for record in sorted(records, key=lambda r: (r.id, r.task, r.split, r.site, r.instruction, r.input, r.output, r.messages)):
        seen[record.id] += 1
        unique.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}~{seen[record.id]}"))
    return unique


Written = dict[tuple[str, str], str]  # task and label, see `forms.alike` -> as a row writes it


def read_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    config: Data,
    meta: Mapping[str, Any],
    site: str = "",
    written: Written | None = None,
) -> list[Record]:
    """Rows, each with its place, as Records, as they stand there: without a split where they have none. site: see `to_record`.
    written: the labels of rows that were read before these, and then of these too.

    A task whose rows are all `text, label` without a list of labels gets the labels of its own rows, sorted.
    Raises DataError on a row without an answer.
    """
    read, classified, dropped = [], set(), spoken(config.drop_labels)
    written = {} if written is None else written
    for place, row in rows:
        if config.tasks and (name_of(row, "task", place) or "default") not in config.tasks:
            continue
        answer = row["label"] if row.get("label") is not None else row.get("output")
        if spoken((str(answer).strip(),))[0] in dropped:
            continue
        record = to_record(row, place, meta, config, site)
        form = form_of(_present(row))
        if form is not None and form.labelled and not record.labels:
            classified.add(record.task)
            label = name_of(row, "label", place)
            first = written.setdefault((record.task, alike(record.output)), label)
            if first != label:
                raise DataError(f"{place}: labels {first!r} and {label!r} of task {record.task!r} are the same words")
        read.append(record)
    return _without_dropped(_with_own_labels(read, classified), config)


def _with_own_labels(read: Sequence[Record], tasks: Collection[str]) -> list[Record]:
    own = {t: tuple(sorted({r.output for r in read if r.task == t})) for t in tasks}
    return [replace(r, labels=own[r.task]) if r.task in own else r for r in read]


def _without_dropped(read: list[Record], config: Data) -> list[Record]:
    dropped = spoken(config.drop_labels)
    if not dropped:
        return read
    left = {labels: tuple(v for v in labels if spoken((v,))[0] not in dropped) for labels in {r.labels for r in read}}
    return [replace(r, labels=left[r.labels]) for r in read]


def files(config: Data, seed: int = 0) -> list[Record]:
    """The sources `files` and `jsonl`: all rows of data.files. Raises DataError on a missing or malformed file, and as
    `read_rows`."""
    if config.site_from != "column":
        config = replace(config, site_column=FILE_SITE)
    return read_rows(file_rows(config), config, metadata(config))


def hub(config: Data, seed: int = 0) -> list[Record]:
    """The source `hub`: all rows of a Hugging Face data set. Raises DataError where it cannot be loaded, and as `read_rows`."""
    return read_rows(hub_rows(config), config, metadata(config))


def load_records(config: Data, seed: int, partly: bool = False) -> list[Record]:
    """All rows of the source, each with a split, sorted by id. partly: of one site of many, which need not hold every task.

    Raises DataError as the source does, or on a source with no training row.
    """
    source = tables.SOURCES[config.source]
    return whole(source.load()(config, seed), config, seed, source.splits, partly)


def whole(found: list[Record], config: Data, seed: int, splits: bool = False, partly: bool = False) -> list[Record]:
    """Rows of a source as a run takes them: of the tasks asked for, each with an id and a split of its own, sorted by id.

    splits: they have them already. Raises DataError where a task (unless partly), or any training row, is missing.
    """
    if not splits:  # in this order: a row that stands twice is in one split
        found = unique_ids(list(with_splits(found, config, seed)))
    if config.tasks:
        missing = set(config.tasks) - {r.task for r in found}
        if missing and not partly:
            there = ", ".join(sorted({r.task for r in found})[:10]) or "none"
            raise DataError(
                f"data.tasks names {sorted(missing)}, but no row is of that task; rows' tasks: {there}; name some of these, "
                f"or leave data.tasks empty to take all"
            )
        found = [r for r in found if r.task in config.tasks]
    if not any(r.split == "train" for r in found):
        where = config.dataset or config.root or config.source
        raise DataError(f"no training row in {where}: {len(found)} rows read, none with split `train`")
    return sorted(found, key=lambda r: r.id)


def label_groups(config: Data) -> dict[tuple[str, str], str]:
    """(task, label) -> the group that data.tasks_file puts it into, of a task without groups the label itself, as words; labels
    as they are written there, and as words."""
    groups: dict[tuple[str, str], str] = {}
    for task, about in metadata(config).get("tasks", {}).items():
        domains = about.get("label_domain") or {label: spoken((label,))[0] for label in map(str, about.get("labels") or ())}
        for label, group in domains.items() if isinstance(domains, dict) else ():
            groups |= dict.fromkeys([(task, str(label)), (task, spoken((str(label),))[0])], str(group))
    return groups
