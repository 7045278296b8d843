"""Whole blocks left out of a step: neither run nor trained, for less time and memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from fedkeel.method.structure.draw import Draw
from fedkeel.method.structure.layers import depth_chance
from fedkeel.model.depth import Patch, passed
from fedkeel.model.places import Places, StructureError, in_block
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


def blocks_with_branches(paths: Iterable[str]) -> dict[int, str]:
    """number -> path, in order, of the blocks with branches in the stack that predicts, as `places.find_places` names them.

    paths: of the modules with branches, which is all that a coordinator knows of a base.
    """
    stacks: dict[str, dict[int, str]] = {}
    for at in map(in_block, paths):
        if at is not None:
            stacks.setdefault(at.stack, {})[at.number] = at.block
    last = max(stacks, key=lambda stack: ("decoder" in stack.split("."), len(stacks[stack]), stack), default=None)
    return dict(sorted(stacks[last].items())) if last is not None else {}


def blocks_out(paths: Iterable[str], amount: float, seed: int, site: str, round: int) -> frozenset[str]:
    """Paths of the blocks that a site leaves out for the whole of a round, each with its `depth_chance` in a stack from the
    bottom to the topmost block that has branches, which is all that a coordinator knows. One block with branches stays in.

    Both ends work it out from the run's seed, as with `branch.left_out`.
    """
    key, blocks = derive(seed, "held blocks", site, round), blocks_with_branches(paths)
    count = max(blocks, default=-1) + 1
    out = [path for n, path in blocks.items() if derive(key, path) < depth_chance(amount, n, count) * 2.0**63]
    return frozenset(out if len(out) < len(blocks) else out[1:])


def hold_blocks(places: Places, out: Collection[str]) -> list[Patch]:
    """Leave the blocks at `out` out until the patches are removed: they are neither run nor kept in memory for a gradient.

    Raises StructureError where the blocks of the architecture are not known.
    """
    places.need(places.stack if places.forms else (), "skip")
    found = [(block, form) for (path, block), form in zip(places.stack, places.forms, strict=True) if path in out]
    if len(found) < len(out):
        raise StructureError(
            f"structure.skip under structure.hold leaves out blocks of the stack that predicts, and {min(out)} lies elsewhere: "
            f"put branches into that stack (lora.targets)"
        )
    return [Patch(block, partial(passed, block, form)) for block, form in found]


def _maybe(gone: Callable[[], bool], passed: Callable[..., Any], run: Callable[..., Any], *given: Any, **named: Any) -> Any:
    return passed(*given, **named) if gone() else run(*given, **named)
