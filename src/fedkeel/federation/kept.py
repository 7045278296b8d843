"""What a site keeps between the rounds of a federation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedkeel.method.aggregate import first_rows
from fedkeel.method.structure import left_out
from fedkeel.recipe.schema import LoraConfig, Recipe
from fedkeel.types import Adapter

RESIDUAL, PERSONAL = "residual/", "personal/"  # before the names of what a site keeps


@dataclass
class Kept:
    """What one site keeps between the rounds of a federation; tensors in float32 by flat names, which never travel as they are.

    rank: of its adapter; 0: the recipe's. residual: what a lossy codec has left out so far. personal: the factors that stay
    here under `share_a` and `share_b`.
    """

    rank: int = 0
    residual: Mapping[str, Tensor] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)

    def adapter(self, shared: Adapter) -> Adapter:
        """The adapter of this site: `shared`, with the factors that stay here."""
        return shared.with_tensors(shared.tensors() | dict(self.personal))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors in one mapping, for a checkpoint; `restored` takes it apart again."""
        parts = ((RESIDUAL, self.residual), (PERSONAL, self.personal))
        return {prefix + name: t for prefix, part in parts for name, t in part.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> Kept:
        """The same site with what `tensors` gave."""
        residual, personal = (
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            for prefix in (RESIDUAL, PERSONAL)
        )
        return replace(self, residual=residual, personal=personal)


def layout_of(initial: Adapter, lora: LoraConfig, rank: int) -> Adapter:
    """What the adapter of a site of `rank` looks like (0: of the recipe's, as `initial` is)."""
    return first_rows(initial, rank, lora.scale(rank)) if rank else initial


def modules_left_out(recipe: Recipe, paths: Iterable[str]) -> Callable[[str, int], frozenset[str]]:
    """(site, round) -> the modules of `paths` that `structure.hold` leaves out of that site's round; without it none."""
    structure, modules = recipe.structure, list(paths)

    def out(site: str, round: int) -> frozenset[str]:
        return left_out(modules, structure.branch, recipe.seed, site, round) if structure.hold else frozenset()

    return out
