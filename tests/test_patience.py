"""Stages that end when validation scores no longer rise, and the best adapter beside the last, on scripted curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_run import Silent, adapter_of, go, rows_of, same, without_time
from typer.testing import CliRunner

import fedkeel.federation.local
from fedkeel.cli import app
from fedkeel.evidence.leaks import updates
from fedkeel.exchange.codecs import header_of
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.here import Here
from fedkeel.runs.prepare import prepare
from fedkeel.types import Adapter, Global, Row

CURVE = [0.3, 0.5, 0.4, 0.5, 0.2, 0.9]
ALONE = ["evaluation.baselines=[]", "train.local_steps=1"]
SIX = [*ALONE, "federation.rounds=6"]


@pytest.fixture(autouse=True)
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The score over all tasks that validation rows get after each round, in place of the true one."""
    curve = list(CURVE)
    real = Here.score

    def score(self: Here, leg: Any, stage: int, current: Global, split: str) -> list[Row]:
        rows = real(self, leg, stage, current, split)
        if split != "validation":
            return rows
        whole = [r.name == "score" and not r.task and not r.site for r in rows]
        return [replace(r, value=curve[current.round - 1]) if of_all else r for r, of_all in zip(rows, whole, strict=True)]

    monkeypatch.setattr(Here, "score", score)
    return curve


def after(folder: RunFolder, round: int, overrides: Sequence[str]) -> Adapter:
    """The global adapter as a checkpoint has it."""
    recipe = load_recipe(None, overrides)
    from fedkeel.model.lora import Model

    initial = Model(recipe.model, recipe.lora, recipe.seed).initial
    assert initial is not None
    return folder.read_checkpoint("federated", round, initial).adapter


