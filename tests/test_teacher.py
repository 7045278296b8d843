"""The teacher: a swapped adapter against whole other models, the mixture with the memory, and what is kept of it."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import shapes
import torch
from torch import Tensor
from training import apart, batches_of, other, recipe_of, setting, steady_base, train, whole_batch

import fedkeel.federation.train
from fedkeel.data.batches import Batch
from fedkeel.data.format import Example
from fedkeel.federation.teacher import Guide, held_positions
from fedkeel.method.structure.inject import Injection
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Distill
from fedkeel.types import Adapter, Global, Teacher

NAMES = ["llama", "distilbert", "t5", "gpt2"]  # one of each kind, and one that holds its maps transposed
KINDS = pytest.mark.parametrize("name", NAMES)
EVERYTHING = {"heads": 0.5, "channels": 0.5, "branch": 0.4, "layers": 0.5, "lodrop": 0.3, "rank": 0.5, "weights": 0.5}


def apart_model(name: str, adapter: Adapter) -> Model:
    """Another base, read anew, with this adapter: what a teacher must equal."""
    model, _ = setting(name)
    model.write(adapter)
    return model


@torch.no_grad()
def said_by(model: Model, batch: Batch, states: bool = False) -> tuple[Tensor, Sequence[Tensor]]:
    model.train(False)
    forward = model.forward(batch, states)
    return forward.logits, forward.states


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal but for rounding, which these nets of large random weights amplify: a branch that is folded into its map is added
    up in another order. One ulp in the embeddings of the T5 here moves its states by 5e-5 of their size."""
    finite = expected.isfinite()
    assert torch.equal(got.isfinite(), finite), "what is not allowed stays so"
    assert float((got - expected)[finite].norm()) <= 5e-4 * float(expected[finite].norm())


def guide_of(model: Model, state: Global, examples: Sequence[Example], keep: bool = False, **options: object) -> Guide:
    return Guide(model, state, examples, {}, Distill(weight=1.0, **options), keep)


def test_positions_held_by_task_or_label() -> None:
    _, examples = setting("llama")
    expected = {t: sum(sum(e.supervised[1:]) for e in examples if e.task == t) for t in ("side", "topic")}
    assert held_positions(examples, "task") == held_positions(examples, "label") == expected  # free answers have no label
    assert list(held_positions(examples, "task")) == ["side", "topic"]
    assert held_positions([], "task") == {}
    _, examples = setting("distilbert")
    assert held_positions(examples, "task") == {"side": 4, "topic": 8}
    # rows 2, 5, 8, 11 answer labels 0, 1, 0, 1 of `side`; rows 0, 1, 3, 4, 6, 7, 9, 10 labels 0, 1, 0, 1, … of `topic`
    assert held_positions(examples, "label") == {
        "side: science": 2,
        "side: world": 2,
        "topic: business news": 4,
        "topic: sport": 4,
    }


@KINDS
def test_a_teacher_is_another_model_with_the_global_adapter(name: str) -> None:
    model, examples = setting(name)
    given = model.read()
    model.write(other(given))
    mine = model.read().tensors()
    batch = whole_batch(model, examples)
    teacher = guide_of(model, Global(3, given), examples, align="cosine")(batch, examples)
    logits, states = said_by(apart_model(name, given), batch, True)
    assert_same(teacher.logits, logits)
    assert len(states) == len(teacher.states) == len(teacher.layer_trust) == 2
    for got, expected in zip(teacher.states, states, strict=True):
        assert_same(got, expected)
    assert not teacher.logits.requires_grad
    student, _ = said_by(model, batch)
    finite = student.isfinite()
    assert (student[finite] - logits[finite]).abs().max() > 0.1, "student and teacher are the same here"
    assert apart(model.read().tensors(), mine) == 0.0


