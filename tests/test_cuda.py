"""A federation on a CUDA device: the CPU's, up to rounding. Skipped, saying so, where no such device is.

The CPU's results are what every other test holds to hand-worked values and slow twins; here they are the twin.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from shapes import CAUSAL, ENCODERS, chosen
from test_lower import ready, rows
from test_run import Silent, adapter_of, assert_ends_as, go, rows_of

from fedkeel.data.batches import collate
from fedkeel.recipe.schema import Evaluation
from fedkeel.runs.folder import RunFolder
from fedkeel.scores.evaluate import score

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

STREAM = ["stream.stages=colour,echo", "evaluation.validation_rows=0", "evaluation.baselines=local,centralised"]
GUIDED = ["distill.weight=1", "distill.memory=0.5", "distill.trust_by=label", "distill.align=cosine", "stream.average=0.5"]
STRUCTURES = ["structure.mode=anchored", "structure.heads=0.1", "structure.channels=0.1", "structure.rank=0.1"]
WAYS = {
    "plain": [],
    "full": [*GUIDED, *STRUCTURES],
    "adversary": ["structure.adversary=0.05", "structure.weights=0.05"],
    "restricted": ["evidence.task=restricted"],
    "prior": ["evidence.task=prior"],
    "upper": ["lora.layers=upper-half"],
    "svd, fp16": ["federation.rule=svd", "federation.codec_up=fp16"],
    "fedsam, proximal": ["train.sam=0.05", "train.proximal=0.1"],
}


def losses(folder: RunFolder) -> list[float]:
    """Of every site's rounds, in nats a position."""
    return [r["value"] for r in rows_of(folder) if r["name"] == "loss" and r["method"] == "federated"]


def run_on(device: str, overrides: list[str], out: Path, watch: Silent | None = None, **options: bool) -> RunFolder:
    return go([*overrides, f"out={out}", f"model.device={device}"], watch, **options)[1]


@pytest.mark.parametrize("way", WAYS)
def test_the_device_changes_nothing_but_rounding(way: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        folder = run_on(device, [*tiny_overrides, *STREAM, *WAYS[way]], tmp_path / device)
        scores = [json.loads(line) for line in (folder.path / "scores.jsonl").read_text().splitlines()]
        found[device] = losses(folder), adapter_of(folder.path), rows_of(folder), scores
    (loss, adapter, table, scores), (loss_there, adapter_there, table_there, scores_there) = found["cpu"], found["cuda"]
    assert len(loss) == 18
    assert any(t.any() for path, t in adapter.items() if "lora_B" in path)
    assert loss_there == pytest.approx(loss, rel=2e-3)
    for path, tensor in adapter.items():
        torch.testing.assert_close(adapter_there[path], tensor, rtol=0.02, atol=5e-3)
    # `seconds` differ, and a rounded likelihood may turn an answer: counts must be equal, scores near
    assert [(r["name"], r["method"], r["round"]) for r in table_there] == [(r["name"], r["method"], r["round"]) for r in table]
    assert len(scores_there) == len(scores) > 0
    turned = sum(abs(a["score"] - b["score"]) > 1e-6 for a, b in zip(scores, scores_there, strict=True))
    assert turned <= len(scores) // 20


@pytest.mark.parametrize("name", chosen(CAUSAL, ENCODERS))
def test_every_architecture_says_the_same_there(name: str) -> None:
    model, formatter = ready(name)
    examples = formatter.encode_all(rows())
    batch = collate(examples, model.kind, model.tokenizer.pad_token_id, len(model.classes))
    wanted = model.forward(batch).logits.float()
    scored = score(model, formatter, rows(), Evaluation(max_new_tokens=4))
    there, formatter = ready(name, device="cuda", precision="fp32")
    there.write(model.read())
    with there.remembering():
        got = there.forward(batch).logits.float()
    torch.testing.assert_close(got.cpu(), wanted, rtol=1e-3, atol=1e-3)
    for one, other in zip(score(there, formatter, rows(), Evaluation(max_new_tokens=4)), scored, strict=True):
        assert one.prediction == other.prediction


def test_bf16_learns_and_is_what_auto_takes(tiny_overrides: list[str], tmp_path: Path) -> None:
    more = ["model.precision=auto", "evaluation.baselines=[]", "train.lr=0.03", "federation.rounds=16"]
    folder = run_on("cuda", [*tiny_overrides, *more], tmp_path)
    seen = losses(folder)
    assert sum(seen[-12:]) < sum(seen[:12]) - 1  # nats, four rounds of three sites each
    assert {t.dtype for t in adapter_of(folder.path).values()} == {torch.float32}


def test_an_interrupted_run_ends_as_an_unbroken_one(tiny_overrides: list[str], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(leg: str, done: int) -> None:
        if (leg, done) == ("federated", 2):
            raise Killed

    settings: list[Any] = [*tiny_overrides, *GUIDED[:1], *STRUCTURES]
    whole = run_on("cuda", settings, tmp_path / "whole")
    with pytest.raises(Killed):
        run_on("cuda", settings, tmp_path / "cut", Silent(kill))
    assert_ends_as(run_on("cuda", settings, tmp_path / "cut", resume=True), whole)
