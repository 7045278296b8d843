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


def cargo_of(recipe: Recipe) -> str:
    """A fingerprint of the files of rows and of the base that a recipe names, as they lie there now."""
    base = Path(recipe.model.base).expanduser()
    base = folder_of(recipe.model.base) if recipe.model.base in BASES else base
    tasks = recipe.data.tasks_file
    rows = [*paths_of(recipe.data), *([Path(recipe.data.root) / tasks] if tasks else [])]
    folders = [base, *([Path(recipe.data.dataset)] if recipe.data.dataset else [])]
    # os.walk passes over what vanishes meanwhile
    within = [Path(at) / name for folder in folders for at, _, names in os.walk(folder) for name in names]
    return _seen([*rows, *([base] if base.is_file() else []), *sorted(within)])
