"""Membership inference by hand, on models that learnt rows by heart and on models that learnt nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapes
import torch
from test_half import rounded
from test_run import go
from typer.testing import CliRunner

from fedkeel.cli import app
from fedkeel.data.canaries import canaries
from fedkeel.data.sources import load_records
from fedkeel.evidence.leaks.audit import audit, exposed, pairs
from fedkeel.evidence.leaks.ranks import attacked, auc, hits
from fedkeel.evidence.report import write_report
from fedkeel.evidence.report.leaks import Exposed
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import row_nats
from fedkeel.types import FedKeelError

WHOLE = ["evaluation.baselines=[]", "data.test_share=0.4", "data.validation_share=0.1"]


def test_auc_and_hits_by_hand() -> None:
    """Of 3 × 2 pairs: 3 beats both, 2 beats one and ties with none, 1 ties with one: (2 + 1 + 0.5) / 6."""
    members, others = np.array([3.0, 2.0, 1.0]), np.array([2.5, 1.0])
    assert auc(members, others) == pytest.approx(3.5 / 6)
    assert auc(others, members) == pytest.approx(2.5 / 6)
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 9, 40).astype(float), draw.integers(0, 9, 30).astype(float)
    slow = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert auc(a, b) == pytest.approx(slow)
    assert hits(np.array([5.0, 1.0, 9.0, 4.0]), np.arange(100) / 20, 0.01) == pytest.approx(0.5)  # above 4.9: 5 and 9


def test_the_interval_holds_the_auc_of_two_normals() -> None:
    """N(1, 1) against N(0, 1): Φ(1/√2) = 0.760; without a difference ½ is inside."""
    draw = np.random.default_rng(1)
    found = attacked("loss", draw.normal(1, 1, 400), draw.normal(0, 1, 400), 1)
    assert found.low < 0.760 < found.high
    assert found.high - found.low < 0.1
    none = attacked("loss", draw.normal(0, 1, 400), draw.normal(0, 1, 400), 1)
    assert none.low < 0.5 < none.high


def rows(folder: Path, count: int) -> list[str]:
    """Rows whose answer cannot be known from the question."""
    draw = np.random.default_rng(3)
    words = ["red", "green", "blue", "cat", "dog", "bird", "tree", "house", "river", "stone"]
    made = [
        {
            "department": f"ward-{n % 3}", "split": "train" if n % 2 else "test", "task": "echo",
            "instruction": "Repeat the verb.", "input": f"line {n}", "output": " ".join(draw.choice(words, 4)),
        }
        for n in range(count)
    ]  # fmt: skip
    (folder / "secrets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return [f"data.root={folder}", 'data.files=["secrets.jsonl"]', 'data.tasks_file=""', "evaluation.baselines=[]"]


@pytest.mark.slow
def test_rows_learnt_by_heart_are_found_and_others_are_not(tiny_overrides: list[str], tmp_path: Path) -> None:
    given = [*tiny_overrides, *rows(tmp_path, 80), "evaluation.test_rows=2", "evaluation.validation_rows=1"]
    alone = ["partition.scheme=iid", "partition.sites=1", "federation.rounds=1", "train.local_steps=300"]
    heart = ["name=heart", *alone, "train.lr=0.01", "lora.rank=16", "train.batch_size=8"]
    _, learnt, _ = go([*given, *heart])
    _, idle, _ = go([*given, "name=idle", "federation.rounds=1", "train.local_steps=1", "train.lr=1e-6"])
    by_heart, nothing = (audit(prepare(load_recipe(run.path / "recipe.toml")), run.path).attacks for run in (learnt, idle))
    loss, reference = by_heart
    assert loss.low > 0.75
    assert reference.low > 0.55
    assert all(one.low < 0.5 < one.high for one in nothing)
    assert {(one.members, one.others) for one in by_heart} == {(40, 40)}
    told = CliRunner().invoke(app, ["audit", str(learnt.path)])
    assert told.exit_code == 0, told.output
    assert f"{by_heart[0].auc:.3f}" in told.output
    page = write_report(learnt.path)
    for text in (page.read_text(), page.with_suffix(".html").read_text()):
        assert "Who was trained on" in text
        assert "What one update tells" in text
        assert f"{by_heart[1].auc:.3f}" in text
    (learnt.path / "audit.json").write_text("[1]")
    with pytest.raises(FedKeelError, match=r"audit\.json cannot be read"):
        write_report(learnt.path)


def test_as_many_of_each_task_and_no_row_on_both_sides(tiny_overrides: list[str]) -> None:
    prepared = prepare(load_recipe(None, tiny_overrides))
    members, others = pairs(prepared)
    assert {r.split for r in members} == {"train"}
    assert {r.split for r in others} == {"test"}
    for task in ("colour", "echo"):
        assert sum(r.task == task for r in members) == sum(r.task == task for r in others) == 6


def test_nats_of_a_row_are_those_of_transformers(tiny_overrides: list[str]) -> None:
    """Summed over the answer's tokens, whatever else is in the batch."""
    recipe, folder, _ = go([*tiny_overrides, "evaluation.baselines=[]"])
    model, prepared = trained_model(recipe, folder.path), prepare(recipe)
    examples = formatter_of(model, prepared).encode_all(prepared.sites.all("test"))
    found = row_nats(model, examples, 5)
    for example, nats in zip(examples, found.tolist(), strict=True):
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.tensor([example.supervised]), ids, -100)
        with torch.no_grad():
            loss = model.net(input_ids=ids, labels=labels).loss
        assert nats == pytest.approx(float(loss) * example.positions, rel=1e-4)


