"""A whole run in this process, with or without an engine for its sites: data to legs, and a folder that can be resumed."""

from __future__ import annotations

import torch

from fedkeel import tables
from fedkeel.model.lora import Model
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.here import Engine, Here
from fedkeel.runs.planned import planned
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.rounds import Loop
from fedkeel.runs.served import serve
from fedkeel.runs.track import Tracks
from fedkeel.runs.watch import Watch


def execute(
    prepared: Prepared,
    folder: RunFolder,
    watch: Watch,
    resume: bool = False,
    fresh: bool = False,
    engine: Engine | None = None,
) -> Model:
    """Run every leg, from the folder's last state on. Returns the model with the federated adapter in it.

    engine: where the sites of the federated leg are; None: in this process. All else, scoring and baselines, is done here.

    Leaves recipe.toml, env.json, rows.jsonl, scores.jsonl, checkpoints/, and adapter/ in PEFT format in the folder.
    """
    torch.set_num_threads(prepared.recipe.threads)
    with folder.alone():
        return _execute(prepared, folder, watch, (resume, fresh), engine)


def _execute(prepared: Prepared, folder: RunFolder, watch: Watch, begin: tuple[bool, bool], engine: Engine | None) -> Model:
    recipe = prepared.recipe
    folder.check(recipe, *begin)
    tracks = Tracks(recipe.track, folder.path, recipe.name, watch.note)
    here = Here(prepared, folder, watch, engine)
    legs, promise = planned(here.cast, here.size)
    # only now: a recipe that cannot run leaves no folder, and replaces none
    loop = Loop(recipe, here, folder, watch, folder.open(recipe, *begin, here.prints()))
    loop.play(legs, tracks, promise)
    if not tables.RULES[recipe.federation.rule].personal:
        serve(here.model, folder, recipe)
    return here.model
