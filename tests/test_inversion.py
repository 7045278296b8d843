"""Words and answers from one update: found exactly where they can be, and not where noise hides them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from builders import numbers
from test_run import go
from torch.nn.functional import normalize

from fedkeel.data.format import Example
from fedkeel.evidence.leaks.inversion import Entry, answers_of, entry_of, gradient_of, pursue, words_told
from fedkeel.evidence.leaks.updates import GUARDS, attack, change_of, coordinator, inverted, sent_by, updates
from fedkeel.evidence.report.leaks import read_audit
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import prepare
from fedkeel.types import Adapter, Global, Lora

WORDS = (60, 71, 90, 113, 200)  # of the row by hand; the last is its answer
READ = set(WORDS[:-1])  # nothing is foretold from the last token of a row, so it leaves no trace as a word


def best(scores: torch.Tensor, count: int) -> set[int]:
    return set(scores.topk(count).indices.tolist())


def test_words_in_the_span_are_found_by_hand() -> None:
    """Six sums of five of 200 words in 16 dimensions: each of the five lies in their span, and chance puts no other there."""
    states, there = normalize(numbers(1, 200, 16), dim=1), [3, 50, 77, 120, 199]
    rows = numbers(2, 6, 5) @ states[there]
    scores = pursue([(rows, states)])
    assert best(scores, 5) == set(there)
    # more words than rows: none is in the span of four alone, and the pursuit still names most of eight
    many = list(range(0, 80, 10))
    wide = normalize(numbers(3, 200, 64), dim=1)
    assert len(best(pursue([(numbers(4, 4, 8) @ wide[many], wide)]), 8) & set(many)) >= 6
    noise = pursue([(rows / rows.norm() + numbers(5, 6, 16), states)])
    assert len(best(noise, 5) & set(there)) <= 2


def test_two_maps_that_read_the_same_tell_together() -> None:
    """Each holds three of six words' dimensions alone, as a LoRA of rank 3 with A frozen shows them: five rows of B's gradient,
    of two words."""
    states, there = normalize(numbers(1, 40, 16), dim=1), [4, 31]
    maps = [numbers(7 + n, 3, 16) for n in range(3)]
    groups = [(numbers(20 + n, 5, 2) @ (states[there] @ a.T), normalize(states @ a.T, dim=1)) for n, a in enumerate(maps)]
    assert best(pursue(groups), 2) == set(there)


def test_the_gradient_behind_a_step_of_adam() -> None:
    """float32 tells what the division by |g| left; a parameter of 0, as B is at first."""
    gradient = torch.tensor([[3e-4, -2e-5, 1e-6, 0.0], [-1e-3, 5e-5, -4e-8, 2e-9]])
    parameter = torch.nn.Parameter(torch.zeros(2, 4))
    optimiser = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0, fused=False)
    parameter.grad = gradient.clone()
    optimiser.step()
    change = parameter.detach()
    assert (change[gradient.abs() > 1e-6].abs() / 0.01).min() > 0.99  # hardly more than signs
    assert torch.allclose(-gradient_of(change, 0.01), gradient, rtol=0.03, atol=0)


@pytest.fixture
def tiny(tiny_overrides: list[str]) -> tuple[Recipe, Model]:
    recipe = load_recipe(None, [*tiny_overrides, "train.batch_size=1", "train.local_steps=1"])
    return recipe, Model(recipe.model, recipe.lora, recipe.seed)


def moved(model: Model, seed: int) -> Adapter:
    """An adapter whose B is no longer 0."""
    assert model.initial is not None
    lora = {
        path: Lora(f.a, 0.1 * numbers(seed + n, *f.b.shape), f.scale) for n, (path, f) in enumerate(model.initial.lora.items())
    }
    return Adapter(lora)


def entry(model: Model) -> Entry:
    count = model.net.get_input_embeddings().weight.shape[0]
    return entry_of(model, range(count), range(count))


def row_of(words: tuple[int, ...]) -> Example:
    return Example("one", "echo", words, (False,) * (len(words) - 1) + (True,))


def test_where_words_enter(tiny: tuple[Recipe, Model]) -> None:
    """The three maps of the first block's attention read the normalised embedding, whatever the place."""
    _, model = tiny
    found = entry(model)
    assert [path.rsplit(".", 1)[1] for path in found.paths] == ["q_proj", "k_proj", "v_proj"]
    assert all(".0." in path for path in found.paths)
    base = model.net.get_base_model().model
    with torch.no_grad():
        states = base.layers[0].input_layernorm(base.embed_tokens.weight)
    assert torch.allclose(found.states, normalize(states - states.mean(0), dim=1), atol=1e-4)


