"""The docstring source: hand-worked rows of a tiny library, and a smoke on the library of the running Python."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from fedkeel.data import pydocs
from fedkeel.types import FedKeelError, Record

SHELVES = '''"""Tools for keeping apples on wooden shelves."""

def stack(apples):
    """Put every apple on the wooden shelf. Larger ones go below.

    The shelf holds nine rows at most, and each new row begins at the left
    side, so that the oldest apples stay within reach of a visitor.

    >>> stack([])
    secret result
    """

class Crate:
    """Hold several apples inside a wooden crate."""

    def tally(self):
        """Return how many apples lie inside the crate."""
        def hidden():
            """A helper that nobody outside can ever reach."""

    def spill(self):
        """spill(self) -> list

        Empty the crate onto the wooden floor.
        """

    def short(self):
        """Too few words."""
'''
EMAIL = '''raise RuntimeError("imported")
def send_letter(text):
    """Carry one letter to email.postman.Office through the rain."""

async def lose_letter(text):
    """Forget about a letter before anybody reads one."""

def copy_letter(text):
    """put EVERY apple on the wooden shelf! Seen before."""

if True:
    def open_letter(text):
        """Show what somebody wrote inside an envelope."""
'''


def library(folder: Path) -> Path:
    """Two areas (`files`, `network`), and everything that has to be passed over."""
    files = {
        "shutil.py": SHELVES,
        "email/__init__.py": "from pathlib import Path\nPath(__file__).with_name('trace.txt').write_text('imported')\n",
        "email/postman.py": EMAIL,
        "email/test/test_postman.py": 'def check():\n    """Docstrings of tests stay outside of all rows."""\n',
        "email/broken.py": 'def broken(:\n    """Never seen because this file cannot be read."""\n',
        "unheard_of.py": '"""A module of no known area is passed over."""\n',
        "site-packages/email.py": '"""Packages that somebody installed are no library."""\n',
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def wide_library(folder: Path, names: list[str]) -> Path:
    """One module a name, each with 60 functions, whose words are too alike for the task `gap`."""
    folder.mkdir()
    for name in names:
        functions = (
            f'def {name}_{i}():\n    """Deliver parcel number {i} from the {name} depot before evening.\n\n'
            f'    Parcel {i} of {name} waits in the yard until a driver has time to load it and sign.\n    """\n'
            for i in range(60)
        )
        (folder / f"{name}.py").write_text("".join(functions))
    return folder


def by_task(rows: list[Record], task: str) -> list[Record]:
    return [row for row in rows if row.task == task]


def restored(row: Record) -> str:
    return row.input.partition("\nOptions: ")[0].replace("____", row.output)


def test_docstrings_found_and_passed_over(tmp_path: Path) -> None:
    found = list(pydocs.docstrings(library(tmp_path)))
    assert [(d.area, d.name, d.kind) for d in found] == [
        ("network", "email.postman.send_letter", "function"),
        ("network", "email.postman.lose_letter", "function"),
        ("network", "email.postman.copy_letter", "function"),
        ("network", "email.postman.open_letter", "function"),
        ("files", "shutil", "module"),
        ("files", "shutil.Crate", "class"),
        ("files", "shutil.Crate.tally", "function"),
        ("files", "shutil.Crate.spill", "function"),
    ]
    assert found[-1].summary == "Empty the crate onto the wooden floor."
    assert not (tmp_path / "email" / "trace.txt").exists()


def test_summary_and_rest_of_one_docstring(tmp_path: Path) -> None:
    (tmp_path / "shutil.py").write_text(SHELVES)
    (row,) = by_task(pydocs.records(tmp_path), "summary")
    assert (row.site, row.labels, row.instruction) == ("files", (), "Summarise this documentation in one sentence.")
    assert row.output == "Put every apple on the wooden shelf."
    assert row.input == (
        "The shelf holds nine rows at most, and each new row begins at the left side, so that the oldest apples stay "
        "within reach of a visitor."
    )


