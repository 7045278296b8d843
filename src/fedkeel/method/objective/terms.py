"""The terms that a recipe asks for, with their options, and how much each counts at a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkeel import tables
from fedkeel.recipe.schema import Recipe
from fedkeel.types import Forward, Loss, Parameters


@dataclass(frozen=True)
class Moment:
    """Where in its work a site is. step: of the stage, from 0. progress: the share of the run that is done, in [0, 1).

    strength: of structures, in [0, 1]. dropout: whether there are no structures, but dropout of the adapter.
    """

    step: int
    progress: float
    strength: float = 0.0
    dropout: bool = False


@dataclass(frozen=True)
class Active:
    """A term that a recipe asks for."""

    entry: tables.Term
    options: Any
    function: Callable[[Any, Any], Tensor | Loss]
    schedule: Callable[[Any, Moment], float] | None

    def weight(self, moment: Moment) -> float:
        """How much it counts at this step; 0: it is not taken."""
        if self.entry.always:
            return 1.0
        return float(self.schedule(self.options, moment) if self.schedule else self.options.weight)

    def __call__(self, seen: Forward | Parameters) -> Loss:
        """Its value on what there is to see. Raises TableError, naming the term, where that is not one number that trains."""
        found = self.function(seen, self.options)
        loss = found if isinstance(found, Loss) else Loss(found)
        if not isinstance(loss.value, Tensor) or loss.value.dim():
            what = f"shape {tuple(loss.value.shape)}" if isinstance(loss.value, Tensor) else type(loss.value).__name__
            belongs = "a tensor of shape (), a mean over positions, belongs there"
            raise tables.TableError(f"term {self.entry.name} returned {what}; {belongs}")
        # FedKeel's own are constants where a batch gives them nothing to say
        theirs = not (isinstance(self.entry.code, str) and self.entry.code.startswith("fedkeel."))
        if theirs and torch.is_grad_enabled() and not loss.value.requires_grad:
            raise tables.TableError(
                f"term {self.entry.name} returned a number without a gradient, which trains nothing: make it of forward.logits "
                f"or states; where a batch gives it nothing to say, 0 * forward.logits.sum()"
            )
        return loss


def terms_of(recipe: Recipe) -> list[Active]:
    """The terms that the recipe asks for, in the order of the table, which is that of their sum."""
    return [_active(entry, recipe) for entry in tables.TERMS.values() if recipe.takes(entry)]


def _active(entry: tables.Term, recipe: Recipe) -> Active:
    own = getattr(recipe, entry.section) if entry.section else None if entry.always else recipe.options("term", entry.name)
    return Active(entry, own, entry.load(), entry.weigh())
