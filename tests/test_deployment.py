"""Real processes on the loopback: SuperLink with TLS and site authentication, three sites with private files, one adapter.

Only the gate of docs/deploy.md is left out: sites dial SuperLink itself. Slow, as every message starts a process of Flower's.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import pytest
from test_run import adapter_of, go, rows_of, same

pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")

from conftest import tiny_rows

import fedkeel
from fedkeel.config import load_recipe, to_toml
from fedkeel.deploy import app_recipe, init
from fedkeel.folder import RunFolder
from fedkeel.sitefile import read_site
from fedkeel.worker import stop

SITES = ("ward-0", "ward-1", "ward-2")
SECONDS = 1800.0  # on a machine that has other work too

pytestmark = pytest.mark.deployment


def free_port() -> int:
    """One whose successor is free too, as far as can be known."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            try:
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


class Deployment:
    """A folder that `deploy init` wrote, filled in for three sites of this machine, and the processes started from it."""

    def __init__(self, folder: Path, overrides: list[str], base: Path) -> None:
        self.folder = folder
        recipe = load_recipe(None, overrides)
        (folder.parent / "recipe.toml").write_text(to_toml(recipe))
        self.port = free_port()
        travels, _ = app_recipe(folder.parent / "recipe.toml")
        init(folder, travels, SITES, ["localhost"], self.port, base)
        self.recipe = travels
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(fedkeel.__file__).parents[1]),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for number, name in enumerate(SITES):
            at = folder / f"site-{name}"
            rows = [json.dumps(row) + "\n" for row in tiny_rows() if row["department"] == name]
            (at / "rows.jsonl").write_text("".join(rows))
            (at / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
            text = f'name = "{name}"\nthreads = 1\nstate = "state"\n[model]\nbase = "{base}"\n[data]\nroot = "."\n[worker]\n'
            # a path of pytest's is long, and a socket's is short
            (at / "site.toml").write_text(
                text + f'key = "worker.key"\nsocket = "{gettempdir()}/fk-{self.port}-{number}.sock"\n'
            )
            start = (at / "start.sh").read_text()
            start = start.replace(f":{self.port} ", f":{self.port + 1} ").replace(
                f"--port {9094 + number}", f"--port {free_port()}"
            )
            (at / "start.sh").write_text(start)

    def start(self, name: str, script: str) -> None:
        log = (self.folder / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            [str(self.folder / script)], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def flwr(self, *arguments: str) -> str:
        command = [str(self.folder / "coordinator" / "flwr.sh"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=SECONDS)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self) -> None:
        """SuperLink, with the sites' keys registered."""
        self.start("superlink", "coordinator/start.sh")
        end = time.monotonic() + SECONDS
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port + 1)):
                    break
            assert self.processes["superlink"].poll() is None, (self.folder / "superlink.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.5)
        command = [str(self.folder / "coordinator" / "register.sh")]
        subprocess.run(command, env=self.environment, check=True, timeout=SECONDS, capture_output=True)

    def begin(self) -> str:
        """Start a run; its id."""
        told = json.loads(self.flwr("run", str(self.folder / "app"), "here", "--format", "json"))
        return str(told["run-id"])

    def end(self, run: str) -> str:
        """Wait for a run's end; its status, as Flower tells it."""
        end, status = time.monotonic() + SECONDS, ""
        while time.monotonic() < end:
            told = json.loads(self.flwr("list", "--format", "json"))
            status = next(str(r["status"]) for r in told["runs"] if str(r["run-id"]) == run)
            if status.startswith("finished"):
                return status
            time.sleep(10)
        raise AssertionError(f"still {status}\n{self.log()}")

    def until_round(self, round: int) -> None:
        """Wait until the coordinator has finished a round."""
        end = time.monotonic() + SECONDS
        while not (self.results.path / "state.json").exists() or self.results.state()["round"] < round:
            assert time.monotonic() < end, self.log()
            time.sleep(0.2)

    def kill(self, word: str) -> int:
        """SIGKILL to Flower's processes of this deployment whose command line holds `word`; they have sessions of their own."""
        found = 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                # by its port, or by the folder
                if word in line and (f"127.0.0.1:{self.port + 1} " in line or str(self.folder) in line):
                    os.kill(int(path.name), signal.SIGKILL)
                    found += 1
            except OSError:
                continue
        return found

    def log(self) -> str:
        """What all processes said."""
        return "".join(f"=== {p.name}\n{p.read_text(errors='replace')[-6000:]}\n" for p in sorted(self.folder.glob("*.log")))

    @property
    def results(self) -> RunFolder:
        out = Path(self.recipe.out)
        return RunFolder((out if out.is_absolute() else self.folder / "coordinator" / "state" / out) / self.recipe.name)

    def down(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self.kill("flwr-serverapp")  # one may outlive its SuperLink
        self.kill("flower-superexec")
        for name in SITES:
            stop(read_site(self.folder / f"site-{name}" / "site.toml"), 5.0)


@contextmanager
def deployed(folder: Path, overrides: list[str], base: Path) -> Iterator[Deployment]:
    found = Deployment(folder, overrides, base)
    try:
        yield found
    finally:
        found.down()


def test_three_sites_end_in_the_bits_of_one_process(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    kept = ["federation.codec_up=topk=0.25+int4", "evaluation.baselines=[]", "evaluation.test_rows=0", "evaluation.every=9"]
    overrides = [*tiny_overrides, *kept]
    _, here, _ = go([*overrides, "name=here"])
    with deployed(tmp_path / "deployment", overrides, tiny_base) as there:
        there.up()
        for name in SITES:
            there.start(name, f"site-{name}/start.sh")
        status = there.end(there.begin())
        assert status == "finished:completed", there.log()
        workers = {name: (there.folder / f"site-{name}" / "state").exists() for name in SITES}
    assert all(workers.values())
    assert same(adapter_of(here.path), adapter_of(there.results.path))
    assert there.results.state()["finished"]

    def score(folder: RunFolder) -> list[Any]:
        wanted = [r for r in rows_of(folder) if (r["name"], r["task"], r["split"], r["site"]) == ("score", "", "test", "")]
        return [r["value"] for r in wanted]

    assert score(there.results) == pytest.approx(score(here))


def test_killed_workers_and_coordinators_change_no_bit(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """A worker is killed in the first rounds, then the ServerApp; a second run goes on from the last checkpoint."""
    few = ["evaluation.baselines=[]", "evaluation.test_rows=1", "evaluation.every=9", "federation.rounds=5"]
    overrides = [*tiny_overrides, *few, "federation.codec_up=topk=0.25+int4"]
    _, here, _ = go([*overrides, "name=here"])
    with deployed(tmp_path / "deployment", overrides, tiny_base) as there:
        there.up()
        for name in SITES:
            there.start(name, f"site-{name}/start.sh")
        there.begin()
        there.until_round(1)
        worker = read_site(there.folder / "site-ward-0" / "site.toml").socket.with_suffix(".lock")
        os.kill(int(worker.read_text()), signal.SIGKILL)
        there.until_round(2)
        assert there.kill("flwr-serverapp")
        done = there.results.state()["round"]
        assert there.end(there.begin()) == "finished:completed", there.log()
    assert 2 <= done < 5
    assert same(adapter_of(here.path), adapter_of(there.results.path))
    assert [r["round"] for r in rows_of(there.results) if (r["name"], r["site"]) == ("loss", "ward-0")] == [1, 2, 3, 4, 5]
