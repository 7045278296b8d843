"""Suites kept in one archive say what their folders said, in equal bytes; what is torn or hostile is one clear error."""

from __future__ import annotations

import io
import json
import lzma
import os
import tarfile
import tomllib
from pathlib import Path

import pytest
from suites import ODD, one_row, whole_suite, write_plan, write_run

from fedkeel import cli
from fedkeel.evidence.archive import ARCHIVE, RunFiles, from_archive, to_archive
from fedkeel.evidence.report import suite_markdown, write_suite_report
from fedkeel.evidence.report.suite import read_suite
from fedkeel.evidence.suites.pack import pack
from fedkeel.types import FedKeelError

FILES = {"a/rows.jsonl": b"{}\n" * 50, "a/recipe.toml": b"seed = 1\n", "a/env.json": b"{}", "b.failed": b"exit status 1\n"}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    folder = whole_suite(tmp_path / "demo")
    (folder / "chance.json").write_text(json.dumps({"s": {"A": {"majority": 0.5, "rows": 100}}}))
    return folder


def test_a_packed_suite_says_what_its_folders_said(suite: Path, tmp_path: Path) -> None:
    kept, left = pack(suite, tmp_path / "kept")
    assert (kept, left) == (12, [])
    beside = {"chance.json", "recipes.toml", "suite.json", "tables.md"}
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {ARCHIVE, *beside}
    assert read_suite(tmp_path / "kept") == read_suite(suite)
    tables = (tmp_path / "kept" / "tables.md").read_text()
    assert tables.endswith(suite_markdown(suite))
    assert "commit 0123456789ab." in tables
    assert "lost" in (write_suite_report(tmp_path / "kept").with_name("table.md")).read_text()
    failed = {run.name: run.reason for run in read_suite(tmp_path / "kept").runs if run.state == "failed"}
    assert failed == {"r6-1": "out of memory", "r6-2": "out of memory"}


def test_the_same_runs_give_the_same_bytes(suite: Path, tmp_path: Path) -> None:
    pack(suite, tmp_path / "one")
    for path in suite.rglob("*"):
        os.utime(path, (1, 1))
    pack(tmp_path / "one", tmp_path / "two")  # packed from the archive, not from folders
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert to_archive(FILES) == to_archive(dict(reversed(FILES.items())))


def test_a_run_made_after_packing_counts_instead_of_the_packed_one(suite: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    pack(suite, kept)
    write_run(kept / "r6-1", [one_row("r6-1", 1, "score", 0.5, split="test")])
    assert RunFiles(kept).state("r6-1") == "finished"
    assert RunFiles(kept).state("r6-2") == "failed"
    (kept / "r0-1.failed").write_text("exit status 1\nno\n")
    assert RunFiles(kept).state("r0-1") == "failed"
    assert pack(kept, kept) == (12, [])
    assert {run.name for run in read_suite(kept).runs if run.state == "failed"} == {"r0-1", "r6-2"}


def test_what_a_method_sets_is_told_and_no_place_of_the_machine(tmp_path: Path) -> None:
    suite = tmp_path / "demo"
    runs = [
        ("p-1", "s", "plain", 1),
        ("p-2", "s", "plain", 2),
        ("o-1", "s", ODD, 1),
        ("n-1", "s", "near", 1),
        ("x", "s", "bad", 1),
    ]
    write_plan(suite, [*runs, ("y", "s", "late", 1)])
    for name, _, method, seed in runs[:4]:
        rate, place = {"plain": 0.1, ODD: 0.1, "near": 0.3}[method], f"/home/me/{name}"
        recipe = f'name = "{name}"\nseed = {seed}\nout = "{place}"\nthreads = {seed}\n[train]\nlr = {rate}\nbound = inf\n'
        write_run(
            suite / name, [one_row(name, seed, "score", 0.5, split="test")], recipe=recipe + '[data]\ntasks = ["a", "b"]\n'
        )
    (suite / "x.failed").write_text("exit status 1\nTraceback\n  File /home/me/x.py\nfedkeel: the disk is full\n\n")
    assert pack(suite, tmp_path / "kept") == (4, ["y"])
    told = tomllib.loads((tmp_path / "kept" / "recipes.toml").read_text())
    most = {"train": {"lr": 0.1, "bound": float("inf")}, "data": {"tasks": ["a", "b"]}}
    assert told == {"s": {"most": most, "methods": {"plain": {}, ODD: {}, "near": {"train": {"lr": 0.3}}}}}
    files = from_archive(tmp_path / "kept" / ARCHIVE)
    assert not any(b"/home" in content for content in files.values())
    assert b'out = "demo"\n' in files["n-1/recipe.toml"]
    assert files["x.failed"] == b"exit status 1\nfedkeel: the disk is full\n"


def test_trials_of_tuning_are_kept_with_what_they_scored(tmp_path: Path) -> None:
    suite = tmp_path / "t"
    scores = {("m", "k=1"): 0.25, ("m", "k=2"): 0.5, ("baselines", "k=1"): 0.75}
    runs = [(f"r{n}", "s", f"{method}@{setting}", 0) for n, (method, setting) in enumerate(scores)]
    write_plan(suite, runs)
    for (name, *_), ((method, _), score) in zip(runs, scores.items(), strict=True):
        leg = "centralised" if method == "baselines" else "federated"
        write_run(suite / name, [one_row(name, 0, "score", score, method=leg, split="validation")])
    (suite / "tuned.toml").write_text("[streams.s.tuned]\n")
    pack(suite, tmp_path / "kept")
    lines = (tmp_path / "kept" / "tables.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| ")][2:] == [
        "| m | 25.0 | 50.0 | k=2 |",
        "| baselines | 75.0 | – | k=1 |",
    ]
    assert (tmp_path / "kept" / "tuned.toml").read_text() == "[streams.s.tuned]\n"


