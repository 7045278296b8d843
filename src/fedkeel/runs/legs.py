"""The legs of a run: each the same loop with other settings. `federated` is the recipe itself; the others are baselines.

A baseline has the budget of what it is compared with: a local site takes the steps it takes in the federation, the centralised
run as many as all sites together, both in one go a stage, with the same batch, learning rate and schedule. Both are plain LoRA:
there is no one to learn from. A leg needs no row, only how many each site holds, so a coordinator can plan what it cannot see.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

from fedkeel import tables
from fedkeel.federation.server import sample_sites
from fedkeel.federation.train import steps_a_round
from fedkeel.recipe.load import plain
from fedkeel.recipe.schema import Federation, Privacy, Recipe


@dataclass(frozen=True)
class Stage:
    """What one leg does in one stage. rows: training rows by site; sites without any are not asked."""

    recipe: Recipe
    rows: Mapping[str, int]


@dataclass(frozen=True)
class Leg:
    """One method's loop over the stages. method: as in Row. rounds: of each stage."""

    name: str
    method: str
    rounds: int
    stages: Sequence[Stage]

    @property
    def site(self) -> str:
        """The one site of a local leg; empty for the others."""
        return next(iter(self.stages[0].rows)) if self.method == "local" else ""

    @property
    def everyone(self) -> list[str]:
        """The sites of all stages: ranks are dealt in the order of their names."""
        return list(dict.fromkeys(name for stage in self.stages for name in stage.rows))

    @property
    def gathers(self) -> bool:
        """Whether the analytic anchor is made, before each stage."""
        evidence, model = self.stages[0].recipe.evidence, self.stages[0].recipe.model
        return self.method != "base" and bool(evidence.asked or model.head == "analytic")

    @property
    def seed(self) -> int:
        """Of the recipe."""
        return self.stages[0].recipe.seed

    @property
    def whole(self) -> int:
        """The rounds of all its stages."""
        return self.rounds * len(self.stages)


@dataclass(frozen=True)
class Cast:
    """Who could take part in a run. rows: of each stage, rows by site that it trains on: those that are too long for
    data.max_length are not among them."""

    recipe: Recipe
    rows: Sequence[Mapping[str, int]]

    @property
    def sites(self) -> list[str]:
        """All sites, in the order in which they are named."""
        return list(dict.fromkeys(name for stage in self.rows for name in stage))

    def rounds(self, stage: int) -> list[list[str]]:
        """The sites that are asked in each round of a stage."""
        federation = self.recipe.federation
        names = [name for name, count in self.rows[stage].items() if count]
        numbers = range(stage * federation.rounds, (stage + 1) * federation.rounds)
        return [sample_sites(names, federation.sites_per_round, self.recipe.seed, round) for round in numbers]

    def asked(self, stage: int) -> Counter[str]:
        """In how many rounds of a stage each site is asked."""
        return Counter(site for sites in self.rounds(stage) for site in sites)

    def steps(self, stage: int) -> dict[str, int]:
        """Optimiser steps that each site takes in the federation in a stage."""
        asked = self.asked(stage)
        return {name: asked[name] * steps_a_round(self.recipe.train, rows) for name, rows in self.rows[stage].items()}


def cast_of(recipe: Recipe, stages: Sequence[Mapping[str, Sized]]) -> Cast:
    """stages: of each, by site, what it trains on."""
    return Cast(recipe, [{name: len(held) for name, held in stage.items()} for stage in stages])


def single(recipe: Recipe, steps: int) -> Recipe:
    """What one site does on its own in a stage: plain LoRA, all its steps in one round, exchanged exactly.

    Limits of a round say nothing here: the whole budget is in one.
    """
    return dataclasses.replace(
        plain(recipe),
        federation=Federation(rounds=1, deadline=math.inf),
        privacy=Privacy(),  # of a site by itself nothing is sent, and there is no sum to hide in
        lora=dataclasses.replace(recipe.lora, site_ranks=()),
        train=dataclasses.replace(plain(recipe).train, local_steps=max(1, steps), local_epochs=0),
    )


def federated(cast: Cast) -> Leg:
    """The recipe itself."""
    stages = [Stage(cast.recipe, {name: rows for name, rows in stage.items() if rows}) for stage in cast.rows]
    return Leg("federated", "federated", cast.recipe.federation.rounds, stages)


def base(cast: Cast) -> list[Leg]:
    """The baseline `base`: the model before any training, with nothing beside it."""
    recipe = plain(cast.recipe)
    return [Leg("base", "base", 0, [Stage(recipe, {}) for _ in cast.rows])]


def analytic(cast: Cast) -> list[Leg]:
    """The baseline `analytic`: the ridge classifiers of all rows so far, and no training; free text is the base's."""
    off = plain(cast.recipe)
    recipe = dataclasses.replace(off, evidence=dataclasses.replace(off.evidence, serve=1.0))
    return [Leg("analytic", "analytic", 0, [Stage(recipe, {n: rows for n, rows in s.items() if rows}) for s in cast.rows])]


def local(cast: Cast) -> list[Leg]:
    """The baseline `local`: every site on its own."""
    stages = range(len(cast.rows))
    return [
        Leg(
            f"local/{name}",
            "local",
            1,
            [Stage(single(cast.recipe, cast.steps(s).get(name, 0)), {name: cast.rows[s].get(name, 0)}) for s in stages],
        )
        for name in cast.sites
    ]


def centralised(cast: Cast) -> list[Leg]:
    """The baseline `centralised`: one site that holds every row."""
    stages = []
    for stage, rows in enumerate(cast.rows):
        stages.append(Stage(single(cast.recipe, sum(cast.steps(stage).values())), {"all": sum(rows.values())}))
    return [Leg("centralised", "centralised", 1, stages)]


def legs_of(cast: Cast) -> list[Leg]:
    """The legs that the recipe asks for, in the order they run: the federated one, and baselines in the order of their
    table."""
    asked = [entry for name, entry in tables.BASELINES.items() if name in cast.recipe.evaluation.baselines]
    before, after = ([leg for e in asked if e.before is first for leg in e.load()(cast)] for first in (True, False))
    return [*before, federated(cast), *after]
