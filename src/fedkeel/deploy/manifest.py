"""What every part knows of the federation, and the base told by the hashes of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkeel import __version__
from fedkeel.recipe.schema import Recipe
from fedkeel.types import FedKeelError

# What decides how a base computes, and how it reads text. Everything else in a folder (README, other formats) is left out.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


class DeployError(FedKeelError):
    """A deployment that cannot be written or read as asked; the text says what would be right."""


def base_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files of the model, files of the tokenizer) in `folder`, a base in Hugging Face layout, each sorted by name.

    Of weights, safetensors if there are any, as transformers prefers them. Raises DeployError if a kind is missing.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    model = sorted([*weights, *(folder / name for name in MODEL_FILES if (folder / name).is_file())])
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not weights or not tokenizer:
        raise DeployError(
            f"{folder} holds no {'tokenizer' if weights else 'weights'}: a folder in Hugging Face layout belongs here, with "
            f"config.json, *.safetensors and the tokenizer's files"
        )
    return model, tokenizer


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 over name, size and SHA-256 of each file, in the order given; files are read as a stream."""
    whole = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.name} {path.stat().st_size} {digest}\n".encode())
        except OSError as error:
            raise DeployError(f"{path} cannot be read: {error.strerror or error}") from error
    return whole.hexdigest()


def base_hashes(folder: Path) -> tuple[str, str]:
    """(hash of the model's files, hash of the tokenizer's files). Raises DeployError.

    Of files, not of tensors as a site's hello tells them: this one needs no memory for weights and no library.
    """
    model, tokenizer = base_files(folder)
    return files_hash(model), files_hash(tokenizer)


def make_manifest(recipe: Recipe, text: str, sites: Sequence[str], address: str, base: Path | None) -> dict[str, Any]:
    """What every part knows of the federation, none of it secret. text: recipe.toml. base: where to compute the hashes; None:
    they are left empty. Raises DeployError if `base` is no base."""
    model, tokenizer = base_hashes(base) if base is not None else ("", "")
    return {
        "fedkeel": __version__,
        "coordinator": address,
        "sites": list(sites),
        "recipe": hashlib.sha256(text.encode()).hexdigest(),
        "base": recipe.model.base,
        "base_sha256": model,
        "tokenizer_sha256": tokenizer,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest that `init` wrote. Raises DeployError naming the file and key."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DeployError(f"{path} cannot be read: {error}; copy it from app/ of the deployment's folder") from error
    keys = ("fedkeel", "coordinator", "recipe", "base", "base_sha256", "tokenizer_sha256")
    for key in keys:
        if not isinstance(told, dict) or not isinstance(told.get(key), str):
            raise DeployError(f"{path}: text belongs under {key!r}; copy the file from app/ of the deployment's folder")
    return told
