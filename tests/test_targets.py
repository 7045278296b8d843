"""Which maps get a branch: what a recipe names, or what an architecture has; and mixtures of experts under every rule."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from further import EXPERTS, further
from shapes import make, quickly, randomise
from test_run import Silent, go

from fedkeel import tables
from fedkeel.data.batches import collate
from fedkeel.data.format import Formatter
from fedkeel.model.bases import ModelError
from fedkeel.model.export import save_adapter, save_merged
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.types import Record

some = pytest.mark.parametrize(
    "name", [n if n in ("qwen3_moe", "phimoe") else pytest.param(n, marks=pytest.mark.slow) for n in EXPERTS]
)


@some
def test_experts_have_no_branch_and_are_named(name: str, tmp_path: Path) -> None:
    model = Model(ModelConfig(base=str(further(name, tmp_path / name)), precision="fp32"), LoraConfig(rank=2), 1)
    assert {type(m).__name__ for m in model.layers.values()} == {"Linear"}
    assert {path.rpartition(".")[2] for path in model.layers} >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {path for path in model.bare if ".experts." in path} == {
        "model.layers.*.mlp.experts.gate_up_proj",
        "model.layers.*.mlp.experts.down_proj",
    }
    formatter = Formatter(model.tokenizer, model.kind, 200)
    examples = formatter.encode_all([Record("a", "t", "train", "yes", "Say it.", "the boat")])
    batch = collate(examples, model.kind, model.tokenizer.pad_token_id, 0)
    randomise(model)
    with torch.no_grad():
        expected = model.forward(batch).logits
        save_adapter(model, tmp_path / "adapter")
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        save_merged(model, tmp_path / "merged")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        for other in (loaded, merged):
            found = other(**batch.inputs).logits[batch.rows, batch.columns]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


EXACT = [n for n, r in tables.RULES.items() if not r.personal and n not in ("mean", "krum")]


@pytest.mark.parametrize("rule", quickly(("svd", "residual", "median"), EXACT))
def test_one_site_of_a_mixture_gets_its_own_adapter_back(rule: str, tmp_path: Path, tiny_overrides: list[str]) -> None:
    """One site, one round: what is served says what the site's model said, whatever the rule does to factors."""
    folder = further("qwen3_moe", tmp_path / "base")
    entry, said = tables.RULES[rule], {}
    start = [
        "partition.scheme=iid",
        "partition.sites=1",
        "federation.rounds=1",
        "evaluation.baselines=[]",
        f"model.base={folder}",
    ]
    for name in ("mean", rule):
        watch = Silent()
        _, _, model = go([*tiny_overrides, *start, f"federation.rule={name}", f"name={name}"], watch)
        formatter = Formatter(model.tokenizer, model.kind, 200)
        batch = collate(
            formatter.encode_all([Record("a", "t", "train", "yes", "Say it.", "the red boat")]),
            model.kind,
            model.tokenizer.pad_token_id,
            0,
        )
        with torch.no_grad():
            said[name] = model.forward(batch).logits
        assert any("experts" in note and "stay as they are" in note for note in watch.notes)
    if entry.trains == ("ab",):  # else one factor is trained, and the model is another
        torch.testing.assert_close(said[rule], said["mean"], rtol=1e-3, atol=1e-3)
    assert said[rule].isfinite().all()


@pytest.mark.parametrize(
    ("name", "targets", "words"),
    [
        ("llama", ["q_proj", "q_prj"], r"names 'q_prj', .* no map has that name; of down_proj, gate_proj, k_proj"),
        ("llama", ["embed_tokens"], r"names 'embed_tokens', .* it is no linear map \(Embedding\)"),
        ("llama", ["q_proj", "lm_head"], r"names 'lm_head', .* it is the output projection"),
        ("gpt2", ["c_attn", "wte"], r"names 'wte', .* it is no linear map"),
        ("bert", ["query", "key", "LayerNorm"], r"names 'LayerNorm', .* it is no linear map"),
        ("t5", ["q", "v", "shared"], r"names 'shared', .* it is no linear map"),
    ],
)
def test_every_name_of_targets_must_be_that_of_a_map_that_can_have_a_branch(name: str, targets: list[str], words: str) -> None:
    with pytest.raises(ModelError, match=r"lora\.targets " + words):
        make(name, targets=tuple(targets))


def test_names_that_fit_are_taken(tmp_path: Path) -> None:
    assert {p.rpartition(".")[2] for p in make("llama", targets=("q_proj", "mlp.up_proj")).read().lora} == {"q_proj", "up_proj"}
    only = make("llama", targets=("model.layers.1.self_attn.v_proj",))
    assert list(only.read().lora) == ["model.layers.1.self_attn.v_proj"]
    assert only.bare == ()
