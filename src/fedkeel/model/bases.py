"""Bases that a recipe may call by name, and where they lie. Imports nothing heavy."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fedkeel import tables
from fedkeel.files import cache_folder
from fedkeel.types import FedKeelError

PACKAGE = Path(__file__).parents[1]
# every file of a PEFT folder as `export.save_adapter` writes it: what stands there is passed on, so no pickle and no program
ADAPTER_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "fedkeel_classes.json",
    "label_embeddings.safetensors",
    "label_heads.safetensors",
)


class ModelError(FedKeelError):
    """A base model that cannot be loaded or used as asked."""


def folder_of(name: str) -> Path:
    """Where a base of the table is, or will be once it is fetched."""
    entry = tables.BASES[name]
    return PACKAGE / entry.embedded if entry.embedded else cache_folder() / "bases" / name


def of_table(name: str) -> Path:
    """The folder of a base of the table. Raises ModelError if it was not fetched yet."""
    folder = folder_of(name)
    if not folder.is_dir():
        raise ModelError(f"model.base = {name!r} is not on this machine ({folder}): fetch it once with  fedkeel fetch {name}")
    return folder


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