@KINDS
def test_in_training_the_teacher_is_clean_while_the_student_is_disturbed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every structure on, and adapter dropout: all that the teacher says in a round is what another model says in peace."""
    model, examples = setting(name, dropout=0.3)
    heard: list[tuple[Batch, Teacher]] = []

    class Listening(Guide):
        def __call__(self, batch: Batch, examples: Sequence[Example]) -> Teacher:
            assert model.net.training
            teacher = super().__call__(batch, examples)
            assert model.net.training, "the student would train without dropout"
            heard.append((batch, teacher))
            return teacher

    monkeypatch.setattr(fedkeel.federation.train, "Guide", Listening)
    amounts = [f"structure.{name}={value}" for name, value in EVERYTHING.items()] + ["structure.adversary=0.5"]
    given = model.read()
    after, stats = train(model, examples, recipe_of("distill.weight=1", "train.local_steps=6", "distill.cache=0", *amounts))
    assert len(heard) == 6
    twin = apart_model(name, given)
    for batch, teacher in heard:
        assert_same(teacher.logits, said_by(twin, batch)[0])
    assert stats["dropped"] > 0.1
    assert apart(after, given.tensors()) > 1e-3


def test_injected_structures_reach_a_forward_but_not_a_teacher_that_is_asked_between() -> None:
    model, examples = setting("llama")
    batch = whole_batch(model, examples)
    guide = guide_of(model, Global(0, model.read()), examples)
    clean, _ = said_by(model, batch)
    with Injection(model.places, EVERYTHING) as injection:
        draw = injection.draw
        draw.key, draw.strength, draw.rows, draw.on = 5, 1.0, len(examples), True
        assert (said_by(model, batch)[0] - clean).abs().max() > 0.1
        draw.on = False
        assert_same(guide(batch, examples).logits, clean)


@KINDS
def test_after_a_swap_the_model_holds_its_own_tensors(name: str) -> None:
    model, examples = setting(name)
    batch = whole_batch(model, examples)
    parked = model.park(other(model.read()))
    before = [(id(p), p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    clean, _ = said_by(model, batch)

    def unchanged() -> bool:
        return all(
            (id(p), p.data_ptr()) == (i, at) and torch.equal(p, value)
            for p, (i, at, value) in zip(model.parameters(), before, strict=True)
        )

    with model.swapped(parked):
        assert sorted(p.data_ptr() for p in model.parameters()) == sorted(t.data_ptr() for t in parked)
        assert not torch.equal(said_by(model, batch)[0], clean)
    assert unchanged()
    with pytest.raises(RuntimeError, match="out of memory"), model.swapped(parked):
        raise RuntimeError("out of memory")
    assert unchanged()
    assert torch.equal(said_by(model, batch)[0], clean)


def test_a_gradient_goes_through_a_swap_untouched() -> None:
    """Loss, then a swap, then backward: gradients are those without the swap, and lie at the student's tensors."""
    found = []
    for swap in (False, True):
        model, examples = setting("llama")
        batch = whole_batch(model, examples)
        parked = model.park(other(model.read()))
        loss = model.forward(batch).logits.float().logsumexp(-1).mean()
        if swap:
            with torch.no_grad(), model.swapped(parked):
                model.forward(batch)
        loss.backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --------------------------------------------------------------------------------------------------------------- the memory


@KINDS
@pytest.mark.parametrize("share", shapes.quickly((0.25,), [0.25, 1.0]))
def test_with_a_memory_the_teacher_is_a_mixture_of_two_models(name: str, share: float) -> None:
    model, examples = setting(name)
    now, before = model.read(), other(model.read())
    batch = whole_batch(model, examples)
    state = Global(3, now, memory=before)
    teacher = guide_of(model, state, examples, memory=share, align="cosine")(batch, examples)
    one, states_one = said_by(apart_model(name, now), batch, True)
    two, states_two = said_by(apart_model(name, before), batch, True)
    expected = (1 - share) * one.double().softmax(-1) + share * two.double().softmax(-1)
    torch.testing.assert_close(teacher.logits.double().softmax(-1), expected, rtol=0, atol=1e-4)
    assert torch.equal(teacher.logits.isinf(), one.isinf()), "what is not allowed stays so"
    for got, x, y in zip(teacher.states, states_one, states_two, strict=True):
        assert_same(got, (1 - share) * x + share * y)


