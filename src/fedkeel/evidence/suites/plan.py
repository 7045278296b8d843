"""Plans: what a suite compares, read from TOML and checked.

A plan holds only differences: what a stream of data needs, what a method is, what tuning chose for it there. `runs.runs_of`
makes runs of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from fedkeel.evidence.report import same_value
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import (
    ConfigError,
    Frozen,
    build,
    check_key,
    checked,
    choose,
    filled,
    needed,
    one_of,
    read_toml,
    tree_of,
)

PLANS = Path(__file__).parent / "plans"


def _overrides(given: Sequence[str]) -> str:
    return "" if all("=" in one for one in given) else "a list of overrides such as 'train.lr=0.1' belongs here"


@dataclass(frozen=True)
class Stream:
    """Data, task stream and model that methods are compared on. text: one sentence. set: overrides of every run on it.

    needs: keys that have no default that could work, such as data.root; the stream is left out while one is not given.
    twin: another stream of the same rows, dealt evenly, that shows what skew costs; empty: none.
    tuned: method -> overrides that tuning chose for it here. trial: overrides of a trial of tuning, such as fewer stages.
    grid: key -> the values that tuning tries, every combination of them for every method: the same effort for each.
    """

    text: str = ""
    set: tuple[str, ...] = checked((), _overrides)
    needs: tuple[str, ...] = ()
    twin: str = ""
    tuned: Mapping[str, tuple[str, ...]] = field(default_factory=Frozen, metadata={"check": _overrides})
    trial: tuple[str, ...] = checked((), _overrides)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=Frozen, metadata={"filled": True})

    def settings(self) -> list[tuple[str, ...]]:
        """The settings that tuning tries, each as overrides; empty without a grid."""
        if not self.grid:
            return []
        return [
            tuple(f"{key}={_as_text(v)}" for key, v in zip(self.grid, values, strict=True))
            for values in product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Method:
    """A line of the table. text: what it is. set: its difference, as overrides. streams: where it is run; empty: everywhere.

    tuned_as: another method whose tuning it shares, as with the parts of one; empty: its own. untuned: it has nothing to tune.
    leg: whose validation score tuning judges it by, `federated` or `centralised`.
    """

    text: str = ""
    set: tuple[str, ...] = checked((), _overrides)
    streams: tuple[str, ...] = ()
    tuned_as: str = ""
    untuned: bool = False
    leg: str = one_of("federated", ("federated", "centralised"))


@dataclass(frozen=True)
class _File:
    """The keys of a plan's file; see `Plan`. knobs: key of a recipe -> its values."""

    streams: Mapping[str, Stream] = needed("a plan needs [streams.NAME] and [methods.NAME]")
    methods: Mapping[str, Method] = needed("a plan needs [streams.NAME] and [methods.NAME]")
    title: str = ""
    note: str = ""
    seeds: tuple[int, ...] = filled((1, 2, 3), 0)
    tuning_seeds: tuple[int, ...] = filled((0,), 0)
    set: tuple[str, ...] = checked((), _overrides)
    reference: str = ""
    factors: tuple[str, ...] = ()
    square: tuple[str, ...] = ()
    knobs: Mapping[str, tuple[Any, ...]] = field(default_factory=Frozen, metadata={"filled": True})


@dataclass(frozen=True)
class _Tuned:
    tuned: Mapping[str, tuple[str, ...]] = field(default_factory=Frozen, metadata={"check": _overrides})


@dataclass(frozen=True)
class _Chosen:
    """The keys of tuned.toml."""

    streams: Mapping[str, _Tuned] = field(default_factory=Frozen)


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


def _as_text(value: Any) -> str:
    """A value of a plan as an override writes it."""
    return json.dumps(value, default=str) if isinstance(value, bool | list) else str(value)


def _value_of(key: str, overrides: Sequence[str]) -> str:
    """What `key` of a recipe has under these overrides, as an override writes it; empty for an option that is not given."""
    given = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    if given:
        return given[-1]
    value: Any = tree_of(Recipe())
    for part in key.split("."):
        value = value.get(part, {})
    return "" if value == {} else _as_text(list(value) if isinstance(value, tuple) else value)


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
        choose("suite", name, plan_names())
    file = build(_File, read_toml(path, "plan"), str(path))
    if tuned:
        chosen = build(_Chosen, read_toml(tuned, "tuned file"), str(tuned)).streams
        for at in chosen:
            choose("streams", at, file.streams, str(tuned))
        streams = {at: replace(s, tuned=chosen[at].tuned) if at in chosen else s for at, s in file.streams.items()}
        file = replace(file, streams=streams)
    return _plan(path.stem, file, f"{path} with {tuned}" if tuned else str(path))


def _plan(name: str, file: _File, where: str) -> Plan:
    """The plan of a file, its names looked up. where: the file, for messages. Raises ConfigError."""
    reference = file.reference or next(iter(file.methods))
    choose("reference", reference, file.methods, where)
    knobs, points = _knobs(file, reference, where)
    methods = {**file.methods, **points}
    for key, names, known in _names(file, methods):
        for one in names:
            choose(key, one, known, where)
    if (len(file.square), len(file.factors)) not in ((0, 0), (4, 2)):
        raise ConfigError(f"{where}: square names four methods (neither, first, second, both) and factors the two")
    if shared := set(file.seeds) & set(file.tuning_seeds):
        raise ConfigError(f"{where}: seeds and tuning_seeds share {sorted(shared)}; tune on others")
    return Plan(
        name=name,
        title=file.title or name,
        note=" ".join(file.note.split()),
        seeds=file.seeds,
        tuning_seeds=file.tuning_seeds,
        set=file.set,
        streams=file.streams,
        methods=methods,
        reference=reference,
        factors=file.factors,
        square=file.square,
        knobs=knobs,
    )


def _names(file: _File, methods: Mapping[str, Method]) -> Iterator[tuple[str, Iterable[str], Iterable[str]]]:
    """(key, the names that stand there, those that may): of every key that names streams or methods."""
    yield "square", file.square, methods
    for name, stream in file.streams.items():
        yield f"streams.{name}.tuned", stream.tuned, methods
        yield f"streams.{name}.twin", filter(None, [stream.twin]), file.streams
    for name, method in file.methods.items():
        yield f"methods.{name}.streams", method.streams, file.streams
        yield f"methods.{name}.tuned_as", filter(None, [method.tuned_as]), methods


def _knobs(file: _File, reference: str, where: str) -> tuple[dict[str, dict[str, str]], dict[str, Method]]:
    """`[knobs]` as key -> {value: method}, and the methods it adds: the reference with that one key changed.

    A value that the reference has on every stream is the reference itself, and adds none. Raises ConfigError on a key that no
    recipe has.
    """
    knobs: dict[str, dict[str, str]] = {}
    added: dict[str, Method] = {}
    of = file.methods[reference]
    for key, values in file.knobs.items():
        check_key(Recipe, key, f"{where}: knobs")
        own = [_value_of(key, [*file.set, *stream.set, *of.set]) for stream in file.streams.values()]
        knobs[key] = {}
        for text in map(_as_text, values):
            if all(same_value(text, value) for value in own):
                knobs[key][text] = reference
                continue
            name = f"{key}={text}"
            knobs[key][text] = name
            added[name] = replace(of, text="", set=(*of.set, name), tuned_as=of.tuned_as or reference)
    return knobs, added
