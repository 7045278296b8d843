"""What a model card says of a private run: unit, ε, δ, clip and noise in one line, the numbers of the run itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedkeel.evidence.card import Made, card
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.privacy import epsilon
from fedkeel.runs.state import Best, State
from fedkeel.types import Row

SITE = ["privacy.unit=site", "privacy.clip=0.05", "privacy.noise=2", "federation.weighting=uniform"]
ROWS = ["privacy.unit=row", "privacy.clip=0.5", "privacy.noise=1.1", "privacy.delta=1e-6", "federation.weighting=uniform"]
SAID = {
    "site": (
        SITE,
        "**Differential privacy** of each site's whole contribution: ε = 4.1 at δ = 1e-05, by clipping to C = 0.05 and "
        "Gaussian noise of z = 2 times C, added by the sites.",
    ),
    "together": ([*SITE, "privacy.together=3"], "times C, added by the sites, of 3 of them together."),
    "coordinator": ([*SITE, "privacy.noise_at=coordinator"], "times C, added by the coordinator."),
    "row": (
        ROWS,
        "**Differential privacy** of each training row: ε = 4.1 at δ = 1e-06, by clipping to C = 0.5 and Gaussian noise of "
        "z = 1.1 times C, added at each site, in every step.",
    ),
}


def card_of(given: list[str], spent: list[float], folder: Path) -> str:
    """The card of a run that told ε after each of its rounds, and of another leg whose number is none of it."""
    rows = [Row("r", "federated", 0, n, "epsilon", value, "epsilon") for n, value in enumerate(spent, 1)]
    rows.append(Row("r", "federated", 0, 3, "score", 0.5, "share", split="test"))
    rows.append(Row("r", "local", 0, 3, "epsilon", 99.0, "epsilon"))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row.as_json()) + "\n" for row in rows))
    (folder / "env.json").write_text(json.dumps({"versions": {"fedkeel": "0"}, "commit": ""}))
    return card(load_recipe(None, given), folder, Made("causal", 8, merged=False, gguf=False))


@pytest.mark.parametrize(("given", "said"), SAID.values(), ids=SAID.keys())
def test_a_private_runs_card_says_its_promise_in_one_line(given: list[str], said: str, tmp_path: Path) -> None:
    text = card_of(given, [1.5, 2.5, 4.0999], tmp_path)
    (line,) = [line for line in text.splitlines() if "Differential privacy" in line]
    assert said in line
    assert "No\ndifferential privacy" not in text
    assert "statistics of training" not in text  # they do not travel from a private site


def test_a_bound_that_moved_is_told(tmp_path: Path) -> None:
    given = [*SITE, "privacy.quantile=0.5"]
    card_of(given, [4.0], tmp_path)
    moved = [Row("r", "federated", 0, n, "clip", value, "norm") for n, value in ((1, 0.05), (2, 0.0625))]
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("".join(json.dumps(row.as_json()) + "\n" for row in moved))
    text = card(load_recipe(None, given), tmp_path, Made("causal", 8, merged=False, gguf=False))
    assert "clipping to C, which followed the 0.5 quantile of their lengths from 0.05 to 0.0625, and Gaussian noise" in text


def test_a_run_that_is_not_private_says_so(tmp_path: Path) -> None:
    text = card_of([], [], tmp_path)
    assert "**No\ndifferential privacy and no secure aggregation** were used" in text
    assert "ε" not in text


def test_a_head_that_was_served_beside_the_adapter_is_told(tmp_path: Path) -> None:
    text = card_of(["evidence.serve=0.5"], [], tmp_path)
    assert "with an analytic head served beside it** (`evidence.serve =\n0.5`)" in text
    assert "analytic head served" not in card_of(["evidence.anchor=1"], [], tmp_path)
    assert "(`evidence.serve_from =\n[0.5, 2]`)" in card_of(["evidence.serve_from=[0.5, 2]"], [], tmp_path)
    assert 'out of a simulation of harm** (`attack.kind = "scaled"`)' in card_of(["attack.kind=scaled"], [], tmp_path)
    assert "simulation of harm" not in card_of([], [], tmp_path)
    assert "scored by `label_heads.safetensors`" in card_of(["model.head=analytic"], [], tmp_path)


def test_sums_of_rows_that_travelled_are_told(tmp_path: Path) -> None:
    for given in (["evidence.anchor=1"], ["model.head=analytic"], ["evaluation.baselines=analytic"]):
        assert "sums of the rows' features in the frozen base by label" in card_of(given, [], tmp_path)
    assert "sums of the rows" not in card_of([], [], tmp_path)


def test_scores_with_a_head_beside_it_are_not_the_adapters(tmp_path: Path) -> None:
    card_of([], [], tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        scored = Row("r", "federated", 0, 3, "accuracy", 0.5, "share", task="colour", split="test")
        file.write(json.dumps(scored.as_json()) + "\n")
    made = Made("causal", 8, merged=False, gguf=False)
    served, alone = (card(load_recipe(None, [f"evidence.serve={w}"]), tmp_path, made) for w in (1, 0))
    assert "model-index:" in alone
    assert "model-index:" not in served
    assert "**With an analytic head beside it, which is not in this folder**: " in served
    assert "With an analytic head" not in alone


def test_no_site_is_named(tmp_path: Path) -> None:
    card_of([], [], tmp_path)
    told = [Row("r", "federated", 0, n, "failed", 1.0, "count", site="Mercy West") for n in (1, 2)]
    told.append(Row("r", "federated", 0, 3, "own_score", 0.5, "share", site="Mercy West", split="test"))
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("".join(json.dumps(row.as_json()) + "\n" for row in told))
    text = card(load_recipe(None, []), tmp_path, Made("causal", 8, merged=False, gguf=False))
    assert "Mercy" not in text
    assert "site 1" in text


def test_the_best_adapter_is_not_given_the_scores_of_the_last(tmp_path: Path) -> None:
    card_of([], [], tmp_path)
    with (tmp_path / "rows.jsonl").open("a") as file:
        scored = Row("r", "federated", 0, 3, "accuracy", 0.5, "share", task="colour", split="test")
        file.write(json.dumps(scored.as_json()) + "\n")
    (tmp_path / "state.json").write_text(json.dumps(State(finished=True, best=Best(0, 2, 0.625)).as_json()))
    last, best, less = (
        card(load_recipe(None, []), tmp_path, Made("causal", 8, merged=False, gguf=False, **more))
        for more in ({}, {"best": True}, {"left": "3 of 6 blocks are left"})
    )
    assert "model-index:" in last
    assert "validation rows of the last stage" not in last
    assert "model-index:" not in best
    assert "model-index:" not in less  # what is left of a model scores otherwise
    assert "the adapter of round 2 (62.5 points there) that did best on validation rows of the last stage" in best


def test_the_lines_that_load_a_linear_head_give_its_classes(tmp_path: Path) -> None:
    card_of([], [], tmp_path)
    recipe, about = load_recipe(None, ["model.head=linear"]), ("classifier", 8)
    adapter, merged = (card(recipe, tmp_path, Made(*about, merged=m, gguf=False, classes=4)) for m in (False, True))
    assert (
        'PeftModel.from_pretrained(transformers.AutoModelForSequenceClassification.from_pretrained("BASE", num_labels=4), "."'
        in adapter
    )
    assert 'transformers.AutoModelForSequenceClassification.from_pretrained(".")' in merged


def test_a_masked_run_says_that_sums_alone_were_seen(tmp_path: Path) -> None:
    masks = ["privacy.masks=true", "federation.weighting=uniform"]
    text = card_of(masks, [], tmp_path)
    assert "the coordinator received sums of the sites' updates of the adapter, by secure aggregation. **No\n" in text
    assert "**No\ndifferential privacy** was used" in text
    private = card_of([*SITE, "privacy.masks=true"], [2.0], tmp_path)
    assert (
        "received sums of the sites' updates of the adapter, by secure aggregation. **Differential privacy** of each" in private
    )


def test_a_private_run_that_told_no_epsilon_does_not_make_one_up(tmp_path: Path) -> None:
    assert "ε unknown, as no round tells it, at δ = 1e-05" in card_of(SITE, [], tmp_path)


def test_the_number_is_the_accountants(tmp_path: Path) -> None:
    """After three rounds, by the function that the report's rows come from."""
    pytest.importorskip("dp_accounting")
    spent = epsilon(load_recipe(None, SITE).privacy, 3)
    assert f"ε = {spent:.3g} at δ = 1e-05" in card_of(SITE, [spent / 2, spent], tmp_path)
