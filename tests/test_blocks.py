"""Which blocks go first: influence against one row at a time, scores without the least, and what is then exported."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from shapes import LAYERS
from shapes import base as shape
from test_measure import data, run, values  # noqa: F401 - `data` is a fixture
from torch import Tensor
from typer.testing import CliRunner

from fedkeel.cli import app
from fedkeel.data.batches import collate
from fedkeel.evidence.measure.blocks import Weighed, order_of
from fedkeel.evidence.measure.parts import measure
from fedkeel.evidence.measure.run import Finished, Settings
from fedkeel.evidence.report import read_rows
from fedkeel.evidence.report.run_charts import blocks_table
from fedkeel.model.depth import without
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import Prepared, prepare
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import choose, overall, score

DEPTH = Settings(("depth",), rows=6, states=False, speculation=False)


@pytest.fixture(scope="module")
def held(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Those rows, a quarter of the training ones for validation."""
    to = tmp_path_factory.mktemp("held")
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["split"] = "validation" if row["split"] == "train" and number % 4 == 1 else row["split"]
    (to / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (to / "tasks.json").write_text((data / "tasks.json").read_text())
    return to


@pytest.fixture(scope="module")
def folder(held: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a base of two blocks."""
    return run(shape("llama"), held, tmp_path_factory.mktemp("blocks"))


def loaded(folder: Path) -> tuple[Model, Prepared]:
    recipe = load_recipe(folder / "recipe.toml")
    model = trained_model(recipe, folder)
    model.train(False)
    return model, prepare(recipe)


@torch.no_grad()
def one_by_one(model: Model, prepared: Prepared, rows: int, gone: Sequence[int] = ()) -> list[float]:
    """1 − cos of what each block is given and gives, over every position of every row by itself, without those of `gone`."""
    apart: list[list[float]] = [[] for _ in range(LAYERS)]

    def see(number: int, given: tuple[Any, ...], output: Any) -> None:
        x, y = given[0][0].double(), (output[0] if isinstance(output, tuple) else output)[0].double()
        apart[number] += [1 - float(a @ b) / float(a.norm() * b.norm()) for a, b in zip(x, y, strict=True)]

    hooks = [
        block.register_forward_hook(lambda m, given, output, number=number: see(number, given, output))
        for number, (_, block) in enumerate(model.places.stack)
    ]
    formatter = formatter_of(model, prepared)
    for record in choose(prepared.stages[-1].all("validation"), "validation", rows):
        batch = collate([formatter.encode(record)], model.kind, model.tokenizer.pad_token_id, len(model.classes))
        with without([model.places.stack[n][1] for n in gone], [model.places.forms[n] for n in gone]):
            model.forward(batch)
    for hook in hooks:
        hook.remove()
    return [sum(values) / len(values) for values in apart]


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "t5"))])
def test_influence_is_that_of_one_row_at_a_time(name: str, held: Path, tmp_path: Path) -> None:
    only = ["data.tasks=colour"] if name == "bert" else []
    folder = run(shape(name), held, tmp_path, *only)
    found = values(measure([folder], DEPTH)[folder].rows)
    told = [found[f"blocks/influence/{n}"] for n in range(LAYERS)]
    expected = one_by_one(*loaded(folder), 6)
    assert told == pytest.approx(expected, rel=1e-4)
    assert min(told) > 0
    assert told[0] != pytest.approx(told[1], rel=1e-2)


def test_influence_is_weighed_anew_when_a_block_has_gone(folder: Path) -> None:
    model, prepared = loaded(folder)
    run = Finished(folder, prepared, model, DEPTH, lambda *_: None)
    assert Weighed(run).influence([0]) == pytest.approx([0.0, one_by_one(model, prepared, 6, [0])[1]], rel=1e-4, abs=1e-9)
    assert one_by_one(model, prepared, 6, [0])[1] != pytest.approx(one_by_one(model, prepared, 6)[1], rel=1e-2)


def test_blocks_go_one_after_the_other_each_the_least_of_what_is_left() -> None:
    """Blocks 2 and 3 do the same: each is idle beside the other, and needed without it."""
    asked: list[list[int]] = []

    def influence(gone: Sequence[int]) -> list[float]:
        asked.append(list(gone))
        weighed = [0.0, 0.3, 0.1, 0.1, 0.2, 0.4, 0.9]
        if {2, 3} & {*gone}:
            weighed[2] = weighed[3] = 0.8
        return [0.0 if n in gone else value for n, value in enumerate(weighed)]

    # of equal ones the higher; then as weighed; the fourth and on by what they have when half of the seven have gone
    assert order_of(7, influence) == [3, 4, 1, 5, 2, 6]
    assert asked == [[], [3], [3, 4], [1, 3, 4]]
    assert order_of(2, lambda gone: [0.5, 0.5]) == [1]
    assert order_of(1, influence) == []


def test_scores_are_those_without_the_least(folder: Path) -> None:
    found = values(measure([folder], DEPTH)[folder].rows)
    model, prepared = loaded(folder)
    assert [found[f"blocks/{share}/kept"] for share in (0.1, 0.2, 0.3)] == [LAYERS, LAYERS, LAYERS - 1]
    records = choose(prepared.stages[-1].all("test"), "test", 6)
    gone = 1  # of two blocks the first stays
    with without([model.places.stack[gone][1]], [model.places.forms[gone]]):
        short = overall(score(model, formatter_of(model, prepared), records, prepared.recipe.evaluation))
    assert found["blocks/0.3/score"] == pytest.approx(short)
    assert found["blocks/0.1/score"] == pytest.approx(found["damage/clean"])
    assert all(found[f"blocks/{share}/seconds"] > 0 for share in (0.1, 0.2, 0.3))


def test_without_validation_rows_nothing_is_weighed(data: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = run(shape("llama"), data, tmp_path, "federation.rounds=1")
    found = measure([folder], DEPTH)[folder]
    assert "blocks not measured, as there are no validation rows to weigh blocks by" in " ".join(found.notes)
    assert not [r for r in found.rows if r.name.startswith("blocks/")]
    told = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "short"), "--depth", "0.5", "--least"])
    assert "says nothing of the order in which 2 blocks may go: `fedkeel measure" in str(told.exception)
    assert not (tmp_path / "short").exists()


@torch.no_grad()
def said(net: Any, tokenizer: Any) -> Tensor:
    inputs = tokenizer("the red boat sails", return_tensors="pt")
    logits: Tensor = net(input_ids=inputs["input_ids"]).logits
    return logits


@pytest.mark.parametrize("merged", [False, True])
def test_a_shorter_model_is_exported_with_what_it_stands_on(merged: bool, folder: Path, tmp_path: Path) -> None:
    measure([folder], DEPTH)
    target = tmp_path / "short"
    told = CliRunner().invoke(
        app, ["export", str(folder), str(target), "--depth", "0.5", "--least", *(["--merged"] if merged else [])]
    )
    assert told.exit_code == 0, told.output
    assert "1 of 2 blocks are left, without 1 (from 0)" in " ".join(told.output.split())
    assert "%" not in told.stderr  # no bars of others
    card = (target / "README.md").read_text()
    assert "**1 of 2 blocks are left, without 1 (from 0)**" in card
    load = transformers.AutoModelForCausalLM.from_pretrained
    if merged:
        net = load(target, dtype=torch.float32)
        assert not (target / "base").exists()
    else:
        assert 'from_pretrained("./base")' in card
        net = peft.PeftModel.from_pretrained(load(target / "base", dtype=torch.float32), target)
    assert net.config.num_hidden_layers == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    model, _ = loaded(folder)
    with without([model.places.stack[1][1]], [model.places.forms[1]]):
        expected = said(model.net, tokenizer)
    torch.testing.assert_close(said(net.eval(), tokenizer), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(["--depth", "0.5", "--gguf"], "leave --gguf out"), (["--least"], "--least says which blocks --depth leaves out")],
)
def test_what_does_not_go_together(arguments: list[str], what: str, folder: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "x"), *arguments])
    assert what in str(told.exception)
    assert not (tmp_path / "x").exists()


def test_the_rows_are_in_the_runs_measures_and_its_report(folder: Path) -> None:
    measure([folder], DEPTH)
    table, found = blocks_table(read_rows(folder / "measures.jsonl")), values(read_rows(folder / "measures.jsonl"))
    assert table.lines[-1][:2] == ("1", f"{100 * found['blocks/0.3/score']:.1f}")
    assert found["blocks/turn/1"] == 1  # the first, block 0, has no turn
    assert f"while all are there: 1 ({found['blocks/influence/1']:.3f})." in table.notes[0]
    earlier = [r for r in read_rows(folder / "measures.jsonl") if "/turn/" not in r.name]  # of a version that had no turns
    assert "weighed once" in blocks_table(earlier).notes[0]
    assert f": 1 ({found['blocks/influence/1']:.3f})." in blocks_table(earlier).notes[0]
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    assert table.title in (folder / "report.html").read_text()
    assert {r.split for r in read_rows(folder / "measures.jsonl") if r.name.startswith("blocks/influence/")} == {"validation"}
