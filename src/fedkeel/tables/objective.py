"""What a site minimises: terms, and how the task term is calibrated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedkeel.tables.entry import Entry, Table, imported


@dataclass(frozen=True)
class Weighted:
    """Options of a term that has none of its own: how much it counts."""

    # the metadata of a `recipe.settings.number`, which is a room above
    weight: float = dataclasses.field(
        default=0.0,
        metadata={"low": 0, "high": math.inf, "above": False, "infinite": False, "about": "of the term; 0: it is not taken"},
    )


@dataclass(frozen=True)
class Term(Entry):
    """A term of a site's objective: (forward, options) -> its mean per supervised position in nats, see `types.Forward`.

    always: no key switches it on. key: the recipe's key that does, at whose default it is off; empty: `term.NAME.weight`, and
    then its options have a `weight`. section: where its options are, of a recipe's own sections; empty: `[term.NAME]`. weight:
    (options, moment) -> the weight at a step (`terms.Moment`); empty: the options' `weight`. mode: it is taken in this
    structure.mode only.
    needs: what of a `Forward` it reads beside logits and targets: `teacher`, `again`, `clean`, `anchor`, `exit`,
    `prototypes`. once: it reads no position but `types.Parameters` (`parameters`), and is taken once a step, not once a
    micro-batch. row: the name of its mean among a site's numbers. gates: names of the per-position numbers that it returns
    beside its loss. least: a bound
    below that the law tests hold it to; −inf for none. couples: it couples the positions of a micro-batch. tail: it looks at
    what a teacher finds least likely, which is not kept of a row (`distill.cache`): the teacher is asked anew each time. asks:
    (key, value) of the schema without which it has no meaning.
    """

    always: bool = False
    key: str = ""
    section: str = ""
    weight: str | Callable[..., float] = ""
    mode: str = ""
    needs: tuple[str, ...] = ()
    once: bool = False
    row: str = ""
    unit: str = "nats"
    gates: tuple[str, ...] = ()
    least: float = 0.0
    couples: bool = False
    tail: bool = False
    asks: tuple[str, Any] | None = None

    @property
    def switch(self) -> str:
        """The key that switches it on; empty for what is always on."""
        return "" if self.always else self.key or f"term.{self.name}.weight"

    def settings(self) -> type | None:
        """See `Entry.settings`; a term of a recipe's own section has none, and any other at least a weight."""
        return None if self.always or self.section else super().settings() or Weighted

    def weigh(self) -> Callable[..., float] | None:
        """What `weight` names; None for the options' own."""
        return imported(self.weight, self.name) if self.weight else None


_OBJECTIVE = "fedkeel.method.objective"
TERMS = Table(
    "term",
    {
        "task": Term(f"{_OBJECTIVE}.task:task", always=True, row="loss"),
        "rdrop": Term(
            f"{_OBJECTIVE}.consistency:rdrop",
            key="structure.mode",
            section="structure",
            mode="rdrop",
            needs=("again",),
            weight=f"{_OBJECTIVE}.consistency:rdrop_weight",
            row="structure_loss",
        ),
        "self": Term(
            f"{_OBJECTIVE}.consistency:to_clean",
            key="structure.mode",
            section="structure",
            mode="self",
            needs=("clean",),
            weight=f"{_OBJECTIVE}.consistency:self_weight",
            row="structure_loss",
        ),
        "distill": Term(
            f"{_OBJECTIVE}.distill:guided",
            key="distill.weight",
            section="distill",
            needs=("teacher",),
            weight=f"{_OBJECTIVE}.distill:guidance_weight",
            row="distill_loss",
            gates=("a", "b", "w_gold", "w_rest"),
        ),
        "anchor": Term(
            f"{_OBJECTIVE}.anchor:to_anchor",
            key="evidence.anchor",
            section="evidence",
            needs=("anchor",),
            weight=f"{_OBJECTIVE}.anchor:anchor_weight",
            row="anchor_loss",
        ),
        "prototype": Term(
            f"{_OBJECTIVE}.prototype:to_prototype",
            key="evidence.prototype",
            section="evidence",
            needs=("prototypes",),
            weight=f"{_OBJECTIVE}.prototype:prototype_weight",
            row="prototype_loss",
            unit="squares",
        ),
        "exit": Term(
            f"{_OBJECTIVE}.exits:early",
            key="exit.weight",
            section="exit",
            needs=("exit",),
            weight=f"{_OBJECTIVE}.exits:exit_weight",
            row="exit_loss",
        ),
        "proximal": Term(
            f"{_OBJECTIVE}.proximal:to_start",
            key="train.proximal",
            section="train",
            needs=("parameters",),
            once=True,
            weight=f"{_OBJECTIVE}.proximal:proximal_weight",
        ),
        "vacant": Term(
            f"{_OBJECTIVE}.vacant:vacant",
            needs=("teacher",),
            row="vacant_loss",
            tail=True,
            asks=("evidence.task", "restricted"),
        ),
        "orthogonal": Term(
            f"{_OBJECTIVE}.orthogonal:orthogonal",
            needs=("parameters",),
            once=True,
            row="orthogonal_loss",
            asks=("stream.slices", True),
        ),
    },
)


@dataclass(frozen=True)
class Calibration(Entry):
    """What the task loss asks of labels that a site does not hold, `evidence.task`: (rows below, rows here, options) -> an
    offset on a logit, see `method.objective.calibrate`; without code: plain cross-entropy."""

    code: str | Callable[..., Any] = ""


CALIBRATIONS = Table(
    "task loss",
    {
        "plain": Calibration(),
        "restricted": Calibration(f"{_OBJECTIVE}.calibrate:restricted"),
        "prior": Calibration(f"{_OBJECTIVE}.calibrate:prior"),
    },
)
