"""Runs of a suite in processes of their own, which on Linux die with the suite."""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedkeel.evidence.suites.plan import Planned
from fedkeel.recipe.settings import cores

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

POLL = 0.5  # seconds between looks at the processes
TAIL = 20  # lines of a failed run's log that are told


class Watch(Protocol):
    """Hears how a suite goes."""

    def begin(self, total: int, done: int) -> None:
        """total runs, of which `done` had ended before."""

    def at(self, running: Sequence[str]) -> None:
        """What runs now, each with how far it is."""

    def ended(self, run: str, seconds: float, failure: str) -> None:
        """A run has ended; failure: the last lines of its log, empty if it did not fail."""


def jobs_for(memory_each: float = 2e9) -> int:
    """Runs at a time: one a core, as far as free memory allows `memory_each` bytes for each; at least 1."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, StopIteration):  # Linux tells what is free, caches counted as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return max(1, min(cores(), int(free // memory_each)))


def die_with(suite: int) -> None:
    """On Linux: when the process `suite` is killed, so is this one, at once, and no run goes on unseen.

    The parent of this process is the server that forked it, which dies too, but only after it has put its libraries away.
    """
    if sys.platform != "linux":
        return
    try:
        handle = os.pidfd_open(suite)
    except ProcessLookupError:  # it died before this line
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _work(suite: int, arguments: Sequence[str], log: str) -> None:
    """A run in a process of its own: `fedkeel run` with these arguments, everything it prints in `log`."""
    die_with(suite)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab", buffering=0) as told:
        for stream in (1, 2):
            os.dup2(told.fileno(), stream)
    sys.argv = ["fedkeel", "run", *arguments]
    runpy.run_module("fedkeel.cli", run_name="__main__")


def processes() -> ForkServerContext | SpawnContext:
    """Processes that begin with the libraries loaded, where the system can fork: that is a tenth of a short run."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["fedkeel.runs.execute", "fedkeel.display", "fedkeel.evidence.report", "peft"])
    return context


@dataclass
class Job:
    """A run on its way. begin: `time.perf_counter` at its start."""

    run: Planned
    process: BaseProcess
    begin: float


def start(context: ForkServerContext | SpawnContext, run: Planned, out: Path) -> Job:
    """Begin or resume a run in a process of its own, in its folder of the suite's folder `out`."""
    resume = ["--resume"] if (out / run.name / "state.json").exists() else []
    arguments = [*run.overrides, f"out={out}", "--no-report", *resume]  # the suite's report is what is read
    # not a daemon: those may not have processes of their own, and a federation may
    process = context.Process(target=_work, args=(os.getpid(), arguments, str(out / f"{run.name}.log")))
    process.start()
    return Job(run, process, time.perf_counter())


def how_far(job: Job, out: Path) -> str:
    """A run's name, leg and round, in words."""
    try:
        state = json.loads((out / job.run.name / "state.json").read_text())
    except (OSError, ValueError):
        return f"{job.run.name}: starting"
    return f"{job.run.name}: {state['leg'] or 'between legs'}, round {state['round']}"


def failure_of(out: Path, run: Planned, code: int) -> str:
    """Exit status and the end of the log of a run that failed."""
    lines = (out / f"{run.name}.log").read_text(errors="replace").splitlines()
    return f"exit status {code}\n" + "\n".join(lines[-TAIL:])


@contextlib.contextmanager
def stopped_at_the_end(jobs: Sequence[Job]) -> Iterator[None]:
    """Whatever ends the suite also ends its runs, with time to leave a whole state behind."""
    try:
        yield
    finally:
        for job in jobs:
            if job.process.pid is not None and job.process.is_alive():
                os.kill(job.process.pid, signal.SIGINT)
        for job in jobs:
            job.process.join()