def peft_of(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The tensors of its PEFT folder."""
    sides = {"a": "lora_A", "b": "lora_B"}
    return {
        f"base_model.model.{path}.{sides[side]}.weight": getattr(factors, side)
        for path, factors in adapter.lora.items()
        for side in "ab"
    }


def best_of(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.path / "best" / "adapter_model.safetensors")


def told(folder: RunFolder) -> dict[str, float]:
    return {r["name"]: r["value"] for r in rows_of(folder) if r["name"] in ("last_round", "best_round")}


def test_a_stage_ends_when_its_curve_no_longer_rises(tiny_overrides: list[str]) -> None:
    """Best in round 2; rounds 3 and 4 (a tie) are no better, so patience 2 ends after round 4, whatever comes later."""
    given, watch = [*tiny_overrides, *SIX, "federation.patience=2"], Silent()
    _, folder, _ = go(given, watch)
    assert len(watch.results) == 4
    assert told(folder) == {"last_round": 4, "best_round": 2}
    assert same(adapter_of(folder.path), peft_of(after(folder, 4, given)))
    assert same(best_of(folder), peft_of(after(folder, 2, given)))
    assert not same(best_of(folder), adapter_of(folder.path))
    assert watch.work == pytest.approx(watch.total)
    assert folder.rounds("federated") == [1, 2, 3, 4, 6]  # the end is where all would have been
    assert any("ends after round 4 of 6" in note and "50.0 of round 2" in note for note in watch.notes), watch.notes
    tested = [r for r in rows_of(folder) if r["split"] == "test" and r["name"] == "score" and not r["task"]]
    assert len(tested) == 1


def test_patience_that_is_never_lost_changes_nothing_and_the_best_lies_beside(tiny_overrides: list[str]) -> None:
    """Round 6 is the best of all: patience 4 waits for it. Without patience the rows are the same to the last one."""
    _, patient, _ = go([*tiny_overrides, *SIX, "name=patient", "federation.patience=4"])
    _, plain, _ = go([*tiny_overrides, *SIX, "name=plain"])
    assert told(patient) == {"last_round": 6, "best_round": 6}
    kept = [{**r, "run": ""} for r in without_time(rows_of(patient)) if r["name"] not in ("last_round", "best_round")]
    assert kept == [{**r, "run": ""} for r in without_time(rows_of(plain))]
    assert same(adapter_of(patient.path), adapter_of(plain.path))
    assert same(best_of(plain), adapter_of(plain.path))


def test_an_audit_begins_where_the_last_round_ended(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no checkpoint of the round before the end, as it was not run."""
    recipe, folder, model = go([*tiny_overrides, *SIX, "federation.patience=2"])
    prepared, begun = prepare(recipe), list[int]()
    monkeypatch.setattr(updates, "coordinator", lambda *given: None)
    monkeypatch.setattr(updates, "attack", lambda attacker, state, *given: begun.append(state.round) or ())
    updates.inverted(prepared, model, formatter_of(model, prepared), folder.path)
    assert begun == [0, 0, 4, 4]


def test_keep_best_serves_and_tests_the_best_round(tiny_overrides: list[str], scripted: list[float]) -> None:
    scripted[:] = [0.3, 0.5, 0.4, 0.1, 0.2, 0.1]
    given = [*tiny_overrides, *SIX, "federation.keep=best"]
    _, folder, model = go(given)
    second = after(folder, 2, given)
    assert same(adapter_of(folder.path), peft_of(second))
    assert same(dict(model.read().tensors()), dict(second.tensors()))
    short = [*tiny_overrides, *ALONE, "name=two", "federation.rounds=2", "train.warmup=0", "train.final_lr=1"]
    long = [*given, "name=six", "train.warmup=0", "train.final_lr=1"]
    of_test = [
        [(r["task"], r["name"], r["value"]) for r in without_time(rows_of(go(g)[1])) if r["split"] == "test" and not r["site"]]
        for g in (short, long)
    ]
    assert of_test[0] == of_test[1]  # two rounds by themselves, and six of which the second is kept


def stream(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, *ALONE, 'stream.stages=["colour", "echo"]', "federation.rounds=3"]


def test_each_stage_has_its_own_best(tiny_overrides: list[str], scripted: list[float]) -> None:
    """The first stage's best is higher than all of the second, and says nothing there."""
    scripted[:] = [0.9, 0.8, 0.7, 0.1, 0.3, 0.2]
    given = [*stream(tiny_overrides), "federation.keep=best", "federation.patience=1"]
    _, folder, _ = go(given)
    found = [(r["stage"], r["name"], r["value"]) for r in rows_of(folder) if r["name"] in ("last_round", "best_round")]
    assert found == [(0, "last_round", 2), (0, "best_round", 1), (1, "last_round", 6), (1, "best_round", 5)]
    assert same(dict(after(folder, 3, given).tensors()), dict(after(folder, 1, given).tensors()))
    assert same(adapter_of(folder.path), peft_of(after(folder, 5, given)))


def test_under_averaging_the_best_is_what_would_have_been_served(tiny_overrides: list[str], scripted: list[float]) -> None:
    scripted[:] = [0.1, 0.2, 0.3, 0.1, 0.3, 0.2]
    given = [*stream(tiny_overrides), "stream.average=0.25"]
    _, folder, _ = go(given)
    first, fifth = (peft_of(after(folder, n, given)) for n in (3, 5))
    expected = {name: 0.25 * first[name] + 0.75 * fifth[name] for name in first}
    found = best_of(folder)
    assert all(torch.allclose(found[name], expected[name], atol=1e-7) for name in expected)


@pytest.mark.parametrize("cut", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("keep", [pytest.param("last", marks=pytest.mark.slow), "best"])
def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tiny_overrides: list[str], cut: int, keep: str) -> None:
    given = [*tiny_overrides, *SIX, "federation.patience=2", f"federation.keep={keep}"]
    _, whole, _ = go([*given, "name=whole"])

    def stop(leg: str, done: int) -> None:
        if done == cut:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go([*given, "name=cut"], Silent(stop))
    _, resumed, _ = go([*given, "name=cut"], resume=True)
    assert same(adapter_of(resumed.path), adapter_of(whole.path))
    assert same(best_of(resumed), best_of(whole))
    rows = [[{**r, "run": ""} for r in without_time(rows_of(f))] for f in (resumed, whole)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (["federation.patience=1", "data.validation_share=0"], "no validation row"),
        (["federation.keep=best", "evaluation.every=7"], "too few"),
        (["federation.patience=6"], "6 points of the curve, too few"),
        (["federation.keep=best", "federation.rule=residual"], "moves the base"),
        (["federation.keep=best", "federation.rule=share_a"], "leaves a factor at each site"),
    ],
)
def test_what_cannot_go_by_validation_rows_is_refused_before_any_work(
    tiny_overrides: list[str], tiny_data: Path, wrong: list[str], text: str
) -> None:
    path = tiny_data / "rows.jsonl"
    if "data.validation_share=0" in wrong:
        lines = [line.replace('"split": "validation"', '"split": "train"') for line in path.read_text().splitlines()]
        (tiny_data / "none.jsonl").write_text("\n".join(lines))
        wrong = [*wrong, 'data.files=["none.jsonl"]']
    with pytest.raises(ConfigError, match=text):
        go([*tiny_overrides, *SIX, *wrong])
    assert not any(o.startswith("out=") and any(Path(o[4:]).glob("*/state.json")) for o in tiny_overrides)


