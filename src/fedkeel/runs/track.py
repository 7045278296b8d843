"""A live view of a run: every Row as a point for the trackers that the recipe asks for, TensorBoard, W&B or MLflow.

A tracker is given Rows and nothing else, and what it shows is never read back: rows.jsonl is the truth. So a resumed run, whose
rows.jsonl was cut back to its last whole state, begins its trackers anew and gives them the rows that stand there first: every
row is one point, however often the run was cut. A tracker that fails is told of once and left out; the run goes on.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fedkeel import tables
from fedkeel.types import FedKeelError, Row

# before either library is imported: neither tells its makers of its use or its errors, unless the user's environment says so
QUIET = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
PROJECT = "fedkeel"  # W&B's project and MLflow's experiment
ADDED = ("positions", "rows", "rounds")  # units that are summed over sites; of the others the mean is shown
BATCH = 1000  # points that MLflow takes at once


class TrackError(FedKeelError):
    """A tracker that is asked for and not installed."""


@dataclass(frozen=True)
class Point:
    """One point of a curve. step: rounds done, over all stages."""

    tag: str
    step: int
    value: float


def point(row: Row) -> Point:
    """The point of a Row: `METHOD/SPLIT/tasks/TASK/NAME` without the parts that it lacks, below `sites/SITE/` for one site.

    The step is the round; before any training (the base model in a stream) it is the stage.
    """
    parts = ("sites" if row.site else "", row.site, row.method, row.split, "tasks" if row.task else "", row.task, row.name)
    return Point("/".join(filter(None, parts)), row.round or row.stage, row.value)


class Summary:
    """What all sites together make of numbers that come one a site: means, sums, and bytes summed over the run so far."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def points(self, rows: Sequence[Row]) -> list[Point]:
        """Points of the rows of one round or one scoring, under the rows' tags without the site. A local leg has one site,
        and is no part of anything that sites do together."""
        together: dict[tuple[str, int, str], list[float]] = {}
        for row in rows:
            if row.site and row.method != "local":
                whole = point(Row(**{**vars(row), "site": ""}))
                together.setdefault((whole.tag, whole.step, row.unit), []).append(row.value)
        found = []
        for (tag, step, unit), values in together.items():
            value = math.fsum(values)
            if unit == "bytes":
                self._bytes[tag] += int(value)
                value = float(self._bytes[tag])
            elif unit not in ADDED:
                value /= len(values)
            found.append(Point(tag, step, value))
        return found


class Tracker(Protocol):
    """Where points go. Made with the run's folder and name; what an earlier process left of this run there is begun anew."""

    def log(self, points: Sequence[Point]) -> None:
        """Show these points."""

    def close(self, finished: bool) -> None:
        """The run is over, or was cut off."""


class TensorBoard:
    """Event files in RUN/tb, for `tensorboard --logdir runs`.

    Written through tensorboardX's file layer in this thread: its SummaryWriter hands events to a thread, and once that has met
    a full disk the next events would wait for it for ever.
    """

    def __init__(self, folder: Path, run: str) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        del run  # TensorBoard names a run by its folder
        shutil.rmtree(folder / "tb", ignore_errors=True)
        (folder / "tb").mkdir(parents=True)
        self._event = event_pb2.Event
        self._writer = EventsWriter(str(folder / "tb" / "events"))
        # a TensorBoard that is open already drops what it read of the file before
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=0, session_log=start))

    def log(self, points: Sequence[Point]) -> None:
        """See `Tracker`. Values are float32 in an event file."""
        now = time.time()
        for p in points:
            event = self._event(wall_time=now, step=p.step)
            event.summary.value.add(tag=p.tag, simple_value=p.value)
            self._writer.write_event(event)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """Weights & Biases, in RUN/wandb; offline, to be sent by `wandb sync`, unless WANDB_MODE says otherwise."""

    def __init__(self, folder: Path, run: str) -> None:
        wandb = load("wandb")
        shutil.rmtree(folder / "wandb", ignore_errors=True)
        # nothing but points: no console, code, repository, machine or list of packages
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            host=PROJECT,
        )
        project, mode = os.environ.get("WANDB_PROJECT", PROJECT), os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(project=project, name=run, dir=str(folder), mode=mode, settings=settings)
        self._run.define_metric("*", step_metric="round")

    def log(self, points: Sequence[Point]) -> None:
        """See `Tracker`. One call for the points of one step, and another where a tag comes again."""
        line: dict[str, float] = {}
        for p in points:
            if p.tag in line or line.get("round", p.step) != p.step:
                self._run.log(line)
                line = {}
            line |= {"round": p.step, p.tag: p.value}
        if line:
            self._run.log(line)

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=0 if finished else 1)