def test_pack_and_report_from_the_command_line(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"

    def fedkeel(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["fedkeel", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        return told.err if end.value.code else told.out

    assert fedkeel("pack", str(suite), str(kept)) == f"12 runs: {kept}/\n"
    assert fedkeel("report", str(kept)) == f"report: {kept}/report.html\n"
    assert "holds no finished run" in fedkeel("pack", str(write_empty(tmp_path / "empty")), str(kept))
    assert "nowhere is no suite's folder: suite.json, which `fedkeel bench` writes, is missing" in fedkeel(
        "pack", str(tmp_path / "nowhere"), str(kept)
    )


def write_empty(folder: Path) -> Path:
    write_plan(folder, [("a", "s", "m", 1)])
    return folder


# ---------------------------------------------------------------------------------------------------- torn and hostile ones


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def refused(path: Path, content: bytes, told: str) -> None:
    path.write_bytes(content)
    with pytest.raises(FedKeelError, match=told) as error:
        from_archive(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


NAMES = ("../rows.jsonl", "/rows.jsonl", "a/../b/rows.jsonl", "a/b/rows.jsonl", "a\\b/rows.jsonl", ".a/env.json", "../a.failed")


@pytest.mark.parametrize("name", [*NAMES, "rows.jsonl", "a/adapter.bin", "a/\nrows.jsonl"])
def test_a_path_that_is_no_file_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    refused(tmp_path / ARCHIVE, lzma.compress(tar_of((entry(name), b"x"))), "no file of a run")
    with pytest.raises(ValueError, match="no file of a run"):
        to_archive({name: b"x"})


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_folders_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    refused(tmp_path / ARCHIVE, lzma.compress(tar_of((entry("a/rows.jsonl", kind, "/etc/passwd"), b""))), "no file of a run")


def test_a_file_twice_is_refused(tmp_path: Path) -> None:
    raw = tar_of((entry("a/rows.jsonl"), b"1"), (entry("a/rows.jsonl"), b"2"))
    refused(tmp_path / ARCHIVE, lzma.compress(raw), "twice")


def test_an_archive_that_unpacks_to_too_much_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / ARCHIVE
    path.write_bytes(to_archive({"a/rows.jsonl": b"\0" * 1_000_000}))
    assert path.stat().st_size < 2_000
    with pytest.raises(FedKeelError, match="holds more than 100,000 bytes"):
        from_archive(path, unpacked=100_000)


def test_a_torn_or_damaged_archive_is_one_clear_error(tmp_path: Path) -> None:
    path, whole = tmp_path / ARCHIVE, to_archive(FILES)
    for cut in range(0, len(whole), 7):
        refused(path, whole[:cut], "torn|cannot be read as an archive")
    for at in range(0, len(whole), 7):
        refused(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], "cannot be read as an archive")
    refused(path, whole + b"more", "more follows its end")
    refused(path, b"PK\3\4" + bytes(99), "cannot be read as an archive")
    raw = bytearray(lzma.decompress(whole))
    raw[1024 + 3] ^= 1  # in the header of the second file, which tarfile would take for the end
    refused(path, lzma.compress(bytes(raw)), "is damaged after 1 files")


def test_a_packed_run_that_is_not_whole_names_the_archive(tmp_path: Path) -> None:
    write_plan(tmp_path, [("a", "s", "m", 1)])
    (tmp_path / ARCHIVE).write_bytes(to_archive({"a/rows.jsonl": b"{}\n", "a/recipe.toml": b""}))
    with pytest.raises(FedKeelError, match=r"runs\.tar\.xz: a/rows\.jsonl:1: not a row of a run"):
        read_suite(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(to_archive({"a/rows.jsonl": b"", "a/recipe.toml": b""}))
    with pytest.raises(FedKeelError, match=r"runs\.tar\.xz: a/env\.json is missing"):
        read_suite(tmp_path)
    (tmp_path / ARCHIVE).write_bytes(to_archive({"a/rows.jsonl": b"\xff", "a/recipe.toml": b"", "a/env.json": b""}))
    with pytest.raises(FedKeelError, match=r"runs\.tar\.xz: a/rows\.jsonl cannot be read"):
        read_suite(tmp_path)