@pytest.mark.slow
def test_the_best_is_asked_scored_and_exported(tiny_overrides: list[str], tiny_base: Path, tmp_path: Path) -> None:
    """`--best` against PEFT on the folder `best`; a run without it says so."""
    _, folder, _ = go([*tiny_overrides, *SIX, "federation.patience=2"])
    merged = tmp_path / "merged"
    found = CliRunner().invoke(app, ["export", str(folder.path), str(merged), "--merged", "--best"])
    assert found.exit_code == 0, found.output
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(base, folder.path / "best").merge_and_unload()
    ids = torch.tensor([[1, 3, 40, 41, 42]])
    ours = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert torch.allclose(ours(ids).logits, expected(ids).logits, atol=1e-5)
    assert CliRunner().invoke(app, ["ask", str(folder.path), "the red cat", "--best", "--tokens", "2"]).exit_code == 0
    assert CliRunner().invoke(app, ["evaluate", str(folder.path), "--best"]).exit_code == 0
    _, shifted, _ = go([*tiny_overrides, *SIX, "federation.rule=residual", "name=shifted"])
    refused = CliRunner().invoke(app, ["export", str(shifted.path), str(tmp_path / "no"), "--best"])
    assert refused.exit_code != 0
    assert "best is missing" in str(refused.exception)


def test_the_round_before_an_early_end_is_there_when_the_end_is_torn(
    tiny_overrides: list[str], scripted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round 6 is written after round 3; of what sites keep nothing older stays."""
    given = [*tiny_overrides, *SIX, "federation.patience=1", "keep_checkpoints=1", "federation.codec_up=int4"]
    given += ['stream.stages=["colour", "echo"]', "evaluation.every=1"]
    scripted += CURVE
    _, whole, _ = go([*given, "name=whole"])
    real = fedkeel.federation.local.answer

    def answer(payload: bytes, *more: Any) -> bytes:
        if header_of(payload)["round"] == 6:
            raise KeyboardInterrupt
        return real(payload, *more)

    with monkeypatch.context() as patch:
        patch.setattr(fedkeel.federation.local, "answer", answer)
        with pytest.raises(KeyboardInterrupt):
            go([*given, "name=torn"])
    there = whole.path.with_name("torn") / "checkpoints" / "federated"
    names = {path.name for path in there.glob("*-000?*")}
    assert names == {"round-0002.fkl", "round-0003.fkl", "round-0006.fkl", "kept-0003", "kept-0006"}
    (there / "round-0006.fkl").write_bytes(b"torn")
    watch = Silent()
    _, resumed, _ = go([*given, "name=torn"], watch, resume=True)
    assert any("goes on from round 3, the one before" in note for note in watch.notes)
    assert same(adapter_of(resumed.path), adapter_of(whole.path))