def test_without_a_memory_or_at_share_0_the_teacher_is_the_global_model() -> None:
    model, examples = setting("llama")
    now, before = model.read(), other(model.read())
    batch = whole_batch(model, examples)
    expected, _ = said_by(model, batch)
    assert_same(guide_of(model, Global(3, now), examples, memory=0.9)(batch, examples).logits, expected)
    assert_same(guide_of(model, Global(3, now, before), examples, memory=0.0)(batch, examples).logits, expected)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_guide_holds_adapters_and_no_second_base(share: float) -> None:
    """New tensors weigh what the parked adapters do; the base's parameters are the same ones."""
    model, examples = setting("llama")
    adapter = model.read()
    state = Global(3, adapter, other(adapter))

    def alive() -> dict[int, int]:
        gc.collect()
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    frozen = {p.data_ptr() for p in model.net.parameters() if not p.requires_grad}
    before = alive()
    guide = guide_of(model, state, examples, memory=share)
    added = {at: size for at, size in alive().items() if at not in before}
    one = 4 * sum(t.numel() for t in adapter.tensors().values())
    assert sum(added.values()) == one * (2 if share else 1)
    assert not frozen & set(added)
    guide(whole_batch(model, examples), examples)
    after = {at: size for at, size in alive().items() if at not in before}
    assert sum(after.values()) < one * (2 if share else 1) + 1000
    assert {p.data_ptr() for p in model.net.parameters() if not p.requires_grad} == frozen
    assert len(frozen) == len([p for p in model.net.parameters() if not p.requires_grad])


# ------------------------------------------------------------------------------------------------------- what is kept of it


class Counting(Guide):
    asked = 0

    def _asked(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        self.asked += 1
        return super()._asked(batch)


@KINDS
def test_a_teacher_with_a_large_cache_says_the_same_in_any_batch(name: str) -> None:
    """Asked once a row, in three batches; then in others, of other lengths and order, from what is kept."""
    model, examples = setting(name)
    state = Global(0, model.read())
    config = Distill(weight=1.0, align="cosine", cache=10_000)
    guide, fresh = Counting(model, state, examples, {}, config, True), guide_of(model, state, examples, align="cosine")
    for first in (examples[:4], examples[4:8], examples[8:]):
        said = guide(whole_batch(model, first), first)
        torch.testing.assert_close(said.logits, fresh(whole_batch(model, first), first).logits, rtol=0, atol=0)
    assert guide.asked == 3
    for chosen in (examples[::-1], examples[1::2], [examples[7], examples[2]], [examples[5]]):
        batch = whole_batch(model, chosen)
        got, expected = guide(batch, chosen), fresh(batch, chosen)
        assert got.logits.shape == expected.logits.shape == (len(batch.targets), expected.logits.shape[1])
        p, q = expected.logits.float().softmax(-1), got.logits.softmax(-1)
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5)
        assert torch.equal(got.logits.isinf(), expected.logits.isinf())
        assert torch.equal(got.gold_trust, expected.gold_trust)
        assert torch.equal(got.rest_trust, expected.rest_trust)
        for x, y in zip(got.states, expected.states, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-8, atol=1e-4)  # bfloat16
    assert guide.asked == 3


