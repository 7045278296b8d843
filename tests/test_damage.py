"""Every family of damage against the same model with its weights changed by hand, in every architecture, and what it leaves.

Which units are lost is recomputed from `_drawn`'s law alone; the twin's units are rows and columns of weight matrices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from shapes import ARCHITECTURES, HEADS, INNER, LAYERS, chosen, make, randomise
from torch import Tensor, nn

from fedkeel.data.batches import collate
from fedkeel.data.format import Formatter
from fedkeel.model.lora import Model
from fedkeel.model.places import Place
from fedkeel.recipe.schema import Evaluation, LoraConfig
from fedkeel.rng import counter_normal, derive, numpy_generator
from fedkeel.scores import damage
from fedkeel.scores.damage import DamageError, Subject, compare, damaged, family_index, in_groups, outcomes, quantised
from fedkeel.scores.evaluate import Scored, score, task_table
from fedkeel.tables import DAMAGES as FAMILIES
from fedkeel.types import Record

SEED = 5
LABELS = ("sport", "business news", "science")
STRONG = {
    "heads": 0.4,
    "channels": 0.5,
    "skip": 1,
    "depth": 0.5,
    "modules": 0.5,
    "scale": 0.5,
    "noise": 0.3,
    "bits": 4,
    "base": 4,
}
every = pytest.mark.parametrize("name", chosen(ARCHITECTURES))
families = pytest.mark.parametrize("family", FAMILIES)


def records(labels: tuple[str, ...] = LABELS) -> list[Record]:
    texts = ("the boat turns", "a much longer row about 42 lentils, carrots and the old captain", "no news", "it rains")
    return [
        Record(f"row-{n}", f"task-{n % 2}", "test", LABELS[n % 3], "Say it.", text, labels=labels)
        for n, text in enumerate(texts)
    ]


@cache
def prepared(name: str) -> tuple[Model, Formatter]:
    """A model with a non-zero adapter; all tests share it, so each also tests that the ones before left nothing behind."""
    model = make(name, LABELS)
    randomise(model)
    return model, Formatter(model.tokenizer, model.kind, 128, classes=model.classes)


@cache
def other(name: str) -> Model:
    """The twin: an equal model, to be changed by hand."""
    model = make(name, LABELS)
    randomise(model)
    return model


@torch.no_grad()
def logits(model: Model, name: str) -> Tensor:
    batch = collate(
        [prepared(name)[1].encode(r) for r in records()], model.kind, model.tokenizer.pad_token_id, len(model.classes)
    )
    return model.forward(batch).logits.clamp(min=-1e4)  # −inf where a class is not allowed


@cache
def clean(name: str) -> Tensor:
    return logits(prepared(name)[0], name)


@pytest.fixture
def by_hand(name: str) -> Iterator[Model]:
    model = other(name)
    before = {key: tensor.clone() for key, tensor in model.net.state_dict().items()}
    yield model
    model.net.load_state_dict(before)


def state(model: Model) -> list[Any]:
    """All that damage could change: each tensor's bits and memory, and hooks."""
    tensors = [(k, t.numpy().tobytes(), t.data_ptr()) for k, t in model.net.state_dict().items()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.net.modules()]
    return [tensors, hooks, model.read().lora.keys(), {m.scale for m in model.read().lora.values()}]


def lost(family: str, count: int, total: int) -> list[int]:
    """Indices of the `count` units that are gone, of `total` in the order of the model's modules."""
    seed = derive(SEED, "damage", family)
    return numpy_generator(seed, "drawn").permutation(total)[:count].tolist()


def base_map(module: nn.Module) -> Any:
    """The frozen map in a LoRA layer, or the module itself."""
    return getattr(module, "base_layer", module)


def matrix(module: Any) -> Tensor:
    """A view of a frozen map's weight as (d_out, d_in); GPT-2 holds it the other way round."""
    return module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data


@torch.no_grad()
def zero_columns(place: Place, columns: range) -> None:
    """No input of these channels, neither through the frozen map nor through A."""
    for column in columns:
        matrix(base_map(place.module))[:, column] = 0.0
        place.module.lora_A["default"].weight[:, column] = 0.0  # type: ignore[union-attr,index]


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5 * max(1.0, float(two.abs().max())), rtol=0)


