"""Plans: what a suite compares, read from TOML and checked.

A plan holds only differences: what a stream of data needs, what a method is, what tuning chose for it there. `runs.runs_of`
makes runs of it.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

from fedkeel.evidence.report import same_value
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError, known_keys, read_toml

PLANS = Path(__file__).parent / "plans"
KEYS = ("title", "note", "seeds", "tuning_seeds", "set", "streams", "methods", "reference", "factors", "square", "knobs")


@dataclass(frozen=True)
class Stream:
    """Data, task stream and model that methods are compared on. text: one sentence. set: overrides of every run on it.

    needs: keys that have no default that could work, such as data.root; the stream is left out while one is not given.
    tuned: method -> overrides that tuning chose for it here. trial: overrides of a trial of tuning, such as fewer stages.
    grid: key -> the values that tuning tries, every combination of them for every method: the same effort for each.
    """

    text: str = ""
    set: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tuned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trial: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def settings(self) -> list[tuple[str, ...]]:
        """The settings that tuning tries, each as overrides; empty without a grid."""
        if not self.grid:
            return []
        return [
            tuple(f"{key}={v}" for key, v in zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Method:
    """A line of the table. text: what it is. set: its difference, as overrides. streams: where it is run; empty: everywhere.

    tuned_as: another method whose tuning it shares, as with the parts of one; empty: its own. untuned: it has nothing to tune.
    leg: whose validation score tuning judges it by, `federated` or `centralised`.
    """

    text: str = ""
    set: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    tuned_as: str = ""
    untuned: bool = False
    leg: str = "federated"


@dataclass(frozen=True)
class Plan:
    """A suite. set: overrides of every run. reference: the method that others are compared with.

    tuning_seeds: seeds of trials, none of which is in `seeds`. square: the methods with neither, the first, the second and both
    of two factors. knobs: key -> {value: method}.
    """

    name: str
    title: str
    note: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    set: tuple[str, ...]
    streams: Mapping[str, Stream]
    methods: Mapping[str, Method]
    reference: str
    factors: tuple[str, ...]
    square: tuple[str, ...]
    knobs: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Planned:
    """One run of a suite. given: its overrides but for name and seed. leg: see `Method`."""

    name: str
    stream: str
    method: str
    seed: int
    given: tuple[str, ...]
    leg: str = "federated"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What `fedkeel run` is told, but for the folder."""
        return (*self.given, f"name={self.name}", f"seed={self.seed}")


