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
        return found


def aggregator(name: str) -> Aggregator:
    """The rule of this name. Raises `tables.UnknownNameError`."""
    return Aggregator(tables.RULES[name])
