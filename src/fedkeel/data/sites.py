"""Who holds what, and when: records dealt to sites, and the stages of a task stream."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkeel import tables
from fedkeel.data.partition import Deal
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.rng import derive, numpy_generator
from fedkeel.types import Record


@dataclass(frozen=True)
class Sites:
    """The rows of every site, by split: sites[name][split] -> records sorted by id."""

    rows: Mapping[str, Mapping[str, Sequence[Record]]]

    def all(self, split: str) -> list[Record]:
        """The rows of all sites together, sorted by id, so that no file order or site name matters."""
        return sorted((r for held in self.rows.values() for r in held[split]), key=lambda r: r.id)

    def only(self, names: Collection[str]) -> Sites:
        """The sites of these names."""
        return Sites({name: held for name, held in self.rows.items() if name in names})


def make_sites(records: Sequence[Record], recipe: Recipe) -> Sites:
    """Deal the records to sites as the recipe's partition says.

    Raises ConfigError if a site would have no training row, naming it, or if a natural split has no key to go by.
    """
    spec = recipe.partition
    deal = Deal(records, spec, numpy_generator(recipe.seed, "partition"), recipe.options("scheme", spec.scheme))
    held = _named(spec.scheme, tables.PARTITIONS[spec.scheme].load()(deal), len(records))
    sites: dict[str, dict[str, list[Record]]] = {}
    for name, indices in held.items():
        sites[name] = {s: [records[i] for i in indices if records[i].split == s] for s in ("train", "validation", "test")}
        cap = recipe.data.rows_per_site
        if cap and not tables.SOURCES[recipe.data.source].capped:
            hashed = sorted(sites[name]["train"], key=lambda r: derive(recipe.seed, "cap", r.id))[:cap]
            sites[name]["train"] = sorted(hashed, key=lambda r: r.id)
    empty = [name for name, held_rows in sites.items() if not held_rows["train"]]
    if empty:
        more = f" and {len(empty) - 5:,} more" if len(empty) > 5 else ""
        raise ConfigError(
            f"site {', '.join(empty[:5])}{more} would have no training row under partition.scheme = {spec.scheme!r} "
            f"(sites = {len(sites)}, alpha = {spec.alpha:g}, {len(records)} rows); use fewer sites, a larger alpha or more rows"
        )
    return Sites(sites)


def _named(scheme: str, held: Any, rows: int) -> dict[str, list[int]]:
    """site -> numbers of its rows, as a partition gave them: by name, or a list of lists. Raises ConfigError for what is
    neither, as a partition of somebody else's could give."""
    if isinstance(held, Sequence) and not isinstance(held, str):
        width = len(str(len(held) - 1))
        held = {f"site-{k:0{width}d}": indices for k, indices in enumerate(held)}
    try:
        found = {str(name): [int(i) for i in indices] for name, indices in held.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"partition.scheme = {scheme!r} gave {held!r:.60}; a list of each site's row numbers, or site -> row numbers, "
            f"belongs there"
        ) from error
    if odd := [i for indices in found.values() for i in indices if not 0 <= i < rows]:
        raise ConfigError(f"partition.scheme = {scheme!r} gave a site row {odd[0]} of {rows}, counted from 0")
    return found


def unseen_sites(sites: Sites, recipe: Recipe) -> list[str]:
    """The names of the evaluation.unseen_sites sites that take no part in training, drawn by the seed; sorted.

    Raises ConfigError if none would be left to train, or if no row of theirs could be scored.
    """
    count, names = recipe.evaluation.unseen_sites, sorted(sites.rows)
    if count >= len(names):
        raise ConfigError(
            f"evaluation.unseen_sites = {count} leaves none of {len(names)} sites to train; it is at most {len(names) - 1}"
        )
    order = numpy_generator(recipe.seed, "unseen-sites").permutation(len(names))
    chosen = sorted(names[i] for i in order[:count])
    if chosen and not any(sites.rows[name]["test"] for name in chosen):
        raise ConfigError(
            f"evaluation.unseen_sites = {count}: {', '.join(chosen)} would take no part in training, and without a test row "
            f"there is nothing to score"
        )
    return chosen
