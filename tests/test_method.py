"""Distillation, structures, proximal term and ascent in the training loop: off to the bit, and on against slow twins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import shapes
import torch
import transformers
from safetensors import safe_open
from test_run import Silent, adapter_of, go, rows_of, same, without_time
from torch import Tensor, nn
from training import (
    agree,
    apart,
    assert_loads_in_peft,
    batches_of,
    other,
    plain_descent,
    recipe_of,
    same_bits,
    setting,
    train,
    whole_batch,
)

from fedkeel import tables
from fedkeel.data.format import Example
from fedkeel.exchange.codecs import open_envelope
from fedkeel.federation.server import FederationError
from fedkeel.federation.teacher import Guide
from fedkeel.method.objective.ascent import backward_at_worst
from fedkeel.method.objective.consistency import self_consistency, symmetric_kl, to_clean
from fedkeel.method.objective.distill import Guidance, distill, guidance_weight
from fedkeel.method.objective.terms import Moment
from fedkeel.method.structure.draw import Draw
from fedkeel.method.structure.inject import Injection
from fedkeel.model.lora import Model
from fedkeel.model.places import StructureError
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Distill, Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive
from fedkeel.runs.prepare import prepare
from fedkeel.tables import STRUCTURES
from fedkeel.types import Forward, Global

OFF = [
    "distill.weight=0",
    "distill.temperature=3",
    "distill.gold=hard",
    "distill.kappa=0.1",
    "distill.rest=entropy",
    "distill.beta=2",
    "distill.task_trust=false",
    "distill.site_trust=false",
    "distill.align=cosine",
    "distill.align_weight=5",
    "distill.layer_trust=false",
    "distill.memory=0.5",
    "distill.ramp=0",
    "distill.cache=7",
    "structure.mode=rdrop",
    "structure.weight=9",
    "structure.every=1",
    "structure.ramp=0",
    "structure.anneal=0",
    "train.proximal=0",
    "train.sam=0",
]
ALL = {"heads": 0.3, "channels": 0.3, "branch": 0.3, "layers": 0.3, "skip": 0.3, "lodrop": 0.2, "rank": 0.3, "weights": 0.1}
EVERY_STRUCTURE = [f"structure.{name}={value}" for name, value in ALL.items()] + ["structure.adversary=0.1"]
KINDS = pytest.mark.parametrize("name", ["llama", "distilbert", "t5"])


# ---------------------------------------------------------------------------------------------------------------------- off


def test_these_are_all_structures() -> None:
    assert {*ALL, "adversary"} == set(STRUCTURES)


@pytest.mark.parametrize("dropout", shapes.quickly((0.3,), [0.0, 0.3]))
def test_a_run_with_all_weights_at_0_is_the_plain_run_to_the_bit(tiny_overrides: list[str], dropout: float) -> None:
    base = [*tiny_overrides, "evaluation.baselines=[]", f"lora.dropout={dropout}", "federation.rounds=2"]
    _, plain, _ = go(base)
    zeros = [f"structure.{name}=0" for name in STRUCTURES]
    # R-Drop runs on adapter dropout alone; there it is its weight that switches it off
    silent = ["structure.weight=0"] if dropout else []
    _, off, _ = go([*base, "name=off", *OFF, *zeros, *silent])
    assert same(adapter_of(plain.path), adapter_of(off.path))
    assert without_time(rows_of(plain)) == [{**r, "run": "tiny"} for r in without_time(rows_of(off))]
    assert not any(r["name"].startswith(("gate", "distill", "structure", "strength")) for r in rows_of(off))


@pytest.mark.parametrize("mode", ["implicit", "self", "rdrop"])
def test_at_the_foot_of_the_ramps_nothing_changes(mode: str) -> None:
    """λ_d = 0 and strength = 0 at the first step of the run, with adapter dropout so that random streams matter."""
    more = ["distill.weight=5", "distill.ramp=0.5", "structure.ramp=0.5", f"structure.mode={mode}", *EVERY_STRUCTURE]
    ends = []
    for overrides in ([], more):
        model, examples = setting("llama", dropout=0.3)
        ends.append(train(model, examples, recipe_of("train.local_steps=1", *overrides), rounds=4))
    (plain, stats), (ramped, told) = ends
    assert same_bits(plain, ramped)
    assert told == {**stats, "strength": 0.0, "dropped": 0.0}
    model, examples = setting("llama", dropout=0.3)
    second, told = train(model, examples, recipe_of("train.local_steps=2", *more), rounds=4)
    assert told["strength"] == pytest.approx(0.125)  # 0 and 1/8 of the run over a half
    assert not same_bits(second, plain)


def test_strength_at_the_end_of_the_run_is_nearly_0() -> None:
    model, examples = setting("llama")
    recipe = recipe_of("train.local_steps=4", "structure.anneal=0.5", "structure.rank=0.3")
    _, stats = train(model, examples, recipe, Global(1, model.read()), rounds=2)
    # progress ½, 5/8, 6/8, 7/8: (1 − progress) / ½
    assert stats["strength"] == pytest.approx((1 + 0.75 + 0.5 + 0.25) / 4)


@pytest.mark.parametrize("mode", ["implicit", "self"])
def test_draws_leave_the_global_generator_where_a_plain_round_leaves_it(mode: str) -> None:
    more = ["distill.weight=1", f"structure.mode={mode}", "structure.every=1", "distill.align=cosine", *EVERY_STRUCTURE]
    states = []
    for overrides in ([], more):
        model, examples = setting("llama", dropout=0.3)
        train(model, examples, recipe_of(*overrides, "structure.skip=0"))  # a block that is not run has no dropout
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_guidance_weight_by_hand() -> None:
    def weight(ramp: float, progress: float, every: int = 1, step: int = 0) -> float:
        return guidance_weight(Distill(weight=2.0, ramp=ramp, every=every), Moment(step, progress))

    assert [weight(0.1, p / 20) for p in (0, 1, 2, 3, 19)] == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0])
    assert weight(0.0, 0.0) == 2.0
    assert weight(1.0, 0.25) == 0.5
    assert [weight(1.0, 0.25, 3, step) for step in range(5)] == [1.5, 0.0, 0.0, 1.5, 0.0]


# ------------------------------------------------------------------------------------------------------------- distillation


@KINDS
@pytest.mark.parametrize("align", shapes.quickly(("cka",), ["off", "cosine", "cka"]))
def test_where_the_student_is_the_teacher_there_is_nothing_to_learn_from_it(name: str, align: str) -> None:
    """At the first step of a round: a loss of 0 and gates of ½, but for the rounding of a teacher whose branches are folded;
    from the second step on it is felt. That the term is exactly 0 where the logits agree, tests of `distill` show."""
    more = ["distill.weight=3", f"distill.align={align}", "distill.align_weight=1"]
    ends = []
    for overrides in ([], more):
        model, examples = setting(name)
        with plain_descent():
            ends.append(train(model, examples, recipe_of("train.local_steps=1", *overrides)))
    (plain, _), (guided, stats) = ends
    assert abs(stats["distill_loss"]) < 1e-6
    assert [stats[f"gate_a_{what}"] for what in ("mean", "q1", "q2", "q3")] == pytest.approx([0.5] * 4, abs=1e-5)
    assert agree(plain, guided, setting(name)[0].read().tensors())
    model, examples = setting(name)
    plain, _ = train(model, examples, recipe_of())
    model, examples = setting(name)
    guided, stats = train(model, examples, recipe_of(*more))
    assert stats["distill_loss"] > 0.0
    assert apart(plain, guided) > 1e-4


def test_plain_distillation_against_a_twin_in_one_line() -> None:
    """gold = constant, rest = kl, no trusts: τ² KL(teacher ‖ student), by torch's own kl_div, with another teacher than
    the student; three steps of plain descent."""
    more = [
        "distill.weight=1.5",
        "distill.temperature=2",
        "distill.gold=constant",
        "distill.task_trust=false",
        "distill.site_trust=false",
        "train.clip_norm=1e9",
        "train.lr=0.002",
    ]
    recipe = recipe_of(*more)
    model, examples = setting("llama")
    given = model.read()
    with plain_descent():
        got, _ = train(model, examples, recipe, Global(0, given))
    model, _ = setting("llama")
    twin_teacher, _ = setting("llama")
    twin_teacher.train(False)
    for batch in batches_of(examples, recipe, range(3)):
        at = whole_batch(model, batch)
        with torch.no_grad():
            p = (twin_teacher.forward(at).logits / 2).log_softmax(-1)
        forward = model.forward(at)
        kl = nn.functional.kl_div((forward.logits / 2).log_softmax(-1), p, reduction="batchmean", log_target=True)
        (nn.functional.cross_entropy(forward.logits, at.targets) + 1.5 * 4 * kl).backward()
        descend(model, 0.002)
    assert agree(got, model.read().tensors(), setting("llama")[0].read().tensors())


def descend(model: Model, lr: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(lr * parameter.grad)
            parameter.grad = None


def test_the_weight_ramps_over_the_whole_run() -> None:
    """Round 0 of 2, two steps each, ramp 1: λ = 0 and w/4. The second step alone is guided."""
    overrides = ["distill.weight=4", "distill.ramp=1", "train.local_steps=2", "train.clip_norm=1e9", "train.lr=0.002"]
    model, examples = setting("llama")
    with plain_descent():
        ramped, stats = train(model, examples, recipe_of(*overrides))
        first, _ = train(
            setting("llama")[0], examples, recipe_of("train.local_steps=1", "train.clip_norm=1e9", "train.lr=0.002")
        )
    model, _ = setting("llama")
    given = model.read()
    guide = Guide(model, Global(0, given), examples, {}, recipe_of(*overrides).distill, False)
    model.write(given.with_tensors(first))
    model.train(False)
    batch = batches_of(examples, recipe_of(), range(2))[1]
    at = whole_batch(model, batch)
    forward = model.forward(at)
    found = distill(replace(forward, teacher=guide(at, batch)), Guidance())
    (nn.functional.cross_entropy(forward.logits, at.targets) + 1.0 * found.loss).backward()
    descend(model, 0.002)
    assert agree(ramped, model.read().tensors(), given.tensors())
    both = sum(e.positions for b in batches_of(examples, recipe_of(), range(2)) for e in b)
    guided = sum(e.positions for e in batch)
    assert stats["gate_a_mean"] > 0
    # told as a mean over the positions of the round, or over those that it was taken at
    assert stats["distill_loss"] in (
        pytest.approx(float(found.loss.detach()), rel=1e-3),
        pytest.approx(float(found.loss.detach()) * guided / both, rel=1e-3),
    )


def test_guidance_every_second_step_carries_the_weight_of_both() -> None:
    """Steps 0 and 2 of three are guided at twice the weight, step 1 is plain; and a teacher's forward is run for no other."""
    flat = ["train.clip_norm=1e9", "train.lr=0.002"]
    recipe = recipe_of("distill.weight=0.7", "distill.every=2", *flat)
    model, examples = setting("llama")
    given = model.read()
    with plain_descent():
        got, stats = train(model, examples, recipe, Global(0, given))
    model, _ = setting("llama")
    guide = Guide(model, Global(0, given), examples, {}, recipe.distill, False)
    model.train(False)
    told = 0.0
    batches = batches_of(examples, recipe, range(3))
    for step, batch in enumerate(batches):
        at = whole_batch(model, batch)
        forward = model.forward(at)
        loss = nn.functional.cross_entropy(forward.logits, at.targets)
        if step != 1:
            found = distill(replace(forward, teacher=guide(at, batch)), Guidance()).loss
            loss = loss + 2 * 0.7 * found
            told += float(found.detach()) * len(at.targets)
        loss.backward()
        descend(model, 0.002)
    assert agree(got, model.read().tensors(), given.tensors())
    guided = sum(e.positions for step in (0, 2) for e in batches[step])
    assert stats["distill_loss"] == pytest.approx(told / guided, rel=1e-3)