@KINDS
def test_a_small_cache_keeps_gold_and_is_off_by_at_most_twice_the_tail(name: str) -> None:
    model, examples = setting(name)
    kept = 2 if model.kind == "classifier" else 8
    state = Global(0, model.read())
    guide = Counting(model, state, examples, {}, Distill(weight=1.0, cache=kept), True)
    guide(whole_batch(model, examples), examples)
    chosen = examples[5:1:-1]
    batch = whole_batch(model, chosen)
    got = guide(batch, chosen).logits.double().softmax(-1)
    assert guide.asked == 1
    p = guide_of(model, state, examples)(batch, chosen).logits.double().softmax(-1)
    rows = torch.arange(len(p))
    torch.testing.assert_close(got[rows, batch.targets], p[rows, batch.targets], rtol=1e-4, atol=1e-6)
    without_gold = p.clone()
    without_gold[rows, batch.targets] = 0.0
    tail = without_gold.sum(-1) - without_gold.topk(kept - 1).values.sum(-1)
    error = (got - p).abs().sum(-1)
    assert bool((error <= 2 * tail + 1e-5).all())
    if model.kind != "classifier":
        assert error.max() > 0.01, "nothing was left out"
    torch.testing.assert_close(got.sum(-1), torch.ones(len(p)).double(), rtol=0, atol=1e-6)
    assert bool((got[p == 0] == 0).all()), "a class that a row does not allow has no chance"


def test_a_row_not_met_before_makes_the_whole_batch_be_asked() -> None:
    model, examples = setting("llama")
    guide = Counting(model, Global(0, model.read()), examples, {}, Distill(weight=1.0, cache=10_000), True)
    guide(whole_batch(model, examples[:3]), examples[:3])
    guide(whole_batch(model, examples[:4]), examples[:4])
    guide(whole_batch(model, examples[2:4]), examples[2:4])
    assert guide.asked == 2
    for options, keep in (({"cache": 0}, True), ({"cache": 64}, False)):
        never = Counting(model, Global(0, model.read()), examples, {}, Distill(weight=1.0, **options), keep)
        for _ in range(3):
            never(whole_batch(model, examples), examples)
        assert never.asked == 3


@KINDS
def test_a_round_of_several_epochs_is_the_same_with_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of three batches: with all entries kept the teacher is asked nine times without a cache, fewer with."""
    asked: dict[int, int] = {}

    class Watched(Counting):
        def _asked(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
            asked[self._config.cache] = asked.get(self._config.cache, 0) + 1
            return super()._asked(batch)

    monkeypatch.setattr(fedkeel.federation.train, "Guide", Watched)
    more = ["train.local_steps=0", "train.local_epochs=3", "distill.weight=2", "structure.rank=0.2", "train.lr=0.001"]
    ends = {}
    for cache in (0, 10_000):
        model, examples = setting(name)
        given = model.read()
        ends[cache], _ = train(model, examples, recipe_of(*more, f"distill.cache={cache}"), Global(0, given))
    assert asked[0] == 9
    assert 3 <= asked[10_000] < 9
    assert apart(ends[0], ends[10_000]) < 1e-5
    assert apart(ends[0], given.tensors()) > 1e-3


def test_one_epoch_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = []

    class Watched(Guide):
        def __init__(self, *arguments: object, **named: object) -> None:
            keeps.append(named["keep"])
            super().__init__(*arguments, **named)

    monkeypatch.setattr(fedkeel.federation.train, "Guide", Watched)
    model, examples = setting("llama")
    for epochs in (1, 2):
        train(model, examples, recipe_of("distill.weight=1", "train.local_steps=0", f"train.local_epochs={epochs}"))
    assert keeps == [False, True]
    # a term that looks at what is least likely has the teacher asked anew
    absent = ["evidence.task=restricted", "term.vacant.weight=1"]
    train(model, examples, recipe_of(*absent, "train.local_steps=0", "train.local_epochs=2"))
    assert keeps[2:] == [False]


# ------------------------------------------------------------------------------------------------------------------- trusts


def test_trusts_stand_at_the_positions_of_their_task() -> None:
    """Two tasks, of which others hold nothing and three times as much: weights by hand, at each row's positions."""
    model, examples = setting("llama")
    own = held_positions(examples, "task")
    total = {"topic": 4 * own["topic"], "side": own["side"]}
    config = Distill(weight=1.0, site_trust=False)
    chosen = [examples[2], examples[0], examples[5]]  # side, topic, side
    batch = whole_batch(model, chosen)
    teacher = Guide(model, Global(1, model.read()), examples, total, config, False)(batch, chosen)
    n = sum(own.values())
    gold = {"topic": 0.75 / (0.75 * own["topic"] / n), "side": 0.0}
    rest_mean = (0.75 * own["topic"] + 0.25 * own["side"]) / n
    rest = {"topic": 0.75 / rest_mean, "side": 0.25 / rest_mean}
    tasks = [chosen[r].task for r in batch.rows.tolist()]
    assert teacher.gold_trust.tolist() == pytest.approx([gold[t] for t in tasks])
    assert teacher.rest_trust.tolist() == pytest.approx([rest[t] for t in tasks])
    assert set(tasks) == {"side", "topic"}


