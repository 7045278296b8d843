"""The legs of a run: each the same loop with other settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedkeel.federation.train import steps_a_round
from fedkeel.recipe.schema import Recipe
from fedkeel.run.prepare import Prepared
from fedkeel.types import Record


@dataclass(frozen=True)
class Stage:
    """What one leg does in one stage. rows: training records by site; sites without any are not asked."""

    recipe: Recipe
    rows: Mapping[str, Sequence[Record]]


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
    def seed(self) -> int:
        return self.stages[0].recipe.seed


def plain(recipe: Recipe) -> Recipe:
    """The recipe without averaging over stages, distillation, structures, proximal term and ascent: plain LoRA."""
    return dataclasses.replace(
        recipe,
        stream=dataclasses.replace(recipe.stream, average=0.0),
        distill=dataclasses.replace(recipe.distill, weight=0.0),
        structure=type(recipe.structure)(),
        train=dataclasses.replace(recipe.train, proximal=0.0, sam=0.0),
    )


def legs_of(prepared: Prepared) -> list[Leg]:
    """The legs in the order they run: base, federated, local ones, centralised.

    A baseline has the budget of what it is compared with: a local site takes the steps it takes in the federation, the
    centralised run as many as all sites together, both in one go a stage, with the same batch, learning rate and schedule.
    Local and centralised legs are `plain`: there is no one to learn from.
    """
    recipe = prepared.recipe
    train, rounds = recipe.train, recipe.federation.rounds
    held = [{name: splits["train"] for name, splits in stage.rows.items()} for stage in prepared.stages]
    single = dataclasses.replace(
        plain(recipe),
        federation=dataclasses.replace(
            recipe.federation,
            rounds=1,
            sites_per_round=0,
            quorum=1.0,
            rule="mean",
            codec_up="fp32",
            codec_down="fp32",
            hostile=0,
            optimiser="average",
            server_lr=1.0,
            # both are meant for one round, and here is the whole budget in one
            max_update_norm=float("inf"),
            deadline=float("inf"),
        ),
        lora=dataclasses.replace(recipe.lora, site_ranks=()),
    )

    def alone(rows: Mapping[str, Sequence[Record]], steps: int) -> Stage:
        own = dataclasses.replace(single.train, local_steps=max(1, steps), local_epochs=0)
        return Stage(dataclasses.replace(single, train=own), rows)

    steps = [{name: rounds * steps_a_round(train, len(rows)) if rows else 0 for name, rows in stage.items()} for stage in held]
    legs = []
    if "base" in recipe.evaluation.baselines:
        legs.append(Leg("base", "base", 0, [Stage(recipe, {}) for _ in held]))
    legs.append(Leg("federated", "federated", rounds, [Stage(recipe, {n: r for n, r in stage.items() if r}) for stage in held]))
    if "local" in recipe.evaluation.baselines:
        for name in prepared.sites.rows:
            stages = [alone({name: rows[name]}, taken[name]) for rows, taken in zip(held, steps, strict=True)]
            legs.append(Leg(f"local/{name}", "local", 1, stages))
    if "centralised" in recipe.evaluation.baselines:
        stages = []
        for at, taken in zip(prepared.stages, steps, strict=True):
            present = sum(1 for count in taken.values() if count)
            asked = min(recipe.federation.sites_per_round or present, present)
            stages.append(alone({"all": at.all("train")}, round(sum(taken.values()) * asked / present)))
        legs.append(Leg("centralised", "centralised", 1, stages))
    return legs
