"""Rows that are handed over from Python: lists of dicts, pandas frames, data sets of Hugging Face's `datasets`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fedkeel.data.forms import DataError, site_of
from fedkeel.data.readers import is_null
from fedkeel.data.sources import Written, metadata, read_rows, with_label_names
from fedkeel.recipe.schema import Data
from fedkeel.types import Record

# what a site's rows may be: anything that gives dicts, or a table with `to_dict("records")`
Rows = Any


def source(config: Data, seed: int = 0) -> list[Record]:
    """The source `rows`, which has none of its own. Raises DataError saying where they come from."""
    raise DataError(
        "data.source = 'rows': the rows of this run are given from Python, as in fedkeel.run(recipe, sites={'a': rows}); here "
        "there are none"
    )


def dicts_of(rows: Rows, site: str) -> Iterator[Mapping[str, Any]]:
    """The rows one by one, in any of the forms that JSON Lines may have. Nulls of a table (None, NaN, NaT) are absent keys.

    Raises DataError, naming the site, for rows that are neither a table nor a sequence of mappings.
    """
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # pandas, without importing it
        rows = rows.to_dict("records")
    elif hasattr(rows, "features"):  # a data set of Hugging Face's, without importing it
        rows = with_label_names(rows)
    if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        raise DataError(f"site {site}: {type(rows).__name__} where a list of dicts, a pandas frame or a data set belongs")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"site {site}, row {number}: {type(row).__name__} where a dict belongs")
        yield {str(key): _plain(value) for key, value in row.items() if not is_null(value)}


def _plain(value: Any) -> Any:
    """Arrays and numbers of NumPy's, which a frame read from Parquet is full of, as lists and numbers of Python's."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def records_of(sites: Mapping[str, Rows], config: Data) -> list[Record]:
    """The rows of all sites as Records, each of the site that it was given for. Raises DataError naming site and row.

    The labels of a task whose rows are all `text, label`, without a list of labels, are those of all sites' rows.
    """
    meta = metadata(config)
    found: list[Record] = []
    written: Written = {}
    for site, rows in sites.items():
        site_of(site, "sites")
        placed = ((f"site {site}, row {number}", row) for number, row in enumerate(dicts_of(rows, site), 1))
        own = read_rows(placed, config, meta, site, written)
        if not own:
            raise DataError(f"site {site} has no row: give it some, or leave it out")
        found += own
    seen: dict[str, set[str]] = {}
    for record in found:
        seen.setdefault(record.task, set()).update(record.labels)
    listed = {task for task, about in meta.get("tasks", {}).items() if about.get("labels")}
    return [record if record.task in listed else _with_labels(record, seen[record.task]) for record in found]


def _with_labels(record: Record, labels: set[str]) -> Record:
    return replace(record, labels=tuple(sorted(labels))) if record.labels else record