def test_trusts_by_label_stand_at_the_rows_of_their_label() -> None:
    """Of `topic: sport` others hold what I hold, of `side: world` three times as much, of the rest nothing."""
    model, examples = setting("distilbert")
    total = {"topic: sport": 8, "side: world": 8, "side: science": 2, "topic: business news": 4, "topic": 1000}
    config = Distill(weight=1.0, site_trust=False, trust_by="label")
    teacher = Guide(model, Global(1, model.read()), examples, total, config, False)(whole_batch(model, examples), examples)
    v = {"topic: sport": 0.5, "side: world": 0.75, "side: science": 0.0, "topic: business news": 0.0}
    gold_mean = (4 * 0.5 + 2 * 0.75) / 12
    rest_mean = (4 * 0.5 + 2 * 0.75 + 6 * 0.25) / 12
    of = [f"{e.task}: {e.label}" for e in examples]
    assert teacher.gold_trust.tolist() == pytest.approx([v[name] / gold_mean for name in of])
    assert teacher.rest_trust.tolist() == pytest.approx([max(0.25, v[name]) / rest_mean for name in of])


def test_layers_are_trusted_by_the_drift_that_came_down() -> None:
    model, examples = setting("llama")
    batch = whole_batch(model, examples)
    spread = {"model.layers.0": 0.4, "model.layers.1": 0.9}  # 1/0.5 = 2 and 1/1: two thirds and one third
    state = Global(1, model.read(), drift=spread)
    assert guide_of(model, state, examples, align="cosine")(batch, examples).layer_trust == pytest.approx([2 / 3, 1 / 3])
    flat = guide_of(model, state, examples, align="cosine", layer_trust=False)
    assert flat(batch, examples).layer_trust == [0.5, 0.5]
    assert model.taps == ("model.layers.0", "model.layers.1")
    off = guide_of(model, state, examples)(batch, examples)
    assert (list(off.states), list(off.layer_trust)) == ([], [])


def test_tapped_states_are_those_of_the_blocks() -> None:
    """Against the hidden states that transformers itself hands out, at the supervised positions."""
    model, examples = setting("llama")
    batch = whole_batch(model, examples)
    with torch.no_grad():
        _, states = said_by(model, batch, True)
        whole = model.net(**batch.inputs, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], whole[1][batch.rows, batch.columns])
    assert states[0].shape == states[1].shape == (len(batch.targets), shapes.HIDDEN)
    # transformers hands the last block's states out behind the final norm
    normed = model.net.get_base_model().model.norm(states[1])
    torch.testing.assert_close(normed, whole[2][batch.rows, batch.columns], rtol=0, atol=1e-5)


def test_batches_of_a_round_are_what_a_twin_expects() -> None:
    """The helper that other tests lean on: three steps over twelve rows meet every row once."""
    _, examples = setting("llama")
    met = [e.record for batch in batches_of(examples, recipe_of(), range(3)) for e in batch]
    assert sorted(met) == [e.record for e in examples]
    assert load_recipe(None, [f"model.base={steady_base('llama')}"]).train.batch_size == 16
