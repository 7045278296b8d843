"""What a federation serves, from its checkpoints."""

from __future__ import annotations

import json
from functools import reduce
from pathlib import Path

from fedkeel import tables
from fedkeel.method.aggregate.common import blend
from fedkeel.method.aggregate.layouts import folded
from fedkeel.model.digest import base_digest, tokenizer_digest
from fedkeel.model.export import CLASSES
from fedkeel.model.features import Beside
from fedkeel.model.load import load_tokenizer
from fedkeel.model.lora import Model
from fedkeel.recipe.checks import anchor_asked, check_one_model
from fedkeel.recipe.schema import Recipe, Stream
from fedkeel.recipe.settings import read_toml
from fedkeel.runs.folder import RunError, RunFolder
from fedkeel.runs.prints import BASE, WORDS
from fedkeel.types import Adapter, Global


def share_of(stream: Stream, end: Global) -> float:
    """Of what was served before, in what is served after a stage that ended in `end`: `average`, or what `average_from` came to
    there; before the end of the second stage that is its first share."""
    if not stream.average_from:
        return stream.average
    return stream.average_from[0] if end.average is None else end.average


def served(folder: RunFolder, leg: str, rounds: int, stage: int, stream: Stream, like: Adapter) -> Adapter:
    """What a leg serves after `stage` (from 0), from the checkpoints of the stages' ends: see `schema.Stream.average`.

    rounds: of one stage.
    """
    first, *ends = (
        folder.read_checkpoint(leg, rounds * (s + 1), like) for s in range(0 if stream.averages else stage, stage + 1)
    )
    return reduce(lambda before, end: blend(before, end.adapter, share_of(stream, end)), ends, first.adapter)


def beside_of(recipe: Recipe, current: Global, alone: bool = False) -> Beside:
    """What scores labels beside the adapter, or alone, by `evidence.serve`, or what `serve_from` came to; before the end of the
    first stage that is its first weight."""
    weight, choice = recipe.evidence.serve, recipe.evidence.serve_from
    if choice:
        weight = choice[0] if current.serve is None else current.serve
    return Beside(current.heads if weight or alone else {}, weight, alone)


def serve(model: Model, folder: RunFolder, recipe: Recipe, which: str = "adapter") -> None:
    """Put into the model what a finished federation serves: its adapter, and the base shifts below it.

    which: `adapter`, or `best`, the best of its last stage by validation rows. Raises ConfigError where there is no such one
    model, as factors stayed at the sites; RunError where no round is known as the best.
    """
    assert model.initial is not None
    check_one_model(recipe, folder.path / "adapter")
    rounds, last = recipe.federation.rounds, max(1, len(recipe.stream.stages)) - 1
    model.rewind()
    if (recipe.evidence.served or recipe.model.head == "analytic") and not folder.knows("federated"):
        raise RunError(
            f"{', '.join(anchor_asked(recipe))}: {folder.path} made no analytic anchor, as its recipe had evidence.anchor and "
            f"evidence.serve at 0"
        )
    end = folder.read_checkpoint("federated", rounds * (last + 1), model.initial)
    if recipe.evidence.serve_from and end.serve is None:
        raise RunError(
            f"evidence.serve_from = {list(recipe.evidence.serve_from)}: {folder.path} chose no weight by its validation rows; "
            f"say one, as in evidence.serve = 1"
        )
    if recipe.stream.average_from and last and end.average is None:
        raise RunError(
            f"stream.average_from = {list(recipe.stream.average_from)}: {folder.path} chose no share by its validation rows; "
            f"say one, as in stream.average = 0.25"
        )
    model.replay(end.shifts, 0)
    model.beside = beside_of(recipe, end)
    model.know(end.heads)
    if which == "best":
        model.write(_best(folder, recipe, model.initial))
    else:
        model.write(served(folder, "federated", rounds, last, recipe.stream, model.initial))


def _best(folder: RunFolder, recipe: Recipe, like: Adapter) -> Adapter:
    last, rounds = max(1, len(recipe.stream.stages)) - 1, recipe.federation.rounds
    best = folder.state().best_of(last)
    if not best or tables.RULES[recipe.federation.rule].shifts:
        raise RunError(f"{folder.path} knows no best round of its last stage: no validation rows were scored in it")
    found = folder.read_checkpoint("federated", best.round, like).adapter
    if not (last and recipe.stream.averages):
        return found
    share = share_of(recipe.stream, folder.read_checkpoint("federated", rounds * (last + 1), like))
    return blend(served(folder, "federated", rounds, last - 1, recipe.stream, like), found, share)


def check_base(recipe: Recipe, folder: Path, model: Model | None = None) -> None:
    """Raise RunError where the base that `recipe` names is not the one that the run in `folder` was trained upon, as far as the
    run knows: by its words, and of a `model` by its weights."""
    state = RunFolder(folder).state()
    words = state.reference.get("tokenizer") or state.prints.get(WORDS)
    weights = state.reference.get("base") or state.prints.get(BASE)
    where = f"{recipe.model.base!r} is not the base that {folder} was trained upon"
    if words and tokenizer_digest(load_tokenizer(recipe.model)) != words:
        raise RunError(f"{where}: its tokenizer or chat template is another")
    if model is not None and weights and base_digest(model) != weights:
        raise RunError(f"{where}: its weights are others")


def trained_model(recipe: Recipe, folder: Path, which: str = "adapter") -> Model:
    """The model of a finished run with its federated adapter in it; its data are not asked for. which: see `serve`. Raises
    RunError."""
    model = Model(recipe.model, recipe.lora, recipe.seed, _classes(folder / "adapter" / CLASSES))
    if recipe.model.base != read_toml(folder / "recipe.toml", "the run's recipe").get("model", {}).get("base"):
        check_base(recipe, folder, model)
    serve(model, RunFolder(folder), recipe, which)
    return model


def served_adapter(model: Model, recipe: Recipe, folder: Path) -> Adapter:
    """What a finished run serves as one adapter upon its untouched base, a log of base shifts folded in.

    model: `trained_model` of the run.
    """
    assert model.initial is not None
    rounds = recipe.federation.rounds * max(1, len(recipe.stream.stages))
    shifts = RunFolder(folder).read_checkpoint("federated", rounds, model.initial).shifts
    return folded(model.read(), shifts) if shifts else model.read()


def _classes(path: Path) -> tuple[str, ...]:
    """The classes that stand beside an encoder's adapter; of another base none do."""
    if not path.exists():
        return ()
    try:
        return tuple(map(str, json.loads(path.read_text(encoding="utf-8"))["classes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be used: {error!r}") from error
