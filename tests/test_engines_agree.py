"""One seed ends in the same bits in this process, over a grid that behaves like Flower's, and in Flower's own simulation."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shapes import quickly
from test_run import Silent, adapter_of, go, rows_of, same, without_time

pytest.importorskip("flwr", reason="the extra fedkeel[flower] is not installed")

from flower_grid import FakeGrid

from fedkeel.engines.flower.apps import client_app
from fedkeel.engines.flower.simulation import Simulation, simulate
from fedkeel.recipe.load import load_recipe
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import prepare

# the default rule; what a lossy codec left out is kept at the sites; a factor stays there; the base moves
RULES = {
    "mean": [],
    "kept": ["federation.codec_up=topk=0.25+int4"],
    "personal": ["federation.rule=share_a"],
    "shifts": ["federation.rule=residual"],
    "blocks": ["structure.skip=0.6", "structure.hold=true"],
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


@pytest.mark.parametrize("rule", quickly(("kept",), RULES))
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


def command(overrides: list[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "fedkeel.cli", "run", "--engine", "flower-sim", *options, *overrides]


@pytest.mark.simulation
def test_the_commands_exit_status_says_whether_a_federation_ended(tiny_overrides: list[str]) -> None:
    """0 at its end, 1 where a site raises, 130 on Ctrl-C, after which the run goes on to the same bits."""
    pytest.importorskip("ray", reason="the extra fedkeel[flower-sim] is not installed")
    overrides = [*tiny_overrides, "evaluation.baselines=[]"]
    _, here, _ = go(overrides)
    failed = subprocess.run(
        command([*overrides, "name=failed", "federation.max_update_norm=1e-9"]), capture_output=True, text=True
    )
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "federation.max_update_norm" in failed.stderr + failed.stdout
    there = RunFolder(here.path.with_name("there"))
    with subprocess.Popen(command([*overrides, "name=there"]), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not there.rows_file.exists() or not there.state().round:  # until the first round has ended
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate()
    assert process.returncode == 130, told.decode()
    assert b"--resume --engine flower-sim" in told
    assert not there.state().finished
    done = subprocess.run(command([*overrides, "name=there"], "--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert there.state().finished
    assert same(adapters(here), adapters(there))
