"""Updates as rules see them: in order, checked, and as seldom in memory as can be."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedkeel.method.aggregate.exact import Sketch, Stack
from fedkeel.types import Adapter, Update


@dataclass(frozen=True)
class Checked:
    """Updates by ascending site, each held against `reference`; may be gone through as often as `updates` itself.

    updates: a sequence in any order, which is sorted here, or another re-iterable that yields them by ascending site and may
    decode them anew each time; of that one, no update is held here when the next is asked for.
    mixed: whether sites may differ in rank and scale. who: whose errors these are (`rule mean`).
    Going through it raises ValueError, with the site, for a value that is not finite, for other modules, shapes, ranks or
    scales than are taken, for a site out of order, and if the sites are not those of `weights`: an iterator that can be gone
    through only once yields none the second time, and a sum over none would pass as a model.
    """

    who: str
    mixed: bool
    reference: Adapter
    updates: Iterable[Update]
    weights: Mapping[str, float]

    def __iter__(self) -> Iterator[Update]:
        updates = self.updates
        sites: list[str] = []
        for update in sorted(updates, key=lambda u: u.site) if isinstance(updates, Sequence) else updates:
            if sites and update.site <= sites[-1]:
                raise ValueError(
                    f"{self.who}: site {update.site} after site {sites[-1]}; each belongs once, in ascending order"
                )
            sites.append(update.site)
            self._check(update)
            yield update
            del update  # before the next is decoded
        if sites != sorted(self.weights):
            raise ValueError(f"{self.who}: updates of sites {sites}, weights of sites {sorted(self.weights)}")

    def _check(self, update: Update) -> None:
        said, got = f"{self.who}: site {update.site}", update.adapter
        if got.lora.keys() != self.reference.lora.keys() or got.dense.keys() != self.reference.dense.keys():
            odd = (got.lora.keys() ^ self.reference.lora.keys()) | (got.dense.keys() ^ self.reference.dense.keys())
            raise ValueError(f"{said}: {', '.join(sorted(odd))} only there or only in the global adapter")
        for path, f in got.lora.items():
            old = self.reference.lora[path]
            (rank, d_in), (d_out, inner) = f.a.shape, f.b.shape
            if d_in != old.a.shape[1] or d_out != old.b.shape[0] or rank != inner:
                raise ValueError(f"{said}: {path} has A {tuple(f.a.shape)} and B {tuple(f.b.shape)}, which fit no map here")
            if not self.mixed and (f.a.shape != old.a.shape or f.scale != old.scale):
                raise ValueError(f"{said}: rank or scale of {path} differs; they must be equal here")
            if not math.isfinite(f.scale):
                raise ValueError(f"{said}: the scale of {path} is {f.scale}")
        for path, tensor in got.dense.items():
            if tensor.shape != self.reference.dense[path].shape:
                raise ValueError(f"{said}: {path} has the shape {tuple(tensor.shape)}, which is not the global one")
        for name, tensor in got.tensors().items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{said}: {name} holds a value that is not finite")


def gather(
    reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], names: Collection[str], exact: Stack | Sketch
) -> dict[str, Tensor]:
    """Σ_k p_k t_k of the tensors in `names` (flat names of `reference`, whose types the results have), and every adapter
    shown to `exact`, all in one pass over `updates`, with one update held at a time. Sums run in float64 and by site."""
    like = reference.tensors()
    totals = {name: torch.zeros_like(like[name], dtype=torch.float64) for name in names}
    for update in updates:
        share, tensors = weights[update.site], update.adapter.tensors()
        for name, total in totals.items():
            total += share * tensors[name].double()
        exact.add(share, update.adapter)
        del update, tensors  # before the next is decoded
    return {name: total.to(like[name].dtype) for name, total in totals.items()}
