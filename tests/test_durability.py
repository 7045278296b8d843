"""Nothing lost: runs that die at any moment, or whose checkpoints are torn or altered, end in the bits of a whole one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import shapes
import tiny
from test_run import Silent, adapter_of, assert_ends_as, go, rows_of, same

from fedkeel.runs.folder import RunError, RunFolder

ROOT = Path(__file__).parents[1]
SHORT = [
    "evaluation.baselines=base,centralised",
    "train.local_steps=1",
    "federation.codec_up=int8",
    "federation.optimiser=adam",
]
# dies of kill -9 at the n-th write to a disk, before it or behind it
DIES = """
import os, signal, sys
sys.path.insert(0, 'tests')
from pathlib import Path
from test_run import go
left, behind = int(sys.argv[1]), sys.argv[2] == 'behind'
def counted(real):
    def call(*given, **more):
        global left
        left -= 1
        if not left and not behind: os.kill(os.getpid(), signal.SIGKILL)
        found = real(*given, **more)
        if not left and behind: os.kill(os.getpid(), signal.SIGKILL)
        return found
    return call
os.fsync, Path.replace, Path.rename = counted(os.fsync), counted(Path.replace), counted(Path.rename)
given = sys.argv[3:]
resume = (Path(next(o for o in given if o.startswith('out='))[4:]) / 'tiny' / 'state.json').exists()
go(given, resume=resume)
"""


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return go([*tiny.overrides(tiny_base, tiny_data, tmp_path_factory.mktemp("whole")), *SHORT])[1]


def dies(overrides: list[str], write: int, where: str) -> bool:
    """Whether it died at that write; it ended before otherwise."""
    found = subprocess.run(
        [sys.executable, "-c", DIES, str(write), where, *overrides], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode in (0, -9), found.stderr
    return found.returncode == -9


@pytest.mark.slow
def test_a_run_that_died_at_its_first_file_is_begun_again(tiny_overrides: list[str]) -> None:
    overrides = [*tiny_overrides, *SHORT]
    assert dies(overrides, 1, "before")
    folder = Path(next(o for o in overrides if o.startswith("out="))[4:]) / "tiny"
    assert [path.name for path in folder.iterdir()] == ["recipe.toml.partial"]
    assert (go(overrides)[1].path / "adapter").exists()
    assert not (folder / "recipe.toml.partial").exists()


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_write_it_ends_in_the_same_bits(
    kills: int, tiny_overrides: list[str], whole: RunFolder, tmp_path: Path
) -> None:
    draw = random.Random(kills)
    killed = 0
    while killed < kills:
        shutil.rmtree(tmp_path / "tiny", ignore_errors=True)
        while killed < kills and dies([*tiny_overrides, *SHORT], draw.randint(1, 25), draw.choice(["before", "behind"])):
            killed += 1
        begun = (tmp_path / "tiny" / "state.json").exists()
        _, resumed, _ = go([*tiny_overrides, *SHORT], resume=begun)
        assert_ends_as(resumed, whole)


def stopped(overrides: list[str], leg: str, at: int) -> RunFolder:
    def stop(now: str, done: int) -> None:
        if (now, done) == (leg, at):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(overrides, Silent(stop))
    return RunFolder(Path(next(o for o in overrides if o.startswith("out="))[4:]) / "tiny")


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("harm", shapes.quickly((altered,), [torn, altered, Path.unlink]))
@pytest.mark.parametrize(
    ("at", "file"), [(2, "round-0002.fkl"), (3, "kept-0003/optimiser.fkl"), (3, "kept-0003/1.fkl"), (1, "round-0001.fkl")]
)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(
    harm: object, at: int, file: str, tiny_overrides: list[str], whole: RunFolder
) -> None:
    given = [*tiny_overrides, *SHORT]
    folder = stopped(given, "federated", at)
    harm(folder.path / "checkpoints" / "federated" / file)  # type: ignore[operator]
    watch = Silent()
    _, resumed, _ = go(given, watch, resume=True)
    assert any(f"goes on from round {at - 1}, the one before" in note and Path(file).name in note for note in watch.notes)
    assert_ends_as(resumed, whole)


def test_two_damaged_checkpoints_are_an_error_that_names_them(tiny_overrides: list[str]) -> None:
    given = [*tiny_overrides, *SHORT]
    folder = stopped(given, "federated", 3)
    for name in ("round-0002.fkl", "round-0003.fkl"):
        altered(folder.path / "checkpoints" / "federated" / name)
    with pytest.raises(RunError, match=r"round-0003\.fkl is not as it was written .* round before cannot be used either"):
        go(given, resume=True)


def test_old_checkpoints_go_and_what_is_needed_stays(tiny_overrides: list[str]) -> None:
    """Two stages of six rounds, averaged: the last two rounds, the stages' ends and the best round; the same end."""
    given = [*tiny_overrides, "evaluation.baselines=[]", "train.local_steps=1", "federation.rounds=6", "stream.average=0.25"]
    given += ['stream.stages=["colour", "echo"]']
    _, all_of, _ = go([*given, "name=all"])
    _, few, _ = go([*given, "name=few", "keep_checkpoints=1"])
    best = few.state().best.round
    left = sorted(int(p.stem[6:]) for p in (few.path / "checkpoints/federated").glob("round-*.fkl"))
    assert left == sorted({6, 11, 12, best})
    assert len(list((all_of.path / "checkpoints/federated").glob("round-*.fkl"))) == 12
    assert same(adapter_of(few.path), adapter_of(all_of.path))
    assert [r["value"] for r in rows_of(few) if r["split"]] == [r["value"] for r in rows_of(all_of) if r["split"]]


def test_scores_of_legs_are_added_and_those_of_a_leg_replaced(tmp_path: Path) -> None:
    """Also where a kill tore the last line, or cut a leg's short; as if each leg had been written once."""
    (tmp_path / "run").mkdir()

    def lines() -> list[tuple[str, str, str, float]]:
        told = map(json.loads, (tmp_path / "run" / "scores.jsonl").read_text().splitlines())
        return [(line["method"], line["site"], line["id"], line["score"]) for line in told]

    folder = RunFolder(tmp_path / "run")
    folder.write_scores("base", "", {"x": ("t", 0.5), "y": ("t", 1.0)})
    folder.write_scores("local", "a", {"x": ("t", 0.0)})
    folder.write_scores("base", "", {"y": ("t", 0.25)})
    assert lines() == [("local", "a", "x", 0.0), ("base", "", "y", 0.25)]
    with (tmp_path / "run" / "scores.jsonl").open("a") as file:
        file.write(json.dumps({"method": "local", "site": "b", "task": "t", "id": "x", "score": 1.0}) + '\n{"method": "lo')
    again = RunFolder(tmp_path / "run")
    again.write_scores("local", "b", {"x": ("t", 0.5), "y": ("t", 0.5)})
    again.write_scores("local", "c", {"x": ("t", 1.0)})
    kept = [("local", "a", "x", 0.0), ("base", "", "y", 0.25)]
    assert lines() == [*kept, ("local", "b", "x", 0.5), ("local", "b", "y", 0.5), ("local", "c", "x", 1.0)]