# ------------------------------------------------------------------------------------------------------------ micro-batches

TOGETHER = ["distill.weight=1", "distill.align=cosine", "train.proximal=0.5", "structure.mode=anchored"]


@KINDS
@pytest.mark.parametrize(
    "structures",
    [{"heads": 0.3, "channels": 0.5, "rank": 0.3}, {"layers": 0.5, "lodrop": 0.2, "branch": 0.3, "weights": 0.1}],
    ids=["default", "others"],
)
def test_micro_batches_add_up_with_everything_on(name: str, structures: dict[str, float]) -> None:
    ends = []
    for micro in (8, 2):
        model, examples = setting(name)
        amounts = [f"structure.{key}={value}" for key, value in structures.items()]
        more = ["train.batch_size=8", f"train.micro_batch_size={micro}", "train.clip_norm=1e9", "train.lr=0.002"]
        with plain_descent():
            ends.append(train(model, examples, recipe_of(*TOGETHER, *amounts, *more)))
    (one, stats_one), (four, stats_four) = ends
    assert stats_one["distill_loss"] > 1e-3
    # a micro-batch counts what all rows share anew, so beside draws by row the share may differ a little
    assert stats_one.pop("dropped") == pytest.approx(stats_four.pop("dropped"), abs=1e-6 if "heads" in structures else 0.02)
    assert stats_one == pytest.approx(stats_four, rel=1e-4, abs=1e-5)
    assert agree(one, four, setting(name)[0].read().tensors())


