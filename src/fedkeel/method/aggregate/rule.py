"""What an aggregation rule is: a function, in a frame that checks what it is given. What the rest of a federation must know of
it stands in its entry, `tables.Rule`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedkeel import tables
from fedkeel.method.aggregate.common import Aggregate
from fedkeel.method.aggregate.updates import Checked
from fedkeel.types import Adapter, Update


@dataclass(frozen=True)
class Options:
    """What a rule may have to know beside the updates.

    hostile: f ≥ 0, how many sites may send anything at all (`trimmed`, `krum`). round: of the federation, from 0 (`alternate`).
    own: of the rule's own dataclass, where its entry names one.
    """

    hostile: int = 0
    round: int = 0
    own: Any = None


PLAIN = Options()


@dataclass(frozen=True)
class Aggregator:
    """A rule of the table, called as a function."""

    entry: tables.Rule

    def __call__(
        self, reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options = PLAIN
    ) -> Aggregate:
        """The next global adapter. weights: site -> p_k ≥ 0, with sum 1, for just the sites of `updates`.

        reference: what the sites started from. The rule itself is a pure function of (reference, updates, weights, options);
        what it is given is in order and checked. Raises ValueError if there are too few sites, and for updates as in `Checked`.
        """
        least = self.entry.least(options.hostile)
        if len(weights) < least:
            raise ValueError(
                f"rule {self.entry.name} with {options.hostile} hostile sites needs at least {least} sites, not {len(weights)}"
            )
        checked = Checked(f"rule {self.entry.name}", self.entry.mixed, reference, updates, weights)
        found: Aggregate = self.entry.load()(reference, checked, weights, options)
        if not isinstance(found, Aggregate):
            raise ValueError(f"rule {self.entry.name} returned {type(found).__name__}; an Aggregate belongs there")
        _check(self.entry.name, reference, found)
        return found


def _check(name: str, reference: Adapter, found: Aggregate) -> None:
    """Raise ValueError where the next adapter is not laid out as the one that the sites started from."""
    told: tuple[Any, Any] = found.adapter, found.error
    if not isinstance(told[0], Adapter) or not isinstance(told[1], int | float):
        of = f"{type(told[0]).__name__} and error {told[1]!r}"
        raise ValueError(f"rule {name} returned an Aggregate of {of}; an Adapter and a number belong there")
    had, has = reference.tensors(), found.adapter.tensors()
    for path in sorted(had.keys() ^ has.keys()):
        raise ValueError(f"rule {name} returned {'no' if path in had else 'another tensor,'} {path}")
    for path, tensor in had.items():
        if has[path].shape != tensor.shape:
            raise ValueError(
                f"rule {name} returned {path} of shape {tuple(has[path].shape)}; {tuple(tensor.shape)} belongs there"
            )


def aggregator(name: str) -> Aggregator:
    """The rule of this name. Raises `tables.UnknownNameError`."""
    return Aggregator(tables.RULES[name])
