"""What an aggregation rule is: a function, and what the rest of a federation must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedkeel.method.aggregate.common import Aggregate
from fedkeel.method.aggregate.updates import Checked
from fedkeel.types import Adapter, Update

BOTH = frozenset({"a", "b"})


@dataclass(frozen=True)
class Options:
    """What a rule may have to know beside the updates.

    hostile: f ≥ 0, how many sites may send anything at all (`trimmed`, `krum`). round: of the federation, from 0 (`alternate`).
    """

    hostile: int = 0
    round: int = 0


PLAIN = Options()


@dataclass(frozen=True)
class Rule:
    """An aggregation rule, called as a function; `combine` is the same.

    function: the rule itself, a pure function of (reference, updates, weights, options); what it is given is in order and
    checked, see `Checked`.
    trained: round, from 0 -> the factors that a site trains in it, of {"a", "b"}; the other is as the reference has it.
    personal: the factor that stays at the site, "" for none. Of `trained`, what is also in `shared` is sent up.
    mixed: sites may differ in rank and scale. shifts: it returns a shift of the frozen maps. exact: it claims error 0 up to
    rounding, if sites leave alone what they do not train.
    keeps_basis: if the sites change the factors little (being of the reference's rank and scale), so does the rule, from
    round to round; only then is aggregated − reference a step that a server optimiser can carry on. `stack` starts its
    factors afresh; `svd`, `median` and `trimmed` factorise anew; between the rounds of `alternate` the gauge changes.
    least: hostile -> the number of sites that the rule needs.
    """

    name: str
    function: Callable[[Adapter, Iterable[Update], Mapping[str, float], Options], Aggregate]
    trained: Callable[[int], frozenset[str]] = lambda round: BOTH
    personal: str = ""
    mixed: bool = False
    shifts: bool = False
    exact: bool = False
    keeps_basis: bool = False
    least: Callable[[int], int] = lambda hostile: 1

    @property
    def shared(self) -> frozenset[str]:
        """The factors that travel at all."""
        return BOTH - {self.personal}

    def combine(
        self, reference: Adapter, updates: Iterable[Update], weights: Mapping[str, float], options: Options = PLAIN
    ) -> Aggregate:
        """The next global adapter. weights: site -> p_k ≥ 0, with sum 1, for just the sites of `updates`.

        reference: what the sites started from. Raises ValueError if there are too few sites, and for updates as in `Checked`.
        """
        if len(weights) < self.least(options.hostile):
            raise ValueError(
                f"rule {self.name} with {options.hostile} hostile sites needs at least {self.least(options.hostile)} sites, "
                f"not {len(weights)}"
            )
        checked = Checked(f"rule {self.name}", self.mixed, reference, updates, weights)
        return self.function(reference, checked, weights, options)

    __call__ = combine