def check(name: str, family: str, twin: Model) -> None:
    """The damaged model is the twin, is another than the clean one, and is the clean one again afterwards."""
    model = prepared(name)[0]
    before, undamaged = state(model), clean(name)
    with damaged(model, family, STRONG[family], SEED):
        got = logits(model, name)
    close(got, logits(twin, name))
    assert (got - undamaged).abs().max() > 1e-2
    assert state(model) == before
    assert torch.equal(logits(model, name), undamaged)


@every
def test_lost_heads_are_columns_of_the_output_map(name: str, by_hand: Model) -> None:
    places = by_hand.places.attention
    units = [(place, unit) for place in places for unit in range(place.units)]
    assert {p.units for p in places} <= {HEADS, 2}
    for index in lost("heads", round(0.4 * len(units)), len(units)):
        place, unit = units[index]
        width = matrix(base_map(place.module)).shape[1] // place.units
        zero_columns(place, range(unit * width, (unit + 1) * width))
    check(name, "heads", by_hand)


@every
def test_lost_channels_are_columns_of_the_down_projection(name: str, by_hand: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "BLOCK", 20)  # of 48: the last block is shorter
    places = by_hand.places.down
    units = [(place, start) for place in places for start in (0, 20, 40)]
    assert len(units) == 3 * LAYERS * (2 if by_hand.kind == "seq2seq" else 1)
    for index in lost("channels", round(0.5 * len(units)), len(units)):
        place, start = units[index]
        zero_columns(place, range(start, min(start + 20, INNER)))
    check(name, "channels", by_hand)


@every
@torch.no_grad()
def test_a_skipped_block_is_one_whose_branches_end_in_zeros(name: str, by_hand: Model) -> None:
    blocks: dict[str, list[Any]] = {}
    for place in by_hand.places.residual:
        parts = place.path.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(".".join(parts[: number + 1]), []).append(place.module)
    assert len(blocks) == LAYERS * (2 if by_hand.kind == "seq2seq" else 1)
    (index,) = lost("skip", 1, len(blocks))
    for module in list(blocks.values())[index]:
        if hasattr(module, "base_layer"):
            for parameter in (*module.base_layer.parameters(), module.lora_B["default"].weight):
                parameter.zero_()
        else:
            module.weight.fill_(-1.0)  # Gemma's norms multiply by 1 + weight
    check(name, "skip", by_hand)


@every
@torch.no_grad()
def test_a_dropped_module_has_no_adapter(name: str, by_hand: Model) -> None:
    adapter = by_hand.read()
    paths = list(adapter.lora)
    for index in lost("modules", round(0.5 * len(paths)), len(paths)):
        adapter.lora[paths[index]].b.zero_()
    by_hand.write(adapter)
    check(name, "modules", by_hand)


@every
def test_scale_is_the_adapters_scale(name: str, by_hand: Model) -> None:
    adapter = by_hand.read()
    by_hand.write(dataclasses.replace(adapter, lora={p: dataclasses.replace(f, scale=1.5) for p, f in adapter.lora.items()}))
    assert {f.scale for f in adapter.lora.values()} == {3.0}
    check(name, "scale", by_hand)
    by_hand.write(adapter)  # load_state_dict knows no scale


@every
def test_noise_is_the_drawn_matrix_in_the_units_of_each_row(name: str, by_hand: Model) -> None:
    for branch in by_hand.places.branches:
        w = matrix(branch.base)
        d_out, d_in = w.shape
        key = derive(SEED, "damage", "noise")
        n = counter_normal(derive(key, branch.path), torch.arange(d_out * d_in)).view(d_out, d_in)
        for row in range(d_out):
            length = math.sqrt(sum(v * v for v in w[row].double().tolist()))
            w[row] += 0.3 * length / math.sqrt(d_in) * n[row]
    check(name, "noise", by_hand)


@every
def test_four_bits_are_fifteen_values_a_row(name: str, by_hand: Model) -> None:
    for branch in by_hand.places.branches:
        w = matrix(branch.base)
        for row in w:
            step = float(row.abs().max()) / 7
            row.copy_(torch.tensor([round(float(v) / step) * step for v in row]))
            assert len(row.unique()) <= 15
    check(name, "bits", by_hand)


def four_bits(row: Tensor) -> Tensor:
    """A row of a matrix through Q4_0, number by number."""
    found = []
    for start in range(0, len(row), 32):
        group = row[start : start + 32].tolist()
        largest = max(group, key=abs)
        step = np.float32(largest) / np.float32(-8)
        for value in group:
            whole = min(15, max(0, math.floor(value / float(step) + 8.5))) - 8 if step else 0
            found.append(whole * float(np.float16(step)))
    return torch.tensor(found)


