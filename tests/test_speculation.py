"""Drafts of the lower blocks: counts by hand, and against a loop that really drafts and checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from shapes import LAYERS
from shapes import base as shape
from test_measure import data, run, values  # noqa: F401 - `data` is a fixture
from typer.testing import CliRunner

from fedkeel.cli import app
from fedkeel.data.batches import collate
from fedkeel.data.format import Example, Formatter
from fedkeel.evidence.measure.parts import measure
from fedkeel.evidence.measure.run import Settings
from fedkeel.evidence.measure.speculation import AHEAD, SHARES, Drafted, drafted, together
from fedkeel.evidence.report import read_rows
from fedkeel.evidence.report.run_charts import drafts_table
from fedkeel.model.depth import without
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import trained_model
from fedkeel.scores.evaluate import choose
from fedkeel.types import Record

ALONE = Settings((), rows=5, states=False)


@pytest.mark.parametrize(
    ("foretold", "ahead", "passes"),
    [
        ([True, True, False, True, True, True, True, True, True], 2, 3),  # 2 and its own, 2 and its own, 2 and its own
        ([False, False, False], 4, 3),  # each pass gives its own token alone
        ([True] * 4, 4, 1),
        ([True] * 5, 4, 1),  # the fifth is the pass's own
        ([True] * 6, 4, 2),
        ([False, True], 1, 2),
        ([True, True, False, True], 4, 2),
        ([], 4, 0),
    ],
)
def test_passes_by_hand(foretold: list[bool], ahead: int, passes: int) -> None:
    assert drafted(foretold, ahead) == Drafted(len(foretold), sum(foretold), passes)


@torch.no_grad()
def next_token(model: Model, prompt: tuple[int, ...], said: list[int]) -> int:
    """The likeliest token behind `said`, by a pass over everything."""
    pad = model.tokenizer.pad_token_id
    if model.kind == "seq2seq":
        example = Example("r", "t", prompt, decoder=(*said, pad))
    else:
        ids = (*prompt, *said, pad)
        example = Example("r", "t", ids, (False,) * (len(ids) - 1) + (True,))
    return int(model.forward(collate([example], model.kind, pad)).logits[-1].argmax())


def really(model: Model, formatter: Formatter, record: Record, kept: int, most: int) -> tuple[list[int], Drafted]:
    """Draft with the lower `kept` blocks, check with all, until an end or `most` tokens; and how it went."""
    prompt, ends = formatter.prompt_ids(record, most), formatter.ends(record)
    said: list[int] = []
    foretold = passes = 0

    def draft(before: list[int]) -> int:
        with without([b for _, b in model.places.stack[kept:]], model.places.forms[kept:]):
            return next_token(model, prompt, before)

    def over() -> bool:
        return len(said) == most or (bool(said) and said[-1] in ends)

    while not over():
        drafts: list[int] = []
        for _ in range(AHEAD):
            drafts.append(draft(said + drafts))
        passes += 1
        right = True
        for token in [*drafts, None]:  # behind the last draft the pass has a token of its own
            if over() or not right:
                break
            true = next_token(model, prompt, said)
            foretold += draft(said) == true
            right = token == true
            said.append(true)
    return said, Drafted(len(said), foretold, passes)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_counts_are_those_of_a_loop_that_really_drafts(name: str, data: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = run(shape(name), data, tmp_path, "evaluation.max_new_tokens=6")
    found = values(measure([folder], ALONE)[folder].rows)
    recipe = load_recipe(folder / "recipe.toml")
    model, prepared = trained_model(recipe, folder), prepare(recipe)
    model.train(False)
    formatter, records = formatter_of(model, prepared), choose(prepared.stages[-1].all("test"), "test", 5)
    assert len(records) == 10
    seen = []
    for share in SHARES:
        kept = int(found[f"speculation/{share:g}/blocks"])
        assert kept == max(1, min(LAYERS - 1, round(share * LAYERS)))
        parts = []
        for record in records:
            said, counts = really(model, formatter, record, kept, 6)
            whole, counted = really(model, formatter, record, LAYERS, 6)
            assert said == whole  # drafts change no answer
            assert counted.foretold == counted.tokens
            parts.append(counts)
        totals = together(parts)
        part = f"speculation/{share:g}"
        assert found[f"{part}/acceptance"] == totals.foretold / totals.tokens
        assert found[f"{part}/tokens_a_pass"] == totals.tokens / totals.passes
        plain, drafting = totals.tokens * LAYERS, totals.passes * (LAYERS + AHEAD * kept)
        assert found[f"{part}/speed_up"] == pytest.approx(plain / drafting)
        seen.append(found[f"{part}/acceptance"])
    assert any(0 < share < 1 for share in seen)


def test_an_encoder_drafts_nothing_and_who_does_not_ask_waits_for_nothing(data: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [line for line in (data / "rows.jsonl").read_text().splitlines(True) if json.loads(line)["task"] == "colour"]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "tasks.json").write_text((data / "tasks.json").read_text())
    folder = run(shape("bert"), tmp_path, tmp_path / "out")
    found = measure([folder], ALONE)[folder]
    assert not [r for r in found.rows if r.name.startswith("speculation")]
    assert not found.notes


def test_the_command_the_table_and_the_report(tiny_base: Path, data: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = run(tiny_base, data, tmp_path)
    arguments = ["measure", str(folder), "--families", "", "--rows", "2", "--no-states"]
    told = CliRunner().invoke(app, [*arguments, "--no-speculation"])
    assert told.exit_code == 0, told.output
    assert "foretold" not in told.output
    told = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    found = values(read_rows(folder / "measures.jsonl"))
    assert "foretold" in told.output
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    table = drafts_table(read_rows(folder / "measures.jsonl"))
    half = {name: found[f"speculation/0.5/{name}"] for name in ("acceptance", "tokens_a_pass", "speed_up")}
    shown = ("1", f"{100 * half['acceptance']:.1f}", f"{half['tokens_a_pass']:.2f}", f"{half['speed_up']:.2f}")
    assert table.lines == (shown,)  # of two blocks one drafts, whatever the share
    assert table.title in (folder / "report.html").read_text()