@pytest.mark.parametrize("mode", ["self", "rdrop"])
def test_micro_batches_add_up_in_both_other_modes(mode: str) -> None:
    ends = []
    for micro in (8, 2):
        model, examples = setting("llama")
        more = ["structure.heads=0.3", "structure.rank=0.3", f"structure.mode={mode}", "structure.every=1"]
        more += ["train.batch_size=8", f"train.micro_batch_size={micro}", "train.clip_norm=1e9", "train.lr=0.002"]
        with plain_descent():
            ends.append(train(model, examples, recipe_of(*more)))
    (one, stats_one), (four, stats_four) = ends
    assert stats_one["structure_loss"] > 1e-3
    assert stats_one == pytest.approx(stats_four, rel=1e-4, abs=1e-5)
    assert agree(one, four, setting("llama")[0].read().tensors())


# ------------------------------------------------------------------------------------------------------------------- modes


def test_anchored_is_implicit_with_distillation_to_the_bit() -> None:
    ends = []
    for mode in ("implicit", "anchored"):
        model, examples = setting("llama", dropout=0.2)
        ends.append(train(model, examples, recipe_of("distill.weight=1", f"structure.mode={mode}", *EVERY_STRUCTURE)))
    assert same_bits(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


@pytest.mark.parametrize("mode", ["self", "rdrop"])
def test_consistency_against_two_forwards_by_hand(mode: str) -> None:
    """One step of plain descent; the twin runs the two passes itself, with the same keys."""
    overrides = [
        "structure.heads=0.4",
        "structure.rank=0.3",
        "structure.weight=0.7",
        "train.local_steps=1",
        f"structure.mode={mode}",
        "train.clip_norm=1e9",
        "train.lr=0.002",
    ]
    recipe = recipe_of(*overrides)
    model, examples = setting("llama")
    with plain_descent():
        got, stats = train(model, examples, recipe)
    model, _ = setting("llama")
    (batch,) = batches_of(examples, recipe, range(1))
    at = whole_batch(model, batch)

    def seen(pass_: int | None) -> Forward:
        if pass_ is None:
            return model.forward(at)
        with Injection(model.places, {"heads": 0.4, "rank": 0.3}) as injection:
            draw: Draw = injection.draw
            draw.key, draw.strength = derive(recipe.seed, "structure", "here", 0, 0, pass_), 1.0
            draw.rows, draw.on = len(batch), True
            return model.forward(at)

    def surprise(forward: Forward) -> Tensor:
        return nn.functional.cross_entropy(forward.logits, at.targets)

    first = seen(0)
    if mode == "rdrop":
        second = seen(1)
        consistency = symmetric_kl(first.logits, second.logits)
        loss = (surprise(first) + surprise(second)) / 2 + 0.7 * consistency
        assert not torch.equal(first.logits, second.logits)
    else:
        with torch.no_grad():
            clean = seen(None)
        consistency = self_consistency(clean.logits, first.logits)
        loss = surprise(first) + 0.7 * consistency
    loss.backward()
    descend(model, 0.002)
    assert stats["loss"] == pytest.approx(float(surprise(first).detach()), abs=1e-6)
    assert stats["structure_loss"] == pytest.approx(float(consistency.detach()), abs=1e-6)
    assert stats["structure_loss"] > 1e-3
    assert agree(got, model.read().tensors(), setting("llama")[0].read().tensors())


def test_self_takes_its_second_pass_every_nth_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[float] = []

    def counted(forward: Forward, options: Any) -> Tensor:
        taken.append(1.0)
        return to_clean(forward, options)

    monkeypatch.setitem(tables.TERMS, "self", replace(tables.TERMS["self"], code=counted))
    for every, count in ((1, 6), (2, 3), (4, 2)):  # steps 6 to 11 of the stage: 8 only under 4, but for 8 … 11
        taken.clear()
        model, examples = setting("llama")
        recipe = recipe_of("structure.mode=self", f"structure.every={every}", "structure.rank=0.2", "train.local_steps=6")
        train(model, examples, recipe, Global(0, model.read()))
        assert len(taken) == count


def test_a_clean_pass_is_without_adapter_dropout() -> None:
    """In mode `self` at strength that changes next to nothing, what is left of the term is the adapter's own dropout."""
    ends = []
    for dropout in (0.0, 0.5):
        model, examples = setting("llama", dropout=dropout)
        recipe = recipe_of("structure.mode=self", "structure.every=1", "structure.rank=1e-6", "train.local_steps=1")
        ends.append(train(model, examples, recipe)[1]["structure_loss"])
    assert ends[0] < 1e-8
    assert ends[1] > 1e-3


# ------------------------------------------------------------------------------------------------------ proximal and ascent


def test_the_proximal_term_is_a_pull_towards_the_start() -> None:
    """FedProx by hand: the gradient plus μ (w − w0)."""
    overrides = ["train.clip_norm=1e9", "train.lr=0.002"]
    model, examples = setting("llama")
    start = [p.detach().clone() for p in model.parameters()]
    with plain_descent():
        got, stats = train(model, examples, recipe_of("train.proximal=50", *overrides))
        free, plain = train(setting("llama")[0], examples, recipe_of(*overrides))
    model, _ = setting("llama")
    for batch in batches_of(examples, recipe_of(), range(3)):
        at = whole_batch(model, batch)
        nn.functional.cross_entropy(model.forward(at).logits, at.targets).backward()
        with torch.no_grad():
            for p, w0 in zip(model.parameters(), start, strict=True):
                p.grad += 50 * (p - w0)
        descend(model, 0.002)
    assert agree(got, model.read().tensors(), setting("llama")[0].read().tensors())
    assert not agree(got, free, setting("llama")[0].read().tensors())
    assert set(stats) == set(plain) == {"loss"}


def test_the_gradient_at_the_worst_point_by_hand() -> None:
    """½ Σ h w² has gradient h w: at w + ρ g / ‖g‖ it is h (w + ρ h w / ‖h w‖). Here h w = (3, 4 | 12), of length 13."""
    w = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[4.0]], requires_grad=True)]
    unused = torch.tensor([5.0], requires_grad=True)
    h = [torch.tensor([3.0, 2.0]), torch.tensor([[3.0]])]
    kept = [p.detach().clone() for p in w]
    seen: list[list[float]] = []

    def backward() -> None:
        seen.append([x for p in w for x in p.detach().flatten().tolist()])
        sum((a * p * p / 2).sum() for a, p in zip(h, w, strict=True)).backward()

    backward()
    backward_at_worst([*w, unused], 2.6, backward)
    assert seen[1] == pytest.approx([1 + 0.2 * 3, 2 + 0.2 * 4, 4 + 0.2 * 12])
    assert w[0].grad.tolist() == pytest.approx([3 * 1.6, 2 * 2.8])
    assert w[1].grad.tolist() == [pytest.approx([3 * 6.4])]
    assert all(torch.equal(p, old) for p, old in zip(w, kept, strict=True))
    assert unused.item() == 5.0