@pytest.mark.parametrize(("name", "more"), [("bert", []), ("llama", ["model.precision=bf16"])])
def test_an_encoder_and_a_pass_in_bf16_are_attacked_too(
    name: str, more: list[str], tiny_overrides: list[str], tmp_path: Path
) -> None:
    """Of 24 rows on each side; and words are looked for in one update."""
    rows = [
        {"split": ("train", "test")[n % 2], "text": f"line {n} {n % 7}", "label": ("red", "blue")[n // 2 % 2]}
        for n in range(48)
    ]
    (tmp_path / "lines.jsonl").write_text(
        "".join(json.dumps({**row, "ward": f"w{n // 4 % 2}"}) + "\n" for n, row in enumerate(rows))
    )
    made = rounded(name, tmp_path / "base") if more else shapes.base(name)
    given = [
        *tiny_overrides, *more, f"model.base={made}", f"data.root={tmp_path}", 'data.files=["lines.jsonl"]',
        'data.tasks_file=""', "data.site_column=ward", "evaluation.baselines=[]", "federation.rounds=1", "train.local_steps=1",
        "evaluation.test_rows=0",
    ]  # fmt: skip
    _, folder, _ = go(given)
    found = audit(prepare(load_recipe(folder.path / "recipe.toml")), folder.path)
    assert [(one.members, one.others) for one in found.attacks] == [(24, 24), (24, 24)]
    assert all(0 <= one.low <= one.auc <= one.high <= 1 for one in found.attacks)
    assert {one.what for one in found.updates} >= {"words"}


def test_too_few_rows_are_refused(tiny_overrides: list[str]) -> None:
    _, folder, _ = go([*tiny_overrides, "evaluation.baselines=[]"])
    with pytest.raises(FedKeelError, match="too few to attack"):
        audit(prepare(load_recipe(None, tiny_overrides)), folder.path)


@pytest.mark.slow
def test_secrets_that_were_learnt_are_exposed(tiny_overrides: list[str], tmp_path: Path) -> None:
    """Three at one site, twelve of each among its rows, against the same run that trains on next to nothing."""
    alone = ["partition.scheme=iid", "partition.sites=1", "federation.rounds=1", "train.local_steps=300", "train.batch_size=8"]
    given = [*tiny_overrides, "evaluation.baselines=[]", *alone, "lora.rank=16", "audit.canaries=3", "audit.copies=40"]
    found = {}
    for name, rate in (("learnt", "0.01"), ("idle", "1e-9")):
        _, folder, _ = go([*given, f"name={name}", f"train.lr={rate}", "data.test_share=0.4"])
        prepared = prepare(load_recipe(folder.path / "recipe.toml"))
        model = trained_model(prepared.recipe, folder.path)
        found[name] = exposed(model, formatter_of(model, prepared), prepared.recipe)
    assert [one.codes for one in found["learnt"]] == [500] * 3
    assert [one.base_rank for one in found["learnt"]] == [one.rank for one in found["idle"]]
    assert sum(one.exposure for one in found["learnt"]) > sum(one.exposure for one in found["idle"]) + 3
    assert Exposed("x", 1, 1, 512).exposure == 9
    assert Exposed("x", 512, 1, 512).exposure == 0


def test_where_secrets_are_planted(tiny_overrides: list[str]) -> None:
    """Among the training rows of one site, and in no test; the same codes for a seed, others for another."""
    given = [*tiny_overrides, "audit.canaries=2", "audit.copies=3"]
    prepared = prepare(load_recipe(None, [*given, "audit.site=ward-2"]))
    held = {name: [r for r in of["train"] if r.task == "canary"] for name, of in prepared.stages[-1].rows.items()}
    assert {name: len(rows) for name, rows in held.items()} == {"ward-0": 0, "ward-1": 0, "ward-2": 6}
    assert len({r.output for r in held["ward-2"]}) == 2
    assert not [r for split in ("validation", "test") for r in prepared.stages[-1].all(split) if r.task == "canary"]
    assert any("2 secrets are planted at site ward-2, 3 of each" in note for note in prepared.notes)
    again, other = (canaries(prepared.recipe.audit, seed, "") for seed in (prepared.recipe.seed, 99))
    assert {r.output for r in again} == {r.output for r in held["ward-2"]}
    assert not {r.output for r in other} & {r.output for r in again}
    with pytest.raises(ConfigError, match=r"audit\.site = 'ward-9': no site of that name"):
        prepare(load_recipe(None, [*given, "audit.site=ward-9"]))
    # at one site of a deployment, which sees its own rows alone
    mine = [r for r in load_records(prepared.recipe.data, prepared.recipe.seed) if r.site == "ward-1"]
    with pytest.raises(ConfigError, match=r"audit\.site: a site alone knows of no other"):
        prepare(load_recipe(None, given), alone="ward-1", records=mine)
    for site, planted in (("ward-1", 6), ("ward-2", 0)):
        alone = prepare(load_recipe(None, [*given, f"audit.site={site}"]), alone="ward-1", records=mine)
        assert sum(r.task == "canary" for r in alone.sites.all("train")) == 0  # in the last stage, and not in the data
        assert sum(r.task == "canary" for r in alone.stages[-1].all("train")) == planted
