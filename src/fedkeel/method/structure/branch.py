"""LoRA branches left out as a whole, for a step or for a round."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.draw import Draw
from fedkeel.model.places import Places
from fedkeel.rng import derive


def _chosen(key: int, path: str, p: float) -> bool:
    """Whether the branch at `path` is left out, with probability p; derive's 63 bits are the uniform number."""
    return derive(key, "branch", path) < p * 2.0**63


def branch(places: Places, amount: float, draw: Draw) -> list[RemovableHandle]:
    """Leave out the LoRA branch of a module: one draw a module and step, for all rows, at the output of `a`, (…, r).

    amount: the probability p, in [0, 1). A branch that is kept is scaled by 1/(1 − p), so the mean is the branch.
    Raises StructureError if there is no branch.
    Source: stochastic depth (arXiv:1603.09382) on adapter branches; method.md §3.
    """
    places.need(places.branches, "branch")
    return [b.a.register_forward_hook(partial(_drop, draw, amount, b.path)) for b in places.branches]


def _drop(draw: Draw, amount: float, path: str, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
    if not draw.active:
        return None
    p = amount * draw.strength
    lost = _chosen(draw.key, path, p)
    draw.units += 1
    draw.dropped += lost
    return output * (0.0 if lost else 1.0 / (1.0 - p))


def left_out(paths: Iterable[str], amount: float, seed: int, site: str, round: int) -> frozenset[str]:
    """The modules that a site leaves out for the whole of a round, each with probability `amount`.

    Both ends work it out from the run's seed, so nobody has to say which tensors a message lacks. At least one module
    stays in.
    """
    key, ordered = derive(seed, "held", site, round), sorted(paths)
    out = frozenset(path for path in ordered if _chosen(key, path, amount))
    return out if len(out) < len(ordered) else out - {ordered[0]}


def hold(places: Places, amount: float, out: Collection[str]) -> list[RemovableHandle]:
    """Leave out the branches at `out` until the hooks are removed; the others are scaled by 1/(1 − amount), as by `branch`."""
    places.need(places.branches, "branch")
    return [b.a.register_forward_hook(partial(_hold, 0.0 if b.path in out else 1.0 / (1.0 - amount))) for b in places.branches]


def _hold(gate: float, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * gate