def test_without_a_gradient_there_is_no_ascent() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    w.grad = torch.zeros(2)
    backward_at_worst([w], 1.0, lambda: pytest.fail("a second pass was taken"))
    w.grad = torch.tensor([math.inf, 0.0])
    backward_at_worst([w], 1.0, lambda: pytest.fail("a second pass was taken"))
    assert w.grad.tolist() == [math.inf, 0.0]


def test_w_is_restored_to_the_bit() -> None:
    """w + ρ g − ρ g would not do: small numbers next to large steps."""
    torch.manual_seed(0)
    w = (torch.randn(1000) * 1e-4).requires_grad_()
    kept = w.detach().clone()
    w.grad = torch.randn(1000)
    backward_at_worst([w], 100.0, lambda: w.sum().backward())
    assert torch.equal(w.detach(), kept)
    assert torch.equal(w.grad, torch.ones(1000))


def test_ascent_in_the_loop_against_a_twin() -> None:
    overrides = ["train.sam=0.3", "train.clip_norm=1e9", "train.lr=0.002", "train.micro_batch_size=2"]
    model, examples = setting("llama")
    with plain_descent():
        got, stats = train(model, examples, recipe_of(*overrides))
    model, _ = setting("llama")
    nats = positions = 0.0
    for batch in batches_of(examples, recipe_of(), range(3)):
        at = whole_batch(model, batch)
        here = [p.detach().clone() for p in model.parameters()]
        loss = nn.functional.cross_entropy(model.forward(at).logits, at.targets)
        loss.backward()
        nats, positions = nats + float(loss.detach()) * len(at.targets), positions + len(at.targets)
        g = [p.grad for p in model.parameters()]
        length = math.sqrt(sum(float(x.double().square().sum()) for x in g))
        with torch.no_grad():
            for p, x in zip(model.parameters(), g, strict=True):
                p.add_(0.3 * x / length)
        model.net.zero_grad()
        nn.functional.cross_entropy(model.forward(at).logits, at.targets).backward()
        with torch.no_grad():
            for p, old in zip(model.parameters(), here, strict=True):
                p.copy_(old)
        descend(model, 0.002)
    assert agree(got, model.read().tensors(), setting("llama")[0].read().tensors())
    assert stats["loss"] == pytest.approx(nats / positions, abs=1e-5), "the loss that is told is the one at w"


