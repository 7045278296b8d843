"""GGUF files read: weights are dequantised once, into a folder in Hugging Face layout. Needs `fedkeel[gguf]`."""

from __future__ import annotations

import copy
import io
from contextlib import redirect_stderr
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers

from fedkeel.files import cache_folder, whole_folder
from fedkeel.model.bases import ModelError, sha256
from fedkeel.model.quiet import quiet

# of `general.file_type`: weights that are stored as they were trained
PLAIN = {0: torch.float32, 1: torch.float16, 32: torch.bfloat16}


def need_gguf(what: str) -> None:
    """Raises ModelError where the package `gguf` is not installed."""
    if find_spec("gguf") is None:
        raise ModelError(f"{what} needs the package gguf: pip install 'fedkeel[gguf]'")


def dequantised(file: Path) -> Path:
    """The folder that `file` is turned into when it is first used; it is kept by the file's SHA-256. Raises ModelError."""
    if not file.is_file():
        raise ModelError(f"model.base = '{file}': no such file")
    about = file.stat()
    folder = cache_folder() / "gguf" / _digest(file.resolve(), about.st_size, about.st_mtime_ns)
    if not folder.is_dir():
        convert(file, folder)
    return folder


@cache
def _digest(file: Path, size: int, changed: int) -> str:
    """By its size and time of change too, so that a file is read once a process and again once it has changed."""
    return sha256(file)


def convert(file: Path, folder: Path, about: str = "") -> None:
    """Write `folder`, whole or not at all: the model of `file` in safetensors, its tokenizer, and where it comes from.

    Weights that were quantised become bfloat16; others keep their type. about: more to say of its origin, in Markdown.
    Raises ModelError for a file that is not GGUF, or of an architecture that transformers cannot read from it.
    """
    need_gguf(f"model.base = '{file}'")
    # some bars there ask nobody before they show themselves
    with quiet(), redirect_stderr(io.StringIO()), whole_folder(folder) as partial:
        net, tokenizer = _read(file)
        net.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        kind = str(net.dtype).removeprefix("torch.")
        (partial / "README.md").write_text(f"{about or f'# {file.stem}'}\n\nMade from `{file.name}`; weights in {kind}.\n")


def _read(file: Path) -> tuple[Any, Any]:
    where = {"pretrained_model_name_or_path": str(file.absolute().parent), "gguf_file": file.name, "trust_remote_code": False}
    try:
        dtype = PLAIN.get(_file_type(file), torch.bfloat16)
        config = transformers.AutoConfig.from_pretrained(**where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
        auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
        # Without `dequantize`, transformers keeps packed weights, through which no gradient passes.
        read = auto.from_pretrained(**where, dtype=dtype, quantization_config=transformers.GgufConfig(dequantize=True))
    except Exception as error:  # of gguf, transformers and tokenizers alike: whatever a broken or unknown file raises
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"'{file}' cannot be read as a GGUF model: {reason or repr(error)}") from error
    # What was read remembers that it came quantised and refuses to be saved; a clean model takes its weights.
    clean = copy.deepcopy(config)
    clean.architectures, clean.dtype = [type(read).__name__], dtype
    vars(clean).pop("_model_name_or_path", None)  # a name out of the file, which is no place
    with torch.device("meta"):
        net = type(read)(clean)
    net.load_state_dict(read.state_dict(), assign=True)
    net.tie_weights()
    net.generation_config = read.generation_config
    return net, tokenizer


def _file_type(file: Path) -> int:
    """`general.file_type`, of llama.cpp's `llama_ftype`; −1 where the file does not say."""
    from gguf import GGUFReader

    field = GGUFReader(file).get_field("general.file_type")
    return -1 if field is None else int(field.contents())
