"""Some structures in one model, and the schedule of their strength."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch.utils.hooks import RemovableHandle

from fedkeel import tables
from fedkeel.method.structure.draw import Draw
from fedkeel.model.places import Places, StructureError
from fedkeel.rng import derive


def strength(progress: float, ramp: float, anneal: float) -> float:
    """The schedule, in [0, 1]: linear from 0 to 1 over the first `ramp` of training, linear to 0 over the last `anneal`.

    progress: the share of training that is done, in [0, 1]. ramp, anneal: shares, ≥ 0; 0 leaves that side out. Where they
    overlap the smaller holds. Raises ValueError outside these.
    """
    if not (0.0 <= progress <= 1.0 and ramp >= 0.0 and anneal >= 0.0):
        raise ValueError(f"no such schedule: progress {progress}, ramp {ramp}, anneal {anneal}")
    rise = progress / ramp if ramp else 1.0
    fall = (1.0 - progress) / anneal if anneal else 1.0
    return min(1.0, rise, fall)


class Injection:
    """Some structures in one model; between `attach` and `remove` the hooks obey `draw`.

        with injection:
            injection.draw.on, injection.draw.key = True, …
            loss = …

    learners: those with parameters of their own, by name; the training loop calls `begin` and `ascend`.
    """

    def __init__(self, places: Places, amounts: Mapping[str, float]) -> None:
        """amounts: structure -> a probability in [0, 1), or a number ≥ 0, as its entry says; 0 leaves it out.

        Raises StructureError for an unknown name, an amount out of range, or a learner without a place.
        """
        for name, amount in amounts.items():
            if name not in tables.STRUCTURES:
                raise StructureError(f"no structure {name!r}; there are {', '.join(tables.STRUCTURES)}")
            chance = tables.STRUCTURES[name].chance
            if not (0.0 <= amount < (1.0 if chance else float("inf"))):
                kind = "a probability in [0, 1)" if chance else "a finite number ≥ 0"
                raise StructureError(f"structure {name!r}: its amount is {kind}, not {amount}")
        self.draw = Draw()
        self._places = places
        self._amounts = {name: amounts[name] for name in tables.STRUCTURES if amounts.get(name)}
        self.learners: dict[str, Any] = {
            name: tables.STRUCTURES[name].load()(places, amount, self.draw)
            for name, amount in self._amounts.items()
            if tables.STRUCTURES[name].learns
        }
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks in. Raises StructureError if a structure finds no place, with no hook left behind."""
        self.remove()
        try:
            for name, amount in self._amounts.items():
                if name in self.learners:
                    self._handles.extend(self.learners[name].attach())
                else:
                    self._handles.extend(tables.STRUCTURES[name].load()(self._places, amount, self.draw))
        except StructureError:
            self.remove()
            raise

    def begin(self, seed: int, site: str, round: int) -> None:
        """A site's round begins: learners start anew."""
        for name, learner in self.learners.items():
            learner.reset(derive(seed, name, site, round))

    def ascend(self) -> None:
        """A step is done: learners go the other way."""
        for name, learner in self.learners.items():
            learner.ascend(self._amounts[name])

    def remove(self) -> None:
        """Take every hook out: the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> Injection:
        self.attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()
