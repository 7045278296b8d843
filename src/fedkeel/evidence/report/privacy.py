"""What a run promised of its sites' privacy, and what it spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedkeel.evidence.report.tables import MISSING, Table, plural
from fedkeel.types import Row

HIDDEN = {"site": "each site's whole contribution", "row": "each training row"}


def privacy_table(recipe: Mapping[str, Any], rows: Sequence[Row]) -> Table:
    """A line a fact; empty of a run without differential privacy and secure aggregation. recipe: as TOML is read."""
    told = recipe.get("privacy", {})
    unit, masks = told.get("unit", "none"), told.get("masks", False)
    lines = []
    if unit in HIDDEN:
        mine = [r for r in rows if r.method == "federated"]
        spent = [r for r in mine if r.name == "epsilon"]
        bounds = [r.value for r in mine if r.name == "clip"]
        largest = f"{max(r.value for r in spent):.3g}" if spent else MISSING
        bound = f"{bounds[0]:.3g}, moving to {bounds[-1]:.3g}" if bounds else f"{told['clip']:g}"
        by = "each site, in every step" if unit == "row" else f"the {told['noise_at']}"
        lines = [
            ("what is hidden", HIDDEN[unit]),
            ("ε spent", f"{largest} at δ = {told['delta']:g}, after {plural(len({r.round for r in spent}), 'round')}"),
            ("ε allowed", f"{told['epsilon']:g}" if told["epsilon"] else "no limit was set"),
            ("clipped to", bound),
            ("noise", f"z = {told['noise']:g} times that, by {by}"),
        ]
    if lines or masks:
        seen = "sums of the sites' changes alone (secure aggregation)" if masks else "each site's change"
        lines.append(("what the coordinator saw", seen))
    notes = ("The promise is for one such unit at a time; a large ε promises little. docs/privacy.md says what it covers.",)
    return Table("Privacy", ("what", "value"), tuple(lines), notes if unit in HIDDEN else ())
