"""A site's whole part in a round: the global message in, training, the update message out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fedkeel import tables
from fedkeel.data.format import Example
from fedkeel.exchange import quantile
from fedkeel.exchange.channel import channel_of
from fedkeel.exchange.codecs import header_of, seal
from fedkeel.exchange.messages import (
    NOTHING_UNSENT,
    about,
    difference,
    layout,
    names_of,
    pack,
    read_counts,
    shapes_of,
    unpack_global,
    unsent,
)
from fedkeel.exchange.summands import summand
from fedkeel.exchange.sums import pack_foretold, pack_sums, read_trial
from fedkeel.federation.attacks import spoilt
from fedkeel.federation.evidence import known_sums, tried
from fedkeel.federation.kept import Kept, blocks_left_out, layout_of, modules_left_out
from fedkeel.federation.masking import KINDS, masks_of, prepare
from fedkeel.federation.teacher import held_positions
from fedkeel.federation.train import Round, SiteError, train_round, untold
from fedkeel.method.structure.branch import hold
from fedkeel.method.structure.skip import hold_blocks
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Attack, Recipe
from fedkeel.rng import derive
from fedkeel.types import Adapter


@dataclass(frozen=True)
class Site:
    """A site of a leg. stages: its encoded rows of each stage of the stream; a stage lasts `rounds` rounds. recipe: of the
    leg. tick: hears of each step, see `train_round`. attack: what it does to its changes, in a simulation of harm."""

    name: str
    stages: Sequence[Sequence[Example]]
    rounds: int
    recipe: Recipe
    tick: Callable[[float], None] = untold
    attack: Attack = field(default_factory=Attack)

    @property
    def rule(self) -> tables.Rule:
        """Of aggregation, in this leg."""
        return tables.RULES[self.recipe.federation.rule]


def answer(payload: bytes, model: Model, site: Site, kept: Kept, clock: Callable[[], float] = time.perf_counter) -> bytes:
    """The site's update message for a global message. kept: of this site, is brought up to date.

    Up go the change of what is trained and shared in this round, supervised positions, positions held by task where trust in
    the teacher is weighed by them, and means over positions; never text, never logits. Raises SiteError, and EnvelopeError for
    a message that is not what this site was promised.
    """
    asked = header_of(payload)
    if asked.get("kind") in ("gather", "trial"):
        return _knowing(payload, asked, model, site)
    assert model.initial is not None
    if asked.get("kind") in KINDS:
        _check_masks(site)
        return prepare(asked, model.initial, site.name, kept)
    begin = clock()
    recipe, rule = site.recipe, site.rule
    like, round = _begin(payload, model, site, kept)
    out = modules_left_out(recipe, like.lora)(site.name, round.state.round)
    trained = names_of(like, rule.trained(round.state.round), out)
    sent = trained & names_of(like, rule.shared)
    examples = site.stages[round.stage]
    blocks = blocks_left_out(recipe, like.lora)(site.name, round.state.round)
    with _held(model, recipe, out, blocks), model.training_only(trained):
        positions, stats = train_round(model, examples, round, site.tick)
    after = model.read()
    change = difference(after, round.state.adapter)
    if rule.personal:
        now = after.tensors()
        kept.personal = {name: now[name] for name in names_of(like, rule.keeps) - set(like.dense)}
    # Of fixed width, so that the bytes of a message do not depend on how fast the machine was.
    seconds = f"{clock() - begin:012.3f}"
    key = derive(recipe.seed, "up", site.name, round.state.round)
    if (
        recipe.stream.slices
    ):  # what an earlier stage left unsent moves nothing any more, and would crowd out what is trained now
        kept.forget(round.ranks)
    recipe = replace(recipe, privacy=quantile.as_now(recipe.privacy, round.state.clip))
    spoils = derive(recipe.seed, "attack", site.name, round.state.round)
    change = spoilt({name: change[name] for name in sorted(sent)}, site.attack, spoils)
    side = quantile.side(change, recipe.privacy) if recipe.privacy.quantile else None
    if recipe.privacy.masks:
        masks = masks_of(asked.get("masked", {}), round.state.round, site.name, kept)
        adds = summand(recipe.federation.codec_up, len(masks.among), round.state.reach)
        encoded, kept.memory = channel_of(recipe, adds).send(change, kept.memory, key)
        beside = [] if side is None else [side]
        whole = masks.over(adds.numbers(encoded, beside))
        form = adds.form(shapes_of(change), len(beside))
        return seal(about("masked", round.state.round, like, site=site.name), form.packed(whole))
    encoded, kept.memory = channel_of(recipe).send(change, kept.memory, key)
    told = {"site": site.name, "positions": positions, "stats": stats, "seconds": seconds, "held": model.shifts}
    told["tasks"] = held_positions(examples, recipe.distill.trust_by) if _counts_travel(recipe) else {}
    if recipe.privacy.unit != "none":  # numbers about private rows are not sent, and time tells of them too
        told |= {"positions": 1, "stats": {}, "seconds": f"{0:012.3f}"}
    told |= {} if side is None else {"side": quantile.told(side)}
    return pack("update", round.state.round, like, encoded, recipe.federation.codec_up, **told)


def _check_masks(site: Site) -> None:
    if not site.recipe.privacy.masks:
        raise SiteError(f"site {site.name}: keys for masks are asked for, and this leg has privacy.masks = false")


def _knowing(payload: bytes, asked: Mapping[str, Any], model: Model, site: Site) -> bytes:
    """What the rows of a stage say through the frozen base, or how well the classifiers that all sites' rows made foretell
    them."""
    assert model.initial is not None
    round, stage = asked.get("round"), asked.get("stage")
    if type(round) is not int or type(stage) is not int or not 0 <= stage < len(site.stages):
        raise SiteError(f"site {site.name}: asked for what its rows of stage {stage!r} say; it has {len(site.stages)} stages")
    if asked.get("layout") != layout(model.initial) or site.recipe.privacy.hides:
        raise SiteError(f"site {site.name}: sums of its rows are asked for by another model, or its rows are private")
    told = {example.record for rows in site.stages[:stage] for example in rows}  # those that are replayed are in the sums
    examples = [example for example in site.stages[stage] if example.record not in told]
    if asked["kind"] == "gather":
        return pack_sums(site.name, round, model.initial, known_sums(model.features, examples, stage))
    heads, inverses = read_trial(payload)
    return pack_foretold(site.name, round, model.initial, tried(model.features, examples, heads, inverses))


def _begin(payload: bytes, model: Model, site: Site, kept: Kept) -> tuple[Adapter, Round]:
    """(what the site's adapter looks like, the round), with the model where the round begins."""
    recipe, rule = site.recipe, site.rule
    assert model.initial is not None
    like = layout_of(model.initial, recipe.lora, kept.rank)
    header, state = unpack_global(payload, "global", like, names_of(like, rule.down), recipe.federation.codec_down)
    if header.get("unsent", NOTHING_UNSENT) != unsent(like, rule):
        raise SiteError(
            f"site {site.name}: a factor that does not travel under federation.rule = {rule.name!r} is not the one that the "
            f"server holds; seed, base and fedkeel must be the same at both ends"
        )
    model.replay(state.shifts, header["shifts"]["first"])
    start = kept.adapter(state.adapter)
    model.write(start)
    model.know(state.heads)
    return like, Round(site.name, site.rounds, recipe, replace(state, adapter=start), read_counts(header.get("tasks")))


@contextmanager
def _held(model: Model, recipe: Recipe, out: frozenset[str], blocks: frozenset[str]) -> Iterator[None]:
    """While it lasts, the branches and the whole blocks that `structure.hold` leaves out of this round are left out."""
    structure = recipe.structure
    with ExitStack() as undo:
        if structure.hold and structure.amount("branch"):
            for handle in hold(model.places, structure.amount("branch"), out):
                undo.callback(handle.remove)
        if structure.hold and structure.amount("skip"):
            for patch in hold_blocks(model.places, blocks):
                undo.callback(patch.remove)
        yield


def _counts_travel(recipe: Recipe) -> bool:
    """Whether anybody weighs trust by the sites' counts."""
    distill = recipe.distill
    return bool(distill.weight and (distill.task_trust or distill.site_trust))
