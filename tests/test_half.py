"""Frozen maps held in bf16: half the memory, and not one bit of a bf16 pass, a damage or a base shift changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from shapes import CAUSAL, base, chosen, make, randomise
from test_lower import LABELS, rows
from torch import nn

import fedkeel.model.lora
from fedkeel.data.batches import collate
from fedkeel.data.format import Formatter
from fedkeel.model.lora import Model
from fedkeel.scores.damage import damaged


def rounded(name: str, folder: Path) -> Path:
    """The base `name` with weights that are bf16 numbers, saved in float32."""
    shutil.copytree(base(name), folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(folder)
    return folder


def said(model: Model) -> list[torch.Tensor]:
    """Logits of some rows, their gradients, and the logits under damage."""
    randomise(model)
    formatter = Formatter(model.tokenizer, model.kind, 200, classes=model.classes)
    batch = collate(formatter.encode_all(rows()), model.kind, model.tokenizer.pad_token_id, 0)
    with model.autocast():
        logits = model.forward(batch).logits
    nn.functional.cross_entropy(logits.float(), batch.targets).backward()
    found = [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for family, level in (("bits", 4), ("noise", 0.1)):
        with torch.no_grad(), damaged(model, family, level, 1), model.autocast():
            found.append(model.forward(batch).logits)
    with torch.no_grad(), model.autocast(), model.swapped(model.park(model.read())):
        found.append(model.forward(batch).logits)
    return found


@pytest.mark.parametrize("name", chosen(CAUSAL))
def test_no_bit_changes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = rounded(name, tmp_path / name)
    options: dict[str, Any] = {"base": str(folder), "precision": "bf16"}
    held = make(name, LABELS, **options)
    monkeypatch.setattr(fedkeel.model.lora, "hold_in_bf16", lambda net: None)
    plain = make(name, LABELS, **options)
    frozen = [m.weight for m in held.net.modules() if type(m) is nn.Linear and not m.weight.requires_grad]
    tied = {id(m.weight) for m in held.net.modules() if isinstance(m, nn.Embedding)}
    assert all((w.dtype == torch.bfloat16) != (id(w) in tied) for w in frozen)
    for value, want in zip(said(held), said(plain), strict=True):
        assert value.dtype == want.dtype
        assert torch.equal(value, want)


def test_weights_that_are_no_bf16_numbers_stay_as_they_are() -> None:
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    net.requires_grad_(False)
    net[0].weight.data = torch.arange(16.0).view(4, 4) / 8
    net[2].weight.data = net[0].weight.data.clone()
    net[2].weight.requires_grad_(True)
    fedkeel.model.lora.hold_in_bf16(net)
    assert [m.weight.dtype for m in net] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.equal(net[0].weight.float(), torch.arange(16.0).view(4, 4) / 8)


def test_small_base_shifts_add_up(tmp_path: Path) -> None:
    """A thousandth of a step that bf16 can show, a hundred times."""
    model = make("llama", base=str(rounded("llama", tmp_path / "base")), precision="bf16")
    path, module = next(iter(model.layers.items()))
    weight = module.get_base_layer().weight
    assert weight.dtype == torch.bfloat16
    before = weight.data.float()
    small = torch.full((weight.shape[0], 1), 1e-5), torch.ones(1, weight.shape[1])
    model.replay([{path: small}] * 100, 0)
    torch.testing.assert_close(module.get_base_layer().weight.data, before + 1e-3, rtol=1e-5, atol=1e-6)
    model.rewind()
    assert torch.equal(module.get_base_layer().weight.data.float(), before)
