"""A run's folder: recipe, rows, checkpoints, and the state to resume from."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fedkeel.config import Recipe, to_toml
from fedkeel.files import append_lines, write_atomic
from fedkeel.messages import pack_global, read_counts, unpack_global
from fedkeel.types import Adapter, FedKeelError, Global, Row


class RunError(FedKeelError):
    """A run folder that cannot be used as asked."""


def environment() -> dict[str, Any]:
    """Versions, machine and, in a checkout of FedKeel, its commit."""
    packages = ("fedkeel", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "commit": commit,
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


class RunFolder:
    """`runs/<name>`: the resolved recipe, rows, checkpoints and the state to resume from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows_file = path / "rows.jsonl"

    @property
    def _state_file(self) -> Path:
        return self.path / "state.json"

    def state(self) -> dict[str, Any]:
        """{done: names of finished legs, leg, round: the last checkpoint, tested: stages of it that are scored, rows_bytes,
        finished}."""
        if not self._state_file.exists():
            return {"done": [], "leg": "", "round": 0, "tested": 0, "rows_bytes": 0, "finished": False}
        state: dict[str, Any] = json.loads(self._state_file.read_text())
        return state

    def check(self, recipe: Recipe, resume: bool, fresh: bool) -> None:
        """Raise RunError if `open` would; touches nothing."""
        if self._state_file.exists() and not fresh:
            if not resume:
                raise RunError(
                    f"{self.path} holds a run already; continue it with --resume, replace it with --fresh, or set name=OTHER"
                )
            before, written = (self.path / "recipe.toml").read_text(), to_toml(recipe)
            if before != written:
                pairs = zip(before.splitlines(), written.splitlines(), strict=False)
                changed = next((f"{a!r} became {b!r}" for a, b in pairs if a != b), "a key was added or removed")
                raise RunError(f"{self.path} cannot be resumed with another recipe: {changed}")
        elif resume:
            raise RunError(f"{self.path} holds no run to resume")
        elif self.path.exists():
            found = {p.name for p in self.path.iterdir()}
            if found and not found & {"recipe.toml", "state.json"}:
                raise RunError(f"{self.path} exists and is not a run of FedKeel; set out= or name= to another folder")

    def open(self, recipe: Recipe, resume: bool, fresh: bool) -> dict[str, Any]:
        """Make the folder for a new run, or go back to the last whole state of an old one. Raises RunError."""
        self.check(recipe, resume, fresh)
        if self._state_file.exists() and not fresh:
            state = self.state()
            if self.rows_file.exists():  # rows written after the last checkpoint belong to work that is done again
                os.truncate(self.rows_file, state["rows_bytes"])
            return state
        if self.path.exists():
            shutil.rmtree(self.path)
        write_atomic(self.path / "recipe.toml", to_toml(recipe))
        write_atomic(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")
        state = self.state()
        write_atomic(self._state_file, json.dumps(state))
        return state

    def save(self, state: dict[str, Any], rows: Sequence[Row]) -> None:
        """Append rows and move the state on: the one point after which a resumed run continues."""
        state["rows_bytes"] = append_lines(self.rows_file, [json.dumps(r.as_json(), allow_nan=False) for r in rows])
        write_atomic(self._state_file, json.dumps(state))

    def checkpoint(self, leg: str, round: int) -> Path:
        """Where the adapter after `round` rounds of a leg lies."""
        return self.path / "checkpoints" / leg / f"round-{round:04d}.fkl"

    def write_checkpoint(self, leg: str, state: Global) -> None:
        """Exact: float32, whatever the exchange rounds to."""
        counts = {site: dict(held) for site, held in state.counts.items()}
        write_atomic(self.checkpoint(leg, state.round), pack_global("checkpoint", state, "fp32", counts=counts))

    def read_checkpoint(self, leg: str, round: int, like: Adapter) -> Global:
        """What `write_checkpoint` wrote. Raises RunError."""
        path = self.checkpoint(leg, round)
        try:
            header, state = unpack_global(path.read_bytes(), "checkpoint", like)
            counts = {site: read_counts(held) for site, held in header["counts"].items()}
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise RunError(f"checkpoint {path} cannot be used: {error}; start over with --fresh") from error
        return replace(state, counts=counts)
