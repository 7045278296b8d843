"""GGUF files of an adapter and of a whole model: read back by transformers and by gguf, and said alike by llama.cpp."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapes
import tiny
import torch
import transformers
from huggingface_hub import ModelCard
from test_run import go

from fedkeel.cli import main
from fedkeel.evidence.card import Made, card, hub_id
from fedkeel.evidence.export import export as written
from fedkeel.evidence.report import read_rows
from fedkeel.files import DiskError, replaced
from fedkeel.model.bases import ModelError, folder_of
from fedkeel.model.gguf import convert
from fedkeel.model.gguf_write import save_adapter_gguf, save_merged_gguf
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import LoraConfig
from fedkeel.recipe.schema import Model as ModelConfig
from fedkeel.types import Adapter, Lora

gguf = pytest.importorskip("gguf")


def byte_level(name: str, folder: Path, **sizes: Any) -> str:
    """A tiny random base of an architecture, its words as llama.cpp cuts them; biases are random too."""
    words = shapes.tokenizer("chatml")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "head_dim": 8, **sizes}
    sizes |= {"intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    made = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(name, vocab_size=len(words), eos_token_id=words.eos_token_id, **sizes)
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def model(base: str, rank: int = 4, layers: tuple[str, ...] = ()) -> Model:
    made = Model(ModelConfig(base=base, precision="fp32"), LoraConfig(rank=rank, alpha=12.0, layers=layers), 1)
    shapes.randomise(made)
    return made


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def value(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


IDS = torch.tensor([[7, 30, 300, 12, 45, 46, 47, 200, 9, 10, 11]])


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", {"rope_theta": 500.0}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    ],
)
def test_a_merged_file_is_the_same_model_to_transformers(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    made = model(byte_level(name, tmp_path / "base", **sizes))
    with torch.no_grad():
        wanted = made.net(input_ids=IDS).logits
    save_merged_gguf(made, tmp_path / "model.gguf", "f32")
    convert(tmp_path / "model.gguf", tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.dtype == torch.float32
    with torch.no_grad():
        assert (again(input_ids=IDS).logits - wanted).abs().max() < 1e-4
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    # of a Qwen3's, transformers makes another tokenizer than of its own files: llama.cpp's answer counts there, below
    for text in () if name == "qwen3" else (*shapes.TEXT[:4], "<|im_start|>user\nÄé 12 \n\n  x<|im_end|>"):
        assert words(text)["input_ids"] == made.tokenizer(text)["input_ids"]
    assert words.eos_token == made.tokenizer.eos_token
    # transformers gives a Qwen2 its own way to cut words, whatever the base's file says
    assert value(tmp_path / "model.gguf", "tokenizer.ggml.pre") == ("qwen2" if name == "qwen2" else "gpt-2")


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_an_adapter_file_holds_what_merging_adds(name: str, tmp_path: Path) -> None:
    """Map by map: merged less base, in llama.cpp's own order of rows, is alpha / rank · B A of the file. Ranks differ."""
    base = byte_level(name, tmp_path / "base")
    made, plain = model(base, layers=("1",)), model(base)
    plain.write(Adapter({path: Lora(f.a, 0 * f.b, f.scale) for path, f in plain.read().lora.items()}, {}))
    found = made.read()
    some = dict(sorted(found.lora.items()))
    given = {path: Lora(f.a[: 1 + k % 4], f.b[:, : 1 + k % 4], 0.5 + k) for k, (path, f) in enumerate(some.items())}
    save_adapter_gguf(made, Adapter(given, {}), tmp_path / "adapter.gguf")
    for path, factors in given.items():
        made.net.get_submodule(f"base_model.model.{path}").weight.data += factors.scale * factors.b @ factors.a
    made.write(Adapter({path: Lora(f.a, 0 * f.b, f.scale) for path, f in found.lora.items()}, {}))
    save_merged_gguf(made, tmp_path / "merged.gguf", "f32")
    save_merged_gguf(plain, tmp_path / "base.gguf", "f32")
    merged, whole, lora = (tensors(tmp_path / f"{part}.gguf") for part in ("merged", "base", "adapter"))
    changed = {at for at in merged if not np.array_equal(merged[at], whole[at])}
    assert {f"{at}.lora_{f}" for at in changed for f in "ab"} == lora.keys()
    assert len(changed) == 7
    alpha = value(tmp_path / "adapter.gguf", "adapter.lora.alpha")
    for at in changed:
        a, b = lora[f"{at}.lora_a"], lora[f"{at}.lora_b"]
        assert np.abs(merged[at] - whole[at] - alpha / len(a) * b @ a).max() < 1e-5
    kinds = {key: value(tmp_path / "adapter.gguf", key) for key in ("general.type", "adapter.type", "general.architecture")}
    assert kinds == {"general.type": "adapter", "adapter.type": "lora", "general.architecture": name}