def test_area_rows_hold_one_label_a_site_and_no_dotted_name(tmp_path: Path) -> None:
    rows = by_task(pydocs.records(library(tmp_path)), "area")
    assert len(rows) == 8
    assert all(row.output == row.site and row.labels == ("files", "network") for row in rows)
    (row,) = [row for row in rows if row.input.startswith("Carry")]
    assert (row.input, row.output) == ("Carry one letter to through the rain.", "network")


def test_name_rows_offer_four_names_of_the_area_that_the_text_does_not_hold(tmp_path: Path) -> None:
    rows = {row.output: row for row in by_task(pydocs.records(library(tmp_path)), "name")}
    # `files` has three names only (`stack` lost its docstring to the same sentence in `email`), so no options.
    assert set(rows) == {"send_letter", "lose_letter", "copy_letter", "open_letter"}
    for row in rows.values():
        assert sorted(row.labels) == ["copy_letter", "lose_letter", "open_letter", "send_letter"]
    row = rows["open_letter"]
    assert row.input == "Show what somebody wrote inside an envelope.\nOptions: " + ", ".join(row.labels)


def test_gap_rows_restore_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "shutil.py").write_text(SHELVES)
    rows = by_task(pydocs.records(tmp_path), "gap")
    # Words of at least two sentences: wooden (4), apples (3), crate (3), inside (2). Three of them have to stand
    # outside a sentence to serve as its options, and only this sentence holds just one.
    (row,) = rows
    assert restored(row) == "Put every apple on the wooden shelf."
    assert row.output == "wooden"
    assert sorted(row.labels) == ["apples", "crate", "inside", "wooden"]
    assert row.input == f"Put every apple on the ____ shelf.\nOptions: {', '.join(row.labels)}"


def test_gap_words_are_plain_words() -> None:
    sentence = "Call run_twice() on self.path or well-known paths (see `open`) and Python's <host> names, e.g. here."
    assert pydocs._gap_words(sentence) == ["paths", "names", "here"]


def test_docstring_stays_in_one_split(tmp_path: Path) -> None:
    wide = wide_library(tmp_path / "wide", ["json", "ssl", "shutil", "logging"])
    splits: dict[str, set[str]] = defaultdict(set)
    rows = pydocs.records(wide, rows_per_site=10_000)
    for row in rows:
        found = re.search(r"number (\d+) from the (\w+)|Parcel (\d+) of (\w+)", restored(row))
        assert found is not None
        splits["/".join(part for part in found.groups() if part)].add(row.split)
    assert len(splits) == 240
    assert all(len(split) == 1 for split in splits.values())
    shares = Counter(split for (split,) in splits.values())
    assert shares["train"] == pytest.approx(0.80 * 240, abs=20)
    assert shares["validation"] == pytest.approx(0.08 * 240, abs=15)
    assert shares["test"] == pytest.approx(0.12 * 240, abs=17)


def test_rows_do_not_depend_on_the_order_of_files(tmp_path: Path) -> None:
    names = ["json", "ssl", "shutil", "logging"]
    one, two = wide_library(tmp_path / "one", names), wide_library(tmp_path / "two", names[::-1])
    rows = pydocs.records(one, seed=3)
    assert rows == pydocs.records(one, seed=3) == pydocs.records(two, seed=3)
    assert [row.id for row in rows] == sorted({row.id for row in rows})


def test_seed_changes_options_only(tmp_path: Path) -> None:
    wide = wide_library(tmp_path / "wide", ["json", "ssl"])
    one, two = pydocs.records(wide, seed=0), pydocs.records(wide, seed=1)
    assert [(r.id, r.split, r.site, r.task) for r in one] == [(r.id, r.split, r.site, r.task) for r in two]
    assert by_task(one, "area") == by_task(two, "area")
    assert by_task(one, "summary") == by_task(two, "summary")
    assert by_task(one, "name") != by_task(two, "name")