@every
def test_a_base_of_four_bits_is_rounded_in_groups_whatever_is_on_it(name: str, by_hand: Model) -> None:
    changed = 0
    for path, module in by_hand.net.get_base_model().named_modules():
        for key, weight in module.named_parameters(recurse=False):
            inside = any(part.isdigit() for part in path.split(".")) and not isinstance(module, nn.Embedding)
            if inside and weight.dim() > 1 and not weight.requires_grad:
                rows = weight.data.T if type(module).__name__ == "Conv1D" else weight.data
                rows.copy_(torch.stack([four_bits(row) for row in rows.reshape(-1, rows.shape[-1])]).view(rows.shape))
                changed += key == "weight"
    assert changed >= 4
    check(name, "base", by_hand)


def test_groups_by_hand() -> None:
    """A group's scale is its largest number over −8 (steps up to 7 on the other side) or over 127; a group of 0 stays."""
    w = torch.zeros(2, 40)
    w[0, :4] = torch.tensor([-8.0, 7.0, 8.0, 0.5])
    w[0, 32:35] = torch.tensor([1.0, -0.125, 0.06])
    assert in_groups(w, 4)[0, :4].tolist() == [-8.0, 7.0, 7.0, 1.0]
    assert in_groups(w, 4)[0, 32:35].tolist() == [1.0, -0.125, 0.0]
    eight = torch.tensor([127.0, -0.5, 0.49, 126.5])
    assert in_groups(eight, 8).tolist() == [127.0, -1.0, 0.0, 127.0]
    assert in_groups(w, 8)[1].abs().max() == 0


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_0")])
def test_a_base_is_what_gguf_packs(bits: int, kind: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the extra fedkeel[gguf] is not installed")
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 1, 64)[:, None]
    w[5, 32:64] = 0
    as_type = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), as_type), as_type)
    assert np.array_equal(in_groups(w, bits).numpy(), packed)


def test_quantising_by_hand() -> None:
    w = torch.tensor([[7.0, -3.4, 0.6, -7.0], [0.0, 0.0, 0.0, 0.0], [1.27, -0.0149, 0.016, 0.0]])
    assert quantised(w[:2], 4).tolist() == [[7.0, -3.0, 1.0, -7.0], [0.0] * 4]
    torch.testing.assert_close(quantised(w[2:], 8), torch.tensor([[1.27, -0.01, 0.02, 0.0]]))
    again = quantised(w, 4)
    torch.testing.assert_close(quantised(again, 4), again)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
@families
def test_the_model_is_as_before_after_an_error(name: str, family: str) -> None:
    model = prepared(name)[0]
    before = state(model)

    def fail() -> None:
        with damaged(model, family, STRONG[family], SEED):
            assert state(model) != before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert state(model) == before


def test_a_weight_that_cannot_be_damaged_leaves_the_ones_before_it_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("llama")[0]
    before = state(model)
    odd = dataclasses.replace(model.places.branches[-1], base=nn.Identity())
    odd.base.register_parameter("weight", nn.Parameter(torch.ones(3)))
    places = dataclasses.replace(model.places, branches=(*model.places.branches, odd))
    monkeypatch.setitem(model.__dict__, "places", places)
    with pytest.raises(DamageError, match="'llama' holds no plain weight"), damaged(model, "noise", 0.1, 1):
        pass
    assert state(model) == before


@families
def test_the_seed_decides(family: str) -> None:
    model = prepared("opt")[0]

    def under(seed: int) -> Tensor:
        with damaged(model, family, STRONG[family], seed):
            return logits(model, "opt")

    torch.manual_seed(1)
    first = under(1)
    torch.manual_seed(2)
    assert torch.equal(under(1), first)
    others = [torch.equal(under(seed), first) for seed in range(2, 10)]
    assert all(others) != FAMILIES[family].random
    before = torch.get_rng_state()
    under(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stronger_damage_of_one_seed_contains_the_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    real = damage._drawn
    monkeypatch.setattr(damage, "_drawn", lambda f, n, s: seen.append(set(map(id, real(f, n, s)))) or real(f, n, s))
    model = prepared("llama")[0]
    for share in (0.0, 0.01, 0.5, 1.0):  # 0.01 of 14 modules is still one
        with damaged(model, "modules", share, 3):
            pass
    assert [len(s) for s in seen] == [0, 1, 7, 14]
    assert seen[1] < seen[2] < seen[3]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("bits", "base")])
