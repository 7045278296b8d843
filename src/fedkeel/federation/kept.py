"""What a site keeps between the rounds of a federation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from fedkeel.method.aggregate.layouts import first_rows
from fedkeel.method.structure.branch import left_out
from fedkeel.method.structure.shares import AXES, only
from fedkeel.method.structure.skip import blocks_out
from fedkeel.recipe.schema import LoraConfig, Recipe
from fedkeel.types import Adapter

PERSONAL = "personal"  # before the names of factors that stay at the site


@dataclass
class Kept:
    """What one site keeps between the rounds of a federation; tensors in float32 by flat names, which never travel as they are.

    rank: of its adapter; 0: the recipe's. memory: step of the channel -> what it remembers. personal: the factors that stay
    here under `share_a` and `share_b`. masks: secrets of the present round's masks, see `masking`; they are no part of
    `tensors`, so that none is written where a federation could be resumed from, or lasts longer than it must.
    """

    rank: int = 0
    memory: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    personal: Mapping[str, Tensor] = field(default_factory=dict)
    masks: bytes = b""

    def forget(self, ranks: range) -> None:
        """Keep of what is remembered for the next message only what is of these ranks of the branches."""
        self.memory = {
            step: {n: only(ranks, AXES[n[-1]], t) if n.endswith((".a", ".b")) else t for n, t in tensors.items()}
            for step, tensors in self.memory.items()
        }

    def adapter(self, shared: Adapter) -> Adapter:
        """The adapter of this site: `shared`, with the factors that stay here."""
        return shared.with_tensors(shared.tensors() | dict(self.personal))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors in one mapping, for a checkpoint; `restored` takes it apart again."""
        parts = {**self.memory, PERSONAL: self.personal}
        return {f"{part}/{name}": t for part, held in parts.items() for name, t in held.items()}

    def restored(self, tensors: Mapping[str, Tensor]) -> Kept:
        """The same site with what `tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        personal = parts.pop(PERSONAL, {})
        return replace(self, memory=parts, personal=personal)


def layout_of(initial: Adapter, lora: LoraConfig, rank: int) -> Adapter:
    """What the adapter of a site of `rank` looks like (0: of the recipe's, as `initial` is)."""
    return first_rows(initial, rank, lora.scale(rank)) if rank else initial


def modules_left_out(recipe: Recipe, paths: Iterable[str]) -> Callable[[str, int], frozenset[str]]:
    """(site, round) -> the modules of `paths` that `structure.hold` leaves out of that site's round, in blocks that are left
    out as a whole and by themselves; without it none."""
    structure, modules, blocks = recipe.structure, list(paths), blocks_left_out(recipe, paths)

    def out(site: str, round: int) -> frozenset[str]:
        if not structure.hold:
            return frozenset()
        gone = tuple(f"{block}." for block in blocks(site, round))
        within = frozenset(path for path in modules if path.startswith(gone))
        others = [path for path in modules if path not in within]
        return within | left_out(others, structure.amount("branch"), recipe.seed, site, round)

    return out


def blocks_left_out(recipe: Recipe, paths: Iterable[str]) -> Callable[[str, int], frozenset[str]]:
    """(site, round) -> paths of the blocks that `structure.hold` leaves out of that site's round. paths: of all modules with
    branches."""
    structure, modules = recipe.structure, list(paths)

    def out(site: str, round: int) -> frozenset[str]:
        held = structure.hold
        return blocks_out(modules, structure.amount("skip"), recipe.seed, site, round) if held else frozenset()

    return out
