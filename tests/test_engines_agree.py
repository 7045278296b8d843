"""One seed ends in the same bits in this process, over a grid that behaves like Flower's, and in Flower's own simulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_run import Silent, adapter_of, go, rows_of, same, without_time

pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")

from flower_grid import FakeGrid

from fedkeel.config import load_recipe
from fedkeel.flower import Simulation, client_app, simulate
from fedkeel.folder import RunFolder
from fedkeel.run import execute, prepare

# the default rule; what a lossy codec left out is kept at the sites; a factor stays there; the base moves
RULES = {
    "mean": [],
    "kept": ["federation.codec_up=topk=0.25+int4"],
    "personal": ["federation.rule=share_a"],
    "shifts": ["federation.rule=residual"],
}


def over_grid(overrides: list[str], tmp_path: Path, watch: Silent | None = None, **options: bool) -> RunFolder:
    recipe = load_recipe(None, overrides)
    folder, prepared = RunFolder(Path(recipe.out) / recipe.name), prepare(recipe)
    grid = FakeGrid(client_app, len(prepared.sites.rows))
    execute(prepared, folder, watch or Silent(), engine=Simulation(grid, prepared, tmp_path / "sites"), **options)
    return folder


def adapters(folder: RunFolder) -> dict[str, torch.Tensor]:
    """The tensors of a run's adapter, or of those of all its sites."""
    if (folder.path / "adapter" / "adapter_model.safetensors").exists():
        return adapter_of(folder.path)
    from safetensors.torch import load_file

    found = {}
    for path in sorted((folder.path / "adapter").glob("*/adapter_model.safetensors")):
        found |= {f"{path.parent.name}/{name}": t for name, t in load_file(path).items()}
    assert found
    return found


@pytest.mark.parametrize("rule", RULES)
def test_over_a_grid_as_in_this_process(rule: str, tiny_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*tiny_overrides, *RULES[rule], "evaluation.baselines=[]"]
    _, here, _ = go(overrides)
    there = over_grid([*overrides, "name=there"], tmp_path)
    assert same(adapters(here), adapters(there))
    mine, theirs = ([{**r, "run": ""} for r in without_time(rows_of(f))] for f in (here, there))
    assert mine == theirs


@pytest.mark.simulation
@pytest.mark.parametrize("rule", ["mean", "kept"])
def test_in_flowers_simulation_as_in_this_process(rule: str, tiny_overrides: list[str]) -> None:
    pytest.importorskip("ray", reason="the extra fedkeel[flower-sim] is not installed")
    overrides = [*tiny_overrides, *RULES[rule], "evaluation.baselines=[]"]
    _, here, _ = go(overrides)
    recipe = load_recipe(None, [*overrides, "name=there"])
    there = RunFolder(Path(recipe.out) / recipe.name)
    simulate(prepare(recipe), there, Silent())
    assert same(adapters(here), adapters(there))