def test_no_strength_is_no_damage(family: str) -> None:
    model = prepared("qwen2")[0]
    with damaged(model, family, 1.0 if family == "scale" else 0.0, SEED):
        assert torch.equal(logits(model, "qwen2"), clean("qwen2"))


def test_families_can_be_put_together() -> None:
    model = prepared("bart")[0]
    before = state(model)
    with damaged(model, "bits", 8, 1), damaged(model, "noise", 0.1, 1), damaged(model, "heads", 0.3, 1):
        assert state(model) != before
    assert state(model) == before


IMPOSSIBLE = [(f, s) for f in FAMILIES for s in (-0.5, math.nan, math.inf)]
IMPOSSIBLE += [("heads", 1.5), ("channels", 1.5), ("modules", 1.5), ("skip", 0.5), ("skip", 3), ("bits", 1), ("bits", 4.5)]
IMPOSSIBLE += [("base", 5)]


@pytest.mark.parametrize(("family", "strength"), IMPOSSIBLE)
def test_a_strength_that_cannot_be_is_refused(family: str, strength: float) -> None:
    model = prepared("llama")[0]
    before = state(model)
    with pytest.raises(DamageError, match=f"not {strength}"), damaged(model, family, strength, 1):
        pass
    assert state(model) == before


def test_an_unknown_family_and_an_architecture_without_a_place_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared("llama")[0]
    with pytest.raises(DamageError, match="'thunder'; there are heads, channels"), damaged(model, "thunder", 0.1, 1):
        pass
    bare = dataclasses.replace(
        model.places, architecture="zamba", attention=(), down=(), residual=(), branches=(), stack=(), forms=()
    )
    monkeypatch.setitem(model.__dict__, "places", bare)
    for family in FAMILIES.keys() - {"base"}:  # whose maps are known without a table
        with pytest.raises(DamageError, match="'zamba'"), damaged(model, family, STRONG[family], 1):
            pass
    monkeypatch.setitem(model.__dict__, "places", dataclasses.replace(places_of_three_heads(), architecture="odd"))
    with pytest.raises(DamageError, match="'odd' is 32 wide, which 3 heads do not divide"), damaged(model, "heads", 0.1, 1):
        pass


def places_of_three_heads() -> Any:
    places = prepared("mistral")[0].places
    return dataclasses.replace(places, attention=tuple(dataclasses.replace(p, units=3) for p in places.attention))


def jensen_shannon(p: tuple[float, ...], q: tuple[float, ...]) -> float:
    p, q = (tuple(x / math.fsum(side) for x in side) for side in (p, q))  # float32's rows sum to 1 only to 1e-7
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return sum(a * math.log(a / m) / 2 for side in (p, q) for a, m in zip(side, middle, strict=True) if a)


def test_consistency_is_of_the_rows_that_have_labels_however_many() -> None:
    def one(prediction: str, *distribution: float) -> Scored:
        return Scored(records()[0], prediction, {"accuracy": 1.0}, distribution)

    clean = [one("sport", 0.5, 0.5), one("sport", 0.2, 0.2, 0.6), one("some text")]
    scored = [one("sport", 1.0, 0.0), one("science", 0.2, 0.2, 0.6), one("other text")]
    found = compare("heads", 0.1, 0, scored, clean)
    # of the first row: see test_metrics; of the second 1; the third has none
    divergence = (math.log(4 / 3) + (math.log(2 / 3) + math.log(2)) / 2) / 2
    assert found.consistency == pytest.approx((1 - divergence / math.log(2) + 1) / 2)
    assert (found.agreement, found.score) == (1 / 3, 1.0)


