"""What others serve of a finished run: its adapter or the whole model with a card, for PEFT, Hugging Face or llama.cpp."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedkeel.data.format import Formatter
from fedkeel.evidence.card import Made, base_is_away, card, hub_id
from fedkeel.evidence.report import read_rows
from fedkeel.evidence.report.run_numbers import measured_of
from fedkeel.files import whole_folder, write_atomic
from fedkeel.model.bases import ADAPTER_FILES, ModelError
from fedkeel.model.depth import kept_blocks
from fedkeel.model.export import CLASSES, cut, save_merged, save_with_base
from fedkeel.model.gguf_write import save_adapter_gguf, save_merged_gguf
from fedkeel.model.load import load_tokenizer
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.served import served_adapter, trained_model
from fedkeel.types import Record


@dataclass(frozen=True)
class Depth:
    """How much of a model is written. share: of its blocks. least: those of least influence are left out, in the order that
    `fedkeel measure` found for the run, in place of the top ones."""

    share: float = 1.0
    least: bool = False


def export(
    recipe: Recipe, run: Path, target: Path, merged: bool = False, which: str = "adapter", depth: Depth = Depth()
) -> list[str]:
    """Write the new folder `target`: the run's adapter in PEFT's format, or if `merged` the whole model in Hugging Face layout.

    recipe, run: of a run that has ended in one adapter. which: `adapter` or `best`, see `served.serve`. depth: below 1 an
    adapter has the base that it fits, in the folder `base` beside it.
    An adapter has the tokenizer beside it, and names its base by its id on the hub where it has one. Returns notes, also on
    what could not be added. Raises DiskError, ModelError.
    """
    notes = []
    with whole_folder(target) as partial:
        left = ""
        if merged or depth.share < 1:
            model = trained_model(recipe, run, which)
            kind = model.kind
            if depth.share < 1:
                left = _shorten(model, run, depth)
                notes.append(f"{left}; `fedkeel measure` tells what that costs")
            if merged:
                save_merged(model, partial, _ends(model))
            else:
                save_with_base(model, partial)
        else:
            notes += _copy_adapter(run / which, partial)
            kind = _kind(partial)
            _name_base(partial, recipe)
            try:
                if base_is_away(recipe, run):
                    raise ModelError(f"the base {recipe.model.base!r} is at the sites")
                load_tokenizer(recipe.model).save_pretrained(partial)
            except ModelError:
                notes.append(f"the base {recipe.model.base!r} is not on this machine: the adapter is without its tokenizer")
        made = Made(kind, _rank(run), merged, gguf=False, left=left, best=which == "best", classes=_linear(partial))
        _write_card(recipe, run, partial, made)
    return notes


def _linear(folder: Path) -> int:
    """Classes of a linear head, which an encoder's adapter holds; 0 where there is none."""
    path = folder / CLASSES
    about = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return len(about["classes"]) if about.get("head") == "linear" else 0


def _shorten(model: Model, run: Path, depth: Depth) -> str:
    """Take blocks off the model; says which. Raises ModelError."""
    blocks, order = len(model.places.stack), list[int]()
    if depth.least:
        measures = run / "measures.jsonl"
        found = measured_of(read_rows(measures), "blocks") if measures.exists() else {}
        turns = {int(number): turn for number, turn in found.get("turn", {}).items()}
        order = sorted(turns, key=lambda n: turns[n])
        if sorted(order) != list(range(1, blocks)):
            raise ModelError(
                f"{measures} says nothing of the order in which {blocks} blocks may go: `fedkeel measure {run}` finds it on "
                f"validation rows, if the run has some, with the family `depth`"
            )
    kept = kept_blocks(blocks, depth.share, order)
    cut(model, kept)
    gone = ", ".join(str(n) for n in range(blocks) if n not in kept)
    return f"{len(kept)} of {blocks} blocks are left" + (f", without {gone} (from 0)" if gone else "")


def _copy_adapter(folder: Path, target: Path) -> list[str]:
    """The files that FedKeel wrote, and no other; a note names what else was found beside them."""
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    others = sorted(path.name for path in folder.iterdir() if path.name not in ADAPTER_FILES)
    return [f"{folder} holds what FedKeel did not write, and it is left out: {', '.join(others)}"] if others else []


def export_gguf(
    recipe: Recipe, run: Path, target: Path, merged: bool = False, which: str = "adapter", kind: str = "f16"
) -> None:
    """As `export`, as one file for llama.cpp, `adapter.gguf` or `model.gguf`, with a Modelfile for Ollama.

    kind: of the whole model's matrices, see `model.gguf_write.TYPES`.
    """
    model = trained_model(recipe, run, which)
    with whole_folder(target) as partial:
        if merged:
            save_merged_gguf(model, partial / "model.gguf", kind, _ends(model))
            written = "FROM ./model.gguf\n"
        else:
            save_adapter_gguf(model, served_adapter(model, recipe, run), partial / "adapter.gguf")
            written = f"# the base model as GGUF, of any quantisation\nFROM {_base(recipe)}\nADAPTER ./adapter.gguf\n"
        write_atomic(partial / "Modelfile", written)
        _write_card(recipe, run, partial, Made(model.kind, _rank(run), merged, gguf=True, best=which == "best"))


def _ends(model: Model) -> list[int]:
    """The tokens that ended an answer in training; none of an encoder."""
    if model.kind == "classifier":
        return []
    return Formatter(model.tokenizer, model.kind, 64).ends(Record("probe", "probe", "test", "", input="x"))


def _name_base(adapter: Path, recipe: Recipe) -> None:
    known = hub_id(recipe.model.base)
    if known:
        text = json.dumps({**_config(adapter), "base_model_name_or_path": known}, indent=2)
        write_atomic(adapter / "adapter_config.json", f"{text}\n")


def _base(recipe: Recipe) -> str:
    given = Path(recipe.model.base).expanduser()
    return str(given.resolve()) if given.suffix == ".gguf" and given.is_file() else "./base.gguf"


def _rank(run: Path) -> int:
    rank = _config(run / "adapter")["r"]
    assert isinstance(rank, int)
    return rank


def _kind(adapter: Path) -> str:
    """Of the model that a PEFT folder is for, by the task it names."""
    return {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq"}.get(str(_config(adapter)["task_type"]), "classifier")


def _config(adapter: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def _write_card(recipe: Recipe, run: Path, folder: Path, made: Made) -> None:
    write_atomic(folder / "README.md", card(recipe, run, made))
