"""The examples do what they say: each run short here, at full length under `make slow`."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest

import fedkeel

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = {"federation.rounds": 2, "train.local_steps": 1, "evaluation.test_rows": 6, "evaluation.validation_rows": 2}
LENGTHS = pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["short", "whole"])


@pytest.fixture
def kept(short: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[fedkeel.Result]:
    """The results of what an example runs, in a folder of its own."""
    found: list[fedkeel.Result] = []
    real = fedkeel.run

    def run(recipe: dict[str, Any], **more: Any) -> fedkeel.Result:
        found.append(real({**recipe, **(SHORT if short else {})}, **more))
        return found[-1]

    monkeypatch.setattr(fedkeel, "run", run, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return found


@LENGTHS
def test_own_rows(short: bool, kept: list[fedkeel.Result], capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "own_rows.py"), run_name="__main__")
    (result,) = kept
    assert {row.site for row in result.measured if row.name == "loss"} == {"north", "harbour", "valley"}
    assert result.scores.keys() == {"base", "local", "federated"}
    assert (result.folder / "report.html").exists()
    assert "of the test rows of all clinics" in capsys.readouterr().out
    if not short:
        assert result.scores["federated"] > result.scores["local"] > result.scores["base"]


@pytest.mark.slow
@LENGTHS
def test_own_term(short: bool, kept: list[fedkeel.Result]) -> None:
    runpy.run_path(str(EXAMPLES / "own_term.py"), run_name="__main__")
    plain, priced = kept
    told = [row.value for row in priced.measured if row.name == "sureness_loss"]
    assert all(0 < value < math.log(4096) for value in told)  # log V of the embedded model bounds it
    assert len(told) == 3 * priced.recipe.federation.rounds
    assert not any(row.name == "sureness_loss" for row in plain.measured)


@pytest.mark.slow
@LENGTHS
def test_own_rule(short: bool, kept: list[fedkeel.Result]) -> None:
    runpy.run_path(str(EXAMPLES / "own_rule.py"), run_name="__main__")
    assert [result.recipe.federation.rule for result in kept] == ["mean", "even_pull"]
    norms = [{(r.round, r.site): r.value for r in result.measured if r.name == "update_norm"} for result in kept]
    first = [{key: value for key, value in norm.items() if key[0] == 1} for norm in norms]
    assert first[0] == first[1]  # both begin alike, and the rule comes after
    assert norms[0] != norms[1]


@pytest.mark.slow
@LENGTHS
def test_the_notebook(short: bool, kept: list[fedkeel.Result]) -> None:
    """Its cells in turn, as a kernel runs them; what it shows, it has been asked for."""
    pytest.importorskip("pandas", reason="pandas is not installed (the extra fedkeel[hub] brings it)")
    notebook = json.loads((EXAMPLES / "tour.ipynb").read_text())
    space: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    result, narrow, _ = kept
    assert space["up"]["int4"] < space["up"]["fp32"] / 4
    assert space["same"] is True or space["same"].numel()
    assert bool((space["logits"] == space["same"]).all())
    assert result.adapter.exists()
    if not short:
        assert narrow.scores["federated"] > result.scores["base"]
