"""A deployment's federation over the stand-in grid: three sites with private files, a coordinator with none, the same bits."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import shapes
import torch
import transformers
from safetensors.torch import load_file, save
from test_run import adapter_of, go, rows_of, same

pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")

from flower_grid import FakeGrid, Twist
from flwr.app import Context, RecordDict
from tiny import tiny_rows
from typer.testing import CliRunner

from fedkeel import tables
from fedkeel.cli import app as cli
from fedkeel.engines.coordinate import meanings_of, read_sums, reference_of
from fedkeel.engines.exported import check_heads
from fedkeel.engines.flower.apps import OneSentence, Waiting, client_app, server_app
from fedkeel.engines.hello import HelloError, read_hello
from fedkeel.engines.sitefile import SiteFileError, read_site
from fedkeel.engines.work import handle
from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.federation.server import FederationError
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import to_toml
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.runs.legs import Leg, Stage
from fedkeel.runs.rows import pooled_rows
from fedkeel.types import Head

SITES = ("ward-0", "ward-1", "ward-2")
KEPT = "federation.codec_up=topk=0.25+int4"


@pytest.fixture
def deployment(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> tuple[list[str], list[Path]]:
    """Overrides of the recipe, and a folder a site with its own rows and site.toml. The recipe's paths are none."""
    files = []
    for name in SITES:
        folder = tmp_path / name
        folder.mkdir()
        rows = [json.dumps(row) + "\n" for row in tiny_rows() if row["department"] == name]
        (folder / "rows.jsonl").write_text("".join(rows))
        (folder / "tasks.json").write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}}))
        text = f'name = "{name}"\nthreads = 1\n[model]\nbase = "{tiny_base}"\n[data]\nroot = "."\n[worker]\nwarm = false\n'
        (folder / "site.toml").write_text(text)
        files.append(folder / "site.toml")
    every = ["evaluation.test_rows=0", "evaluation.validation_rows=0", "evaluation.baselines=base"]
    return [*tiny_overrides, *every], files


def coordinate(
    overrides: list[str],
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    twist: Twist | None = None,
    wait: float = 60.0,
) -> RunFolder:
    """The ServerApp as Flower runs it: in a folder that holds the app, its path among those of imports.

    wait: seconds, at most, for sites that have not said hello."""
    recipe = load_recipe(None, [*overrides, "name=there"])
    app = tmp_path / "app"
    app.mkdir(exist_ok=True)
    text = to_toml(recipe).replace(recipe.model.base, "tiny_base").replace(recipe.data.root, "")
    (app / "recipe.toml").write_text(text)
    monkeypatch.syspath_prepend(str(app))
    grid = FakeGrid(client_app, len(files), twist, files)
    server_app(grid, Context(77, 1, {}, RecordDict(), {"sites": ",".join(SITES), "wait": wait}))
    return RunFolder(Path(recipe.out) / "there")


