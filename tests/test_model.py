"""Every architecture against plain Hugging Face: where LoRA sits, what logits come out, what a saved adapter gives.

The twin of a forward pass is the base alone with W + scale · B @ A written into its weights by hand, one row at a time and
without padding, all positions computed and the supervised ones picked out afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shapes import ARCHITECTURES, CAUSAL, ENCODERS, HIDDEN, LAYERS, SEQ2SEQ, base, chosen, make, randomise, tokenizer
from torch import Tensor, nn
from training import setting, whole_batch

from fedkeel import tables
from fedkeel.data.batches import Batch, collate
from fedkeel.data.format import Example, Formatter
from fedkeel.model.bases import ModelError
from fedkeel.model.export import save_adapter, save_merged
from fedkeel.model.load import kind_of, load_config, load_tokenizer, uses_bf16
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.recipe.settings import ConfigError
from fedkeel.types import Adapter, Lora, Record

CLASSES = ("sport", "business news", "science")
_LLAMA = (
    "model.layers",
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
)
_BERT = "attention.output.dense intermediate.dense output.dense"
_SELF = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2"
_CROSS = "encoder_attn.q_proj encoder_attn.k_proj encoder_attn.v_proj encoder_attn.out_proj"


def _t5(feed_forward: str) -> tuple[tuple[str, str], ...]:
    def block(*attentions: str) -> str:
        maps = [f"layer.{n}.{a}.{m}" for n, a in enumerate(attentions) for m in "qkvo"]
        return " ".join(maps + [f"layer.{len(attentions)}.DenseReluDense.{m}" for m in feed_forward.split()])

    return ("encoder.block", block("SelfAttention")), ("decoder.block", block("SelfAttention", "EncDecAttention"))


# (path of the blocks, modules in each block) for the attention and feed-forward maps of each architecture
PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2"), (_LLAMA,)),
    "phi": (("model.layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2"),),
    "phi3": (("model.layers", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),),
    "gpt2": (("transformer.h", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),),
    "gpt_neox": (("gpt_neox.layers", "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),),
    "opt": (("model.decoder.layers", _SELF),),
    "bert": (("encoder.layer", f"attention.self.query attention.self.key attention.self.value {_BERT}"),),
    "roberta": (("encoder.layer", f"attention.self.query attention.self.key attention.self.value {_BERT}"),),
    "deberta-v2": (("encoder.layer", f"attention.self.query_proj attention.self.key_proj attention.self.value_proj {_BERT}"),),
    "distilbert": (
        ("transformer.layer", "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2"),
    ),
    "modernbert": (("layers", "attn.Wqkv attn.Wo mlp.Wi mlp.Wo"),),
    "t5": _t5("wi wo"),
    "t5:gated": _t5("wi_0 wi_1 wo"),
    "bart": (("model.encoder.layers", _SELF), ("model.decoder.layers", f"{_SELF} {_CROSS}")),
}
every = pytest.mark.parametrize("name", chosen(ARCHITECTURES))


@cache
def examples(name: str) -> tuple[Example, ...]:
    """Three rows of different lengths."""
    kind = ARCHITECTURES[name][0]
    made = Formatter(load_tokenizer(ModelConfig(base=base(name))), kind, 128, classes=CLASSES)
    rows = [
        Record("a", "t", "train", "sport", "Say it.", "the boat turns", labels=CLASSES[:2] if kind == "classifier" else ()),
        Record("b", "t", "train", "science", "", "a much longer row about 42 lentils, carrots and the old captain"),
        Record("c", "t", "train", "business news", "", "no news"),
    ]
    return tuple(made.encode(row) for row in rows)


def batch_of(model: Model, name: str) -> Batch:
    return collate(examples(name), model.kind, model.tokenizer.pad_token_id, len(model.classes))


@torch.no_grad()
def logits_of(model: Model, name: str) -> Tensor:
    return model.forward(batch_of(model, name)).logits


def auto_class(model: Model) -> Any:
    if model.kind == "classifier":
        return transformers.AutoModelForSequenceClassification if model.linear_head else transformers.AutoModel
    return transformers.AutoModelForCausalLM if model.kind == "causal" else transformers.AutoModelForSeq2SeqLM


def plain(model: Model, adapter: Adapter | None = None) -> nn.Module:
    """The base, loaded without FedKeel and PEFT, with the adapter's change added to its weights."""
    net = auto_class(model).from_pretrained(model.config.base, dtype=torch.float32).eval()
    for path, factors in (adapter.lora if adapter else {}).items():
        module = net.get_submodule(path)
        change = factors.scale * torch.einsum("or,ri->oi", factors.b, factors.a)
        with torch.no_grad():  # GPT-2 stores its maps transposed
            module.weight += change if isinstance(module, nn.Linear) else change.T
    return net