@pytest.mark.parametrize(("kind", "apart"), [("f16", 2**-11), ("bf16", 2**-8)])
def test_matrices_are_of_the_type_that_was_asked_for(kind: str, apart: float, tmp_path: Path) -> None:
    base = byte_level("llama", tmp_path / "base")
    for of in ("f32", kind):
        save_merged_gguf(model(base), tmp_path / f"{of}.gguf", of)
    packed = {t.name: t for t in gguf.GGUFReader(tmp_path / f"{kind}.gguf").tensors}
    for name, exact in tensors(tmp_path / "f32.gguf").items():
        held = gguf.quants.dequantize(packed[name].data, packed[name].tensor_type).reshape(exact.shape)
        if exact.ndim == 1:
            assert np.array_equal(held, exact)
        else:
            assert packed[name].tensor_type.name == kind.upper()
            assert 0 < np.abs(held - exact).max() <= apart * np.abs(exact).max()
    large = model(base)
    large.net.get_input_embeddings().weight.data[3, 3] = 1e5
    with pytest.raises(ModelError, match="write bf16 or f32"):
        save_merged_gguf(large, tmp_path / "large.gguf", "f16")
    assert not list(tmp_path.glob("large*"))


def test_what_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    made = model(shapes.base("gpt2"))
    for save in (
        lambda: save_adapter_gguf(made, made.read(), tmp_path / "x.gguf"),
        lambda: save_merged_gguf(made, tmp_path / "x.gguf"),
    ):
        with pytest.raises(ModelError, match=r"GGUF is written of llama, qwen2, qwen3, not of .*gpt2"):
            save()
    with pytest.raises(ModelError, match=r"llama\.cpp cuts words in ways of its own .*docs/serve\.md"):
        save_merged_gguf(model(shapes.base("llama")), tmp_path / "x.gguf")  # its words are SentencePiece's
    with pytest.raises(ModelError, match=r"'keel-nano': llama\.cpp cuts words in ways of its own"):
        save_merged_gguf(model("keel-nano"), tmp_path / "x.gguf")  # letters of other alphabets are signs to it
    turned = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="rotations of type 'linear'"):
        save_merged_gguf(model(byte_level("llama", tmp_path / "turned", rope_parameters=turned)), tmp_path / "x.gguf")
    dense = Adapter({}, {"classifier.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"classifier\.weight is trained whole"):
        save_adapter_gguf(model(shapes.base("llama")), dense, tmp_path / "x.gguf")
    assert not list(tmp_path.glob("x*"))


def test_a_file_of_a_library_is_whole_or_not_there(tmp_path: Path) -> None:
    with replaced(tmp_path / "deep" / "a") as partial:
        partial.write_text("all of it")
    assert (tmp_path / "deep" / "a").read_text() == "all of it"

    def fails(error: Exception) -> None:
        with replaced(tmp_path / "deep" / "a") as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(ValueError, match="no"):
        fails(ValueError("no"))
    with pytest.raises(DiskError, match="No space left"):
        fails(OSError(28, "No space left on device"))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]
    assert (tmp_path / "deep" / "a").read_text() == "all of it"


LEAN = ['evaluation.baselines=["base", "local"]', "evaluation.validation_rows=0", "train.lr=0.05"]


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    where = tmp_path_factory.mktemp("run")
    base = byte_level("llama", where / "base")
    recipe, folder, _ = go([*tiny.overrides(Path(base), tiny_data, where), *LEAN, "federation.rule=residual"])
    return recipe, folder.path


def export(run: Path, target: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["fedkeel", "export", str(run), str(target), *options])
        with pytest.raises(SystemExit) as ended:
            main()
    captured = capsys.readouterr()
    return captured.out if not ended.value.code else captured.err


def test_export_writes_files_a_modelfile_and_a_card(
    run: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's rule adds to the base: its adapter has all of that folded in, in either format."""
    told = export(run[1], tmp_path / "a", "--gguf", capsys=capsys)
    assert "adapter as GGUF" in told
    export(run[1], tmp_path / "m", "--merged", "--gguf", "--type", "f32", capsys=capsys)
    export(run[1], tmp_path / "p", capsys=capsys)
    assert {p.name for p in (tmp_path / "a").iterdir()} == {"adapter.gguf", "Modelfile", "README.md"}
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"model.gguf", "Modelfile", "README.md"}
    assert (tmp_path / "m" / "Modelfile").read_text() == "FROM ./model.gguf\n"
    assert (tmp_path / "a" / "Modelfile").read_text().splitlines()[1:] == ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"]
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(run[0].model.base)
    with torch.no_grad():
        before = base(input_ids=IDS).logits
        wanted = peft.PeftModel.from_pretrained(base, tmp_path / "p")(input_ids=IDS).logits
        convert(tmp_path / "m" / "model.gguf", tmp_path / "again")
        got = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")(input_ids=IDS).logits
    assert (got - wanted).abs().max() < 1e-3 < (before - wanted).abs().max()
    lora = tensors(tmp_path / "a" / "adapter.gguf")
    from safetensors.torch import load_file

    held = load_file(tmp_path / "p" / "adapter_model.safetensors")
    at = "base_model.model.model.layers.1.mlp.up_proj.lora"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "p").chat_template  # peft's AutoPeftModel finds it too
    ours = lora["blk.1.ffn_up.weight.lora_b"] @ lora["blk.1.ffn_up.weight.lora_a"]
    assert np.abs(ours - (held[f"{at}_B.weight"] @ held[f"{at}_A.weight"]).numpy()).max() < 1e-5


