"""What a warm worker was started in, and whether it is still so: what a site says now is what runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from fedkeel.data.readers import paths_of
from fedkeel.engines.sitefile import SiteFile
from fedkeel.model.bases import folder_of
from fedkeel.recipe.schema import Recipe
from fedkeel.tables import BASES

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def _seen(files: Iterable[Path]) -> str:
    """Of every file where it lies, its size and when it was written; what is not there counts as well."""
    told = []
    for path in files:
        try:
            about = path.stat()
            told.append(f"{path} {about.st_size} {about.st_mtime_ns} {about.st_ino}")
        except OSError:
            told.append(f"{path} -")
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def world_of(site: SiteFile, package: Path = PACKAGE) -> str:
    """A fingerprint of the site's file as it is read, FedKeel's code and the libraries' versions: a process that began with
    another one has to go."""
    versions = [f"{name} {metadata.version(name)}" for name in LIBRARIES]
    told = [repr(site), _seen(sorted(package.rglob("*.py"))), *versions]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def _cached(name: str, kind: str, revision: str = "main") -> list[Path]:
    """Where the hub's cache on this machine says which commit of `name` is meant, and that commit's files; asks no network."""
    from huggingface_hub import constants  # heavy
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    return [ref, *_within(folder / "snapshots" / commit)]


def _within(folder: Path) -> list[Path]:
    """Every file of a folder; os.walk passes over what vanishes meanwhile."""
    return sorted(Path(at) / name for at, _, names in os.walk(folder) for name in names)


def cargo_of(recipe: Recipe) -> str:
    """A fingerprint of the files of rows and of the base that a recipe names, as they lie there now."""
    model, data = recipe.model, recipe.data
    base = folder_of(model.base) if model.base in BASES else Path(model.base).expanduser()
    files = [*paths_of(data), *([Path(data.root) / data.tasks_file] if data.tasks_file else [])]
    files += [base] if base.is_file() else _within(base) if base.exists() else _cached(model.base, "model", model.revision)
    if data.dataset:
        rows = Path(data.dataset)
        files += _within(rows) if rows.exists() else _cached(data.dataset, "dataset")
    return _seen(files)
