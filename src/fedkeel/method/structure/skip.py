"""Whole blocks left out of a step: neither run nor trained, for less time and memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fedkeel.method.structure.draw import Draw
from fedkeel.method.structure.layers import depth_chance
from fedkeel.model.depth import Patch, passed
from fedkeel.model.places import Places
from fedkeel.rng import derive


def skip(places: Places, amount: float, draw: Draw) -> list[Patch]:
    """Leave out blocks of the upper half of the stack that predicts, each for all rows of a step.

    amount: the probability of the top block, in [0, 1), falling linearly to 0 at the middle of the stack (`depth_chance`).
    What is left is not scaled, as in a model that is exported without those blocks, so the mean is not the undisturbed value.
    Raises StructureError where the blocks of the architecture are not known.
    Source: LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710, there by row; DropPEFT 2503.10217, there held for a round.
    """
    places.need(places.stack if places.forms else (), "skip")
    handles = []
    for number, ((path, block), form) in enumerate(zip(places.stack, places.forms, strict=True)):
        if chance := depth_chance(amount, number, len(places.stack)):
            gone = partial(_gone, draw, path, chance)
            handles.append(Patch(block, partial(_maybe, gone, partial(passed, block, form), block.forward)))
    return handles


def _gone(draw: Draw, path: str, chance: float) -> bool:
    if not draw.active:
        return False
    lost = derive(draw.key, "skip", path) < draw.strength * chance * 2.0**63
    draw.units += 1
    draw.dropped += lost
    return lost


def _maybe(gone: Callable[[], bool], passed: Callable[..., Any], run: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return passed(*given, **named) if gone() else run(*given, **named)
