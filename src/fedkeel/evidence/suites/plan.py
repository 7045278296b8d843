"""Plans: what a suite compares."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkeel.evidence.report import same_value
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError, known_keys

if TYPE_CHECKING:
    pass


PLANS = Path(__file__).parent / "plans"


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
    """A suite: see the module. set: overrides of every run. reference: the method that others are compared with.

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
    """One run of a suite: what `fedkeel run` is told, beside its name and folder. leg: see `Method`."""

    name: str
    stream: str
    method: str
    seed: int
    overrides: tuple[str, ...]
    leg: str = "federated"


def _known(given: Iterable[str], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{where} must be a list of strings, not {value!r}")
    return tuple(value)


def _one_of(name: str, known: Sequence[str], where: str) -> None:
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
        _one_of(method, methods, f"{where}.tuned")
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
        _one_of(stream, streams, f"{where}.streams")
    if shared:
        _one_of(shared, methods, f"{where}.tuned_as")
    set_, leg = _strings(tree.get("set", []), f"{where}.set"), str(tree.get("leg", "federated"))
    _one_of(leg, ("federated", "centralised"), f"{where}.leg")
    return Method(str(tree.get("text", "")), set_, only, shared, bool(tree.get("untuned", False)), leg)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not (isinstance(value, list) and value and all(type(s) is int and s >= 0 for s in value)):
        raise ConfigError(f"{where} must be a list of whole numbers from 0, not {value!r}")
    return tuple(value)


def plan_names() -> list[str]:
    """The suites that come with FedKeel."""
    return sorted(path.stem for path in PLANS.glob("*.toml"))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def load_plan(name: str, tuned: Path | None = None) -> Plan:
    """The suite `name` of those that come with FedKeel, or the plan in the file of that name, which ends in .toml.

    tuned: a file that `write_tuned` wrote, whose choices replace the plan's own.

    `[knobs]` gives each key its values, and every value is a method: the reference with that one key changed, or the reference
    itself where that is its value.
    Raises ConfigError on a file that is missing or malformed, a key or name that is not known, or nothing to compare.
    """
    path = Path(name) if name.endswith(".toml") else PLANS / f"{name}.toml"
    if not name.endswith(".toml"):
        _one_of(name, plan_names(), "suite")
    tree = _read_toml(path)
    for at, chosen in (_read_toml(tuned).get("streams", {}) if tuned else {}).items():
        _one_of(at, list(tree.get("streams", {})), str(tuned))
        tree["streams"][at]["tuned"] = chosen["tuned"]
    top = (
        "title", "note", "seeds", "tuning_seeds", "set", "streams", "methods", "reference", "factors", "square", "knobs",
    )  # fmt: skip
    _known(tree, top, str(path))
    streams, methods = tree.get("streams", {}), dict(tree.get("methods", {}))
    seeds, tuning = (
        _seeds(tree.get("seeds", [1, 2, 3]), f"{path}: seeds"),
        _seeds(tree.get("tuning_seeds", [0]), f"{path}: tuning_seeds"),
    )
    if set(seeds) & set(tuning):
        raise ConfigError(f"{path}: seeds and tuning_seeds share {sorted(set(seeds) & set(tuning))}; tune on others")
    if not streams or not methods:
        raise ConfigError(f"{path}: a plan needs [streams.NAME] and [methods.NAME]")
    reference = str(tree.get("reference", next(iter(methods))))
    _one_of(reference, list(methods), f"{path}: reference")
    knobs: dict[str, dict[str, str]] = {}
    for key, values in tree.get("knobs", {}).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: knobs.{key} must be a list of values")
        knobs[key] = {}
        for value in values:
            text, of = _as_text(value), methods[reference]
            own = [
                _value_of(key, [*tree.get("set", []), *stream.get("set", []), *of.get("set", [])])
                for stream in streams.values()
            ]
            if all(same_value(text, value) for value in own):  # the reference itself is this point of the curve
                knobs[key][text] = reference
                continue
            knobs[key][text] = f"{key}={text}"
            methods[f"{key}={text}"] = {
                **of, "text": "", "set": [*of.get("set", []), f"{key}={text}"], "tuned_as": of.get("tuned_as") or reference,
            }  # fmt: skip
    square, factors = (_strings(tree.get(key, []), f"{path}: {key}") for key in ("square", "factors"))
    for method in square:
        _one_of(method, list(methods), f"{path}: square")
    if (len(square), len(factors)) not in ((0, 0), (4, 2)):
        raise ConfigError(f"{path}: square names four methods (neither, first, second, both) and factors the two")
    return Plan(
        path.stem, str(tree.get("title", path.stem)), " ".join(str(tree.get("note", "")).split()), seeds, tuning,
        _strings(tree.get("set", []), f"{path}: set"),
        {n: _stream(n, t, list(methods), f"{path}: streams.{n}") for n, t in streams.items()},
        {n: _method(t, list(streams), list(methods), f"{path}: methods.{n}") for n, t in methods.items()},
        reference, factors, square, knobs,
    )  # fmt: skip