def test_caps_hold_and_are_balanced_over_tasks(tmp_path: Path) -> None:
    wide = wide_library(tmp_path / "wide", ["json", "ssl"])
    rows = pydocs.records(wide, rows_per_site=24)
    assert Counter((row.site, row.split) for row in rows if row.split != "validation") == {
        ("network", "train"): 24,
        ("network", "test"): 6,
        ("text", "train"): 24,
        ("text", "test"): 6,
    }
    tasks = Counter(row.task for row in rows if row.split == "train" and row.site == "text")
    assert tasks == {"area": 8, "name": 8, "summary": 8}
    assert {row.id for row in rows} < {row.id for row in pydocs.records(wide, rows_per_site=48)}
    with pytest.raises(FedKeelError, match="rows_per_site is 0"):
        pydocs.records(wide, rows_per_site=0)


def test_library_without_docstrings_is_named(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("value = 1\n")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FedKeelError, match=r"data\.root") as caught:
            pydocs.records(folder)
        assert str(folder) in str(caught.value)


PARSED: dict[Path, list[pydocs.Docstring]] = {}


@pytest.fixture
def parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a library are read for the first test that asks for it: parsing Python's own takes seconds."""
    real = pydocs.docstrings

    def docstrings(library: Path) -> list[pydocs.Docstring]:
        if library not in PARSED:
            PARSED[library] = list(real(library))
        return PARSED[library]

    monkeypatch.setattr(pydocs, "docstrings", docstrings)


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_once")
def test_own_standard_library() -> None:
    rows = pydocs.records()
    areas = {row.site for row in rows}
    assert len(areas) >= 6
    assert areas <= set(pydocs.AREAS)
    for area in areas:
        for split, at_least in (("train", 120), ("test", 20)):
            site = [row for row in rows if row.site == area and row.split == split]
            assert at_least <= len(site) <= {"train": 240, "test": 60}[split]
            assert len({row.task for row in site}) >= 3
    assert len({row.id for row in rows}) == len(rows)
    for row in rows:
        assert row.output
        assert row.output in row.labels or not row.labels
        assert len(row.input.split()) <= 80
        if row.task in ("name", "gap"):
            assert len(set(row.labels)) == 4
            assert row.output not in re.findall(r"\w+", row.input.partition("\nOptions: ")[0])
    inputs = defaultdict(set)
    for row in by_task(rows, "area"):
        inputs[row.input].add(row.split)
    assert all(len(splits) == 1 for splits in inputs.values())


def test_kind_is_balanced_within_a_split_and_right(tmp_path: Path) -> None:
    """Twenty classes and sixty functions: as many functions as classes of each split, each with its own kind."""
    source = [f'class C{k}:\n    """A container that holds thing number {k} for later."""\n' for k in range(20)]
    source += [f'def f{k}():\n    """Return the value of thing number {k} at once."""\n' for k in range(60)]
    (tmp_path / "string.py").write_text("\n".join(source))
    rows = by_task(pydocs.records(tmp_path), "kind")
    assert rows
    for split in ("train", "validation", "test"):
        kinds = Counter(row.output for row in rows if row.split == split)
        assert kinds["class"] == kinds["function"]
    assert all(row.output == ("class" if row.input.startswith("A container") else "function") for row in rows)
    assert {row.labels for row in rows} == {("class", "function")}


@pytest.mark.slow
@pytest.mark.usefixtures("parsed_once")
def test_only_the_tasks_asked_for_count_towards_the_cap() -> None:
    rows = pydocs.records(rows_per_site=40, tasks=("kind", "summary"))
    counts = Counter(row.task for row in rows if row.split == "train" and row.site == "gui")
    assert counts == {"kind": 20, "summary": 20}
    with pytest.raises(FedKeelError, match=r"no task 'colour'; its tasks are area, kind, name, gap, summary"):
        pydocs.records(tasks=("colour",))
