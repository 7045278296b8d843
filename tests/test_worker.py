"""The warm worker with real processes: one a site, found again, started again when it dies, ended when it hangs."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_rows

from fedkeel.engines.sitefile import SiteFile, read_site
from fedkeel.engines.work import handle
from fedkeel.engines.worker import WorkerError, ask, stop
from fedkeel.engines.world import cargo_of, world_of
from fedkeel.recipe.load import load_recipe, make_recipe, read_tree
from fedkeel.recipe.settings import to_toml

SECONDS = 300.0  # a slow machine starts an interpreter with torch in a minute


@pytest.fixture
def site(tiny_base: Path, tmp_path: Path) -> Iterator[SiteFile]:
    rows = [json.dumps(row) + "\n" for row in tiny_rows() if row["department"] == "ward-0"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
    (tmp_path / "site.toml").write_text(f'name = "ward-0"\n[model]\nbase = "{tiny_base}"\n[data]\nroot = "."\n')
    found = read_site(tmp_path / "site.toml")
    yield found
    stop(found, 1.0)


def request(overrides: list[str], **changed: str) -> dict[str, Any]:
    text = to_toml(load_recipe(None, overrides))
    return {"run": "r", "id": "0", "site": "ward-0", "kind": "hello", "recipe": text, **changed}


@pytest.mark.slow
def test_a_worker_is_started_once_and_again_when_it_dies(site: SiteFile, tiny_overrides: list[str]) -> None:
    first, _ = ask(site, request(tiny_overrides), b"", SECONDS)
    assert first["hello"]["site"] == "ward-0"
    again, out = ask(site, request(tiny_overrides, kind="start"), b"", SECONDS)
    assert again["worker"] == first["worker"] != os.getpid()  # the same process, its base still loaded
    assert len(out) > 1000
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (site.socket, site.key, site.state)}
    assert modes == {"worker.sock": 0o600, "worker.key": 0o600, "state": 0o700}
    os.kill(first["worker"], signal.SIGKILL)
    third, back = ask(site, request(tiny_overrides, kind="start"), b"", SECONDS)
    assert third["worker"] not in (first["worker"], os.getpid())
    assert back == out
    assert "foreign run" in ask(site, request(tiny_overrides, run="other", kind="start"), b"", SECONDS)[0]["error"]

    def ended() -> tuple[int, str]:
        """What start.sh runs after its SuperNode."""
        command = [sys.executable, "-m", "fedkeel.engines.worker", str(site.path), "stop"]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert ended() == (0, "site ward-0: its worker has ended\n")
    assert ended() == (0, "")
    assert not stop(site)
    site.key.chmod(0o644)
    assert ended() == (1, f"{site.key}: a key of 32 bytes or more belongs there, in a file of mode 0600\n")
    site.key.chmod(0o600)


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_and_another_started(site: SiteFile, tiny_overrides: list[str]) -> None:
    first, _ = ask(site, request(tiny_overrides), b"", SECONDS)
    os.kill(first["worker"], signal.SIGSTOP)
    begin = time.monotonic()
    with pytest.raises(WorkerError, match="it was ended, and the next request starts another"):
        ask(site, request(tiny_overrides), b"", 1.0)
    assert time.monotonic() - begin < 60
    second, _ = ask(site, request(tiny_overrides), b"", SECONDS)
    assert second["worker"] != first["worker"]


@pytest.mark.slow
def test_one_who_says_stop_and_goes_away_is_obeyed(site: SiteFile, tiny_overrides: list[str]) -> None:
    pid = ask(site, request(tiny_overrides), b"", SECONDS)[0]["worker"]
    with socket.socket(socket.AF_UNIX) as plain:
        plain.connect(str(site.socket))
        connection = Connection(plain.detach())
    key = site.key.read_bytes()
    answer_challenge(connection, key)
    deliver_challenge(connection, key)
    os.kill(pid, signal.SIGSTOP)  # so that it reads the word only after whoever said it has gone
    connection.send_bytes(json.dumps({"kind": "stop"}).encode())
    connection.send_bytes(b"")
    connection.close()
    os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + SECONDS
    while site.socket.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    assert not stop(site)


def test_a_worker_that_cannot_start_says_why(site: SiteFile) -> None:
    broken = replace(site, path=site.path.with_name("absent.toml"))
    with pytest.raises(
        WorkerError, match=r"its worker could not start:[\s\S]*site file not found: .*absent.toml; did you mean site.toml"
    ):
        ask(broken, {"kind": "hello"}, b"", SECONDS)


def test_both_ends_prove_that_they_know_the_key(site: SiteFile) -> None:
    site.state.mkdir(mode=0o700)
    site.key.write_bytes(b"k" * 32)
    site.key.chmod(0o644)
    with Listener(str(site.socket), "AF_UNIX", authkey=b"another key") as listener:

        def accept() -> None:
            with pytest.raises(Exception, match="digest"):
                listener.accept()

        thread = threading.Thread(target=accept)
        with pytest.raises(WorkerError, match="of mode 0600"):
            ask(site, {}, b"", 1.0)
        site.key.chmod(0o600)
        thread.start()
        with pytest.raises(WorkerError, match="does not know the key"):
            ask(site, {}, b"", 5.0)
        thread.join(10)


@pytest.mark.slow
def test_a_worker_reads_rows_that_changed_and_makes_way_for_another_site_file(
    site: SiteFile, tiny_overrides: list[str]
) -> None:
    """What the site says now is what runs: rows edited in place, a file that points elsewhere; a line in the log for each."""

    def hello() -> dict[str, Any]:
        told, _ = ask(read_site(site.path), request(tiny_overrides), b"", SECONDS)
        assert "hello" in told, told
        return told

    first = hello()
    rows = site.path.with_name("rows.jsonl")
    lines = rows.read_text().splitlines(keepends=True)
    withdrawn = next(n for n, line in enumerate(lines) if '"train"' in line)
    rows.write_text("".join(lines[:withdrawn] + lines[withdrawn + 1 :]))
    second = hello()
    assert second["worker"] == first["worker"]
    (before,), (now,) = first["hello"]["rows"], second["hello"]["rows"]
    assert now == {**before, "train": before["train"] - 1}
    assert second["hello"]["encoded"] == [now["train"]]
    # a file of the same length, written a moment later, is another
    rows.write_text(rows.read_text().replace('"train"', '"test" ', 1))
    assert hello()["hello"]["rows"][0]["train"] == now["train"] - 1
    elsewhere = site.path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text("".join(lines[: len(lines) // 2 + 3]))
    (elsewhere / "tasks.json").write_text(site.path.with_name("tasks.json").read_text())
    site.path.write_text(site.path.read_text().replace('root = "."', 'root = "elsewhere"'))
    third = hello()
    assert third["worker"] != first["worker"]
    assert sum(third["hello"]["rows"][0].values()) == len(lines) // 2 + 3
    assert hello()["worker"] == third["worker"]
    log = (site.state / "worker.log").read_text()
    assert log.count("rows or base have changed: they are read anew") == 2
    assert log.count("another takes over") == 1


def test_a_base_that_changes_in_a_run_is_refused(
    site: SiteFile, tiny_overrides: list[str], tiny_base: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    base = shutil.copytree(tiny_base, tmp_path / "own-base")
    site.path.write_text(site.path.read_text().replace(str(tiny_base), str(base)))
    here = read_site(site.path)
    assert "hello" in handle(request(tiny_overrides), b"", here)[0]
    assert len(handle(request(tiny_overrides, kind="start"), b"", here)[1]) > 1000
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] *= 2
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    told, _ = handle(request(tiny_overrides, kind="start"), b"", here)
    assert told["error"] == "site ward-0: its base or tokenizer is another than when it said hello; put it back"


@pytest.mark.slow
def test_a_worker_of_another_environment_is_not_asked_for_ever(
    site: SiteFile, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedkeel.engines.worker.world_of", lambda site: "another")
    with pytest.raises(WorkerError, match="even anew, its worker sees another site file, FedKeel or library"):
        ask(site, request(tiny_overrides), b"", SECONDS)


def test_a_new_version_is_another_world(site: SiteFile, tmp_path: Path) -> None:
    package = tmp_path / "package" / "inner"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    seen = [world_of(site, package.parent)]
    (package / "a.py").write_text("x = 2\n")
    seen.append(world_of(site, package.parent))
    (package / "b.py").write_text("")
    seen.append(world_of(site, package.parent))
    seen.append(world_of(replace(site, threads=7), package.parent))
    assert len(set(seen)) == 4
    assert world_of(replace(site, threads=7), package.parent) == seen[-1]


def test_a_snapshot_of_the_hub_that_changes_is_another_cargo(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base and rows named by hub ids are what the cache holds under the revision; nothing asks a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = ["model.base=org/base", "model.revision=v1", "data.source=hub", "data.dataset=org/rows", "data.files=[]"]
    recipe = make_recipe(read_tree(None, [*tiny_overrides, *hub]), data=False)

    def put(folder: str, ref: str, commit: str, text: str) -> str:
        for path, content in ((f"snapshots/{commit}/a.bin", text), (f"refs/{ref}", commit)):
            target = tmp_path / folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content)
        return cargo_of(recipe)

    seen = [cargo_of(recipe), put("models--org--base", "v1", "c1", "one"), put("models--org--base", "v1", "c1", "two")]
    seen += [put("models--org--base", "v1", "c2", "two"), put("datasets--org--rows", "main", "d1", "x")]
    seen.append(put("datasets--org--rows", "main", "d2", "x"))
    assert len(set(seen)) == 6
    assert put("models--org--base", "main", "c3", "another revision") == cargo_of(recipe) == seen[-1]