def test_an_adapter_names_its_base_by_the_hub_and_does_without_it(run: tuple[Any, Path], tmp_path: Path) -> None:
    """As on a machine that has a run's folder and not its base."""
    recipe = dataclasses.replace(run[0], model=dataclasses.replace(run[0].model, base="some-lab/some-model"))
    notes = written(recipe, run[1], tmp_path / "x")
    assert len(notes) == 1
    assert "'some-lab/some-model' is not on this machine" in notes[0]
    about = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert about == {
        **json.loads((run[1] / "adapter" / "adapter_config.json").read_text()),
        "base_model_name_or_path": "some-lab/some-model",
    }
    assert ModelCard.load(tmp_path / "x" / "README.md").data.base_model == "some-lab/some-model"


def test_bad_options_are_named(run: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, why in (
        (["--type", "f32"], "--type is of the matrices of --merged --gguf"),
        (["--merged", "--gguf", "--type", "q4"], "--type q4: one of f16, bf16, f32"),
    ):
        assert why in export(run[1], tmp_path / "x", *options, capsys=capsys)
    (tmp_path / "there").mkdir()
    assert "exists; name a folder that does not" in export(run[1], tmp_path / "there", "--gguf", capsys=capsys)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("form", [False, True])
def test_a_card_says_what_the_hub_reads_and_what_was_measured(run: tuple[Any, Path], merged: bool, form: bool) -> None:
    text = card(run[0], run[1], Made("causal", 8, merged, form))
    about = ModelCard(text).data
    assert about.library_name == (None if form else "transformers" if merged else "peft")
    assert about.pipeline_tag == "text-generation"
    assert ("lora" in about.tags, "gguf" in about.tags) == (not merged, form)
    measured = {
        (r.task, r.name): r.value for r in read_rows(run[1] / "rows.jsonl") if r.method == "federated" and r.split == "test"
    }
    told = {(result.dataset_name, result.metric_type): result.metric_value for result in about.eval_results}
    assert {task for task, _ in told} == {"colour", "echo"}
    for key, number in told.items():
        assert number == pytest.approx(measured[key], abs=5e-5)
    for part in ("3 rounds", "3 sites", "No\ndifferential privacy", "| aggregation | residual, codec fp32 up", "| base |"):
        assert part in text
    assert "local-only, site 3" in text
    for private in ("ward-", str(Path(run[0].model.base).parent)):  # who takes part, and where the base lies here
        assert private not in text


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (8, 8), (9, 16), (600, 600)])
def test_a_card_has_the_line_that_serves_it(run: tuple[Any, Path], rank: int, served: int) -> None:
    text = card(run[0], run[1], Made("causal", rank, merged=False, gguf=False))
    assert f"vllm serve BASE --enable-lora --max-lora-rank {served} --lora-modules fedkeel=.\n" in text
    assert "vllm" not in card(run[0], run[1], Made("seq2seq", rank, merged=False, gguf=False))


def test_the_base_has_its_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    names = ["smollm2", "keel-nano", "meta-llama/Llama-3.2-1B", "here/base", "/data/models/x", "base.gguf"]
    wanted = ["HuggingFaceTB/SmolLM2-135M-Instruct", "", "meta-llama/Llama-3.2-1B", "", "", ""]
    assert [hub_id(name) for name in names] == wanted


# Against llama.cpp itself, which is built when it is installed: `make slow` does.

QUESTIONS = (
    "What is the capital of France?", "Give an antonym of: hot", "Is 7 a prime number?", "Write a line about rain.",
    "Which colour has the sky?", "Name three fruits.", "Translate to German: the house", "Sum up: A boat sank. All were saved.",
    "Positive or negative? The film was dull.", "What is 12 + 30?", "Who wrote Hamlet?", "Say hello.",
    "Continue: once upon a time", "What does a keel do?", "List two rivers in Europe.", "What is Python?",
    "Rewrite politely: give me that", "Is water wet?", "How many days has a week?", "What's “naïve”, in other words?",
)  # fmt: skip