class Mlflow:
    """MLflow, in a database of its own, RUN/mlflow.db, unless MLFLOW_TRACKING_URI names another store."""

    def __init__(self, folder: Path, run: str) -> None:
        mlflow = load("mlflow")
        where = os.environ.get("MLFLOW_TRACKING_URI", "")
        if not where:
            database = (folder / "mlflow.db").resolve()
            database.unlink(missing_ok=True)
            where = f"sqlite:///{database}"
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=where)
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        self._run = self._client.create_run(number, run_name=run).info.run_id

    def log(self, points: Sequence[Point]) -> None:
        """See `Tracker`. Characters that MLflow does not take in a name are written as `_` and their number in hexadecimal."""
        now = int(1000 * time.time())
        metrics = [self._metric(plain_name(p.tag), p.value, now, p.step) for p in points]
        for start in range(0, len(metrics), BATCH):
            self._client.log_batch(self._run, metrics=metrics[start : start + BATCH])

    def close(self, finished: bool) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run, "FINISHED" if finished else "KILLED")


def plain_name(tag: str) -> str:
    """`tag` of letters, digits and `_-. /` alone."""
    return re.sub(r"[^A-Za-z0-9_\-. /]", lambda found: f"_{ord(found[0]):x}", tag)


def load(name: str) -> Any:
    """The library of a tracker that the recipe asks for. Raises TrackError if it is not installed."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    try:
        return import_module(tables.TRACKERS[name].library)
    except ImportError as error:
        raise TrackError(f"track = [{name!r}] needs the extra: pip install 'fedkeel[{name}]' ({error})") from error


def read_history(path: Path) -> Iterator[Row]:
    """The Rows of a run so far; a value that was not finite is NaN."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            yield Row.from_json(json.loads(line))


class Tracks:
    """The trackers of a run, by name; use it as a context manager.

    folder: the run's, whose rows.jsonl is in the state that the run goes on from. note: told of a tracker that fails.
    Raises TrackError if one is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, run: str, note: Callable[[str], None]) -> None:
        self._folder, self._run, self._note = folder, run, note
        self._names = tuple(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}
        self._summary = Summary()
        for name in names:
            if tables.TRACKERS[name].library:
                load(name)

    def _lost(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        self._note(f"{name} shows no more of this run, which goes on: {type(error).__name__}: {error}")

    def __enter__(self) -> Tracks:
        for name in self._names:
            try:
                self._open[name] = tables.TRACKERS[name].load()(self._folder, self._run)
            except Exception as error:  # whatever a tracker raises is no reason to lose a run
                self._lost(name, error)
        # rows were saved by round and by scoring, so what is made of the sites together is made of the same rows again
        for _, rows in groupby(read_history(self._folder / "rows.jsonl"), lambda r: (r.method, r.stage, r.round)):
            self.log(list(rows))
        return self

    def log(self, rows: Sequence[Row]) -> None:
        """Show the rows of a round or of a scoring."""
        points = [*map(point, rows), *self._summary.points(rows)]
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(points)
            except Exception as error:
                self._lost(name, error)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, tracker in list(self._open.items()):
            try:
                tracker.close(kind is None)
            except Exception as failed:
                self._lost(name, failed)
        self._open = {}