# ------------------------------------------------------------------------------------------------------------ after training


def hooks_of(model: Model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.net.modules())


def test_what_is_exported_after_every_structure(tiny_overrides: list[str], tiny_base: Path) -> None:
    more = ["evaluation.baselines=[]", "distill.weight=1", "structure.mode=anchored", "structure.ramp=0", "federation.rounds=2"]
    recipe, folder, model = go([*tiny_overrides, *more, *EVERY_STRUCTURE])
    fresh = Model(recipe.model, recipe.lora, recipe.seed)
    assert hooks_of(model) == hooks_of(fresh) == 1  # what gathers the supervised positions
    assert_loads_in_peft(folder.path / "adapter", model, tiny_base)
    with safe_open(folder.path / "adapter" / "adapter_model.safetensors", "pt") as file:
        exported = {k: tuple(file.get_tensor(k).shape) for k in file.keys()}  # noqa: SIM118
    expected = {k: tuple(v.shape) for k, v in peft.get_peft_model_state_dict(fresh.net).items()}
    assert exported == expected
    _, tensors = open_envelope(folder.checkpoint("federated", 2).read_bytes())
    assert {n: tuple(t.shape) for n, t in tensors.items()} == fresh.read_shapes()
    assert [n for n, _ in model.net.named_parameters()] == [n for n, _ in fresh.net.named_parameters()]