def test_a_row_is_read_from_one_exact_step_and_noise_hides_it(tiny: tuple[Recipe, Model]) -> None:
    """Four tokens before the answer, twelve rows of A in the maps that read them. int8 leaves the signs: most words."""
    recipe, model = tiny
    state, found = Global(1, moved(model, 1)), entry(model)
    change = change_of(model, recipe, state, "ward-0", [row_of(WORDS)])
    rate = recipe.train.lr * (recipe.train.final_lr + (1 - recipe.train.final_lr) * 2 / 2)
    assert best(words_told(change, state.adapter, found, rate), 4) == READ
    signs = sent_by(change, GUARDS["int8"], recipe, 1)
    assert len(best(words_told(signs, state.adapter, found, 0.0), 4) & READ) >= 3
    hidden = sent_by(change, GUARDS["site noise 1"], recipe, 1)
    assert len(best(words_told(hidden, state.adapter, found, 0.0), 4) & READ) <= 1


def test_one_step_from_zero_moves_no_a(tiny: tuple[Recipe, Model]) -> None:
    """B is 0, and so is the gradient of A: what is left is B's, in as many dimensions as there are ranks."""
    recipe, model = tiny
    assert model.initial is not None
    change = change_of(model, recipe, Global(0, model.initial), "ward-0", [row_of(WORDS)])
    assert not any(change[f"{path}.a"].any() for path in model.initial.lora)
    assert words_told(change, model.initial, entry(model), recipe.train.lr).max() > 0
    nothing = {name: torch.zeros_like(t) for name, t in change.items()}
    assert not words_told(nothing, model.initial, entry(model), 0.0).any()


def test_an_answer_that_was_taught_becomes_likelier(tiny: tuple[Recipe, Model], tiny_overrides: list[str]) -> None:
    _, model = tiny
    recipe = load_recipe(None, [*tiny_overrides, "train.batch_size=1", "train.local_steps=20"])
    prepared = prepare(recipe)
    examples = formatter_of(model, prepared).encode_all(prepared.sites.all("test"))
    attacker = coordinator(model, recipe, examples)
    state = Global(1, moved(model, 1))
    change = change_of(model, recipe, state, "ward-0", [row_of(WORDS)])
    after = state.adapter.with_tensors({n: t + change[n] for n, t in state.adapter.tensors().items()})
    told = answers_of(model, after, attacker.batch) - answers_of(model, state.adapter, attacker.batch)
    assert int(told.argmax()) == WORDS[-1]
    taught = [e.ids[n] for e in examples for n in range(1, len(e.ids)) if e.supervised[n]]
    assert attacker.answers == {token: taught.count(token) for token in taught}
    assert {model.tokenizer.convert_tokens_to_ids(t) for t in ("<user>", "<end>")} <= attacker.frame


def test_a_sum_is_one_for_all_sites_and_row_noise_trains_anew(tiny: tuple[Recipe, Model], tiny_overrides: list[str]) -> None:
    recipe, model = tiny
    prepared = prepare(load_recipe(None, tiny_overrides))
    formatter = formatter_of(model, prepared)
    rows = {f"ward-{n}": [row_of(tuple(token + n for token in WORDS))] for n in range(3)}
    attacker = coordinator(model, recipe, formatter.encode_all(prepared.sites.all("test")))
    state = Global(1, moved(model, 1))
    seen: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for guard, site, update in updates(attacker, state, rows, (1, 1), GUARDS):
        seen.setdefault(guard, {})[site] = update
    name = next(iter(seen["none"]["ward-0"]))
    mean = torch.stack([seen["none"][site][name] for site in rows]).mean(0)
    assert all(torch.allclose(one[name], mean) for one in seen["secure aggregation"].values())
    assert not torch.equal(seen["row noise 1"]["ward-0"][name], seen["none"]["ward-0"][name])
    few = {name: GUARDS[name] for name in ("none", "site noise 1")}
    told = {(one.guard, one.what): one for one in attack(attacker, state, rows, (1, 1), few)}
    assert told["none", "words"].found >= 0.7  # four of five
    assert told["site noise 1", "words"].found <= 0.3
    assert told["none", "words"].low > 0.6
    assert told["none", "words"].epsilon is None
    assert told["site noise 1", "words"].epsilon == pytest.approx(4.38, abs=0.02)  # one Gaussian of z = 1 at δ = 1e-5
    assert told["none", "answers"].updates == 3


@pytest.mark.slow
def test_rounds_and_guards_of_an_audit(tiny_overrides: list[str], tmp_path: Path) -> None:
    recipe, folder, model = go([*tiny_overrides, "evaluation.baselines=[]", "federation.codec_up=topk=0.5+int8"])
    prepared = prepare(recipe)
    found = inverted(prepared, model, formatter_of(model, prepared), folder.path)
    assert {one.round for one in found} == {1, 3}
    assert {(one.rows, one.steps) for one in found} == {(1, 1), (4, 2)}
    assert {one.guard for one in found if one.steps == 1} == {*GUARDS, "the run's own"}
    assert {one.guard for one in found if one.steps == 2} == {"none", "secure aggregation", "the run's own"}
    assert all(0 <= one.low <= one.auc <= one.high <= 1 and 0 <= one.found <= 1 for one in found)
    assert np.isfinite([one.usual_auc for one in found]).all()
    (tmp_path / "audit.json").write_text('{"attacks": [], "secrets": []}')
    assert read_audit(tmp_path).updates == ()  # of an audit that looked at none
