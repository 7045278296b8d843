"""What will run: the legs of a run, and what of them cannot be kept, before any work."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedkeel.recipe.checks import check_enough
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.legs import Cast, Leg, legs_of
from fedkeel.runs.privacy import check_budget

Size = Callable[[Leg, int, str], int]  # see `rounds.Parties.size`
# what validation rows may choose at the end of a stage: field of Global -> the key that sets it otherwise, and what it is
CHOICES = {
    "average": ("stream.average", "the share of what was served before"),
    "serve": ("evidence.serve", "the weight of the analytic head"),
}


def choices_of(leg: Leg, stage: int) -> dict[str, tuple[float, ...]]:
    """What is chosen by validation rows at the end of a stage: field of Global -> its candidates."""
    recipe = leg.stages[stage].recipe
    found = {"average": recipe.stream.average_from if stage and leg.rounds else (), "serve": recipe.evidence.serve_from}
    return {name: choice for name, choice in found.items() if choice}


def planned(cast: Cast, size: Size) -> tuple[list[Leg], str]:
    """(the legs of a run, the privacy that it promises in words; empty for none). Raises ConfigError for what it could not keep
    or would not have."""
    legs = legs_of(cast)
    check_stages(cast)
    promise = check_budget(cast)
    check_curve(legs, size, cast.recipe.evaluation.every)
    return legs, promise


def check_stages(cast: Cast) -> None:
    """Raise ConfigError where too few sites have rows of a stage for its rounds."""
    for stage, rows in enumerate(cast.rows, 1):
        if count := sum(1 for held in rows.values() if held):
            check_enough(cast.recipe, count, f" in stage {stage}" if len(cast.rows) > 1 else "")


def check_curve(legs: Sequence[Leg], size: Size, every: int) -> None:
    """Raise ConfigError where a leg goes by validation rows, or points of a curve of them, that it will not have. every: rounds
    between points."""
    for leg in legs:
        federation, points = leg.stages[0].recipe.federation, leg.rounds // every
        for stage in range(len(leg.stages)):
            for name, choice in choices_of(leg, stage).items():
                if not size(leg, stage, "validation"):
                    key, _ = CHOICES[name]
                    raise ConfigError(
                        f"{key}_from = {list(choice)}: a stage has no validation row to choose by; set data.validation_share "
                        f"above 0, or {key} in its place"
                    )
        if not leg.rounds or (federation.keep != "best" and not federation.patience):
            continue
        if not all(size(leg, stage, "validation") for stage in range(len(leg.stages))):
            raise ConfigError(
                f"federation.patience = {federation.patience}, federation.keep = {federation.keep!r}: a stage has no "
                f"validation row to go by; set data.validation_share above 0"
            )
        if points <= federation.patience:
            raise ConfigError(
                f"federation.patience = {federation.patience}, federation.keep = {federation.keep!r}: {leg.rounds} rounds "
                f"with evaluation.every = {every} are {points} points of the curve, too few to go by; score more often, or "
                f"set more federation.rounds"
            )