def test_no_hook_stays_where_a_round_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    model, examples = setting("llama")
    before = hooks_of(model)

    def broken(forward: Forward, options: Any) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setitem(tables.TERMS, "task", replace(tables.TERMS["task"], code=broken))
    with pytest.raises(ZeroDivisionError):
        train(model, examples, recipe_of(*EVERY_STRUCTURE))
    assert hooks_of(model) == before


def test_the_adversary_begins_every_round_anew_and_moves_the_training() -> None:
    """At the first step it is the identity; from the second on it is felt; two rounds from the same state are the same."""
    ends = {}
    for amount in (0, 1):
        for steps in (1, 3):
            model, examples = setting("llama")
            recipe = recipe_of(f"structure.adversary={amount}", f"train.local_steps={steps}")
            given = model.read()
            ends[amount, steps], _ = train(model, examples, recipe, Global(0, given))
            again, _ = train(model, examples, recipe, Global(0, given))
            assert same_bits(ends[amount, steps], again)
    assert same_bits(ends[0, 1], ends[1, 1])
    assert apart(ends[0, 3], ends[1, 3]) > 1e-4


# ------------------------------------------------------------------------------------------------------------ what is logged

QUARTILES = ("mean", "q1", "q2", "q3")


def test_gates_and_strength_are_told_by_site_and_round(tiny_overrides: list[str]) -> None:
    """Constant gates: a = 1, b = 0.7, weights 1 at every position. Two rounds of two steps, ramp ½: strength 0, ½ | 1, 1."""
    more = [
        "evaluation.baselines=[]",
        "federation.rounds=2",
        "train.local_steps=2",
        "distill.weight=1",
        "distill.ramp=0",
        "distill.gold=constant",
        "distill.rest=constant",
        "distill.beta=0.7",
        "distill.task_trust=false",
        "distill.site_trust=false",
        "structure.branch=0.4",
        "structure.ramp=0.5",
        "structure.anneal=0",
    ]
    recipe, folder, model = go([*tiny_overrides, *more])
    rows = {(r["name"], r["site"], r["round"]): r["value"] for r in rows_of(folder)}
    units = {r["name"]: r["unit"] for r in rows_of(folder)}
    paths = [b.path for b in model.places.branches]
    for site in ("ward-0", "ward-1", "ward-2"):
        for done in (1, 2):
            for gate, value in (("a", 1.0), ("b", 0.7), ("w_gold", 1.0), ("w_rest", 1.0)):
                got = [rows[f"gate_{gate}_{what}", site, done] for what in QUARTILES]
                assert got == pytest.approx([value] * 4, abs=1e-6)
            assert rows["strength", site, done] == (0.25 if done == 1 else 1.0)
            assert rows["distill_loss", site, done] >= 0
            # a branch is lost where a uniform number of its own is under the probability; at strength 0 none is drawn
            lost = []
            for step in range(2):
                strength = (0.0, 0.5, 1.0, 1.0)[2 * (done - 1) + step]
                key = derive(recipe.seed, "structure", site, done - 1, 2 * (done - 1) + step, 0)
                if strength:
                    lost += [derive(key, "branch", path) / 2**63 < 0.4 * strength for path in paths]
            assert rows["dropped", site, done] == pytest.approx(sum(lost) / len(lost))
    assert (units["gate_a_mean"], units["distill_loss"], units["dropped"]) == ("weight", "nats", "share")


