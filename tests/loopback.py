"""A whole deployment on the loopback: the folder that `deploy init` writes, and the processes started from it.

For tests, and for benchmarks/engines.py. The gate of docs/deploy.md is left out: sites dial SuperLink itself.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import fedkeel
from fedkeel.deploy.init import app_recipe, init
from fedkeel.engines.sitefile import MEMBERS, SiteFile, read_members, read_site
from fedkeel.engines.worker import stop
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import to_toml
from fedkeel.runs.folder import RunFolder

SECONDS = 1800.0  # on a machine that has other work too


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
    """A folder that `deploy init` wrote, filled in for sites of this machine, and the processes started from it.

    rows: site -> its rows, which become its `rows.jsonl`. labels: task -> its candidate labels. base: the folder of the base
    model, or None for the embedded one. host: where sites find the coordinator. inside: name of a site, or "coordinator" ->
    what its commands begin with, such as `ip netns exec NAME`. wait: seconds for all sites to be there before round 1. recipe:
    a recipe's file, before the overrides.
    """

    def __init__(
        self,
        folder: Path,
        overrides: Sequence[str],
        rows: Mapping[str, Sequence[Mapping[str, Any]]],
        labels: Mapping[str, Sequence[str]],
        base: Path | None,
        host: str = "localhost",
        inside: Mapping[str, Sequence[str]] | None = None,
        wait: float = 600.0,
        recipe: Path | None = None,
    ) -> None:
        self.folder, self.sites, self._inside = folder, tuple(rows), inside or {}
        (folder.parent / "recipe.toml").write_text(to_toml(load_recipe(recipe, overrides)))
        self.port = free_port()
        travels = app_recipe(folder.parent / "recipe.toml").recipe
        init(folder, travels, self.sites, [host], self.port, base)
        if host != "localhost":
            script = folder / "coordinator" / "start.sh"
            script.write_text(script.read_text().replace("--host 127.0.0.1", "--host 0.0.0.0"))
        self.recipe = travels
        project = folder / "app" / "pyproject.toml"
        project.write_text(re.sub(r"^wait = .*$", f"wait = {wait}", project.read_text(), flags=re.MULTILINE))
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(Path(fedkeel.__file__).parents[1]),
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for number, name in enumerate(self.sites):
            at = folder / f"site-{name}"
            (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
            (at / "tasks.json").write_text(json.dumps({task: {"labels": list(of)} for task, of in labels.items()}))
            model = f'[model]\nbase = "{base}"\n' if base else ""
            text = f'name = "{name}"\nthreads = 1\nstate = "state"\n{model}[data]\nroot = "."\n[worker]\n'
            # a path of pytest's is long, and a socket's is short
            (at / "site.toml").write_text(
                text + f'key = "worker.key"\nsocket = "{gettempdir()}/fk-{self.port}-{number}.sock"\n'
            )
            start = (at / "start.sh").read_text()
            start = start.replace(f':{self.port}"', f':{self.port + 1}"').replace(
                f"--port {9094 + number}", f"--port {free_port()}"
            )
            (at / "start.sh").write_text(start)

    def site(self, name: str) -> SiteFile:
        """What a site's file says."""
        return read_site(self.folder / f"site-{name}" / "site.toml")

    def worker(self, name: str) -> int:
        """The process id of a site's warm worker, which must have been started."""
        return int(self.site(name).socket.with_suffix(".lock").read_text())

    def start(self, name: str, script: str) -> None:
        """Start `coordinator/start.sh` as name "coordinator", or a site's by the site's name."""
        command = [*self._inside.get(name, ()), str(self.folder / script)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _told(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """What a script of the coordinator's said, and its exit status."""
        command = [*self._inside.get("coordinator", ()), str(self.folder / "coordinator" / script), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=SECONDS)

    def _until(self, true: Callable[[], bool], pause: float) -> None:
        """Look every `pause` seconds until it is so."""
        end = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < end, self.log()
            time.sleep(pause)

    def flwr(self, *arguments: str) -> str:
        done = self._told("flwr.sh", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def up(self) -> None:
        """SuperLink, with the sites' keys registered."""
        self.start("coordinator", "coordinator/start.sh")

        def answers() -> bool:
            assert self.processes["coordinator"].poll() is None, self.log()
            return not self._told("flwr.sh", "list", "here").returncode

        self._until(answers, 0.5)
        done = self._told("register.sh")
        assert done.returncode == 0, done.stdout + done.stderr

    def begin(self) -> str:
        """Start a run; its id."""
        told = json.loads(self.flwr("run", str(self.folder / "app"), "here", "--format", "json"))
        return str(told["run-id"])

    def run(self) -> tuple[int, str]:
        """The exit status of `run.sh`, and what it said."""
        done = self._told("run.sh")
        return done.returncode, done.stdout + done.stderr

    def end(self, run: str) -> str:
        """Wait for a run's end; its status, as Flower tells it."""

        def status() -> str:
            told = json.loads(self.flwr("list", "--format", "json"))
            return next(str(r["status"]) for r in told["runs"] if str(r["run-id"]) == run)

        self._until(lambda: status().startswith("finished"), 10)
        return status()

    def until_round(self, round: int) -> None:
        """Wait until the coordinator has finished a round."""
        state = self.results.path / "state.json"
        self._until(lambda: state.exists() and self.results.state().round >= round, 0.2)

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

    def stop_worker(self, site: str) -> None:
        """Ask a site's worker to end."""
        stop(self.site(site), 5.0)

    def lose(self, site: str) -> None:
        """SIGKILL to all that runs at a site: SuperNode, its executors and the worker."""
        os.killpg(self.processes.pop(site).pid, signal.SIGKILL)
        os.kill(self.worker(site), signal.SIGKILL)
        self.kill(f"site-{site}")

    def nodes(self) -> list[dict[str, Any]]:
        """What Flower tells of the registered SuperNodes."""
        found: list[dict[str, Any]] = json.loads(self.flwr("supernode", "list", "here", "--format", "json"))["nodes"]
        return found

    def members(self) -> dict[str, int]:
        """Which node each site's key was registered as."""
        return read_members(self.folder / "coordinator" / "state" / MEMBERS) or {}

    def online(self) -> int:
        """SuperNodes that are connected."""
        return sum(node["status"] == "online" for node in self.nodes())

    def revoke(self, site: str) -> None:
        """Take a site's key from the register."""
        self.flwr("supernode", "unregister", str(self.members()[site]), "here")

    def until_online(self, count: int) -> None:
        """Wait until so many SuperNodes are connected."""
        self._until(lambda: self.online() >= count, 1)

    def until_gone(self, left: int) -> None:
        """Wait until no more than `left` SuperNodes are held for connected; one that was killed is until its heartbeat is
        missed, and while it is, its key is refused."""
        self._until(lambda: self.online() <= left, 1)

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
        for name in self.sites:
            stop(self.site(name), 5.0)


@contextmanager
def deployed(*given: Any, **more: Any) -> Iterator[Deployment]:
    """A `Deployment` whose processes are ended afterwards."""
    found = Deployment(*given, **more)
    try:
        yield found
    finally:
        found.down()
