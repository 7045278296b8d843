"""Adapters in the upper blocks only: what the frozen blocks below say of a row is kept, and changes no bit of any result.

LAYERS is 2 in every tiny model here, so that the upper half is the second block and the first lies below the boundary.
"""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
import transformers
from shapes import CAUSAL, ENCODERS, LAYERS, base, chosen, make, randomise
from test_run import go

from fedkeel.data.batches import collate
from fedkeel.data.format import Formatter
from fedkeel.model.bases import ModelError
from fedkeel.model.export import save_adapter
from fedkeel.model.lora import Model
from fedkeel.model.lower import States
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Evaluation, LoraConfig
from fedkeel.recipe.settings import ConfigError
from fedkeel.scores.evaluate import label_log_likelihoods, score
from fedkeel.types import Record

UPPER = {"layers": ("upper-half",)}
LABELS = ("yes", "yes indeed", "42", "maybe")
TEXTS = ("What?", "the boat turns and the captain says no word about it", "soup of lentils", "is it so, or not")


def rows() -> list[Record]:
    return [Record(f"row-{n}", "t", "test", LABELS[n % 4], "Say it.", text, labels=LABELS) for n, text in enumerate(TEXTS)]


def ready(name: str, **options: Any) -> tuple[Model, Formatter]:
    model = make(name, LABELS if name in ENCODERS else (), **UPPER, **options)
    randomise(model)
    model.train(False)
    return model, Formatter(model.tokenizer, model.kind, 200, classes=model.classes)


def gradients(model: Model, formatter: Formatter) -> list[torch.Tensor]:
    """Of the likelihood of all rows in one batch, and the logits in front."""
    batch = collate(formatter.encode_all(rows()), model.kind, model.tokenizer.pad_token_id, len(model.classes))
    logits = model.forward(batch).logits
    torch.nn.functional.cross_entropy(logits.float(), batch.targets).backward()
    found = [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for parameter in model.parameters():
        parameter.grad = None
    return found


@pytest.mark.parametrize("name", chosen(CAUSAL, ENCODERS))
def test_a_pass_above_kept_states_is_the_whole_pass(name: str) -> None:
    model, formatter = ready(name)
    assert model.first == LAYERS // 2
    assert all(".1." in path for path in model.read().lora)
    plain = gradients(model, formatter)
    upper = {m for _, block in model.places.above(1).stack for m in block.modules()}
    for module in model.net.modules():
        module.training = module not in upper  # what lies below is at rest, whatever mode training is in
    with model.remembering():
        kept = [gradients(model, formatter), gradients(model, formatter)]
        assert model.lower is not None
        for bounds in ((0, 1), (0, 0)):
            model.lower._states = States(*bounds)
            kept += [gradients(model, formatter), gradients(model, formatter)]
    model.train(False)
    for found in kept:
        for value, want in zip(found, plain, strict=True):
            torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)
        for value, first in zip(found, kept[0], strict=True):
            assert torch.equal(value, first)
    for value, want in zip(gradients(model, formatter), plain, strict=True):  # nothing stays behind
        assert torch.equal(value, want)


@pytest.mark.parametrize("name", chosen(CAUSAL))
def test_labels_score_the_same_above_kept_states(name: str) -> None:
    model, formatter = ready(name)
    prompts = [formatter.prompt_ids(r, 20) for r in rows()]
    answers = [[formatter.answer_ids(r, label) for label in r.labels] for r in rows()]
    with torch.no_grad():
        plain = label_log_likelihoods(model, prompts, answers)
        with model.remembering():
            found = [label_log_likelihoods(model, prompts, answers) for _ in range(2)]
    assert found[0] == found[1]
    for got, want in zip(found[0], plain, strict=True):
        assert got == pytest.approx(want, abs=1e-4, rel=1e-5)


def test_a_row_that_is_kept_does_not_go_through_the_lower_blocks_again() -> None:
    model, formatter = ready("llama")
    below, above = (block for _, block in model.places.stack)
    assert model.keeps_keys  # found out by a pass of its own, once
    passed: list[str] = []
    below.self_attn.register_forward_hook(lambda *_: passed.append("below"))
    above.self_attn.register_forward_hook(lambda *_: passed.append("above"))
    with model.remembering():
        gradients(model, formatter)
        assert passed == ["below"] * 4 + ["above"]  # each row on its own, then all together
        passed.clear()
        gradients(model, formatter)
        assert passed == ["above"]
        passed.clear()
        free = [replace(r, labels=()) for r in rows()]
        score(model, formatter, free, Evaluation(max_new_tokens=3))  # a generating model remembers its own keys and values
        # three tokens generated from the bottom; then the likelihood of four rows, each worked out once
        assert (passed.count("below"), passed.count("above")) == (3 + 4, 3 + 1)


