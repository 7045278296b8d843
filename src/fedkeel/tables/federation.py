"""What the server makes of updates, and what hostile sites do in a simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedkeel.tables.entry import Entry, Table, imported


@dataclass(frozen=True)
class Rule(Entry):
    """An aggregation rule: (reference, updates, weights, options) -> Aggregate, see `aggregate.rule`.

    trains: the factors that sites train, a word of "a" and "b" a round, gone through in turn. keeps: the factor that stays at
    the site, "" for none. mixed: sites may differ in rank and scale. shifts: it returns a shift of the frozen maps. exact: it
    claims error 0 up to rounding. keeps_basis: factors keep their basis from round to round, so that a step from one to the
    next means something. apart: it may be taken module by module, over the sites that trained a module. counts: f hostile sites
    need counts[0] · f + counts[1] in all. withstands: it reads federation.hostile. even: every site counts the same, whatever
    its weight. sums: what it makes of changes is their weighted sum.
    """

    trains: tuple[str, ...] = ("ab",)
    keeps: str = ""
    mixed: bool = False
    shifts: bool = False
    exact: bool = False
    keeps_basis: bool = False
    apart: bool = True
    counts: tuple[int, int] = (0, 1)
    withstands: bool = False
    even: bool = False
    sums: bool = False

    def trained(self, round: int) -> frozenset[str]:
        """The factors that a site trains in round `round`, from 0; the other is as the reference has it."""
        return frozenset(self.trains[round % len(self.trains)])

    @property
    def shared(self) -> frozenset[str]:
        """The factors that travel at all."""
        return frozenset("ab") - {self.keeps}

    @property
    def down(self) -> frozenset[str]:
        """The factors that the server sends: those that are trained in any round and do not stay at the sites."""
        return frozenset("".join(self.trains)) & self.shared

    @property
    def personal(self) -> bool:
        """Whether each site ends in an adapter of its own."""
        return bool(self.keeps)

    def least(self, hostile: int) -> int:
        """The number of sites that it needs."""
        return self.counts[0] * hostile + self.counts[1]


_AGGREGATE = "fedkeel.method.aggregate"
RULES = Table(
    "rule",
    {
        "mean": Rule(f"{_AGGREGATE}.mean:mean", keeps_basis=True, sums=True),
        "freeze_a": Rule(f"{_AGGREGATE}.one_factor:freeze_a", trains=("b",), exact=True, keeps_basis=True, sums=True),
        "alternate": Rule(f"{_AGGREGATE}.one_factor:alternate", trains=("b", "a"), exact=True, sums=True),
        "svd": Rule(f"{_AGGREGATE}.svd:svd", mixed=True),
        "stack": Rule(f"{_AGGREGATE}.stack:stack", mixed=True, shifts=True, exact=True, apart=False),
        "residual": Rule(f"{_AGGREGATE}.residual:residual", shifts=True, exact=True, keeps_basis=True, apart=False),
        "share_a": Rule(f"{_AGGREGATE}.one_factor:share_a", keeps="b", keeps_basis=True, apart=False),
        "share_b": Rule(f"{_AGGREGATE}.one_factor:share_b", keeps="a", keeps_basis=True, apart=False),
        "median": Rule(f"{_AGGREGATE}.robust:median", mixed=True, apart=False, even=True),
        "trimmed": Rule(f"{_AGGREGATE}.robust:trimmed", mixed=True, apart=False, counts=(2, 1), withstands=True, even=True),
        "clipped": Rule(f"{_AGGREGATE}.centred:clipped", mixed=True, apart=False, even=True),
        "centred": Rule(f"{_AGGREGATE}.centred:centred", mixed=True, apart=False, even=True),
        "krum": Rule(
            f"{_AGGREGATE}.krum:krum", mixed=True, keeps_basis=True, apart=False, counts=(2, 3), withstands=True, even=True
        ),
    },
)


@dataclass(frozen=True)
class Optimiser(Entry):
    """A server optimiser around a rule: (change, state, rates) -> (step, state), see `aggregate.optimise`."""


OPTIMISERS = Table(
    "server optimiser",
    {name: Optimiser(f"{_AGGREGATE}.optimise:{name}") for name in ("average", "momentum", "adam")},
)


@dataclass(frozen=True)
class Weighting(Entry):
    """How much a site counts: supervised positions -> a number > 0."""


WEIGHTINGS = Table(
    "weighting",
    {name: Weighting(f"{_AGGREGATE}.weighting:{name}") for name in ("positions", "sqrt_positions", "uniform")},
)


# What hostile sites do in a simulation


@dataclass(frozen=True)
class Attack(Entry):
    """What a hostile site does: (change, strength, key) -> change, see `federation.attacks`; without code it sends its own.

    rows: where (row, `[attack]`, key) -> row is, for what it trains on.
    """

    code: str | Callable[..., Any] = ""
    rows: str = ""

    def poison(self) -> Any:
        """What `rows` names; without it, rows as they are."""
        return imported(self.rows, self.name) if self.rows else lambda row, attack, key: row


_ATTACKS = "fedkeel.federation.attacks"
ATTACKS = Table(
    "attack",
    {
        "none": Attack(),
        "sign_flip": Attack(f"{_ATTACKS}:sign_flip"),
        "scaled": Attack(f"{_ATTACKS}:scaled"),
        "gaussian": Attack(f"{_ATTACKS}:gaussian"),
        "free_rider": Attack(f"{_ATTACKS}:free_rider"),
        "label_flip": Attack(f"{_ATTACKS}:scaled", rows=f"{_ATTACKS}:label_flip"),
        "backdoor": Attack(f"{_ATTACKS}:scaled", rows=f"{_ATTACKS}:backdoor"),
    },
)
