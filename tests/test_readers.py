"""Rows as people have them: CSV, TSV, Parquet, several files by pattern, one file or folder a site."""

from __future__ import annotations

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_run import go
from tiny import tiny_rows

from fedkeel.data.forms import DataError
from fedkeel.data.readers import read_csv
from fedkeel.data.sources import load_records
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Data
from fedkeel.runs.prepare import prepare
from fedkeel.types import Record

ROWS = [
    {"instruction": "Say it.", "input": 'with "quotes", commas\nand lines', "output": "日本語", "split": "train", "ward": "a"},
    {"instruction": "Add.", "input": "1,5", "output": "2", "split": "test", "ward": "b"},
    {"text": "good", "label": "yes", "split": "train", "ward": "a"},
]


def load(folder: Path, *files: str, **options: Any) -> list[Record]:
    return load_records(Data(source="files", root=str(folder), files=files, **options), 1)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    """The rows as the file's endings say, with nulls or empty cells where a row lacks a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="needs the extra fedkeel[parquet]")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: [row.get(name) for row in rows] for name in names}), path)
        return
    if kind == "tsv":
        lines = ["\t".join(names), *("\t".join(row.get(name, "") for name in names) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
        return
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else path.open("w", newline="") as out:
        if kind == "csv":
            writer = csv.DictWriter(out, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
        else:
            out.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("name", ["r.csv", "r.tsv", "r.csv.gz", "r.parquet", "r.ndjson", "r.jsonl.gz", "R.CSV"])
def test_every_kind_of_file_is_the_same_rows(name: str, tmp_path: Path) -> None:
    rows = [{k: v.replace("\n", " ") for k, v in row.items()} for row in ROWS] if name == "r.tsv" else ROWS
    write(tmp_path / "rows.jsonl", rows)
    write(tmp_path / name, rows)
    assert load(tmp_path, name, site_column="ward") == load(tmp_path, "rows.jsonl", site_column="ward")


@given(st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5))
def test_text_survives_a_csv_file(pairs: list[tuple[str, str]]) -> None:
    """Any text that a CSV writer takes comes back as it was; a carriage return or a NUL too."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.csv"
        with path.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerows([("a", "b"), *pairs])
        assert [(row["a"], row["b"]) for _, row in read_csv(path)] == pairs


def test_quotes_are_text_in_a_tsv_file(tmp_path: Path) -> None:
    (tmp_path / "r.tsv").write_text('text\tlabel\n"Go, he said\tyes\nand it went"\tno\n"whole"\tyes\n')
    assert {(r.input, r.output) for r in load(tmp_path, "r.tsv", validation_share=0, test_share=0)} == {
        ('"Go, he said', "yes"),
        ('and it went"', "no"),
        ('"whole"', "yes"),
    }


def test_a_pattern_may_be_absolute_and_a_site_may_have_dots(tmp_path: Path) -> None:
    for name in ("dr.smith", "dr.jones"):
        write(tmp_path / f"{name}.csv", [{"text": name, "label": "x", "split": "train"}])
    found = load(Path("/"), str(tmp_path / "*.csv"), site_from="file")
    assert {(r.site, r.input) for r in found} == {("dr.smith", "dr.smith"), ("dr.jones", "dr.jones")}


def test_files_of_one_name_in_several_folders_are_no_one_site_by_mistake(tmp_path: Path) -> None:
    for name in ("east", "west"):
        write(tmp_path / name / "rows.csv", [{"text": name, "label": "x", "split": "train"}])
    with pytest.raises(DataError, match=r"2 files in 2 folders are all called rows\.csv, .* set data\.site_from = 'folder'"):
        load(tmp_path, "*/rows.csv", site_from="file")
    assert {r.site for r in load(tmp_path, "*/rows.csv", site_from="folder")} == {"east", "west"}


BAD = {
    "a cell too many": ("text,label\n1,2\n1,2,3\n", r"r\.csv:3: 3 cells, and the first line names 2 columns"),
    "a cell too few": ("text,label\n1\n", r"r\.csv:2: 1 cells"),
    "a name twice": ("a,a\n1,2\n", r"r\.csv:1: the first line names the columns, and 'a' stands there twice"),
    "an empty first line": ("\n1,2\n", r"r\.csv:1: the first line names the columns"),
    "an open quote": ('text,label\n"x,y\n', r"r\.csv:2: no CSV: unexpected end of data"),
    "no known form": ("a,b\n1,2\n", r"r\.csv:2: keys \['a', 'b'\] are of no known form"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_csv_file_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    text, words = BAD[name]
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        load(tmp_path, "r.csv")


def test_a_file_and_its_compressed_self_are_not_read_both(tmp_path: Path) -> None:
    text = "text,label\na,x\nb,y\n"
    (tmp_path / "north.csv").write_text(text)
    (tmp_path / "north.csv.gz").write_bytes(gzip.compress(text.encode()))
    config = Data(source="files", root=str(tmp_path), files=("north*",))
    with pytest.raises(DataError, match=r"north\.csv and north\.csv\.gz would be read both, and its rows twice"):
        load_records(config, 1)
    assert len(load_records(replace(config, files=("north.csv.gz",), test_share=0.0, validation_share=0.0), 1)) == 2


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.xlsx").write_bytes(b"PK")
    (tmp_path / "r.parquet").write_bytes(b"PAR1 no")
    for name, words in (
        ("r.xlsx", r"r\.xlsx: a file of rows ends in one of \.jsonl, \.json, \.ndjson, \.csv, \.tsv, \.parquet"),
        ("*.csv", r"data\.files: no file of .* fits '\*\.csv'"),
        ("gone.csv", r"data file not found: .*gone\.csv"),
    ):
        with pytest.raises(DataError, match=words):
            load(tmp_path, name)
    pytest.importorskip("pyarrow", reason="needs the extra fedkeel[parquet]")
    with pytest.raises(DataError, match=r"r\.parquet cannot be read"):
        load(tmp_path, "r.parquet")


@pytest.mark.parametrize(("site_from", "names"), [("file", "{}.csv"), ("folder", "{}/rows.jsonl"), ("file", "{}.jsonl.gz")])
def test_one_file_or_folder_a_site(site_from: str, names: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    """The federation is that of a column of sites, to the bit, whatever order the files come in."""
    by_site: dict[str, list[dict[str, str]]] = {}
    for row in tiny_rows():
        by_site.setdefault(row["department"], []).append({k: v for k, v in row.items() if k != "department"})
    for site, rows in by_site.items():
        write(tmp_path / names.format(site), rows)
    (tmp_path / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    pattern = names.format("*")
    own = ["data.source=files", f"data.root={tmp_path}", f'data.files=["{pattern}"]', "data.site_column="]
    found = prepare(load_recipe(None, [*tiny_overrides, *own, f"data.site_from={site_from}"]))
    wanted = prepare(load_recipe(None, tiny_overrides))
    assert dict(found.sites.rows) == dict(wanted.sites.rows)


def test_a_csv_federation_runs(tiny_overrides: list[str], tmp_path: Path) -> None:
    write(tmp_path / "rows.csv", tiny_rows())
    (tmp_path / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    own = [
        "data.source=files",
        f"data.root={tmp_path}",
        'data.files=["*.csv"]',
        "evaluation.baselines=[]",
        "federation.rounds=1",
    ]
    recipe, folder, _ = go([*tiny_overrides, *own])
    assert folder.state().finished
    assert replace(recipe.data, files=()).source == "files"