def _known(given: Iterable[str], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{where} must be a list of strings, not {value!r}")
    return tuple(value)


def one_of(name: str, known: Sequence[str], where: str) -> None:
    """Raises ConfigError, naming the nearest of `known`, if `name` is none of them."""
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ConfigError(
            f"{where}: no {name!r}; there are {', '.join(known)}" + (f". Did you mean {near[0]!r}?" if near else "")
        )


def _stream(name: str, tree: Any, methods: Sequence[str], where: str) -> Stream:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must be a table")
    _known(tree, ("text", "set", "needs", "tuned", "trial", "grid"), where)
    tuned, grid = tree.get("tuned", {}), tree.get("grid", {})
    for method in tuned:
        one_of(method, methods, f"{where}.tuned")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.grid.{key} must be a list of values")
    return Stream(
        str(tree.get("text", "")),
        _strings(tree.get("set", []), f"{where}.set"),
        _strings(tree.get("needs", []), f"{where}.needs"),
        {method: _strings(given, f"{where}.tuned.{method}") for method, given in tuned.items()},
        _strings(tree.get("trial", []), f"{where}.trial"),
        {key: tuple(map(_as_text, values)) for key, values in grid.items()},
    )


def _as_text(value: Any) -> str:
    """A value of a plan as an override writes it."""
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def _value_of(key: str, overrides: Sequence[str]) -> str:
    """What `key` has under these overrides, as an override writes it. Raises ConfigError on an unknown key."""
    _known([key], list(known_keys(Recipe)), "knobs")
    given = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    return given[-1] if given else _as_text(attrgetter(key)(Recipe()))


def _method(tree: Any, streams: Sequence[str], methods: Sequence[str], where: str) -> Method:
    if not isinstance(tree, dict):
        raise ConfigError(f'{where} must be a table, such as {{text = "...", set = ["train.proximal=0.1"]}}')
    _known(tree, ("text", "set", "streams", "tuned_as", "untuned", "leg"), where)
    only, shared = _strings(tree.get("streams", []), f"{where}.streams"), str(tree.get("tuned_as", ""))
    for stream in only:
        one_of(stream, streams, f"{where}.streams")
    if shared:
        one_of(shared, methods, f"{where}.tuned_as")
    set_, leg = _strings(tree.get("set", []), f"{where}.set"), str(tree.get("leg", "federated"))
    one_of(leg, ("federated", "centralised"), f"{where}.leg")
    return Method(str(tree.get("text", "")), set_, only, shared, bool(tree.get("untuned", False)), leg)


def checked_seeds(value: Any, where: str) -> tuple[int, ...]:
    """`value` as seeds. Raises ConfigError if it is no list of whole numbers from 0, or empty."""
    if not (isinstance(value, list) and value and all(type(s) is int and s >= 0 for s in value)):
        raise ConfigError(f"{where} must be a list of whole numbers from 0, not {value!r}")
    return tuple(value)


def plan_names() -> list[str]:
    """The suites that come with FedKeel."""
    return sorted(path.stem for path in PLANS.glob("*.toml"))


def load_plan(name: str, tuned: Path | None = None) -> Plan:
    """The suite `name` of those that come with FedKeel, or the plan in the file of that name, which ends in .toml.

    tuned: a file that `fedkeel bench --tune` wrote, whose choices replace the plan's own.
    Raises ConfigError on a file that is missing or malformed, a key or name that is not known, or nothing to compare.
    """
    path = Path(name) if name.endswith(".toml") else PLANS / f"{name}.toml"
    if not name.endswith(".toml"):
        one_of(name, plan_names(), "suite")
    tree = read_toml(path, "plan")
    for at, chosen in (read_toml(tuned).get("streams", {}) if tuned else {}).items():
        one_of(at, list(tree.get("streams", {})), str(tuned))
        tree["streams"][at]["tuned"] = chosen["tuned"]
    return _plan(path.stem, tree, str(path))


def _plan(name: str, tree: Mapping[str, Any], where: str) -> Plan:
    """The plan of a whole tree. where: the file, for messages."""
    _known(tree, KEYS, where)
    streams, own = tree.get("streams", {}), tree.get("methods", {})
    if not streams or not own:
        raise ConfigError(f"{where}: a plan needs [streams.NAME] and [methods.NAME]")
    reference = str(tree.get("reference", next(iter(own))))
    one_of(reference, list(own), f"{where}: reference")
    knobs, points = _knobs(tree, reference, where)
    methods = {**own, **points}
    square, factors = (_strings(tree.get(key, []), f"{where}: {key}") for key in ("square", "factors"))
    for method in square:
        one_of(method, list(methods), f"{where}: square")
    if (len(square), len(factors)) not in ((0, 0), (4, 2)):
        raise ConfigError(f"{where}: square names four methods (neither, first, second, both) and factors the two")
    seeds = checked_seeds(tree.get("seeds", [1, 2, 3]), f"{where}: seeds")
    tuning = checked_seeds(tree.get("tuning_seeds", [0]), f"{where}: tuning_seeds")
    if shared := set(seeds) & set(tuning):
        raise ConfigError(f"{where}: seeds and tuning_seeds share {sorted(shared)}; tune on others")
    return Plan(
        name=name,
        title=str(tree.get("title", name)),
        note=" ".join(str(tree.get("note", "")).split()),
        seeds=seeds,
        tuning_seeds=tuning,
        set=_strings(tree.get("set", []), f"{where}: set"),
        streams={n: _stream(n, t, list(methods), f"{where}: streams.{n}") for n, t in streams.items()},
        methods={n: _method(t, list(streams), list(methods), f"{where}: methods.{n}") for n, t in methods.items()},
        reference=reference,
        factors=factors,
        square=square,
        knobs=knobs,
    )


def _knobs(tree: Mapping[str, Any], reference: str, where: str) -> tuple[dict[str, dict[str, str]], dict[str, Any]]:
    """`[knobs]` as key -> {value: method}, and the methods it adds: the reference with that one key changed.

    A value that the reference has on every stream is the reference itself, and adds none.
    """
    knobs: dict[str, dict[str, str]] = {}
    added: dict[str, Any] = {}
    of = tree["methods"][reference]
    for key, values in tree.get("knobs", {}).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}: knobs.{key} must be a list of values")
        given = [[*tree.get("set", []), *stream.get("set", []), *of.get("set", [])] for stream in tree["streams"].values()]
        own = [_value_of(key, overrides) for overrides in given]
        knobs[key] = {}
        for text in map(_as_text, values):
            if all(same_value(text, value) for value in own):
                knobs[key][text] = reference
                continue
            name = f"{key}={text}"
            knobs[key][text] = name
            changed = {"text": "", "set": [*of.get("set", []), name], "tuned_as": of.get("tuned_as") or reference}
            added[name] = {**of, **changed}
    return knobs, added