@torch.no_grad()
def twin(net: nn.Module, model: Model, name: str) -> Tensor:
    """The rows of `forward`, one row at a time, unpadded, every position computed."""
    found = []
    for example in examples(name):
        ids = torch.tensor([example.ids])
        if model.kind == "causal":
            logits = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            found += [logits[c - 1] for c in range(1, len(example.ids)) if example.supervised[c]]
        elif model.kind == "seq2seq":
            decoder = torch.tensor([[net.config.decoder_start_token_id, *example.decoder[:-1]]])
            found += list(net(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=decoder).logits[0])
        else:
            found.append(net(input_ids=ids).last_hidden_state[0].mean(0))
    return torch.stack(found)


def close(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest logit: float32 rounds sums by their largest term."""
    torch.testing.assert_close(one, two, atol=tolerance * max(1.0, float(two.abs().max())), rtol=0)


@every
def test_kind_is_read_from_the_config(name: str) -> None:
    config = ModelConfig(base=base(name))
    assert kind_of(config, load_config(config)) == ARCHITECTURES[name][0] == make(name).kind
    assert kind_of(dataclasses.replace(config, kind="classifier"), load_config(config)) == "classifier"


@every
def test_lora_is_in_attention_and_feed_forward_of_every_block(name: str) -> None:
    expected = {f"{blocks}.{i}.{m}" for blocks, maps in PLACES[name] for i in range(LAYERS) for m in maps.split()}
    adapter = make(name, rank=3, alpha=12.0).read()
    assert set(adapter.lora) == expected
    assert adapter.dense == {}
    modules = dict(plain(make(name)).named_modules())
    for path, factors in adapter.lora.items():
        out, into = modules[path].weight.shape if isinstance(modules[path], nn.Linear) else modules[path].weight.T.shape
        assert (factors.a.shape, factors.b.shape) == ((3, into), (out, 3))
        assert factors.scale == 4.0
        assert factors.a.abs().sum() > 0 == factors.b.abs().sum()


@pytest.mark.parametrize("name", chosen(CAUSAL, SEQ2SEQ))
def test_logits_equal_a_plain_forward_of_base_and_adapter(name: str) -> None:
    model = make(name)
    randomise(model)
    forward = model.forward(batch_of(model, name))
    close(forward.logits, twin(plain(model, model.read()), model, name))
    # and the adapter matters: a comparison that would hold without it proves nothing
    assert (forward.logits - twin(plain(model), model, name)).abs().max() > 0.1
    n = sum(e.positions for e in examples(name))
    assert forward.logits.shape == (n, model.net.config.vocab_size)
    assert forward.targets.tolist() == [
        token for e in examples(name) for token in (e.decoder or [t for t, s in zip(e.ids, e.supervised, strict=True) if s])
    ]
    assert forward.rows.tolist() == [row for row, e in enumerate(examples(name)) for _ in range(e.positions)]


@pytest.mark.parametrize("name", chosen(CAUSAL, SEQ2SEQ))
def test_the_output_projection_sees_supervised_positions_only(name: str) -> None:
    model, seen = make(name), []
    model.net.get_output_embeddings().register_forward_hook(lambda _, inputs, out: seen.append((inputs[0].shape, out.shape)))
    forward = model.forward(batch_of(model, name))
    n, vocabulary = forward.logits.shape
    assert n == sum(e.positions for e in examples(name))
    assert seen == [((1, n, HIDDEN), (1, n, vocabulary))]
    # outside `forward` the model is whole again
    inputs = {k: v for k, v in batch_of(model, name).inputs.items() if k != "labels"}
    if model.kind == "seq2seq":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    assert model.net(**inputs).logits.shape == (*inputs["input_ids"].shape, vocabulary)


def test_a_failed_forward_leaves_no_positions_behind() -> None:
    model = make("llama")
    with pytest.raises(IndexError):
        model.logits_at({"input_ids": torch.tensor([[10**6]])}, torch.tensor([0]), torch.tensor([0]))
    assert model.net(input_ids=torch.tensor([[1, 2, 3]])).logits.shape[1] == 3


@pytest.mark.parametrize("name", chosen(ENCODERS))
def test_an_encoder_scores_a_class_by_twenty_times_the_cosine_to_its_words(name: str) -> None:
    model = make(name)
    randomise(model)
    untouched, pooled = plain(model), twin(plain(model, model.read()), model, name)
    label_rows = []
    with torch.no_grad():
        for text in CLASSES:
            ids = torch.tensor([tokenizer(ARCHITECTURES[name][1])(text)["input_ids"]])
            label_rows.append(untouched(input_ids=ids).last_hidden_state[0].mean(0))
    labels = torch.stack(label_rows)
    cosines = [[float(p @ q / (p.norm() * q.norm())) for q in labels] for p in pooled]
    expected = 20 * torch.tensor(cosines)
    expected[0, 2] = float("-inf")  # row a allows the first two classes only
    assert expected[1:].std() > 0.1
    forward = model.forward(batch_of(model, name))
    assert (forward.logits == float("-inf")).tolist() == expected.isinf().tolist()
    close(forward.logits.nan_to_num(neginf=0.0), expected.nan_to_num(neginf=0.0))
    assert (forward.targets.tolist(), forward.rows.tolist()) == ([0, 2, 1], [0, 1, 2])


@every
def test_only_the_adapter_is_trained_and_all_of_it(name: str) -> None:
    model = make(name)
    randomise(model)
    trained = {n for n, p in model.net.named_parameters() if p.requires_grad}
    assert all("lora_A" in n or "lora_B" in n for n in trained)
    assert len(trained) == len(model.parameters()) == len(model.read().tensors()) == 2 * len(model.read().lora)
    frozen = {n: p.detach().clone() for n, p in model.net.named_parameters() if n not in trained}
    forward = model.forward(batch_of(model, name))
    nn.functional.cross_entropy(forward.logits, forward.targets).backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(torch.equal(p, frozen[n]) for n, p in model.net.named_parameters() if n in frozen)
    assert (
        model.base_parameters() == sum(p.numel() for p in frozen.values()) == sum(p.numel() for p in plain(model).parameters())
    )


@every
def test_read_and_write_are_exact(name: str) -> None:
    model = make(name)
    fresh = model.read()
    randomise(model)
    adapter = model.read()
    kept = {path: t.clone() for path, t in adapter.tensors().items()}
    logits = logits_of(model, name)
    other = make(name, seed=2, alpha=20.0)
    other.write(adapter)
    assert torch.equal(logits_of(other, name), logits)
    again = other.read()
    assert all(torch.equal(t, kept[path]) for path, t in again.tensors().items())
    assert [m.scale for m in again.lora.values()] == [m.scale for m in adapter.lora.values()]
    model.write(fresh)
    assert all(torch.equal(t, kept[path]) for path, t in adapter.tensors().items()), "read must give a copy"
    if model.kind != "classifier":
        close(logits_of(model, name), twin(plain(model), model, name))


def test_the_seed_decides_the_fresh_adapter() -> None:
    one, same, other = (make("llama", seed=s).read().tensors() for s in (5, 5, 6))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert all(torch.equal(one[n], other[n]) == n.endswith(".b") for n in one)
    head, again, elsewhere = (make("bert", head="linear", seed=s).read().dense["classifier.weight"] for s in (5, 5, 6))
    assert torch.equal(head, again)
    assert not torch.equal(head, elsewhere)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert {m.scale for m in make("gpt2", rank=4, alpha=12.0, rslora=True).read().lora.values()} == {6.0}


@pytest.mark.parametrize("fault", ["rank", "missing", "extra", "dense"])
def test_an_adapter_that_does_not_fit_is_refused_whole_and_named(fault: str) -> None:
    model = make("llama")
    before, odd = model.read(), "model.layers.1.mlp.up_proj"
    lora, dense = {p: Lora(m.a + 1, m.b + 1, m.scale) for p, m in before.lora.items()}, {}
    if fault == "rank":
        lora[odd] = Lora(lora[odd].a.repeat(2, 1), lora[odd].b.repeat(1, 2), 6.0)  # a lower one would find room
    elif fault == "missing":
        del lora[odd]
    elif fault == "extra":
        odd = "model.layers.2.mlp.up_proj"
        lora[odd] = lora["model.layers.1.mlp.up_proj"]
    else:
        odd = "classifier.weight"
        dense[odd] = torch.zeros(3, HIDDEN)
    with pytest.raises(ModelError, match=odd.replace(".", r"\.")):
        model.write(Adapter(lora, dense))
    assert all(torch.equal(t, before.tensors()[n]) for n, t in model.read().tensors().items())


@every
def test_peft_loads_a_saved_adapter(name: str, tmp_path: Path) -> None:
    model = make(name)
    randomise(model)
    save_adapter(model, tmp_path)
    expected = logits_of(model, name)
    loaded = peft.PeftModel.from_pretrained(auto_class(model).from_pretrained(base(name)), tmp_path).eval()
    assert not (tmp_path / "README.md").exists()
    if model.kind != "classifier":
        close(twin(loaded, model, name), expected)
        return
    # what is needed to score classes lies beside the adapter
    assert json.loads((tmp_path / "fedkeel_classes.json").read_text()) == {"head": "label-text", "classes": list(CLASSES)}
    labels = load_file(tmp_path / "label_embeddings.safetensors")["embeddings"]
    scores = 20 * nn.functional.normalize(twin(loaded, model, name), dim=-1) @ labels.T
    close(scores[1:], expected[1:])


@every
def test_a_merged_model_gives_the_same_logits_alone(name: str, tmp_path: Path) -> None:
    model = make(name)
    randomise(model)
    expected = logits_of(model, name)
    save_merged(model, tmp_path)
    alone = auto_class(model).from_pretrained(tmp_path).eval()
    text = "No news is good news 42"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    found = twin(alone, model, name)
    if model.kind == "classifier":
        assert json.loads((tmp_path / "fedkeel_classes.json").read_text())["classes"] == list(CLASSES)
        labels = load_file(tmp_path / "label_embeddings.safetensors")["embeddings"]
        found, expected = (20 * nn.functional.normalize(found, dim=-1) @ labels.T)[1:], expected[1:]
    close(found, expected, tolerance=1e-4)
    assert "use_cache" not in (c := json.loads((tmp_path / "config.json").read_text())) or c["use_cache"] is True


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_a_merged_model_has_the_bases_type_and_ends_where_training_ended(stored: str, tmp_path: Path) -> None:
    """Whatever it was trained in; every weight is the float32 sum, rounded once."""
    folder = shutil.copytree(base("llama"), tmp_path / "base")
    dtype = getattr(torch, stored)
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    whole.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 3, "eos_token_id": 9}))
    model = make("llama", base=str(folder), precision="bf16")
    randomise(model)
    factors = model.read().lora
    save_merged(model, tmp_path / "merged", [3, 5])
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {dtype}
    for name, tensor in saved.items():
        found = factors.get(name.removesuffix(".weight"))
        wanted = before[name].float()
        if found:
            wanted = wanted + found.scale * (found.b @ found.a)
        torch.testing.assert_close(tensor, wanted.to(dtype), rtol=2**-7, atol=1e-6)
    configs = [json.loads((tmp_path / "merged" / f"{n}.json").read_text()) for n in ("config", "generation_config")]
    assert [c["eos_token_id"] for c in configs] == [[3, 5], [3, 5]]
    assert configs[0]["dtype"] == stored
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [3, 5]


LINEAR = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {"classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"},
    "deberta-v2": {"classifier.weight", "classifier.bias"},
    "distilbert": {"classifier.weight", "classifier.bias", "pre_classifier.weight", "pre_classifier.bias"},
    "modernbert": {"classifier.weight", "classifier.bias", "head.dense.weight", "head.norm.weight"},
    "llama": {"score.weight"},
}


@pytest.mark.parametrize("name", chosen(LINEAR))
def test_a_linear_head_is_trained_and_survives_saving(name: str, tmp_path: Path) -> None:
    made = {"kind": "classifier", "head": "linear", "classes": CLASSES}
    model = make(name, **made)
    assert set(model.read().dense) >= LINEAR[name]
    assert set(model.read().lora) == {
        f"{blocks}.{i}.{m}" for (blocks, maps), i in zip_layers(name, model) for m in maps.split()
    }
    randomise(model)
    rows = [Example(r, "t", e.ids, target=n) for n, (r, e) in enumerate(zip("abc", examples(name), strict=True))]
    batch = collate(rows, "classifier", model.tokenizer.pad_token_id, 3)
    forward = model.forward(batch)
    assert forward.logits.shape == (3, 3)
    nn.functional.cross_entropy(forward.logits, forward.targets).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    other = make(name, seed=9, **made)
    other.write(model.read())
    save_adapter(model, tmp_path / "adapter")
    # loaded by PEFT on a base whose fresh head is drawn anew, and so is another one
    torch.manual_seed(77)
    fresh = transformers.AutoModelForSequenceClassification.from_pretrained(base(name), num_labels=3)
    fresh.config.pad_token_id = model.tokenizer.pad_token_id
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    save_merged(model, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        close(other.forward(batch).logits, forward.logits)
        close(loaded(**batch.inputs).logits, forward.logits)
        close(merged(**batch.inputs).logits, forward.logits, tolerance=1e-4)
    assert json.loads((tmp_path / "adapter" / "fedkeel_classes.json").read_text())["head"] == "linear"


def zip_layers(name: str, model: Model) -> list[tuple[tuple[str, str], int]]:
    """The blocks of `name` under the extra prefix that a model with a head has."""
    prefix = {"llama": "", "modernbert": "model."}.get(name, f"{model.net.config.model_type.removesuffix('-v2')}.")
    return [((prefix + blocks, maps), i) for blocks, maps in PLACES[name] for i in range(LAYERS)]


@every
def test_a_model_without_weights_has_the_same_shapes_and_counts(name: str) -> None:
    for head in ("label-text", "linear") if name in LINEAR else ("label-text",):
        options: dict[str, Any] = {"head": head}
        if head == "linear":
            options |= {"kind": "classifier", "classes": ("only",) if name == "bert" else CLASSES}
        real, meta = make(name, **options), make(name, weights=False, **options)
        assert meta.read_shapes() == real.read_shapes() == {n: tuple(t.shape) for n, t in real.read().tensors().items()}
        assert meta.base_parameters() == real.base_parameters()
        assert meta.kind == real.kind
        assert {p.device.type for p in meta.net.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("device", "weights"),
    [*((d, True) for d in ("banana", "cuda:x", "cuda:97", "meta", "")), *((d, False) for d in ("banana", "cuda:x", ""))],
)
def test_a_device_that_is_not_there_is_refused(device: str, weights: bool) -> None:
    with pytest.raises(ModelError, match=rf"model\.device = '{device}' cannot be used on this machine: .+; 'cpu' can"):
        make("llama", device=device, weights=weights)


def test_what_another_machine_will_do_is_planned_without_its_device() -> None:
    assert make("llama", device="cuda:97", weights=False).read_shapes() == make("llama").read_shapes()


def test_an_architecture_that_the_table_lacks_gets_every_linear_map_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    known = set(make("llama").read().lora)
    monkeypatch.delitem(tables.ARCHITECTURES, "llama")
    assert set(make("llama").read().lora) == known


def test_targets_of_the_recipe_take_precedence() -> None:
    paths = set(make("llama", targets=("q_proj", "down_proj")).read().lora)
    assert paths == {f"model.layers.{i}.{m}" for i in range(LAYERS) for m in ("self_attn.q_proj", "mlp.down_proj")}
    with pytest.raises(ModelError, match=r"lora\.targets names 'nonsense'"):
        make("llama", targets=("nonsense",))


def test_an_encoder_needs_classes() -> None:
    with pytest.raises(ModelError, match="no row of this data has labels"):
        Model(ModelConfig(base=base("bert"), precision="fp32"), LoraConfig(), 1)


def copy_of(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(base(name), folder / "base"))


def refused(folder: Path | str, match: str, **options: Any) -> None:
    for weights in (True, False):
        with pytest.raises(ModelError, match=match):
            Model(ModelConfig(base=str(folder), precision="fp32", **options), LoraConfig(), 1, CLASSES, weights)


def test_a_base_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "gone", r"gone': no such folder")
    refused("./gone", r"gone': no such folder")
    refused("no-such-owner/no-such-model", r"'no-such-owner/no-such-model' cannot be loaded.*keel-nano")


def test_a_folder_that_holds_no_known_model(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be loaded")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    refused(tmp_path, "cannot be loaded.*no-such-architecture")


def test_a_base_of_another_kind_than_asked_for() -> None:
    refused(base("llama"), "cannot be loaded", kind="seq2seq")


@pytest.mark.parametrize("damage", ["truncated", "another size", "no weights"])
def test_damaged_weights_are_named(tmp_path: Path, damage: str) -> None:
    folder = copy_of("llama", tmp_path)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif damage == "another size":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    else:
        weights.unlink()
    with pytest.raises(ModelError, match="base' cannot be loaded"):
        Model(ModelConfig(base=str(folder), precision="fp32"), LoraConfig(), 1)


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    folder, canary = copy_of("llama", tmp_path), tmp_path / "ran"
    (folder / "own.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig): model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM): config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    refused(folder, "cannot be loaded")
    # with a type that transformers knows, its own code for that type is used
    (folder / "config.json").write_text(json.dumps(config))
    model = Model(ModelConfig(base=str(folder), precision="fp32"), LoraConfig(), 1)
    assert type(model.net.get_base_model()) is transformers.LlamaForCausalLM
    assert not canary.exists()


def test_a_padding_token_is_always_there() -> None:
    made = load_tokenizer(ModelConfig(base=base("gpt2")))
    assert made.pad_token_id == made.eos_token_id is not None
    assert make("gpt2").net.config.pad_token_id == made.pad_token_id


def test_precision_is_as_asked() -> None:
    assert (uses_bf16("bf16", "cpu"), uses_bf16("fp32", "cpu"), uses_bf16("fp32", "cuda")) == (True, False, False)
    assert uses_bf16("auto", "cpu") == torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("head", ["label-text", "linear"])
@pytest.mark.parametrize("name", chosen(ENCODERS))
def test_an_encoder_that_lacks_a_layer_is_refused_and_one_that_lacks_its_head_is_not(
    name: str, head: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(base(name), tmp_path / "base")
    held = load_file(folder / "model.safetensors")
    whole = make(name, base=str(folder), head=head, classes=CLASSES)
    last = max((n for n in held if "pooler" not in n), key=lambda n: ([int(p) for p in n.split(".") if p.isdigit()] or [-1], n))
    save_file({n: t for n, t in held.items() if "pooler" not in n}, folder / "model.safetensors", {"format": "pt"})
    assert make(name, base=str(folder), head=head, classes=CLASSES).read_shapes() == whole.read_shapes()
    save_file({n: t for n, t in held.items() if n != last}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors of a whole encoder \(.*" + last.split(".")[-2]):
        make(name, base=str(folder), head=head, classes=CLASSES)


@pytest.mark.parametrize(("name", "key"), [("llama", "num_hidden_layers"), ("gpt2", "n_layer"), ("bert", "num_hidden_layers")])
def test_blocks_that_the_config_does_not_count_are_refused(name: str, key: str, tmp_path: Path) -> None:
    """With its top block left out the base is another model, and would train and score without a word."""
    folder = Path(shutil.copytree(base(name), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps({**config, key: config[key] - 1}))
    with pytest.raises(ModelError, match=r"holds \d+ tensors of blocks that its config\.json does not count \(.*\.1\."):
        Model(ModelConfig(base=str(folder)), LoraConfig(), 1, ("a", "b"))


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_is_no_language_model_unless_it_is_a_decoder(name: str, tmp_path: Path) -> None:
    """Trained on the next token it would copy it from its own input, and score and generate nonsense without a word."""
    folder = Path(shutil.copytree(base(name), tmp_path / "base"))
    with pytest.raises(ModelError, match=rf"\({name}\) reads what comes after a token too"):
        Model(ModelConfig(base=str(folder), kind="causal"), LoraConfig(), 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_decoder": True}))
    assert Model(ModelConfig(base=str(folder), kind="causal"), LoraConfig(), 1).kind == "causal"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_language_model_that_lacks_a_tensor_is_refused(name: str, tmp_path: Path) -> None:
    """transformers would fill it with random numbers and only warn."""
    folder = tmp_path / "base"
    shutil.copytree(base(name), folder)
    tensors = load_file(folder / "model.safetensors")
    lost = next(key for key in sorted(tensors) if key.endswith(("q_proj.weight", "SelfAttention.q.weight")))
    save_file({k: v for k, v in tensors.items() if k != lost}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"lacks 1 tensors.*{lost}"):
        Model(ModelConfig(base=str(folder), precision="fp32"), LoraConfig(rank=2), 1)


def test_a_recipe_may_bring_its_chat_template(tmp_path: Path) -> None:
    """A file, its text, `none`, or one of several that a tokenizer has by name."""
    own = load_tokenizer(ModelConfig(base=base("llama"))).chat_template
    text = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    file = tmp_path / "mine.jinja"
    file.write_text(text)

    def template(asked: str, folder: str = base("llama")) -> str | None:
        return load_tokenizer(ModelConfig(base=folder, chat_template=asked)).chat_template

    assert (template(""), template(text), template("none")) == (own, text, None)
    assert load_recipe(None, [f"model.chat_template={file}"]).model.chat_template == text
    several = shutil.copytree(base("llama"), tmp_path / "several")
    (several / "chat_template.jinja").unlink(missing_ok=True)
    (several / "additional_chat_templates").mkdir()
    (several / "additional_chat_templates" / "tools.jinja").write_text("{{ 'tools' }}")
    (several / "chat_template.jinja").write_text("{{ 'plain' }}")
    assert template("", str(several)) == "{{ 'plain' }}"
    assert template("tools", str(several)) == "{{ 'tools' }}"
    for asked, words in (("rag", "'none', 'default', 'tools', or a file"), (str(tmp_path / "no.jinja"), "no.jinja'")):
        with pytest.raises(ModelError, match=r"model\.chat_template = .*" + words):
            template(asked, str(several))
    file.write_bytes(b"\xff{{")
    with pytest.raises(ConfigError, match=r"model\.chat_template = .* cannot be read"):
        load_recipe(None, [f"model.chat_template={file}"])


def test_tokens_that_a_base_has_no_embedding_of_are_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(base("llama"), tmp_path / "base")
    words = transformers.AutoTokenizer.from_pretrained(folder)
    rows = transformers.AutoConfig.from_pretrained(folder).vocab_size
    words.add_special_tokens({"pad_token": "<new-pad>"})
    words.add_tokens(["<extra>"])
    words.save_pretrained(folder)
    for weights in (True, False):
        with pytest.raises(ModelError, match=rf"embeds {rows} tokens, and its tokenizer has '<new-pad>' \({rows}\);"):
            make("llama", base=str(folder), weights=weights)
    words.pad_token = words.eos_token  # a token that no text needs, as Gemma 3 has one, is no fault
    words.save_pretrained(folder)
    assert make("llama", base=str(folder)).read().lora


@pytest.mark.parametrize(("name", "positions"), [("llama", 256), ("gpt2", 256), ("roberta", 254), ("t5", 0), ("bart", 256)])
def test_how_many_tokens_a_base_reads(name: str, positions: int) -> None:
    """RoBERTa counts from behind its padding; a T5 has no bound. A row of that many goes through, one more does not."""
    model = make(name)
    assert model.positions == positions
    if name in ("gpt2", "roberta", "bart"):
        embedded = model.net.get_base_model().get_input_embeddings().num_embeddings
        ids = torch.randint(5, embedded, (1, positions))
        more = {"decoder_input_ids": ids[:, :3]} if name == "bart" else {}
        model.net(input_ids=ids, **more)
        with pytest.raises((IndexError, RuntimeError)):
            model.net(input_ids=torch.cat([ids, ids[:, :1]], 1), **more)


def test_a_rank_beyond_every_map_is_refused() -> None:
    with pytest.raises(ModelError, match=r"lora\.rank = 33: no map of .* has a rank above 32"):
        make("llama", rank=33)


@pytest.mark.parametrize("name", chosen(ARCHITECTURES))
def test_a_pass_in_bf16_is_trained_and_is_nearly_that_in_float32(name: str) -> None:
    """Attention is trained in float32 there, whatever a model gives it beside its mask."""
    losses = []
    for precision in ("fp32", "bf16"):
        model, examples = setting(name, precision=precision)
        model.train(True)
        with model.autocast():
            forward = model.forward(whole_batch(model, examples))
            loss = torch.nn.functional.cross_entropy(forward.logits.float(), forward.targets)
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