def test_quartiles_of_a_gate_that_differs_by_position() -> None:
    """The rest gate under plain distillation is 1 − p_y: over all positions of the round, by NumPy."""
    import numpy as np

    model, examples = setting("llama")
    recipe = recipe_of("distill.weight=1", "train.micro_batch_size=2")
    given = model.read()
    _, stats = train(model, examples, recipe, Global(0, given))
    twin, _ = setting("llama")
    twin.train(False)
    values = []
    for batch in batches_of(examples, recipe, range(3)):
        at = whole_batch(twin, batch)
        with torch.no_grad():
            p = twin.forward(at).logits.double().softmax(-1)
        values += (1 - p[torch.arange(len(p)), at.targets]).tolist()
    expected = [np.mean(values), *np.quantile(values, [0.25, 0.5, 0.75])]
    assert [stats[f"gate_b_{what}"] for what in QUARTILES] == pytest.approx(expected, abs=1e-5)
    assert expected[1] < expected[3]


def test_weights_of_tasks_are_told_over_positions() -> None:
    """Half of all evidence on `topic` is others', nothing on `side`: weights c and 0, quartiles by how many positions each."""
    model, examples = setting("distilbert")
    total = {"topic": 16, "side": 4}
    more = ["distill.weight=1", "distill.site_trust=false"]
    _, stats = train(model, examples, recipe_of(*more), Global(1, model.read()), total=total)
    # the round meets all 12 rows once: 4 of weight 0, 8 of ½ / ((8 · ½) / 12) = 1.5
    assert [stats[f"gate_w_gold_{what}"] for what in QUARTILES] == pytest.approx([1.0, 0.0, 1.5, 1.5])
    # rest: ¼ and ½ over (8 · ½ + 4 · ¼) / 12: 0.6 and 1.2
    assert [stats[f"gate_w_rest_{what}"] for what in QUARTILES] == pytest.approx([1.0, 0.6, 1.2, 1.2])


