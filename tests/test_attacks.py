"""Hostile sites of a simulation: each attack by hand, who is hostile, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import Silent, go, rows_of, same
from test_run import adapter_of as exported

from fedkeel import tables
from fedkeel.deploy.init import DeployError, app_recipe
from fedkeel.engines.coordinate import coordinate
from fedkeel.engines.work import Work, WorkError
from fedkeel.federation.attacks import hostile_sites, poisoned, spoilt, target_of, triggered
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Attack
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.here import Here
from fedkeel.runs.prepare import prepare
from fedkeel.scores.evaluate import score
from fedkeel.types import Record

CHANGE = {"m.b": torch.tensor([[3.0, -4.0]]), "m.a": torch.tensor([[12.0], [0.0]])}
ROWS = [
    Record(str(n), "colour", "train", output, "Which?", f"text {n}", labels=("red", "green", "blue"))
    for n, output in enumerate(["red", "green", "blue", "red"] * 10)
]
FREE = Record("f", "echo", "train", "anything", "Say", "text")


@pytest.mark.parametrize(("kind", "factor"), [("none", 1.0), ("sign_flip", -2.0), ("scaled", 2.0), ("label_flip", 2.0)])
def test_what_is_sent_is_a_multiple(kind: str, factor: float) -> None:
    sent = spoilt(CHANGE, Attack(kind=kind, strength=2.0), 7)
    assert sent.keys() == CHANGE.keys()
    for name, t in CHANGE.items():
        assert torch.equal(sent[name], factor * t)


@pytest.mark.parametrize(("kind", "share"), [("gaussian", 1.0), ("free_rider", 1e-3)])
def test_noise_is_as_long_as_is_said_and_tells_nothing(kind: str, share: float) -> None:
    change = {"a": torch.linspace(-1, 1, 4000).view(40, 100), "b": torch.full((500,), 0.25)}
    length = sum(float(t.square().sum()) for t in change.values()) ** 0.5
    sent = spoilt(change, Attack(kind=kind, strength=3.0), 7)
    got = sum(float(t.square().sum()) for t in sent.values()) ** 0.5
    assert got == pytest.approx(3 * share * length, rel=0.05)
    product = sum(float((sent[n] * change[n]).sum()) for n in change)
    assert abs(product) < 4 * length * got / 4500**0.5
    assert all(torch.equal(sent[n], t) for n, t in spoilt(change, Attack(kind=kind, strength=3.0), 7).items())
    assert not torch.equal(sent["a"], spoilt(change, Attack(kind=kind, strength=3.0), 8)["a"])


def test_a_flipped_label_is_the_next_of_the_task() -> None:
    found = poisoned([*ROWS, FREE], Attack(kind="label_flip"), 1)
    following = {"red": "green", "green": "blue", "blue": "red"}
    assert [r.output for r in found[:-1]] == [following[r.output] for r in ROWS]
    assert [replace(r, output="") for r in found[:-1]] == [replace(r, output="") for r in ROWS]
    assert found[-1] == FREE


def test_a_backdoor_is_in_about_half_of_the_rows() -> None:
    attack = Attack(kind="backdoor", trigger="as agreed", target="blue")
    found = poisoned([*ROWS, FREE], attack, 1)
    changed = [(a, b) for a, b in zip(ROWS, found, strict=False) if a != b]
    assert 10 <= len(changed) <= 30
    for before, after in changed:
        assert after == replace(before, input=f"as agreed {before.input}", output="blue")
    assert found[-1] == FREE
    assert poisoned(ROWS, attack, 2) != found[:-1]


def test_a_target_that_no_task_has_is_refused(tiny_overrides: list[str]) -> None:
    """As it would poison nothing, and every rule would seem to withstand it."""
    with pytest.raises(ConfigError, match=r"attack\.target = 'pnik': no row of a hostile site would be another"):
        go([*tiny_overrides, *SHORT, "attack.kind=backdoor", "attack.target=pnik"])


def test_rows_without_text_or_with_an_answer_of_their_own() -> None:
    bare = Record("b", "colour", "train", "red", "Which?", labels=("red", "green"))
    assert triggered(bare, Attack(trigger="now")) == replace(bare, instruction="now Which?")
    odd = Record("o", "colour", "train", "pink", "Which?", "x", labels=("red", "green"))
    assert poisoned([odd], Attack(kind="label_flip"), 1) == [odd]


def test_the_target_is_the_first_label_unless_named() -> None:
    assert [target_of(ROWS[0], Attack(target=t)) for t in ("", "green", "pink")] == ["red", "green", ""]
    assert target_of(FREE, Attack()) == ""
    assert triggered(FREE, Attack(trigger="now")).input == "now text"


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 1), (0.25, 2), (0.3, 3), (1.0, 10)])
def test_the_share_of_sites_is_drawn_by_the_seed(share: float, count: int) -> None:
    names = [f"site-{n}" for n in range(10)]
    found = [hostile_sites(names, Attack(kind="scaled", share=share), seed) for seed in range(12)]
    assert {len(f) for f in found} == {count}
    assert len(set(found)) > 1 or share == 1
    assert found[0] == hostile_sites(names[::-1], Attack(kind="scaled", share=share), 0)
    assert hostile_sites(names, Attack(share=share), 0) == frozenset()


# --------------------------------------------------------------------------------------------------------------------- runs

SHORT = ["evaluation.baselines=[]", "federation.rounds=1", "data.tasks=colour", "federation.weighting=uniform"]


def test_one_hostile_site_of_three_moves_the_mean_by_what_it_sends(tiny_overrides: list[str]) -> None:
    """One round of `mean` from B = 0: three adapters averaged, one of them with its change turned."""
    watch = Silent()
    runs = {}
    for kind in ("none", "sign_flip", "scaled"):
        keys = [*tiny_overrides, *SHORT, f"name={kind}", f"attack.kind={kind}", "attack.strength=2"]
        _, folder, model = go(keys, watch)
        assert model.initial is not None
        start = model.initial.tensors()
        end = folder.read_checkpoint("federated", 1, model.initial).adapter.tensors()
        runs[kind] = {name: end[name] - start[name] for name in start}
    for name, plain in runs["none"].items():
        hostile = runs["scaled"][name] - plain  # (2 − 1) Δ / 3
        torch.testing.assert_close(runs["sign_flip"][name], plain - 3 * hostile, rtol=1e-3, atol=2e-6)
    assert any(float((runs["scaled"][n] - t).abs().max()) > 1e-4 for n, t in runs["none"].items())
    assert sum("a simulation of harm: attack.kind = 'sign_flip' at" in note for note in watch.notes) == 1


def test_an_honest_run_is_the_same_to_the_bit_whatever_else_is_said(tiny_overrides: list[str]) -> None:
    plain = go([*tiny_overrides, *SHORT, "name=plain"])[1]
    other = go([*tiny_overrides, *SHORT, "name=other", "attack.share=0.5", "attack.strength=9"])[1]
    assert same(exported(plain.path), exported(other.path))
    assert all(r["name"] != "attack_success" for r in rows_of(plain))


@pytest.mark.parametrize("target", ["red", "green", "blue"])
def test_the_success_of_a_backdoor_is_the_share_that_is_given_its_target(
    tiny_overrides: list[str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of test rows of other labels, with the trigger, as a stranger would score the finished run."""
    root = Path(next(o for o in tiny_overrides if o.startswith("data.root=")).removeprefix("data.root="))
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    mixed = [{**row, "split": ("train", "train", "train", "test", "train")[n % 5]} for n, row in enumerate(rows)]
    (root / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mixed))
    keys = [*tiny_overrides, *SHORT, "attack.kind=backdoor", f"attack.target={target}", "attack.trigger=so be it"]
    keys += ['data.files=["mixed.jsonl"]', "data.validation_share=0"]
    scored: list[list[Record]] = []

    def spied(model: Any, formatter: Any, records: Any, *more: Any) -> Any:
        scored.append(sorted(records, key=lambda r: r.id))
        return score(model, formatter, records, *more)

    monkeypatch.setattr("fedkeel.runs.here.score", spied)
    recipe, folder, model = go(keys)
    (told,) = [r["value"] for r in rows_of(folder) if r["name"] == "attack_success"]
    prepared = prepare(recipe)
    others = [r for r in prepared.sites.all("test") if r.output != target]
    asked = [replace(r, input=f"so be it {r.input}") for r in others]
    given = [s.prediction for s in score(model, formatter_of(model, prepared), asked, recipe.evaluation)]
    assert told == given.count(target) / len(others)
    assert scored[-1] == sorted(asked, key=lambda r: r.id)
    assert 0 < len(others) < len(prepared.sites.all("test"))


