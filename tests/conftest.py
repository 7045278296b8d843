"""What many tests share: one thread, no network, a tiny base model and a tiny federation's data."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.fsync = lambda descriptor: None  # a power cut is not among the tests, and a disk takes its time for each
gc.disable()  # until all tests are collected: what imports leave behind stays
SLOW = ("deployment", "faults", "simulation")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """What starts Flower's processes is slow."""
    for item in items:
        if any(item.get_closest_marker(name) for name in SLOW):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """A million objects of imports, which no garbage collection of a test goes through. One thread a process of tests; what
    only hands them out needs no torch."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tiny.write_base`."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny_base")
    tiny.write_base(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tiny.write_data`."""
    import tiny

    folder = tmp_path_factory.mktemp("tiny_data")
    tiny.write_data(folder)
    return folder


@pytest.fixture
def tiny_overrides(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> list[str]:
    """See `tiny.overrides`."""
    import tiny

    return tiny.overrides(tiny_base, tiny_data, tmp_path)
