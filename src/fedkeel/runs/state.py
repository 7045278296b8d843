"""Where a run stands: what its state.json says, and what a resumed run goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MOST = 2**53  # of a count: what a JSON number holds exactly


@dataclass(frozen=True)
class Best:
    """The best point of a stage's validation curve. waited: points of the curve since."""

    stage: int
    round: int
    score: float
    waited: int = 0


@dataclass(frozen=True)
class State:
    """A run between two of its steps. Saved whole after each, and never changed in place.

    done: names of finished legs. leg: that at hand, and of it: round: its last checkpoint. tested: how many of its stages are
    scored. scored: the last round with a point of the curve. last: the last round of a stage that was really run. best: of the
    curve. kept: site -> the name of what it keeps elsewhere.
    asked: under `[privacy]`, site -> rounds that it was asked for. held: under `privacy.unit = "row"`, site -> the fewest and
    the most training rows that it had then. prints: what the run works with -> its fingerprint; empty
    where none was taken. run, reference: of a deployment, its name at the sites and what they were held to. rows_bytes: how
    much of rows.jsonl belongs to this state. before: the state as the round before left it.
    """

    done: tuple[str, ...] = ()
    leg: str = ""
    round: int = 0
    tested: int = 0
    scored: int = 0
    last: int = 0
    best: Best | None = None
    kept: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, int] = field(default_factory=dict)
    held: Mapping[str, Sequence[int]] = field(default_factory=dict)
    prints: Mapping[str, str] = field(default_factory=dict)
    run: str = ""
    reference: Mapping[str, Any] = field(default_factory=dict)
    rows_bytes: int = 0
    finished: bool = False
    before: State | None = None

    def best_of(self, stage: int) -> Best | None:
        """The best point of the curve of `stage`; None where it has none yet."""
        return self.best if self.best and self.best.stage == stage else None

    def as_json(self) -> dict[str, Any]:
        """A JSON object; what says nothing is left out."""
        inside = {"best": self.best and asdict(self.best), "before": self.before and self.before.as_json()}
        told = {**vars(self), **inside}
        return {key: value for key, value in told.items() if value not in (None, {}, "") or key in _ALWAYS}


_ALWAYS = {"done": list, "leg": str, "round": int, "tested": int, "rows_bytes": int, "finished": bool}
_PERHAPS = {
    "scored": int,
    "last": int,
    "kept": dict,
    "asked": dict,
    "held": dict,
    "prints": dict,
    "run": str,
    "reference": dict,
}
_BEST = {"stage": int, "round": int, "score": float, "waited": int}
_INSIDE = {"done": str, "kept": str, "asked": int, "prints": str}


def read_state(told: Any) -> State:
    """The State of an object that `State.as_json` made, or an earlier release. Raises ValueError, with the first key that is of
    another kind."""
    held = _checked(told, _ALWAYS, _PERHAPS)
    for key, kind in _INSIDE.items():
        inside = held.get(key, ())
        if not all(type(value) is kind for value in (inside.values() if isinstance(inside, dict) else inside)):
            raise ValueError(f"{key} is {inside!r:.60}")
    for counts in held.get("held", {}).values():
        if not isinstance(counts, list) or len(counts) != 2 or not all(type(n) is int and 0 < n < MOST for n in counts):
            raise ValueError(f"held is {counts!r:.60}")
    held["done"] = tuple(held["done"])
    held.setdefault("scored", held["round"])  # of a run that began before this was kept
    best = Best(**_checked(told["best"], _BEST, {})) if told.get("best") else None
    return State(**held, best=best, before=read_state(told["before"]) if "before" in told else None)


def _checked(told: Any, always: Mapping[str, type], perhaps: Mapping[str, type]) -> dict[str, Any]:
    """The named keys of a JSON object, of the kinds that they must be."""
    if not isinstance(told, dict):
        raise ValueError("no JSON object")
    kinds = {**always, **{key: kind for key, kind in perhaps.items() if key in told}}
    for key, kind in kinds.items():
        value = told.get(key)
        if type(value) is not kind and not (kind is float and value in (0, 1)):
            raise ValueError(f"{key} is {value!r:.60}")
        if isinstance(value, int) and not 0 <= value < MOST:
            raise ValueError(f"{key} is {value!r:.60}")
    return {key: told[key] for key in kinds}
