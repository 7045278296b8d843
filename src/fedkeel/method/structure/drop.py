"""Structured dropout at the narrow places of a block: attention heads and feed-forward channels."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw, Sheet, gates, scaled
from fedkeel.model.places import Places, StructureError, in_width

BLOCK = 64  # channels that are dropped together


def heads(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Drop whole heads in front of every attention output map, (rows, time, units · width), for each row of the batch.

    amount: the probability p, in [0, 1). A unit is a head, or a KV group with all its heads under grouped-query attention;
    under multi-query attention that is the whole attention. What is kept is scaled by 1/(1 − p), so the mean is the input.
    Raises StructureError if the architecture is unknown or its heads do not divide the map's width.
    Source: structured dropout of heads, as in Zhou et al. 2020 (DropHead), arXiv:2004.13342.
    """
    places.need(places.attention, "heads")
    for place in places.attention:
        if in_width(place.module) % place.units:
            raise StructureError(
                f"structure 'heads': {place.path} of {places.architecture!r} is {in_width(place.module)} wide, "
                f"which {place.units} heads do not divide"
            )
    sheet = gates(draw, "heads", [p.units for p in places.attention], [amount] * len(places.attention))
    return [
        place.module.register_forward_pre_hook(partial(_drop_heads, draw, sheet, i)) for i, place in enumerate(places.attention)
    ]


def _drop_heads(draw: Draw, sheet: Sheet, place: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not draw.active:
        return None
    x: Tensor = inputs[0]
    gate = sheet.take(place, x)
    split = x.unflatten(-1, (gate.shape[-1], -1))
    return scaled(split, gate.unsqueeze(-1)).flatten(-2), *inputs[1:]


def channels(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Drop blocks of 64 channels in front of every feed-forward down projection, (rows, time, width), for each row.

    amount: the probability p, in [0, 1). The last block may be shorter. What is kept is scaled by 1/(1 − p), so the mean is
    the input. Raises StructureError if the architecture is unknown or its experts are fused.
    Source: dropout (Srivastava et al. 2014, JMLR 15) of whole blocks of feed-forward units; method.md §3.
    """
    places.need(places.down, "channels")
    widths = [in_width(p.module) for p in places.down]
    sheet = gates(draw, "channels", [-(-w // BLOCK) for w in widths], [amount] * len(widths))
    return [
        place.module.register_forward_pre_hook(partial(_drop_channels, draw, sheet, i)) for i, place in enumerate(places.down)
    ]


def _drop_channels(draw: Draw, sheet: Sheet, place: int, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not draw.active:
        return None
    x: Tensor = inputs[0]
    gate = sheet.take(place, x).repeat_interleave(BLOCK, -1)[..., : x.shape[-1]]
    return scaled(x, gate), *inputs[1:]
