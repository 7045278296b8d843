"""Prototypes of labels: what they are, what a row's states are pulled to, and that they travel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import shapes
import tiny
import torch
from test_run import adapter_of, go, rows_of, same
from test_stream import stream_data  # noqa: F401 - a fixture
from training import recipe_of, setting, whole_batch

from fedkeel.data.format import Example
from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.exchange.heads import heads_packed, heads_unpacked, heads_wire
from fedkeel.federation.evidence import Prototypes, known_sums
from fedkeel.method.objective.anchor import head_of
from fedkeel.method.objective.prototype import to_prototype
from fedkeel.model.bases import ModelError
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.dry import Dry
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import trained_model
from fedkeel.types import Forward, Head


def heads_of(model: Model, examples: Sequence[Example]) -> dict[str, Head]:
    return {task: head_of(sums, 0.1, means=True) for task, sums in known_sums(model.features, examples, 0).items()}


def whole(forward: Forward) -> torch.Tensor:
    assert forward.pooled is not None
    return forward.pooled


@pytest.mark.parametrize("more", [{"feature_depths": (0.5, 1.0)}, {"head": "analytic"}], ids=["depths", "head"])
def test_of_the_frozen_base_they_are_the_means_of_its_states(more: dict[str, Any]) -> None:
    model, examples = setting("bert", precision="fp32", **more)
    assert model.initial is not None
    model.write(model.initial)
    heads = heads_of(model, examples)
    with torch.no_grad():
        pooled = whole(model.forward(whole_batch(model, examples), pooled=True))
    found = Prototypes(heads)(pooled, examples)
    assert found is not None
    states, means = found
    assert torch.equal(states, pooled)
    for row, example in enumerate(examples):
        alike = [n for n, e in enumerate(examples) if (e.task, e.label) == (example.task, example.label)]
        assert torch.allclose(means[row], pooled[alike].mean(0), atol=0.01)  # half a step of the features' grid, 1/64


def test_a_row_of_a_label_that_nobody_held_is_pulled_nowhere() -> None:
    """And the loss is a mean over all rows: (1² + 3² + 2² + 2²) / 2 of the one that is, halved."""
    model, examples = setting("bert", precision="fp32", head="analytic")
    known = [e for e in examples if e.label == examples[0].label and e.task == examples[0].task]
    prototypes = Prototypes(heads_of(model, known))
    other = next(e for e in examples if e.task != examples[0].task)
    pooled = torch.zeros(2, model.net.config.hidden_size)
    found = prototypes(pooled, [examples[0], other])
    assert found is not None
    assert len(found[0]) == 1
    assert prototypes(pooled[:1], [other]) is None
    forward = Forward(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    near = replace(forward, prototypes=(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.0]])))
    assert float(to_prototype(near, None)) == (1 + 9) / 2 / 2
    assert float(to_prototype(forward, None)) == 0
    # micro-batches, weighed by their positions, are the whole
    parts = [replace(near, targets=near.targets[:1]), replace(forward, targets=forward.targets[1:])]
    assert sum(float(to_prototype(part, None)) / 2 for part in parts) == float(to_prototype(near, None))
    with pytest.raises(ValueError, match="no prototype loss"):
        to_prototype(Forward(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(0)), None)


def test_they_travel_beside_the_classifier() -> None:
    model, examples = setting("bert", precision="fp32", head="analytic")
    heads = heads_of(model, examples)
    plain = {task: replace(head, mean=None) for task, head in heads.items()}
    for sent in (heads, plain):
        told, tensors = heads_packed(sent)
        assert heads_wire(told) == {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        back = heads_unpacked(told, tensors)
        for task, head in sent.items():
            mean = back[task].mean
            assert (mean is None) == (head.mean is None)
            assert mean is None or head.mean is None or torch.equal(mean, head.mean)
    with pytest.raises(EnvelopeError, match="head 0 with mean 1"):
        heads_wire([{**told[0], "mean": 1}])


def apart(folder: RunFolder) -> float:
    """How far the trained states of all training rows are from their labels' prototypes."""
    recipe = load_recipe(folder.path / "recipe.toml")
    prepared, model = prepare(recipe), trained_model(recipe, folder.path)
    examples = formatter_of(model, prepared).encode_all(prepared.sites.all("train"))
    heads = {t: head_of(sums, 0.1, means=True) for t, sums in folder.read_known("federated", 1).items()}
    with torch.no_grad():
        forward = model.forward(whole_batch(model, examples), pooled=True)
    return float(to_prototype(replace(forward, prototypes=Prototypes(heads)(whole(forward), examples)), None))


def test_states_are_pulled_together_in_a_federation(stream_data: Path, tmp_path: Path) -> None:  # noqa: F811
    """The weight alone tells two runs apart: their states are nearer to the prototypes; and the term is logged."""
    given = [
        *tiny.overrides(Path(shapes.base("bert")), stream_data, tmp_path), "data.site_column=ward", "federation.rounds=2",
        "train.local_steps=8", "train.lr=3e-3", "evaluation.validation_rows=0", "evaluation.test_rows=4",
        "model.feature_depths=[1.0]", "evidence.anchor=1e-9",
    ]  # fmt: skip
    pulled, free = (go([*given, f"name=p{w}", f"evidence.prototype={w}"])[1] for w in (100, 0))
    assert not same(adapter_of(pulled.path), adapter_of(free.path))
    told = {r["name"] for r in rows_of(pulled)} - {r["name"] for r in rows_of(free)}
    assert told == {"prototype_loss"}
    assert len([r for r in rows_of(pulled) if (r["name"], r["site"]) == ("prototype_loss", "north")]) == 2
    assert apart(pulled) < 0.8 * apart(free)


def test_what_it_cannot_go_with_is_refused(tiny_overrides: list[str]) -> None:
    with pytest.raises(
        ConfigError, match=r"evidence.prototype = 1 compares an encoder.s states of one depth: set model.feature_depths"
    ):
        load_recipe(None, ["evidence.prototype=1"])
    private = ["privacy.unit=site", "privacy.noise=1", "federation.weighting=uniform"]
    with pytest.raises(ConfigError, match=r"evidence.prototype = 1: sites send sums over their rows"):
        recipe_of("evidence.prototype=1", "model.feature_depths=[1.0]", *private)
    causal = [*tiny_overrides, "evidence.prototype=1", "model.feature_depths=[1.0]"]
    for tried in (go, lambda given: Dry(prepare(load_recipe(None, given)))):
        with pytest.raises(ModelError, match=r"evidence.prototype: the states of .* are not pooled"):
            tried(causal)
