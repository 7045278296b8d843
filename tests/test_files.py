"""Files that are whole or not there: a disk that fills up, for real and by a patched fsync."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedkeel.files import DiskError, append_lines, replaced_folder, whole_folder, write_atomic


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", no_space)


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomic(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    write_atomic(path, b"\0\1")
    assert path.read_bytes() == b"\0\1"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "state.bin"
    path.write_bytes(b"old")
    with pytest.raises(DiskError, match=r"state\.bin could not be written: No space left on device"):
        write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"old"
    with pytest.raises(DiskError):
        write_atomic(tmp_path / "fresh.bin", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["state.bin"]


def test_a_path_through_a_file_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"inner\.txt could not be written"):
        write_atomic(tmp_path / "file" / "inner.txt", b"")
    with pytest.raises(DiskError, match="could not be written"):
        write_atomic(tmp_path / "file" / "deep" / "inner.txt", b"")
    with pytest.raises(DiskError, match="No such file"):
        append_lines(tmp_path / "nowhere" / "rows.jsonl", ["x"])


def test_append_lines_returns_the_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert append_lines(path, ["ä", "b"]) == 5
    assert append_lines(path, iter(["c"])) == 7
    assert append_lines(path, []) == 7
    assert path.read_bytes() == "ä\nb\nc\n".encode()


def test_append_lines_is_all_or_nothing(tmp_path: Path, full_disk: None) -> None:
    """The lines have reached the file when fsync fails; they are taken back."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one\n")
    with pytest.raises(DiskError, match=r"rows\.jsonl could not be written: No space left on device"):
        append_lines(path, ["two", "three"])
    assert path.read_bytes() == b"one\n"


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_write_that_the_system_cuts_short_leaves_the_old_content(tmp_path: Path) -> None:
    """For real: the process may write files of 1000 bytes, so the system takes a part of the data and refuses the rest."""
    (tmp_path / "state.bin").write_bytes(b"old")
    (tmp_path / "rows.jsonl").write_bytes(b"x" * 899 + b"\n")
    code = """
        import resource, signal, sys
        from pathlib import Path
        from fedkeel.files import DiskError, append_lines, whole_folder, write_atomic

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        folder = Path(sys.argv[1])
        for write in (
            lambda: write_atomic(folder / "state.bin", b"n" * 5000),
            lambda: append_lines(folder / "rows.jsonl", ["y" * 98] * 5),
            lambda: append_lines(folder / "rows.jsonl", ["y" * 70_000]),
        ):
            try:
                write()
            except DiskError as error:
                print(error)
        print(append_lines(folder / "rows.jsonl", ["z" * 99]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.count("could not be written: File too large. What was there before is untouched") == 3
    assert done.stdout.endswith("1000\n")
    assert (tmp_path / "state.bin").read_bytes() == b"old"
    assert (tmp_path / "rows.jsonl").read_bytes() == b"x" * 899 + b"\n" + b"z" * 99 + b"\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl", "state.bin"]


def test_weights_are_as_readable_as_the_config_beside_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from torch import zeros

    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "made") as partial:
            save_file({"x": zeros(2)}, partial / "model.safetensors")
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(before)
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "made").iterdir()} == {
        "model.safetensors": 0o640,
        "config.json": 0o640,
    }


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    target, killed = tmp_path / "runs" / "adapter", tmp_path / "runs" / "adapter.partial"
    killed.mkdir(parents=True)
    (killed / "half").write_text("of one that was killed")
    for content in ("first", "second"):
        with replaced_folder(target) as partial:
            (partial / content).write_text(content)
            assert not (target / content).exists()
        assert [path.name for path in target.iterdir()] == [content]

    def broken() -> None:
        with replaced_folder(target) as partial:
            (partial / "third").write_text("third")
            raise ValueError("not today")

    with pytest.raises(ValueError, match="not today"):
        broken()
    assert [path.name for path in target.iterdir()] == ["second"]
    assert [path.name for path in target.parent.iterdir()] == ["adapter"]
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"adapter could not be written"), replaced_folder(tmp_path / "file" / "adapter"):
        pass


def test_a_folder_that_cannot_be_replaced_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    for name in ("a", "b"):
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text("first")
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(DiskError, match="What was there before is untouched"), replaced_folder(target) as partial:
        (partial / "c").write_text("second")
    assert sorted(path.name for path in target.iterdir()) == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_had_stepped_aside_when_all_was_killed_comes_back(tmp_path: Path) -> None:
    """Killed between the two renames: the next call finds the old one, and keeps it where the new one fails again."""
    target, old = tmp_path / "adapter", tmp_path / "adapter.old"
    old.mkdir()
    (old / "a").write_text("first")
    with pytest.raises(ValueError, match="not today"), replaced_folder(target):
        raise ValueError("not today")
    assert [path.name for path in target.iterdir()] == ["a"]
    with replaced_folder(target) as partial:
        (partial / "b").write_text("second")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
