"""The adapter's folder of a deployment, which sites write: two must agree, and one that writes another is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from training import setting

from fedkeel.engines.coordinate import Away
from fedkeel.engines.exported import differing
from fedkeel.exchange.messages import pack_tensors
from fedkeel.federation.server import FederationError
from fedkeel.model.export import save_adapter
from fedkeel.recipe.schema import Recipe
from fedkeel.types import FedKeelError, Global

Files = dict[str, bytes]
CONFIG, LABELS, CLASSES = "adapter_config.json", "label_embeddings.safetensors", "fedkeel_classes.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, Global]:
    """The folder of an encoder's adapter, and the adapter."""
    model, _ = setting("bert")
    folder = tmp_path_factory.mktemp("written")
    save_adapter(model, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}, Global(3, model.read())


def louder(files: Files) -> Files:
    return {**files, CONFIG: json.dumps({**json.loads(files[CONFIG]), "lora_alpha": 160}).encode()}


def swapped(files: Files) -> Files:
    """Two labels by each other's text: what a model says is turned round, and no file is malformed."""
    return {**files, LABELS: save({"embeddings": load(files[LABELS])["embeddings"].flip(0)})}


def shuffled(files: Files) -> Files:
    """As another process writes it: the targets in another order, the base elsewhere, numbers rounded otherwise."""
    config = json.loads(files[CONFIG])
    config["target_modules"] = sorted(config["target_modules"], reverse=True)
    config["base_model_name_or_path"] = "/data/elsewhere"
    rounded = {"embeddings": load(files[LABELS])["embeddings"] * (1 + 1e-5)}
    return {**files, CONFIG: json.dumps(config).encode(), LABELS: save(rounded)}


def broken(files: Files) -> Files:
    return {**files, CLASSES: b"{"}


def same(files: Files) -> Files:
    return files


def test_what_differs_is_named(written: tuple[Files, Global]) -> None:
    files, _ = written
    assert differing(files, files) == []
    assert differing(files, louder(files)) == [f"lora_alpha in {CONFIG}"]
    assert differing(swapped(files), files) == [LABELS]
    assert differing(files, shuffled(files)) == [f"base_model_name_or_path in {CONFIG}"]
    assert differing(files, {n: c for n, c in files.items() if n != LABELS}) == [LABELS]
    fewer = {key: value for key, value in json.loads(files[CONFIG]).items() if key != "lora_alpha"}
    assert differing({**files, CONFIG: json.dumps(fewer).encode()}, files) == [f"lora_alpha in {CONFIG}"]
    others = {**json.loads(files[CLASSES]), "classes": [["x", "y"]]}
    assert differing(files, {**files, CLASSES: json.dumps(others).encode()}) == [CLASSES]


Writes = Callable[[Files], Files]


@pytest.mark.parametrize(
    ("writes", "asked", "kept", "noted"),
    [
        pytest.param([same, shuffled, louder], 2, same, "", id="two"),
        pytest.param([louder, same, shuffled], 3, same, f"two sites alike:\n--- a: another lora_alpha in {CONFIG}", id="first"),
        pytest.param([same, swapped, shuffled], 3, same, f"two sites alike:\n--- b: another {LABELS}", id="second"),
        pytest.param(
            [broken, same, same],
            3,
            same,
            "two sites alike:\n--- a: the PEFT folder cannot be read: Expecting property name",
            id="broken",
        ),
        pytest.param([same, swapped, louder, same], 3, same, f"no other site alike:\n--- b: another {LABELS}", id="none"),
        pytest.param([same, None], 2, same, "no other site alike:\n--- b: gone", id="alone"),
        pytest.param([same], 1, same, "", id="one site"),
    ],
)
def test_the_folder_is_what_two_sites_write(
    writes: list[Writes | None], asked: int, kept: Writes, noted: str, written: tuple[Files, Global], tmp_path: Path
) -> None:
    files, current = written
    away, told, heard = seat(writes, files, tmp_path)
    Away._export(away, "adapter", current)
    found = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    assert differing(found, kept(files)) == [f"base_model_name_or_path in {CONFIG}"]
    assert json.loads(found[CONFIG])["base_model_name_or_path"] == "their-base"
    assert len(heard) == asked
    assert noted in "".join(told)
    assert bool(told) == bool(noted)


def test_no_folder_is_better_than_another_adapters(written: tuple[Files, Global], tmp_path: Path) -> None:
    files, current = written
    moved = {n: t + 1 for n, t in load(files["adapter_model.safetensors"]).items()}
    away, _, _ = seat([lambda files: {**files, "adapter_model.safetensors": save(moved)}, broken], files, tmp_path)
    with pytest.raises(FederationError, match=r"no site could write the adapter(.|\n)*is not the coordinator's\n--- b"):
        Away._export(away, "adapter", current)
    assert not (tmp_path / "adapter").exists()


def seat(writes: list[Writes | None], files: Files, path: Path) -> tuple[Any, list[str], list[str]]:
    """What `_export` needs of a coordinator: sites a, b, … that write what they write; and what it says, and whom it asks."""
    names, told, heard = "abcd"[: len(writes)], list[str](), list[str]()

    def ask(kind: str, requests: dict[str, Any], deadline: float) -> dict[str, Any]:
        (site,) = requests
        heard.append(site)
        write = writes[names.index(site)]
        if write is None:
            return {site: FedKeelError("gone")}
        tensors = {n: torch.frombuffer(bytearray(c), dtype=torch.uint8) for n, c in write(files).items()}
        return {site: ({}, pack_tensors(tensors, kind="export"))}

    recipe = Recipe()
    named = SimpleNamespace(federation=recipe.federation, model=SimpleNamespace(head="label-text", base="their-base"))
    away = SimpleNamespace(
        fine=lambda: list(names),
        sites=SimpleNamespace(ask=ask),
        recipe=named,
        watch=SimpleNamespace(note=told.append),
        folder=SimpleNamespace(path=path),
    )
    return away, told, heard
