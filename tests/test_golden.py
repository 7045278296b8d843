"""A seed ends where it ended before the code was moved: adapters, checkpoints and rows, to the bit (see golden/runs.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from shapes import quickly
from test_run import Silent, go

sys.path.insert(0, str(Path(__file__).parent / "golden"))
import runs

GOLDEN = json.loads(runs.KEPT.read_text())
RESUMED = ("full", "feedback")


def test_every_case_is_kept() -> None:
    assert GOLDEN["cases"].keys() == runs.CASES.keys()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("golden")


@pytest.mark.parametrize("name", quickly(("full", "feedback", "shifts", "personal", "hold"), runs.CASES))
def test_a_seed_ends_where_it_ended(name: str, workplace: Path) -> None:
    overrides = runs.given(name, workplace)
    if name in RESUMED:

        def stop(leg: str, done: int) -> None:
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            go(overrides, Silent(stop))
    _, folder, _ = go(overrides, resume=name in RESUMED)
    found, kept = runs.outcome(folder.path), GOLDEN["cases"][name]
    if GOLDEN["arithmetic"] == runs.arithmetic() and GOLDEN["torch"] == torch.__version__:
        assert found == kept
    else:  # another processor or torch rounds otherwise; in so few steps that stays small
        assert found["numbers"] == pytest.approx(kept["numbers"], rel=0.02, abs=0.02)