def test_a_full_disk_ends_the_keeping_and_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before stays, what was being written is not taken for whole."""
    states, given = States(0, 9), [torch.randn(4, 8) for _ in range(3)]
    states.put(b"0", given[0])
    assert states._file is not None
    file = states._file

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: Any) -> None:
            file.write(bytes(data)[:40])
            raise OSError(errno.ENOSPC, "No space left on device")

    states._file = cast(Any, Full())
    states.put(b"1", given[1])
    states._file = file
    states.put(b"2", given[2])
    found = states.get(b"0")
    assert found is not None
    assert torch.equal(found, given[0])
    assert states.get(b"1") is states.get(b"2") is None


def test_what_has_no_room_is_worked_out_again() -> None:
    states = States(1, 1)
    large, small = torch.randn(600, 256), torch.randn(3, 256)  # 600 KiB: one fits in memory, one in the file
    for number, tensor in enumerate((large, large + 1, large + 2, small)):
        states.put(bytes([number]), tensor)
    assert torch.equal(states.get(b"\0"), large)  # type: ignore[arg-type]
    assert torch.equal(states.get(b"\1"), large + 1)  # type: ignore[arg-type]
    assert states.get(b"\2") is None
    assert torch.equal(states.get(b"\3"), small)  # type: ignore[arg-type]


def test_bf16_states_come_back_from_the_file() -> None:
    states, given = States(0, 1), torch.randn(5, 8).bfloat16()
    states.put(b"x", given)
    assert torch.equal(states.get(b"x"), given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [("upper-half", [3, 4, 5, 6]), ([0], [0]), (["2-4", 6], [2, 3, 4, 6]), ("5,6", [5, 6]), ([], [])],
)
def test_layers_are_blocks(layers: Any, blocks: list[int]) -> None:
    given = f"lora.layers={layers}" if isinstance(layers, str) else f"lora.layers={str(layers).replace(chr(39), chr(34))}"
    assert load_recipe(None, [given]).lora.blocks(7) == blocks


@pytest.mark.parametrize("layers", ["top", "[1.5]", '["3-"]', "[true]", "-1"])
def test_layers_that_say_nothing_are_an_error(layers: str) -> None:
    with pytest.raises(ConfigError, match=r"lora\.layers"):
        load_recipe(None, [f"lora.layers={layers}"])


def test_a_block_that_the_base_lacks_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"blocks 0 to 1"):
        make("llama", layers=("2",))
    with pytest.raises(ConfigError, match=r"blocks 0 to 3"):
        LoraConfig(layers=("1", "3-4")).blocks(4)


def test_an_encoder_decoder_has_no_upper_half() -> None:
    with pytest.raises(ModelError, match=r"lora\.layers.*no single stack"):
        make("t5", layers=("1",))


def test_the_first_block_alone_is_below_nothing() -> None:
    model = make("llama", layers=("0",))
    assert model.first == 0
    assert model.lower is None
    assert all(".0." in path for path in model.read().lora)


@pytest.mark.slow
def test_a_federation_ends_in_the_same_bits_whatever_is_kept(tiny_overrides: list[str]) -> None:
    ends = []
    method = ["distill.weight=0.5", "distill.align=cka", "structure.heads=0.2", "federation.rounds=2", "model.precision=bf16"]
    for name, memory, disk in (("kept", 1024, 0), ("filed", 0, 1024), ("anew", 0, 0)):
        bounds = [f"model.cache_memory={memory}", f"model.cache_disk={disk}", f"name={name}", "lora.layers=1"]
        _, folder, _ = go([*tiny_overrides, *method, *bounds])
        rows = [json.loads(line) for line in folder.rows_file.read_text().splitlines()]
        told = [row for row in rows if row["unit"] not in ("seconds", "s")]
        assert len(told) > 20
        adapter = (folder.path / "adapter" / "adapter_model.safetensors").read_bytes()
        ends.append((adapter, [{k: v for k, v in row.items() if k != "run"} for row in told]))
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_peft_loads_an_adapter_of_the_upper_half(name: str, tmp_path: Path) -> None:
    model, formatter = ready(name)
    save_adapter(model, tmp_path / "adapter")
    auto = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModel
    loaded = peft.PeftModel.from_pretrained(auto.from_pretrained(base(name)), str(tmp_path / "adapter")).eval()
    ids = torch.tensor([formatter.encode(rows()[1]).ids])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids)[0], model.net(input_ids=ids)[0])
    assert {name for name, _ in loaded.named_parameters() if "lora_A" in name and ".0." in name.split("lora_A")[0]} == set()
