"""The live view: every Row is one point, however often the run was cut, and no tracker can stop a run."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from test_run import Silent, adapter_of, go, killed_while_saving, rows_of, same

import fedkeel.runs.track
from fedkeel import tables
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.track import Point, Summary, TrackError, Tracks, plain_name, point
from fedkeel.types import Row

ROOT = Path(__file__).parent.parent
BASE = ["evaluation.baselines=base,local", "federation.rounds=2", "track=tensorboard"]


def events(folder: Path) -> list[Event]:
    """Of the one event file of a run, record by record: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    (path,) = (folder / "tb").iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def shown(folder: Path) -> Counter[tuple[str, int, str]]:
    """(tag, step, value) of every point of the event file; a value as text, so that NaN equals itself."""
    first, second, *rest = events(folder)
    assert first.file_version == "brain.Event:2"
    assert (second.session_log.status, second.step) == (SessionLog.START, 0)
    assert all(len(event.summary.value) == 1 for event in rest)
    return Counter((v.tag, event.step, str(v.simple_value)) for event in rest for v in event.summary.value)


def single(value: float | None) -> str:
    """A value as an event file holds it: float32; None is NaN."""
    return str(float(np.float32(math.nan if value is None else value)))


def expected(rows: list[dict[str, Any]]) -> Counter[tuple[str, int, str]]:
    """The points of the lines of rows.jsonl, and of the sites together, the slow way."""
    found: list[tuple[str, int, float | None]] = []
    together: dict[tuple[str, int], list[float]] = defaultdict(list)
    units = {}
    for r in rows:
        tag = r["method"] + (f"/{r['split']}" if r["split"] else "") + (f"/tasks/{r['task']}" if r["task"] else "")
        tag += f"/{r['name']}"
        step = r["stage"] if r["round"] == 0 else r["round"]
        found.append((f"sites/{r['site']}/{tag}" if r["site"] else tag, step, r["value"]))
        if r["site"] and r["method"] != "local":
            together[tag, step].append(r["value"])
            units[tag] = r["unit"]
    for tag, step in together:
        values = together[tag, step]
        if units[tag] == "bytes":  # all up to this round
            values = [v for (other, at), some in together.items() if other == tag and at <= step for v in some]
        total = math.fsum(values)
        found.append((tag, step, total if units[tag] in ("bytes", "positions", "rounds") else total / len(values)))
    return Counter((tag, step, single(value)) for tag, step, value in found)


def row(name: str, value: float, **more: Any) -> Row:
    return Row(**{"run": "r", "method": "federated", "seed": 1, "round": 3, "unit": "share", **more}, name=name, value=value)


def test_a_run_that_names_no_tracker_keeps_no_view(tiny_overrides: list[str]) -> None:
    _, folder, _ = go([*tiny_overrides, "evaluation.baselines=", "federation.rounds=1"])
    assert not (folder.path / "tb").exists()


def test_tags_and_steps_by_hand() -> None:
    assert point(row("score", 0.5, split="validation")) == Point("federated/validation/score", 3, 0.5)
    assert point(row("score", 0.5, split="test", task="news")) == Point("federated/test/tasks/news/score", 3, 0.5)
    assert point(row("loss", 2.0, site="a", unit="nats")) == Point("sites/a/federated/loss", 3, 2.0)
    assert point(row("own_score", 0.5, site="a", split="test", stage=1)).tag == "sites/a/federated/test/own_score"
    # the base model is scored after each stage and never trains a round
    assert point(row("score", 0.5, method="base", round=0, stage=2, split="test")) == Point("base/test/score", 2, 0.5)


def test_what_sites_make_together_by_hand() -> None:
    summary = Summary()
    first = [
        row("loss", 1.0, site="a", unit="nats"),
        row("loss", 2.0, site="b", unit="nats"),
        row("seconds", 9.0, unit="seconds"),
        row("positions", 5, site="a", unit="positions"),
        row("positions", 7, site="b", unit="positions"),
        row("bytes_up", 10, site="a", unit="bytes"),
        row("bytes_up", 20, site="b", unit="bytes"),
        row("failed", 1, site="c", unit="rounds"),
        row("failed", 1, site="d", unit="rounds"),
    ]
    assert summary.points(first) == [
        Point("federated/loss", 3, 1.5),
        Point("federated/positions", 3, 12),
        Point("federated/bytes_up", 3, 30),
        Point("federated/failed", 3, 2),
    ]
    assert summary.points([row("bytes_up", 5, site="a", unit="bytes", round=4)]) == [Point("federated/bytes_up", 4, 35)]
    assert summary.points([row("loss", 1.0, site="a", method="local", unit="nats")]) == []


# ----------------------------------------------------------------------------------------------------------- a run and its end