def said_by_llama_cpp(prompts: Sequence[list[int]], tokens: int, **files: Any) -> list[list[int]]:
    """Greedy answers, with all of each answer's logits read as they come."""
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make slow` builds it")
    loaded = llama.Llama(n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False, **{k: str(v) for k, v in files.items()})
    said = []
    for ids in prompts:
        answer: list[int] = []
        for token in loaded.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
            answer.append(token)
            if token == loaded.token_eos() or len(answer) == tokens:
                break
        said.append(answer)
    return said


def check_said(made: Model, prompts: Sequence[list[int]], answers: Sequence[list[int]], rounding: float) -> int:
    """Each token of llama.cpp's is the likeliest to PEFT's model too, or was within `rounding` of it in its logits, and the
    answer is followed no further. Returns how many answers were alike to the end."""
    alike = 0
    for ids, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = made.net(input_ids=torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1].float()
        best = logits.argmax(-1)
        differ = (best != torch.tensor(answer)).nonzero().flatten().tolist()
        if differ:
            first = differ[0]
            assert logits[first].max() - logits[first, answer[first]] < rounding
        alike += not differ
    return alike


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "smollm2"])
def test_llama_cpp_says_what_peft_says(name: str, tmp_path: Path) -> None:
    """20 greedy answers of the merged file, and of the base's file with the adapter's, in float32."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make slow` builds it")
    named = name == "smollm2"
    if named and not folder_of(name).is_dir():
        pytest.skip("smollm2 is not on this machine: fedkeel fetch smollm2")
    sizes = {"head_dim": 16} if name == "qwen3" else {}  # transformers takes 128 for any Qwen3 of a GGUF
    base = name if named else byte_level(name, tmp_path / "base", **sizes)
    made, plain = model(base), model(base)
    found = made.read()
    size = 0.02 if named else 1.0  # a trained adapter's size, about: it changes what is said, and does not make it noise
    made.write(Adapter({path: Lora(f.a, size * f.b, f.scale) for path, f in found.lora.items()}, {}))
    plain.write(Adapter({path: Lora(f.a, 0 * f.b, f.scale) for path, f in found.lora.items()}, {}))
    words = made.tokenizer
    texts = [[{"role": "user", "content": q}] for q in QUESTIONS]
    if words.chat_template:
        texts = [words.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in texts]
    else:
        texts = list(QUESTIONS)
    prompts = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    save_adapter_gguf(made, made.read(), tmp_path / "adapter.gguf")
    save_merged_gguf(plain, tmp_path / "base.gguf", "f32")
    with_adapter = said_by_llama_cpp(prompts, 24, model_path=tmp_path / "base.gguf", lora_path=tmp_path / "adapter.gguf")
    without = said_by_llama_cpp(prompts, 24, model_path=tmp_path / "base.gguf")
    assert sum(a != b for a, b in zip(with_adapter, without, strict=True)) >= 15  # the adapter says other things
    assert check_said(made, prompts, with_adapter, 1e-3) >= 18
    save_merged_gguf(model_again(base, made), tmp_path / "merged.gguf", "f32")
    merged = said_by_llama_cpp(prompts, 24, model_path=tmp_path / "merged.gguf")
    assert check_said(made, prompts, merged, 1e-3) >= 18


def model_again(base: str, made: Model) -> Model:
    again = model(base)
    again.write(made.read())
    return again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "llama", "qwen2", "qwen3"])
def test_llama_cpp_cuts_words_as_the_tokenizer_does(name: str, tmp_path: Path) -> None:
    llama = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; `make slow` builds it")
    if name == "smollm2" and not folder_of(name).is_dir():
        pytest.skip("smollm2 is not on this machine: fedkeel fetch smollm2")
    made = model(name if name == "smollm2" else byte_level(name, tmp_path / "base"))
    words = made.tokenizer
    save_merged_gguf(made, tmp_path / "m.gguf", "f16")
    read = llama.Llama(model_path=str(tmp_path / "m.gguf"), vocab_only=True, verbose=False)
    texts = (
        "the keel keeps its course", "  two  spaces and\ttabs\n\n\nlines ", "Ünïcode: 漢字, emoji 🙂, עברית, हिन्दी", "",
        "1234567890 3.14 1,000", "don't I'LL you're", "def f(x):\n    return x**2  # square", "a" * 60, "…—“quoted”",
        "<|im_start|>user\nhi<|im_end|>\n",
    )  # fmt: skip
    for text in texts:
        wanted = words(text, add_special_tokens=False)["input_ids"]
        assert read.tokenize(text.encode(), add_bos=False, special=True) == wanted, text
