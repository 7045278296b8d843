"""Modular structure injection (METHOD §3): hooks that disturb a frozen model while it trains, and then are gone.

A structure is a function (places, amount, draw) -> hooks. It leaves its input as it is, the same object, while `draw` is off
or its strength is 0; every random one has the undisturbed value as its mean, and draws from `draw.key` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from torch.utils.hooks import RemovableHandle

from fedkeel.method.structure.adversary import Adversary
from fedkeel.method.structure.branch import branch, hold, left_out
from fedkeel.method.structure.draw import Draw
from fedkeel.method.structure.drop import channels, heads
from fedkeel.method.structure.layers import layers
from fedkeel.method.structure.lodrop import lodrop
from fedkeel.method.structure.rank import rank
from fedkeel.method.structure.weights import weights
from fedkeel.model.places import Branch, Place, Places, StructureError, find_places

__all__ = [
    "ADVERSARY", "STRUCTURES", "Adversary", "Branch", "Draw", "Injection", "Place", "Places", "StructureError", "find_places",
    "hold", "left_out", "strength",
]  # fmt: skip

STRUCTURES: dict[str, Callable[[Places, float, Draw], Sequence[RemovableHandle]]] = {
    "heads": heads,
    "channels": channels,
    "branch": branch,
    "layers": layers,
    "rank": rank,
    "weights": weights,
    "lodrop": lodrop,
}
ADVERSARY = "adversary"  # has parameters of its own, so it is no function; its amount stands beside the others'
_CHANCES = ("heads", "channels", "branch", "layers", "lodrop")


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

    adversary: where its amount is not 0, else None; the training loop calls its `reset` and `ascend`.
    """

    def __init__(self, places: Places, amounts: Mapping[str, float]) -> None:
        """amounts: structure -> probability in [0, 1), σ ≥ 0 (rank, weights) or ρ ≥ 0 (adversary); 0 leaves it out.

        Raises StructureError for an unknown name, an amount out of range, or an adversary without a place.
        """
        for name, amount in amounts.items():
            if name not in STRUCTURES and name != ADVERSARY:
                raise StructureError(f"no structure {name!r}; there are {', '.join([*STRUCTURES, ADVERSARY])}")
            if not (0.0 <= amount < (1.0 if name in _CHANCES else float("inf"))):
                kind = "a probability in [0, 1)" if name in _CHANCES else "a finite number ≥ 0"
                raise StructureError(f"structure {name!r}: its amount is {kind}, not {amount}")
        self.draw = Draw()
        self._places = places
        self._amounts = {name: amount for name, amount in amounts.items() if amount and name in STRUCTURES}
        rho = amounts.get(ADVERSARY, 0.0)
        self.adversary = Adversary(places, rho, self.draw) if rho else None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Put the hooks in. Raises StructureError if a structure finds no place, with no hook left behind."""
        self.remove()
        try:
            for name, amount in self._amounts.items():
                self._handles.extend(STRUCTURES[name](self._places, amount, self.draw))
            if self.adversary is not None:
                self._handles.extend(self.adversary.attach())
        except StructureError:
            self.remove()
            raise

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