@pytest.mark.slow
def test_a_killed_run_goes_on_in_an_event_file_with_every_row_once(tiny_overrides: list[str], tmp_path: Path) -> None:
    """kill -9 while rows lie in rows.jsonl that are done again; then an interruption; then to the end."""
    killed_while_saving([*tiny_overrides, *BASE])
    folder = RunFolder(tmp_path / "tiny")
    saved = folder.rows_file.read_bytes()[: folder.state().rows_bytes].decode().splitlines()
    assert shown(folder.path) == expected([json.loads(line) for line in saved])  # live: what was saved was shown

    def interrupt(leg: str, done: int) -> None:
        if leg == "local/ward-1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go([*tiny_overrides, *BASE], Silent(interrupt), resume=True)
    go([*tiny_overrides, *BASE], resume=True)
    assert shown(folder.path) == expected(rows_of(folder))
    before = events(folder.path)
    go([*tiny_overrides, *BASE], resume=True)  # of a run that is over: nothing more to show
    assert events(folder.path) == before


@pytest.mark.parametrize("name", ["clinc150-minilm", "quickstart"])
def test_every_row_of_a_whole_run_is_one_point_from_where_it_was_cut(tmp_path: Path, name: str) -> None:
    lines = (ROOT / "results" / "main-job" / name / "rows.jsonl").read_text().splitlines()
    cut = len(lines) // 2
    while json.loads(lines[cut])["round"] == json.loads(lines[cut - 1])["round"]:  # rows are saved round by round
        cut += 1
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines[:cut]))
    (tmp_path / "tb").mkdir()
    (tmp_path / "tb" / "events.out.tfevents.1.elsewhere").write_bytes(b"of an earlier process")
    for _ in range(2):
        with Tracks(["tensorboard"], tmp_path, "run", print):
            assert shown(tmp_path) == expected([json.loads(line) for line in lines[:cut]])
    rows = [Row(**json.loads(line)) for line in lines]
    with Tracks(["tensorboard"], tmp_path, "run", print) as tracks:
        tracks.log([r for r in rows[cut:] if r.split != "test"])
        tracks.log([r for r in rows[cut:] if r.split == "test"])
    assert shown(tmp_path) == expected([json.loads(line) for line in lines])
    tags = {tag for tag, _, _ in shown(tmp_path)}
    assert {"federated/validation/score", "federated/loss", "federated/bytes_up", "base/test/score"} <= tags


def test_a_value_that_is_not_finite_is_a_point_too(tmp_path: Path) -> None:
    with Tracks(["tensorboard"], tmp_path, "run", print) as tracks:
        tracks.log([row("score", math.nan), row("accuracy", 0.1)])
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("score", math.nan).as_json()) + "\n")
    assert shown(tmp_path) == {("federated/score", 3, "nan"): 1, ("federated/accuracy", 3, single(0.1)): 1}
    with Tracks(["tensorboard"], tmp_path, "run", print):
        pass
    assert shown(tmp_path) == {("federated/score", 3, "nan"): 1}


# ---------------------------------------------------------------------------------------------------------- trackers that fail