EARLY = ["federation.rounds=6", "train.lr=0.1", "federation.patience=1"]


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param([], id="mean", marks=pytest.mark.slow),
        pytest.param([KEPT], id="kept", marks=pytest.mark.slow),
        pytest.param(["federation.rule=residual"], id="shifts", marks=pytest.mark.slow),
        pytest.param(EARLY, id="early", marks=pytest.mark.slow),
    ],
)
def test_private_files_end_in_the_bits_of_one_process(
    rule: list[str], deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, files = deployment
    _, here, _ = go([*overrides, *rule])
    there = coordinate([*overrides, *rule], files, tmp_path, monkeypatch)
    mine, theirs = adapter_of(here.path), adapter_of(there.path)
    assert same(mine, theirs)
    best = [load_file(run.path / "best" / "adapter_model.safetensors") for run in (here, there) if (run.path / "best").exists()]
    assert len(best) == (0 if "federation.rule=residual" in rule else 2)
    assert not best or same(*best)
    ends = [[r["value"] for r in rows_of(run) if r["name"] in ("last_round", "best_round")] for run in (here, there)]
    assert ends[0] == ends[1]
    assert not ends[0] or ends[0][0] < 6
    config = json.loads((there.path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny_base"
    assert there.state().finished

    assert stated(there) == pytest.approx(stated(here))


@pytest.mark.slow
def test_the_doctor_says_where_the_rows_of_a_coordinators_run_are(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of such a run it judges what needs no row: the loss, how far test rows can tell, the codec."""
    overrides, files = deployment
    there = coordinate([*overrides, "federation.rounds=4"], files, tmp_path, monkeypatch)
    told = CliRunner().invoke(cli, ["doctor", str(there.path)])
    assert told.exit_code == 0, told.output
    said = " ".join(told.output.replace("│", " ").split())
    assert "is a coordinator's run, and its rows are at its sites; `fedkeel doctor` on the recipe, at a site" in said
    for words in (
        "training loss",
        "12 test rows of 2 tasks: a score alone is known to ±",
        "28.3 points",
        "federation.codec_up = 'fp32'",
    ):
        assert words in said
    # whoever has the rows may name them
    told = CliRunner().invoke(cli, ["doctor", str(there.path), f"data.root={tmp_path / 'gone'}"])
    assert "the rows were not looked at: " in told.output
    assert "coordinator's run" not in told.output


STREAM = ["stream.stages=colour,echo", "evaluation.baselines=base,local", "federation.rounds=2"]
METHOD = ["distill.weight=1", "distill.memory=0.4", "structure.heads=0.2", "structure.rank=0.1", "train.proximal=0.1"]


def stated(folder: RunFolder) -> dict[tuple[Any, ...], float]:
    """What a run says of scores, losses and bytes, by all that tells one row from another."""
    names = ("score", "accuracy", "rouge_l", "exact_match", "rows", "own_score", "loss", "positions", "bytes_up")
    rows = [r for r in rows_of(folder) if r["name"] in names or r["name"].startswith("score_of_stage")]
    return {(r["name"], r["method"], r["round"], r["stage"], r["site"], r["task"], r["split"]): r["value"] for r in rows}


@pytest.mark.parametrize(
    "more",
    [
        pytest.param([*METHOD, KEPT, "stream.average=0.5"], id="method"),
        pytest.param([], id="plain", marks=pytest.mark.slow),
        pytest.param(["federation.rule=residual"], id="shifts", marks=pytest.mark.slow),
    ],
)
def test_a_stream_and_its_baselines_end_in_the_bits_of_one_process(
    more: list[str], deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site knows which of its rows are whose stage's; ward-1 has none of the first, and is not asked in it. A local model
    is trained and scored where its rows are: of it the coordinator has the site's own score, and no other site's rows."""
    overrides, files = deployment
    lines = [line for line in (files[1].parent / "rows.jsonl").read_text().splitlines(True) if '"colour"' not in line]
    (files[1].parent / "rows.jsonl").write_text("".join(lines))
    (tmp_path / "all").mkdir()
    every = "".join((file.parent / "rows.jsonl").read_text() for file in files)
    (tmp_path / "all" / "rows.jsonl").write_text(every)
    (tmp_path / "all" / "tasks.json").write_text((files[0].parent / "tasks.json").read_text())
    told = [*overrides, *STREAM, *more, f"data.root={tmp_path / 'all'}"]
    _, here, _ = go(told)
    there = coordinate(told, files, tmp_path, monkeypatch)
    assert same(adapter_of(here.path), adapter_of(there.path))
    asked = {(r["site"], r["stage"]) for r in rows_of(there) if (r["name"], r["method"]) == ("loss", "federated")}
    assert asked == {(name, 1) for name in SITES} | {("ward-0", 0), ("ward-2", 0)}
    mine, its = stated(here), stated(there)
    assert its == pytest.approx({key: mine[key] for key in its})
    # in one process a local model is scored on the rows of all sites too
    left_out = {key for key in mine.keys() - its.keys() if not (key[1] == "local" and key[0] != "own_score")}
    assert not left_out
    assert {key[4] for key in its if key[:2] == ("own_score", "local")} == {"ward-1", "ward-2"}  # ward-0 has no test row
    assert {key[0] for key in its if key[1] == "base"} >= {"score", "score_of_stage_1", "score_of_stage_2", "own_score"}


@pytest.mark.slow
def test_a_stream_with_baselines_that_was_killed_goes_on_where_it_was(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second stage, in a local leg, and between a leg's end and its scores."""
    overrides, files = deployment
    told = [*overrides, *STREAM, KEPT, "federation.rounds=2"]
    _, here, _ = go(told)
    seen = 0

    def killed(message: Any, reply: Any) -> list[tuple[int, Any]]:
        nonlocal seen
        seen += 1
        if seen in stops:
            stops.remove(seen)
            raise KeyboardInterrupt
        return [(0, reply)]

    stops = {15, 40, 60}
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            coordinate(told, files, tmp_path, monkeypatch, killed)
    there = coordinate(told, files, tmp_path, monkeypatch, killed)
    assert not stops
    assert same(adapter_of(here.path), adapter_of(there.path))
    mine, its = stated(here), stated(there)
    assert its == pytest.approx({key: mine[key] for key in its})
    counts = [Counter(without_value(folder)) for folder in (here, there)]
    assert {key: n for key, n in counts[1].items() if "load_seconds" not in key} == {
        key: counts[0][key] for key in counts[1] if "load_seconds" not in key
    }


@pytest.mark.slow
def test_an_encoders_classifiers_are_exported_with_its_adapter(
    deployment: tuple[list[str], list[Path]], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, files = deployment
    encoder, data = shapes.base("bert"), tmp_path / "all"
    for file in files:
        file.write_text(file.read_text().replace(str(tiny_base), str(encoder)))
        rows = file.parent / "rows.jsonl"
        rows.write_text("".join(line for line in rows.read_text().splitlines(True) if '"colour"' in line))
    data.mkdir()
    (data / "rows.jsonl").write_text("".join((file.parent / "rows.jsonl").read_text() for file in files))
    (data / "tasks.json").write_text((files[0].parent / "tasks.json").read_text())
    told = [*overrides, f"data.root={data}", f"model.base={encoder}", "model.head=analytic"]
    _, here, _ = go(told)
    there = coordinate(told, files, tmp_path, monkeypatch)
    for name in ("adapter_model", "label_heads", "label_embeddings"):
        mine, its = (load_file(run.path / "adapter" / f"{name}.safetensors") for run in (here, there))
        assert same(mine, its), name
    assert stated(there) == pytest.approx(stated(here))


def test_a_sites_classifiers_are_the_coordinators() -> None:
    """Hand-worked: a = 6, W = [[1, 2], [−1, 0]] on a grid of 1/64, so 384 and 768, −384 and 0."""
    head = Head(("no", "yes"), torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), 6.0, torch.ones(2))
    right = torch.tensor([[384.0, 768.0], [-384.0, 0.0]])

    def given(tensors: dict[str, torch.Tensor], labels: object) -> dict[str, bytes]:
        return {"label_heads.safetensors": save(tensors), "fedkeel_classes.json": json.dumps({"labels": labels}).encode()}

    check_heads(given({"t": right}, {"t": ["no", "yes"]}), {"t": head})
    wrong: list[tuple[dict[str, torch.Tensor], object]] = [
        ({"t": right + 1}, {"t": ["no", "yes"]}),
        ({"t": right}, {"t": ["yes", "no"]}),
        ({"t": right[:1]}, {"t": ["no"]}),
        ({"t": right, "u": right + 0}, {"t": ["no", "yes"], "u": ["no", "yes"]}),
        ({}, {}),
    ]
    for tensors, labels in wrong:
        with pytest.raises(EnvelopeError, match="classifier"):
            check_heads(given(tensors, labels), {"t": head})
    check_heads({}, {})
    with pytest.raises(EnvelopeError, match="has classifiers, and the coordinator has none"):
        check_heads(given({"t": right}, {"t": ["no", "yes"]}), {})


def without_value(folder: RunFolder) -> list[str]:
    return [json.dumps({**r, "value": 0, "run": ""}) for r in rows_of(folder)]


def test_a_coordinator_that_was_killed_goes_on_where_it_was(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, files = deployment
    _, here, _ = go([*overrides, KEPT])

    seen = 0

    def killed(message: Any, reply: Any) -> list[tuple[int, Any]]:
        nonlocal seen
        seen += message.metadata.message_type == "train"
        if seen == 8:  # after two of three sites have done their third round
            raise KeyboardInterrupt
        return [(0, reply)]

    with pytest.raises(KeyboardInterrupt):
        coordinate([*overrides, KEPT], files, tmp_path, monkeypatch, killed)
    there = coordinate([*overrides, KEPT], files, tmp_path, monkeypatch)
    assert same(adapter_of(here.path), adapter_of(there.path))
    rounds = [r["round"] for r in rows_of(there) if r["name"] == "loss" and r["site"] == "ward-0"]
    assert rounds == [1, 2, 3]
    with pytest.raises(FederationError, match="has ended"):
        coordinate([*overrides, KEPT], files, tmp_path, monkeypatch)


def test_a_site_with_another_base_is_refused_before_training(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    overrides, files = deployment
    base = Path(read_site(files[1]).base)
    shutil.copytree(base, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    name = next(n for n in weights if "q_proj" in n)
    weights[name] = weights[name] * 1.5
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    files[1].write_text(files[1].read_text().replace(str(base), str(tmp_path / "other")))
    with pytest.raises(FederationError) as stopped:
        coordinate(overrides, files, tmp_path, monkeypatch)
    assert "2 of 3 sites are fit to train" in str(stopped.value)
    assert "--- ward-1: refused before training: its base model is not that of the other sites" in str(stopped.value)
    assert not (Path(load_recipe(None, overrides).out) / "there").exists()
    there = coordinate([*overrides, "federation.quorum=0.6"], files, tmp_path, monkeypatch)
    losses = {r["site"] for r in rows_of(there) if r["name"] == "loss"}
    assert losses == {"ward-0", "ward-2"}


def test_sites_that_mean_different_things_by_a_task_are_refused(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other labels, or another question to the same rows; what else a site's tasks file says does not matter."""
    overrides, files = deployment
    tasks = [file.with_name("tasks.json") for file in files]
    tasks[0].write_text(json.dumps({"colour": {"labels": ["red", "green", "blue"]}, "other": {"labels": ["x"]}}))
    tasks[1].write_text(json.dumps({"colour": {"labels": ["red", "green", "blue", "white"]}}))
    with pytest.raises(FederationError) as stopped:
        coordinate(overrides, files, tmp_path, monkeypatch)
    told = "--- ward-1: refused before training: the labels or the instruction of its task 'colour' are not those of the other"
    assert told in str(stopped.value)
    assert "ward-0" not in str(stopped.value)
    tasks[1].write_text(tasks[2].read_text())
    rows = files[2].with_name("rows.jsonl")
    rows.write_text(rows.read_text().replace("Which colour?", "What colour is it?"))
    with pytest.raises(FederationError, match="--- ward-2: refused before training: the labels or the instruction"):
        coordinate(overrides, files, tmp_path, monkeypatch)


def test_sites_that_ask_a_free_task_otherwise_are_refused(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The instruction of a task without labels, which its tasks file gives, is what sites mean by it too."""
    overrides, files = deployment
    for file, asks in zip(files, ("Repeat the verb.", "Say the verb.", "Repeat the verb."), strict=True):
        rows = [json.loads(line) for line in (file.parent / "rows.jsonl").read_text().splitlines()]
        for row in rows:
            if row["task"] == "echo":
                del row["instruction"]
        (file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks = {"colour": {"labels": ["red", "green", "blue"]}, "echo": {"instruction": asks}}
        (file.parent / "tasks.json").write_text(json.dumps(tasks))
    with pytest.raises(FederationError, match=r"2 of 3 sites are fit to train[\s\S]*ward-1.*task 'echo'"):
        coordinate(overrides, files, tmp_path, monkeypatch)


def test_the_head_alone_beside_a_rule_that_moves_the_base(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its rows say through the base a site is asked without a word of shifts."""
    overrides, files = deployment
    given = [*overrides, "federation.rule=residual", "federation.rounds=1", "train.local_steps=1"]
    there = coordinate([*given, 'evaluation.baselines=["analytic"]'], files, tmp_path, monkeypatch)
    assert {r["task"] for r in rows_of(there) if (r["method"], r["name"], r["split"]) == ("analytic", "score", "test")} >= {""}


HELLO = {
    "base": "a",
    "tokenizer": "t",
    "kind": "causal",
    "classes": "c",
    "layout": "l",
    "initial": "i",
    "tasks": {},
    "rows": [{"train": 3}],
    "encoded": [3],
    "versions": {"torch": "2"},
    "load_seconds": 0.5,
}


def test_what_most_sites_mean_by_a_task() -> None:
    said = {"x": {"t": "1", "u": "5"}, "y": {"t": "2"}, "z": {"t": "1"}, "old": {}}
    hellos = {site: read_hello(HELLO | {"tasks": tasks}) for site, tasks in said.items()}
    assert meanings_of(hellos) == {"t": "1", "u": "5"}
    with pytest.raises(FederationError, match="the labels or the instruction of task 't', x against y: nothing was trained"):
        meanings_of({name: hellos[name] for name in "xy"})


def test_one_coordinator_a_run(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, files = deployment
    folder = Path(load_recipe(None, overrides).out) / "there"
    with RunFolder(folder).alone(), pytest.raises(RunError, match=f"is being worked on by process {os.getpid()}"):
        coordinate(overrides, files, tmp_path, monkeypatch)
    assert not folder.exists()


def test_most_sites_say_what_belongs() -> None:
    one, two, three = (read_hello(HELLO | more) for more in ({}, {"base": "b"}, {"base": "b", "initial": "j"}))
    assert reference_of({"x": one, "y": one, "z": two}) == one.one
    with pytest.raises(FederationError, match="disagree about the base model and the initial adapter, x against y"):
        reference_of({"x": one, "y": three})


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"encoded": 5}, "encoded = 5 where a list belongs"),
        ({"encoded": [True]}, "True for a number of rows in encoded"),
        ({"versions": [1]}, r"versions = \[1\] where an object belongs"),
        ({"rows": [7]}, "rows = 7 where an object belongs"),
        ({"rows": [{"train": -1}]}, "-1 for a number of rows in rows"),
        ({"tasks": {"a": 3}}, "a = 3 where a text belongs"),
        ({"base": None}, "base = None where a text belongs"),
        ({"load_seconds": float("nan")}, "load_seconds = nan"),
    ],
)
def test_a_hello_that_is_none_is_refused_with_its_key(more: dict[str, Any], told: str) -> None:
    with pytest.raises(HelloError, match=told):
        read_hello(HELLO | more)


def test_pooled_scores_by_hand(tiny_overrides: list[str]) -> None:
    """Task t: 3 of 4 rows at one site, 1 of 6 at the other; task u: half of 2 at one. Means over rows, then over tasks."""
    leg = Leg("federated", "federated", 1, [Stage(load_recipe(None, tiny_overrides), {})])
    sums = {
        "a": {0: {"t": {"score": (3.0, 4.0), "accuracy": (3.0, 4.0)}, "u": {"score": (1.0, 2.0), "rouge_l": (1.0, 2.0)}}},
        "b": {0: {"t": {"score": (1.0, 6.0), "accuracy": (1.0, 6.0)}}},
    }
    found = {(r.name, r.task, r.site): r.value for r in pooled_rows(leg, 0, 1, "test", sums, "run")}
    assert found == pytest.approx(
        {
            ("score", "t", ""): 0.4,
            ("accuracy", "t", ""): 0.4,
            ("rows", "t", ""): 10,
            ("score", "u", ""): 0.5,
            ("rouge_l", "u", ""): 0.5,
            ("rows", "u", ""): 2,
            ("score", "", ""): 0.45,
            ("accuracy", "", ""): 0.4,
            ("rouge_l", "", ""): 0.5,
            ("own_score", "", "a"): 0.625,
            ("own_score", "", "b"): 1 / 6,
        }
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "name is not set"),
        (
            'name = "a"\n[data]\nmax_length = 4',
            r"unknown key 'data.max_length'; .*\[data\] has root, files, tasks_file, site_column, dataset, subset",
        ),
        ('name = "a"\nseed = 4', r"unknown key 'seed'; .* there are name, state, device, threads"),
        ('name = "a"\n[worker]\nkye = "k"', "unknown key 'worker.kye'; did you mean 'worker.key'"),
        ('name = "a"\nworker = 1', "worker is a table of keys"),
        ('name = "a"\n[worker]\nwarm = "no"', "worker.warm = 'no': bool belongs here"),
        ('name = "a"\nthreads = 0', "threads = 0: must be at least 1"),
        (f'name = "a"\n[worker]\nsocket = "{"x" * 120}"', "at most 100 bytes"),
        ("name = ", "cannot be read"),
    ],
)
def test_a_site_file_says_what_is_wrong(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(SiteFileError, match=told):
        read_site(tmp_path / "site.toml")


def test_a_site_file_is_read_with_whole_paths(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_text('name = "a"\nstate = "s"\n[model]\nbase = "./b"\n[data]\nroot = ".."\nfiles = ["r"]')
    os.chdir(tmp_path)
    site = read_site(Path("site.toml"))
    assert (site.state, site.base, site.data) == (
        tmp_path / "s",
        str(tmp_path / "b"),
        {"root": str(tmp_path.parent), "files": ("r",)},
    )


def test_what_needs_no_rows_is_done_where_there_are_none(
    deployment: tuple[list[str], list[Path]], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator's run: exported, merged with a base that is named, reported, asked; what needs rows says so."""
    overrides, files = deployment
    there = coordinate([*overrides, "federation.rounds=1"], files, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)

    def told(*command: str) -> tuple[int, str]:
        found = CliRunner().invoke(cli, [*command])
        return found.exit_code, f"{found.output}{found.exception or ''}"

    assert told("export", str(there.path), "plain")[0] == 0
    assert same(load_file(tmp_path / "plain" / "adapter_model.safetensors"), adapter_of(there.path))
    code, text = told("export", str(there.path), "whole", "--merged")
    assert code
    assert "tiny_base" in text
    assert told("export", str(there.path), "whole", "--merged", "--base", str(tiny_base))[0] == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=merged.dtype)
    expected = peft.PeftModel.from_pretrained(base, there.path / "adapter").merge_and_unload()
    ids = torch.tensor([[1, 3, 40, 41, 42]])
    assert torch.allclose(merged(ids).logits, expected(ids).logits, atol=1e-5)
    assert told("report", str(there.path))[0] == 0
    assert "not finished" not in (there.path / "report.md").read_text()
    code, text = told("ask", str(there.path), "the red cat", "--tokens", "2", "--base", str(tiny_base))
    assert code == 0, text
    code, text = told("evaluate", str(there.path), "--base", str(tiny_base))
    assert code
    assert "data.root is not set" in text


@pytest.mark.slow
def test_a_report_of_a_federation_that_ended_does_not_miss_what_cannot_be_there(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local-only model is scored on its own site's rows alone, and has no score on all of them."""
    overrides, files = deployment
    there = coordinate([*overrides, "evaluation.baselines=local", "federation.rounds=1"], files, tmp_path, monkeypatch)
    assert CliRunner().invoke(cli, ["report", str(there.path)]).exit_code == 0
    assert "not finished" not in (there.path / "report.md").read_text() + (there.path / "report.html").read_text()


def test_a_recipe_that_a_site_has_not_agreed_to_is_refused(
    deployment: tuple[list[str], list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two agree to what is sent, one to another: it trains nothing, and says what it agreed to, once and to the coordinator."""
    overrides, files = deployment
    recipe = load_recipe(None, [*overrides, "name=there"])
    text = to_toml(recipe).replace(recipe.model.base, "tiny_base").replace(recipe.data.root, "")
    agreed = hashlib.sha256(text.encode()).hexdigest()
    for file, seal in zip(files, (agreed, agreed, "0" * 64), strict=True):
        file.write_text(f'recipe_sha256 = "{seal}"\n{file.read_text()}')
    with pytest.raises(FederationError, match=r"2 of 3 sites are fit to train"):
        coordinate(overrides, files, tmp_path, monkeypatch, wait=3.0)
    assert (
        capsys.readouterr().out.count("note: node 886: site ward-2 refuses: it agreed to the recipe with sha256 0000000000")
        == 1
    )
    said, _ = handle({"recipe": text, "run": "r", "kind": "train", "site": ""}, b"", read_site(files[2]))
    assert "it agreed to the recipe with sha256 0000000000000000" in said["error"]
    assert agreed in said["error"]


@pytest.mark.slow
def test_a_base_that_is_at_the_sites_is_not_looked_for_elsewhere(
    deployment: tuple[list[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, files = deployment
    there = coordinate([*overrides, "federation.rounds=1"], files, tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(cli, ["ask", str(there.path), "the red cat"])
    assert "'tiny_base' of this run is a folder at its sites: say where it is here with --base PATH" in str(refused.exception)


def test_who_has_come_and_who_is_waited_for_is_told() -> None:
    told: list[str] = []
    here = Waiting(["b", "a", "c"], told.append)
    assert not here({})
    assert not here({"b": 1})
    assert not here({"b": 1})
    assert here({"b": 1, "a": 2, "c": 3})
    assert told == ["b said hello; waiting for a, c", "a, c said hello; all are here"]


def test_what_stops_a_federation_is_one_sentence_in_flowers_log() -> None:
    """Its own errors without a traceback; what nobody foresaw keeps it. Flower logs them as here (run_serverapp)."""
    log, told = logging.getLogger("flwr.quiet"), io.StringIO()
    handler = logging.StreamHandler(told)
    log.addHandler(handler)
    log.propagate = False
    log.addFilter(OneSentence())
    for error in (FederationError("2 of 3 sites are fit to train: 100 % more are needed"), OSError("the disk is gone")):
        try:
            raise error
        except Exception as found:
            log.error("%s raised an exception", "ServerApp", exc_info=found)
    first, rest = told.getvalue().split("\n", 1)
    assert first == "fedkeel: 2 of 3 sites are fit to train: 100 % more are needed"
    assert rest.startswith("ServerApp raised an exception\nTraceback")
    assert rest.count("Traceback") == 1


def told(**changed: Any) -> dict[str, Any]:
    """What a site of ten rows, six of a task of labels and four of free answers, says of an evaluation."""
    labels: dict[str, Any] = {"score": [4.0, 6], "accuracy": [4.0, 6]}
    free: dict[str, Any] = {"score": [1.5, 4], "rouge_l": [1.5, 4], "nats": [90.0, 40]}
    return {"sums": {"0": {"colour": labels | changed, "echo": free}}}


def test_a_site_speaks_for_the_rows_that_it_has() -> None:
    assert tables.by_token("nats")
    assert read_sums(told(), 1, 10, 32) == {
        0: {"colour": {"score": (4, 6), "accuracy": (4, 6)}, "echo": {"score": (1.5, 4), "rouge_l": (1.5, 4), "nats": (90, 40)}}
    }
    for header in (
        told(score=[4.0, 7], accuracy=[4.0, 7]),  # with the other task's four more than ten
        told(score=[1e300, 1e300]),
        told(score=[math.inf, math.inf]),
        told(score=[math.nan, 6]),
        told(score=[7.0, 6]),
        told(score=[-1.0, 6]),
        told(accuracy=[4.0, 11]),
        told(nats=[1.0, 321]),
        told(nats=[math.inf, 6]),
        told(bytes_up=[0.0, 6]),
        {"sums": {"1": told()["sums"]["0"]}},
        {"sums": {"0": {"colour": {"accuracy": [4.0, 6]}}}},
        {"sums": {"0": {f"task {n}": {"score": [0.0, 1]} for n in range(4097)}}},
    ):
        with pytest.raises(ValueError, match=r"colour|echo|stage|4097"):
            read_sums(header, 1, 10, 32)
