"""Files of rows: JSON Lines, CSV and TSV, plain or gzip, and Parquet. A reader gives (place, row) of each, place file:line."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fedkeel.data.forms import DataError
from fedkeel.recipe.schema import Data

Placed = Iterator[tuple[str, dict[str, Any]]]

FILE_SITE = "(site of the file)"  # the key under which a row has the site that its file names


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The text of a file, plain or gzip. Raises DataError for what the system, the compression or the encoding refuses."""
    try:
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline=None if _kind(path) == ".jsonl" else "") as lines:
            yield lines
    except FileNotFoundError as error:
        raise DataError(f"data file not found: {path}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}{_undecodable(path)}: no UTF-8 text; save the file as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _undecodable(path: Path) -> str:
    """`:LINE` of the first byte that is no UTF-8."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        content = file.read()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        return f":{content[: error.start].count(bytes([10])) + 1}"
    return ""


def _kind(path: Path) -> str:
    """The suffix that tells what a file holds, `.gz` aside."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON; leave the key out where nothing is known")


def _keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError for a key that stands twice in it: which of the two counts nobody knows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return found


def read_json_lines(path: Path) -> Placed:
    """Every line of a file of JSON Lines."""
    with _opened(path) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line, parse_constant=_no_number, object_pairs_hook=_keys_once)
            except json.JSONDecodeError as error:
                raise DataError(f"{place}: not JSON ({error.msg}); one JSON object a line belongs here") from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: cannot be read as JSON: {error}") from error
            if not isinstance(value, dict):
                raise DataError(f"{place}: {type(value).__name__} where a JSON object belongs")
            yield place, value


def read_csv(path: Path) -> Placed:
    """Every row of a CSV (`,`) or TSV (tab) file whose first line names the columns; an empty cell is an absent key."""
    csv.field_size_limit(sys.maxsize)
    with _opened(path) as lines:
        if _kind(path) == ".tsv":  # quotes are text there
            reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        else:
            reader = csv.reader(lines, strict=True)
        try:
            names = next(reader, [])
            twice = sorted(name for name, count in Counter(names).items() if count > 1)
            if twice or not any(names):
                told = f", and {twice[0]!r} stands there twice" if twice else ""
                raise DataError(f"{path}:1: the first line names the columns{told}")
            for cells in reader:
                if not any(cells):
                    continue
                place = f"{path}:{reader.line_num}"
                if len(cells) != len(names):
                    raise DataError(f"{place}: {len(cells)} cells, and the first line names {len(names)} columns")
                yield place, {name: cell for name, cell in zip(names, cells, strict=True) if cell}
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: no CSV: {error}") from error


def read_parquet(path: Path) -> Placed:
    """Every row of a Parquet file; a null or NaN is an absent key. Needs pyarrow."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(f"{path} needs the extra: pip install 'fedkeel[parquet]'") from error
    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", {key: value for key, value in row.items() if not is_null(value)}
    except FileNotFoundError as error:
        raise DataError(f"data file not found: {path}") from error
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def is_null(value: Any) -> bool:
    """Whether a cell of a table says nothing: None, NaN, and pandas' own NA and NaT."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return type(value).__name__ in ("NAType", "NaTType")  # without importing pandas


READERS: Mapping[str, Callable[[Path], Placed]] = {
    ".jsonl": read_json_lines,
    ".json": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def paths_of(config: Data) -> list[Path]:
    """The files of data.files below data.root; a name with `*`, `?` or `[` is a pattern, in the order of names. Raises
    DataError for a pattern that fits none, and a file of no known kind."""
    found: list[Path] = []
    for name in config.files:
        path = Path(config.root) / name
        if any(c in name for c in "*?[") and not path.exists():
            fitting = [p for p in sorted(map(Path, glob.glob(str(path), recursive=True))) if p.is_file()]
            if not fitting:
                raise DataError(f"data.files: no file of {config.root!r} fits {name!r}")
            found += fitting
        else:
            found.append(path)
    for path in found:
        if _kind(path) not in READERS:
            raise DataError(f"{path}: a file of rows ends in one of {', '.join(READERS)}, the text ones also in .gz")
    twice = next((path for path in found if path.with_name(f"{path.name}.gz") in found), None)
    if twice is not None:
        raise DataError(f"data.files: {twice} and {twice.name}.gz would be read both, and its rows twice; name one of them")
    folders = {path.parent for path in found}
    if config.site_from == "file" and len(folders) > 1 and len({site_name(path, config) for path in found}) == 1:
        raise DataError(
            f"data.files: {len(found)} files in {len(folders)} folders are all called {found[0].name}, and with "
            f"data.site_from = 'file' that is one site; for a site a folder set data.site_from = 'folder'"
        )
    return list(dict.fromkeys(found))


def site_name(path: Path, config: Data) -> str:
    """The site that a file is of: as data.site_from says, its own name without endings, or its folder's."""
    if config.site_from == "folder":
        return path.parent.name
    bare = path.name.removesuffix(".gz")
    return bare[: len(bare) - len(_kind(path))]


def file_rows(config: Data) -> Placed:
    """The rows of all files; where data.site_from is `file` or `folder`, each with its site under FILE_SITE."""
    for path in paths_of(config):
        site, count = {} if config.site_from == "column" else {FILE_SITE: site_name(path, config)}, 0
        for place, row in READERS[_kind(path)](path):
            count += 1
            yield place, {**row, **site}
        if not count and config.site_from == "file":
            raise DataError(f"{path} holds no row, and is a site (data.site_from = 'file'): add rows, or leave it out")