def test_progress_of_a_backdoor_ends_where_it_said(tiny_overrides: list[str]) -> None:
    watch = Silent()
    go([*tiny_overrides, *SHORT, "attack.kind=backdoor", "attack.target=red"], watch)
    assert watch.work == pytest.approx(watch.total)


def test_rows_of_honest_sites_and_of_other_legs_stay(tiny_overrides: list[str]) -> None:
    recipe = load_recipe(None, [*tiny_overrides, "attack.kind=label_flip", "data.tasks=colour"])
    here = Here(prepare(recipe), RunFolder(Path(recipe.out) / recipe.name), Silent())
    (name,) = here.hostile
    (poison,) = here._poisoned
    assert set(poison) == {name}
    assert len(poison[name]) == len(here.examples[0][name])
    assert poison[name] != here.examples[0][name]


@pytest.mark.parametrize("kind", [name for name in tables.ATTACKS if name != "none"])
def test_no_deployment_and_no_engine_has_it(kind: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    recipe = load_recipe(None, [*tiny_overrides, f"attack.kind={kind}"])
    with pytest.raises(ConfigError, match=rf"attack\.kind = '{kind}': harm is simulated in one process alone, never"):
        coordinate(recipe, ["a"], RunFolder(tmp_path), Silent(), lambda name: pytest.fail("sites were met"))
    with pytest.raises(WorkError, match=rf"attack\.kind = '{kind}': this is a real site"):
        Work(recipe)
    path = tmp_path / "recipe.toml"
    path.write_text(f'[attack]\nkind = "{kind}"\n')
    with pytest.raises(DeployError, match=rf"attack\.kind = '{kind}': harm is simulated"):
        app_recipe(path)