def test_the_share_of_dropped_heads_counts_every_row_and_place() -> None:
    model, examples = setting("llama")
    recipe = recipe_of("structure.heads=0.4")
    _, stats = train(model, examples, recipe)
    # 3 steps × 4 rows × 2 layers × 2 KV groups = 48 draws: 0.4 within four standard deviations, and a whole number of them
    assert stats["dropped"] * 48 == pytest.approx(round(stats["dropped"] * 48), abs=1e-4)
    assert abs(stats["dropped"] - 0.4) < 4 * math.sqrt(0.24 / 48)


# ------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["structure.mode=anchored"], "set distill.weight above 0"),
        (["distill.weight=1", "distill.align=cka", "train.batch_size=8", "train.micro_batch_size=2"], "train.micro_batch_size"),
        (["train.sam=0.1", "structure.adversary=0.1"], "train.sam and structure.adversary both ascend"),
        (["structure.heads=1.0"], "structure.heads = 1.0"),
        (["distill.memory=1.5"], "distill.memory = 1.5"),
        (["distill.gold=soft"], "sigmoid, hard, constant, off"),
        (["structure.mode=ancored"], "did you mean 'anchored'?"),
        (["structure.hedas=0.1"], "did you mean 'structure.heads'?"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, overrides)
    assert told in str(caught.value)


def test_settings_that_can_be_are_taken() -> None:
    load_recipe(None, ["structure.mode=anchored", "distill.weight=0.1"])
    whole = ["distill.align=cka", "train.batch_size=8"]
    load_recipe(None, ["distill.weight=1", *whole, "train.micro_batch_size=8"])
    load_recipe(None, ["distill.weight=1", *whole, "train.micro_batch_size=0"])
    load_recipe(None, [*whole, "train.micro_batch_size=2"])  # without a weight nothing is compared


@pytest.fixture
def strange_base(tiny_base: Path, tmp_path: Path) -> Path:
    """A causal model of a type for which FedKeel knows no places, with the tiny tokenizer."""
    folder = tmp_path / "strange"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.StableLmConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.StableLmForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_unknown_architecture_is_named_before_any_training(tiny_overrides: list[str], strange_base: Path) -> None:
    base = [*tiny_overrides, f"model.base={strange_base}", 'lora.targets=["q_proj","o_proj"]', "evaluation.baselines=[]"]
    with pytest.raises((FederationError, StructureError), match=r"structure 'heads' finds no place.*'stablelm'"):
        go([*base, "structure.heads=0.1"])
    folder = Path(load_recipe(None, base).out) / "tiny"
    rows = (folder / "rows.jsonl").read_text() if (folder / "rows.jsonl").exists() else ""
    assert not any(json.loads(line)["name"] == "loss" for line in rows.splitlines())
    watch = Silent()
    go([*base, "structure.rank=0.1", "structure.lodrop=0.1", "federation.rounds=1"], watch, fresh=True)
    assert len(watch.results) == 1


# -------------------------------------------------------------------------------------------------- a failed site's traces


def steps_of(recipe: Recipe, examples: Sequence[Example]) -> Callable[[Model], dict[str, Tensor]]:
    return lambda model: train(model, examples, recipe)[0]


def test_two_rounds_in_one_model_are_two_rounds_in_two() -> None:
    """Nothing of one site's round is left for the next site's: the model is shared."""
    recipe = recipe_of(
        "distill.weight=1", "distill.align=cosine", "train.local_epochs=2", "train.local_steps=0", *EVERY_STRUCTURE
    )
    model, examples = setting("llama")
    given = model.read()
    alone = steps_of(recipe, examples[:8])(model)
    model.write(other(given))
    steps_of(recipe, examples[4:])(model)
    model.write(given)
    assert same_bits(alone, steps_of(recipe, examples[:8])(model))


def test_prepare_needs_no_weights_for_the_method(tiny_overrides: list[str]) -> None:
    prepared = prepare(load_recipe(None, [*tiny_overrides, "distill.weight=1", "structure.heads=0.1"]))
    assert len(prepared.stages) == 1
    assert prepared.stages[0] == prepared.sites
