"""Every architecture that docs/architectures.md names, through all that a run does with a base; its table is this list."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from further import EXPERTS, HYBRIDS, further
from shapes import ARCHITECTURES, CAUSAL, SEQ2SEQ, base, quickly, randomise
from test_run import Silent, go

from fedkeel.data.format import Formatter
from fedkeel.evidence.export import export
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Evaluation, LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.runs.folder import RunFolder
from fedkeel.scores.evaluate import label_log_likelihoods, score
from fedkeel.types import Record

DOCS = Path(__file__).parents[1] / "docs" / "architectures.md"
SWEPT = {**dict.fromkeys(ARCHITECTURES, ""), **dict.fromkeys(EXPERTS, "experts"), **dict.fromkeys(HYBRIDS, "hybrid")}
AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "classifier": transformers.AutoModel,
}


def folder_of(name: str, tmp_path: Path) -> Path:
    return further(name, tmp_path / "base") if SWEPT[name] else Path(base(name))


def said(net: torch.nn.Module, model: Model) -> torch.Tensor:
    """What the bare transformers model says of some tokens."""
    ids = torch.arange(5, 25)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.kind == "seq2seq":
        inputs["decoder_input_ids"] = ids[:, :7]
    with torch.no_grad():
        out = net(**inputs)
    return out.last_hidden_state if model.kind == "classifier" else out.logits


@pytest.mark.parametrize("rule", quickly(("svd",), ["mean", "svd"]))
@pytest.mark.parametrize(
    "name", [n if n in ("llama", "bert", "t5", "qwen3_moe", "lfm2") else pytest.param(n, marks=pytest.mark.slow) for n in SWEPT]
)
def test_train_score_aggregate_export_reload_merge(name: str, rule: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    where, watch = folder_of(name, tmp_path), Silent()
    recipe, folder, model = go(
        [
            *tiny_overrides,
            f"model.base={where}",
            f"federation.rule={rule}",
            "federation.rounds=1",
            "evaluation.baselines=[]",
            "train.lr=0.03",
        ],
        watch,
    )
    assert isinstance(folder, RunFolder)
    scores = [r for r in folder.rows_file.read_text().splitlines() if '"name": "score"' in r and '"test"' in r]
    assert len(scores) >= 2
    assert any(f.b.any() for f in model.read().lora.values())
    expected = said(model.net, model)
    plain = AUTO[model.kind].from_pretrained(where)
    assert not torch.allclose(said(plain.eval(), model), expected, atol=1e-4)
    loaded = peft.PeftModel.from_pretrained(plain, folder.path / "adapter").eval()
    torch.testing.assert_close(said(loaded, model), expected, rtol=1e-3, atol=1e-3)
    export(recipe, folder.path, tmp_path / "merged", merged=True)
    merged = AUTO[model.kind].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(said(merged, model), expected, rtol=1e-3, atol=1e-3)
    if SWEPT[name] == "experts":
        assert any("experts" in note for note in watch.notes)


@pytest.mark.parametrize(
    "name", [n if n in ("lfm2", "minimax", "rwkv") else pytest.param(n, marks=pytest.mark.slow) for n in HYBRIDS]
)
def test_a_model_with_a_state_is_scored_as_one_row_after_another(name: str, tmp_path: Path) -> None:
    """Labels against a plain forward of each pair, generation against batches of one."""
    model = Model(ModelConfig(base=str(further(name, tmp_path / name)), precision="fp32"), LoraConfig(rank=2), 1)
    randomise(model)
    model.train(False)
    assert not model.keeps_keys
    formatter = Formatter(model.tokenizer, model.kind, 200)
    texts = ("What?", "the boat turns and the captain says no word", "soup of lentils", "is it so")
    labels = ("yes", "yes indeed", "42")
    records = [Record(f"r{n}", "t", "test", labels[n % 3], "Say it.", text, labels=labels) for n, text in enumerate(texts)]
    prompts = [formatter.prompt_ids(r, 9) for r in records]
    answers = [[formatter.answer_ids(r, label) for label in labels] for r in records]
    found = label_log_likelihoods(model, prompts, answers)
    for prompt, options, values in zip(prompts, answers, found, strict=True):
        for answer, value in zip(options, values, strict=True):
            with torch.no_grad():
                logits = model.net(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0].log_softmax(-1)
            wanted = sum(float(logits[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))
            assert value == pytest.approx(wanted, abs=1e-3)
    free = [replace(r, labels=()) for r in records]
    how = Evaluation(max_new_tokens=6, batch_size=4)
    together = score(model, formatter, free, how)
    alone = [score(model, formatter, [r], how)[0] for r in free]
    assert [s.prediction for s in together] == [s.prediction for s in alone]


def test_the_docs_name_what_is_swept() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)
    kinds = {"": None, "experts": "mixture of experts", "hybrid": "hybrid or recurrent"}

    def kind(name: str) -> str:
        plain = "language model" if name in CAUSAL else "encoder-decoder" if name in SEQ2SEQ else "encoder"
        return kinds[SWEPT[name]] or plain

    assert {name: told.strip() for name, told in rows} == {name: kind(name) for name in SWEPT}