@pytest.mark.parametrize(("name", "labels"), [("bert", LABELS), ("llama", LABELS), ("llama", ()), ("t5", LABELS), ("t5", ())])
def test_outcomes_are_scores_under_damage(name: str, labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model, formatter = prepared(name)
    rows, config = records(labels), Evaluation(batch_size=3, max_new_tokens=3)
    before, calls = state(model), []
    monkeypatch.setattr(damage, "score", lambda *args: calls.append(1) or score(*args))
    asked = {"heads": (0.5,), "scale": (0.5, 3.0), "bits": (2.0,)}
    undamaged = score(model, formatter, rows, config)

    def tried() -> list[damage.Outcome]:
        subject = Subject(model, formatter, config, draws=2, seed=4)
        return [o for family, strengths in asked.items() for o in outcomes(subject, undamaged, family, strengths)]

    found = tried()
    assert [o[:3] for o in found] == [
        ("heads", 0.5, 0),
        ("heads", 0.5, 1),
        ("scale", 0.5, 0),
        ("scale", 3.0, 0),
        ("bits", 2.0, 0),
    ]
    assert len(calls) == len(found)
    same = compare("", 0.0, 0, undamaged, undamaged)
    assert (same.agreement, same.consistency) == (1.0, 1.0 if labels else None)
    for outcome in found:
        with damaged(model, outcome.family, outcome.strength, derive(4, outcome.draw)):
            scored = score(model, formatter, rows, config)
        table = task_table(scored)
        assert outcome.score == pytest.approx((table["task-0"]["score"] + table["task-1"]["score"]) / 2)
        assert outcome.agreement == sum(a.prediction == b.prediction for a, b in zip(scored, undamaged, strict=True)) / 4
        pairs = [(a.distribution, b.distribution) for a, b in zip(scored, undamaged, strict=True)]
        same = sum(1 - jensen_shannon(p, q) / math.log(2) for p, q in pairs) / 4
        assert outcome.consistency == (pytest.approx(same, abs=1e-9) if labels else None)
    assert tried() == found
    assert state(model) == before


@pytest.mark.parametrize("family", ["modules", "scale", "noise", "bits", "heads", "skip"])
@pytest.mark.parametrize("name", chosen(["bert", "deberta-v2", "modernbert", "llama"]))
def test_blocks_below_the_adapter_run_once_a_batch_and_say_the_same(name: str, family: str) -> None:
    """An adapter on the upper of two blocks; the damage of heads and blocks may lie below it."""
    kind, _ = ARCHITECTURES[name][:2]
    whole = prepared(name)[0]
    upper = tuple(path for path in whole.read().lora if ".1." in path)
    model = Model(whole.config, LoraConfig(rank=4, targets=upper), 1, whole.classes)
    randomise(model)
    formatter = Formatter(model.tokenizer, model.kind, 128, classes=model.classes)
    config, before = Evaluation(batch_size=3), state(model)
    calls: list[int] = []
    handle = next(m for p, m in model.places.stack[0][1].named_modules() if "norm" in p.lower()).register_forward_hook(
        lambda *_: calls.append(1)
    )
    undamaged = score(model, formatter, records(), config)
    once = len(calls)
    subject = Subject(model, formatter, config, draws=3, seed=7)
    found = [o[3:] for o in outcomes(subject, undamaged, family, FAMILIES[family].strengths[:2])]
    kept = kind == "classifier" and FAMILIES[family].branches and name != "deberta-v2"  # which says more than states
    assert len(calls) == (2 if kept else 1 + len(found)) * once
    expected = []
    for strength in FAMILIES[family].strengths[:2]:
        for draw in range(3 if FAMILIES[family].random else 1):
            with damaged(model, family, strength, derive(7, draw)):
                scored = score(model, formatter, records(), config)
            expected.append(compare(family, strength, draw, scored, undamaged)[3:])
    assert found == expected
    handle.remove()
    assert state(model) == before
    assert not [m for m in model.net.modules() if "forward" in m.__dict__]


def test_what_cannot_be_damaged_so_is_told_without_scoring() -> None:
    with pytest.raises(DamageError, match="not 9"):
        damage.check(prepared("llama")[0], {"heads": (0.1,), "skip": (9,)})


def test_the_index_of_a_family_by_hand() -> None:
    # 0.75 and 1.25 are one point at 0.25, mean 0.7; 0.5 and 1.5 one at 0.5, mean 0.4: (0.25 · 0.75 + 0.25 · 0.55) / 0.4
    scores = {0.5: 0.3, 0.75: 0.8, 1.25: 0.6, 1.5: 0.5}
    assert family_index("scale", scores, 0.8) == pytest.approx(0.25 * (0.75 + 0.55) / (0.5 * 0.8))
    # steps of 1/127 and 1/7 of a row's largest entry
    x, y = 1 / 127, 1 / 7
    expected = (x * (1.0 + 0.9) / 2 + (y - x) * (0.9 + 0.5) / 2) / y
    assert family_index("bits", {8.0: 0.9, 4.0: 0.5}, 1.0) == pytest.approx(expected)
    assert family_index("skip", {1.0: 0.5}, 1.0) == 0.75
    assert family_index("heads", dict.fromkeys(FAMILIES["heads"].strengths, 0.6), 0.6) == 1.0
    with pytest.raises(DamageError, match="thunder"):
        family_index("thunder", {0.1: 1.0}, 1.0)
