"""One site's round: a plain loop that can be read from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from fedkeel.data.format import Example
from fedkeel.exchange.codecs import make_codec, with_residual
from fedkeel.exchange.messages import (
    NOTHING_UNSENT,
    difference,
    factors_down,
    names_of,
    pack,
    read_counts,
    unpack_global,
    unsent,
)
from fedkeel.federation.kept import Kept, layout_of, modules_left_out
from fedkeel.federation.teacher import held_positions
from fedkeel.federation.train import SiteError, train_round
from fedkeel.method.aggregate import AGGREGATORS
from fedkeel.method.structure import hold
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Recipe
from fedkeel.rng import derive


def answer(
    payload: bytes,
    model: Model,
    stages: Sequence[Sequence[Example]],
    site: str,
    rounds: int,
    recipe: Recipe,
    kept: Kept,
    clock: Callable[[], float] = time.perf_counter,
) -> bytes:
    """A site's whole part in a round: the global message in, the update message out.

    stages: the site's rows of each stage of the stream; a stage lasts `rounds` rounds. kept: is brought up to date. Up go
    the change of what is trained and shared in this round, supervised positions, positions held by task where trust in
    the teacher is weighed by them, and means over positions; never text, never logits.
    """
    begin = clock()
    federation, structure = recipe.federation, recipe.structure
    rule = AGGREGATORS[federation.rule]
    assert model.initial is not None
    like = layout_of(model.initial, recipe.lora, kept.rank)
    header, state = unpack_global(payload, "global", like, names_of(like, factors_down(rule)), federation.codec_down)
    if header.get("unsent", NOTHING_UNSENT) != unsent(like, rule):
        raise SiteError(
            f"site {site}: a factor that does not travel under federation.rule = {federation.rule!r} is not the one that the "
            f"server holds; seed, base and fedkeel must be the same at both ends"
        )
    model.replay(state.shifts, header["shifts"]["first"])
    start = kept.adapter(state.adapter)
    model.write(start)
    out = modules_left_out(recipe, like.lora)(site, state.round)
    trained = names_of(like, rule.trained(state.round), out)
    sent = trained & names_of(like, rule.shared)
    total = read_counts(header.get("tasks"))
    examples = stages[state.round // rounds]
    handles = hold(model.places, structure.branch, out) if structure.hold else []
    try:
        with model.training_only(trained):
            positions, stats = train_round(model, examples, site, rounds, recipe, replace(state, adapter=start), total)
    finally:
        for handle in handles:
            handle.remove()
    trained_adapter = model.read()
    change = difference(trained_adapter, start)
    if rule.personal:
        now = trained_adapter.tensors()
        kept.personal = {name: now[name] for name in names_of(like, rule.personal) - set(like.dense)}
    distilling = recipe.distill
    asked = distilling.weight and (distilling.task_trust or distilling.site_trust)
    told = held_positions(examples, distilling.trust_by) if asked else {}
    # Of fixed width, so that the bytes of a message do not depend on how fast the machine was.
    seconds = f"{clock() - begin:012.3f}"
    change = {name: change[name] for name in sorted(sent)}
    key = derive(recipe.seed, "up", site, state.round)
    codec = make_codec(federation.codec_up)
    # where a rule finds its factors anew each round, what is left of the last ones is in another basis
    steady = rule.keeps_basis and recipe.lora.one_rank
    if federation.error_feedback and federation.codec_up != "fp32" and steady:
        lost = {name: kept.residual.get(name, torch.zeros_like(t)) for name, t in change.items()}
        encoded, left = with_residual(codec, change, lost, key)
        kept.residual = {**kept.residual, **left}
    else:
        encoded = codec.encode(change, key)
    return pack(
        "update", state.round, like, encoded, federation.codec_up,
        site=site, positions=positions, stats=stats, seconds=seconds, tasks=told, held=model.shifts,
    )  # fmt: skip
