"""What a person sees while a run works: one line of progress on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from fedkeel.evidence.report import human_bytes
from fedkeel.evidence.report.tables import plural
from fedkeel.federation.server import RoundResult
from fedkeel.runs.watch import Left, about


class Answers:
    """The answers of several models to one question, side by side as they grow; one below the other where this is no terminal.

    who: the models, from left to right. Use it as a context manager.
    """

    def __init__(self, console: Console, who: Sequence[str]) -> None:
        self._console = console
        self._said = dict.fromkeys(who, "")
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="visible") if console.is_terminal else None

    def __enter__(self) -> Answers:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            for who, text in self._said.items():
                self._console.print(f"{who}: {text}", markup=False, highlight=False, soft_wrap=True)

    def told(self, who: str, so_far: str) -> None:
        """The answer of `who` as far as it has come."""
        self._said[who] = so_far.strip()
        if self._live is not None:
            table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
            for name in self._said:
                table.add_column(name, ratio=1)
            table.add_row(*map(Text, self._said.values()))
            self._live.update(table, refresh=True)


class _TimeLeft(ProgressColumn):
    """What `Left` says."""

    def __init__(self, left: Left) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        """`left 1:23`, or dashes before there is anything to go by."""
        seconds = self._left.seconds
        if seconds is None:
            return Text("left -:--")
        return Text(f"left {round(seconds) // 60}:{round(seconds) % 60:02d}")


class Display:
    """The `Watch` of a run, on a rich console; use it as a context manager. exchanged: bytes, before it went on."""

    def __init__(self, console: Console, sites: int, exchanged: int = 0) -> None:
        self._console, self._sites = console, sites
        self._live = console.is_terminal
        self._bytes = exchanged
        self._begin, self._left = time.perf_counter(), Left()
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            _TimeLeft(self._left),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("preparing", total=None, detail="")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, total_work: float) -> None:
        """See `watch.Watch`."""
        self._left.begin(total_work)
        self._progress.reset(self._task, total=total_work, description="starting", detail=f"{self._sites} sites")

    def leg(self, name: str, detail: str) -> None:
        """See `watch.Watch`."""
        self._progress.update(self._task, description=name, detail=detail)
        if not self._live and detail == "scoring held-out rows":
            self._line(f"{name}: {detail}")

    def advance(self, work: float) -> None:
        """See `watch.Watch`."""
        self._left.advance(work)
        self._progress.advance(self._task, work)
        if not self._live and (first := self._left.first()):
            self._line(first)

    def skip(self, work: float) -> None:
        """See `watch.Watch`."""
        self._left.skip(work)
        self._progress.advance(self._task, work)

    def _line(self, text: str) -> None:
        self._console.print(f"[{time.perf_counter() - self._begin:7.1f} s] {text}", markup=False, highlight=False)

    def round(self, leg: str, done: int, rounds: int, result: RoundResult) -> None:
        """See `watch.Watch`."""
        positions = sum(u.positions for u in result.updates)
        line = f"{leg} round {done}/{rounds}: {plural(len(result.updates), 'site')}"
        if all("loss" in u.stats for u in result.updates):  # private sites do not tell it
            loss = sum(u.stats["loss"] * u.positions for u in result.updates) / positions
            line += f", training loss {loss:.3f} nats"
        if len(result.updates) > 1 or rounds > 1:
            self._bytes += sum(result.bytes_up.values()) + sum(result.bytes_down.values())
            error = f", aggregation error {result.error:.1%}" if math.isfinite(result.error) else ""
            line += f"{error}, {human_bytes(self._bytes)} exchanged so far"
        left = "" if self._live else self._left.told()
        self._line(f"{line}, {result.seconds:.1f} s{left and f', {left}'}")

    def note(self, text: str) -> None:
        """See `watch.Watch`."""
        self._console.print(f"note: {text}", style="yellow", markup=False, highlight=False)


class SuiteDisplay:
    """The `pool.Watch` of a suite: how many runs have ended, what runs now, the time left; use it as a context manager."""

    def __init__(self, console: Console, jobs: int) -> None:
        self._console, self._jobs = console, jobs
        self._done = self._total = 0
        self._took: list[float] = []
        self._progress = Progress(
            TextColumn("[bold]runs"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[now]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None, left="", now="")

    def __enter__(self) -> SuiteDisplay:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def begin(self, total: int, done: int) -> None:
        """See `pool.Watch`."""
        self._done, self._total = done, total
        self._progress.update(self._task, total=total, completed=done)
        ended = f", {done} ended before" if done else ""
        self._console.print(f"{total} runs{ended}, {self._jobs} at a time", markup=False, highlight=False)

    def at(self, running: Sequence[str]) -> None:
        """See `pool.Watch`."""
        self._progress.update(self._task, now="; ".join(running))

    def _left(self) -> str:
        """`about 12 min left`, by the mean time of the runs that ended here; empty before the first."""
        if not self._took or self._done == self._total:
            return ""
        seconds = sum(self._took) / len(self._took) * (self._total - self._done) / self._jobs
        return about(seconds)

    def ended(self, run: str, seconds: float, failure: str) -> None:
        """See `pool.Watch`."""
        self._done += 1
        self._took.append(seconds)
        left = self._left()
        self._progress.update(self._task, completed=self._done, left=left)
        line = f"[{self._done}/{self._total}] {run}: {'failed' if failure else 'finished'} after {seconds:.0f} s"
        self._console.print(", ".join([line, *([left] if left else [])]), markup=False, highlight=False)
        if failure:
            self._console.print(failure, style="red", markup=False, highlight=False)