def test_a_failing_tracker_is_told_of_once_and_stops_nothing(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _, whole, _ = go([*tiny_overrides, *BASE, "name=whole"])
    real, calls = fedkeel.runs.track.TensorBoard.log, [0]

    def log(self: Any, points: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError(28, "No space left on device")
        real(self, points)

    monkeypatch.setattr(fedkeel.runs.track.TensorBoard, "log", log)
    watch = Silent()
    _, folder, _ = go([*tiny_overrides, *BASE], watch)
    assert [n for n in watch.notes if "tensorboard" in n] == [
        "tensorboard shows no more of this run, which goes on: OSError: [Errno 28] No space left on device"
    ]
    assert calls[0] == 2
    assert same(adapter_of(folder.path), adapter_of(whole.path))
    assert len(rows_of(folder)) == len(rows_of(whole))


@pytest.mark.parametrize("where", ["__init__", "log", "close"])
def test_a_tracker_may_fail_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(fedkeel.runs.track.TensorBoard, where, broken)
    notes: list[str] = []
    with Tracks(["tensorboard"], tmp_path, "run", notes.append) as tracks:
        tracks.log([row("score", 0.1)])
        tracks.log([row("score", 0.2)])
    assert notes == ["tensorboard shows no more of this run, which goes on: RuntimeError: no network"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_an_error_before_any_work(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setitem(sys.modules, tables.TRACKERS[name].library, None)
    with pytest.raises(TrackError, match=rf"track = \['{name}'\] needs the extra: pip install 'fedkeel\[{name}\]'"):
        go([*tiny_overrides, f"track={name}"])
    assert not (tmp_path / "tiny").exists()


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"track = 'wandbb': one of tensorboard, wandb, mlflow belongs here; did you mean 'wandb'\?"
    ):
        load_recipe(None, ["track=mlflow,wandbb"])
    assert load_recipe(None, ['track=["wandb", "mlflow"]']).track == ("wandb", "mlflow")


# ---------------------------------------------------------------------------------------------------------- W&B and MLflow


class FakeWandb(ModuleType):
    """The calls that FedKeel makes of wandb, kept."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.lines: list[list[dict[str, float]]] = []
        self.ends: list[int] = []
        self.Settings = lambda **options: options

    def init(self, **options: Any) -> SimpleNamespace:
        self.begun.append(options)
        lines: list[dict[str, float]] = []
        self.lines.append(lines)
        return SimpleNamespace(
            log=lines.append,
            define_metric=lambda name, step_metric: None,
            finish=lambda exit_code: self.ends.append(exit_code),
        )


class FakeMlflow(ModuleType):
    """The calls that FedKeel makes of mlflow, kept: a store of its own by place, and no more than 1,000 points at once."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.entities = SimpleNamespace(Metric=lambda key, value, timestamp, step: (key, step, value))
        self.stores: list[SimpleNamespace] = []

    def MlflowClient(self, tracking_uri: str) -> SimpleNamespace:
        store = SimpleNamespace(uri=tracking_uri, experiments=[], points=[], ended=None, name="")

        def create_run(number: str, run_name: str) -> SimpleNamespace:
            assert number == "7"
            store.name = run_name
            return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

        def log_batch(run: str, metrics: list[Any]) -> None:
            assert run == "r1"
            assert 0 < len(metrics) <= 1000
            store.points += metrics

        self.stores.append(store)
        return SimpleNamespace(
            get_experiment_by_name=lambda name: None,
            create_experiment=lambda name: store.experiments.append(name) or "7",
            create_run=create_run,
            log_batch=log_batch,
            set_terminated=lambda run, status: setattr(store, "ended", status),
        )


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> tuple[FakeWandb, FakeMlflow]:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", *fedkeel.runs.track.QUIET):
        monkeypatch.setenv(name, "")  # so that what FedKeel sets is taken back
        monkeypatch.delenv(name)
    wandb, mlflow = FakeWandb(), FakeMlflow()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return wandb, mlflow


def test_trackers_get_every_row_once_and_nothing_else(
    tiny_overrides: list[str], fakes: tuple[FakeWandb, FakeMlflow], tmp_path: Path
) -> None:
    """Cut in the second round and resumed: each begins anew, in the run's folder, with the rows that stand."""
    wandb, mlflow = fakes

    def interrupt(leg: str, done: int) -> None:
        if (leg, done) == ("federated", 2):
            raise KeyboardInterrupt

    both = [*tiny_overrides, *BASE, "track=tensorboard,wandb,mlflow"]
    with pytest.raises(KeyboardInterrupt):
        go(both, Silent(interrupt))
    _, folder, _ = go(both, resume=True)
    assert (wandb.ends, [s.ended for s in mlflow.stores]) == ([1, 0], ["KILLED", "FINISHED"])
    options = wandb.begun[1]
    assert options.pop("settings")["console"] == "off"
    assert options == {"project": "fedkeel", "name": "tiny", "dir": str(folder.path), "mode": "offline"}
    store = mlflow.stores[1]
    assert (store.uri, store.name) == (f"sqlite:///{(folder.path / 'mlflow.db').resolve()}", "tiny")
    assert store.experiments == ["fedkeel"]
    wanted = expected(rows_of(folder))
    assert Counter((key, step, single(value)) for key, step, value in store.points) == wanted
    told = Counter(
        (tag, line["round"], single(value)) for line in wandb.lines[1] for tag, value in line.items() if tag != "round"
    )
    assert told == wanted
    assert shown(folder.path) == wanted


def test_the_user_s_environment_says_where_points_go(
    fakes: tuple[FakeWandb, FakeMlflow], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import os

    wandb, mlflow = fakes
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    with Tracks(["wandb", "mlflow", "wandb"], tmp_path, "run", print):
        pass
    assert [(o["mode"], o["project"]) for o in wandb.begun] == [("online", "mine")]
    assert [s.uri for s in mlflow.stores] == ["https://mlflow.example"]
    # neither library tells its makers of its use
    assert {name: os.environ[name] for name in fedkeel.runs.track.QUIET} == fedkeel.runs.track.QUIET


def test_many_points_go_to_mlflow_in_parts(fakes: tuple[FakeWandb, FakeMlflow], tmp_path: Path) -> None:
    _, mlflow = fakes
    with Tracks(["mlflow"], tmp_path, "run", print) as tracks:
        tracks.log([row("score", n, round=n + 1) for n in range(2500)])
    assert [(key, step, value) for key, step, value in mlflow.stores[0].points] == [
        ("federated/score", n + 1, n) for n in range(2500)
    ]


def test_names_for_mlflow() -> None:
    assert (
        plain_name("sites/ward-1/federated/test/tasks/a b.c/own_score") == "sites/ward-1/federated/test/tasks/a b.c/own_score"
    )
    assert plain_name("tasks/a:b") == "tasks/a_3ab"
    assert plain_name("tasks/µ") == "tasks/_b5"
