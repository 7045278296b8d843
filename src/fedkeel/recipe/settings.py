"""One loader of settings from tables of keys: for recipes, plans and site files.

Settings are frozen dataclasses. A field's type says what belongs there: text, a number, true or false, a list (of texts, whole
numbers or anything), another such dataclass (a table of keys), or a mapping of names to one of these, each with the field's
metadata. `one_of`, `number` and the like say which values. An unknown key is an error that names the nearest known one; a value
of the wrong type or out of its range is one that names the key, the value and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import tomllib
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fedkeel.tables import Table
from fedkeel.types import FedKeelError

T = TypeVar("T")
V = TypeVar("V")


class ConfigError(FedKeelError):
    """Settings that cannot be right as written."""


class Frozen(Mapping[str, V]):
    """A mapping that never changes and can be hashed; equal to another of the same content, whatever its order."""

    def __init__(self, content: Mapping[str, V] | Iterable[tuple[str, V]] = ()) -> None:
        self._content = dict(content)

    def __getitem__(self, key: str) -> V:
        return self._content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)

    def __hash__(self) -> int:
        return hash(frozenset(self._content.items()))

    def __repr__(self) -> str:
        return repr(self._content)


def meant(default: Any, about: str, **more: Any) -> Any:
    """A value that may be any of its type. about: what the key means, for a reference of all keys. more: further metadata."""
    return field(default=default, metadata={"about": about, **more})


def one_of(default: str | tuple[str, ...], choices: Iterable[str], about: str = "") -> Any:
    """A text among `choices`, a tuple or a table; of a list, each of its texts. about: as of `meant`."""
    return meant(default, about, choices=choices)


def number(default: float, low: float, high: float = math.inf, about: str = "", **more: Any) -> Any:
    """A number in [low, high]. about: as of `meant`. more: `above`: not low itself; `infinite`: infinity too; `unit`."""
    return meant(default, about, **{"low": low, "high": high, "above": False, "infinite": False, **more})


def numbers(low: float, about: str, high: float = math.inf, above: bool = False) -> Any:
    """A list of finite numbers from `low` (above: none equal to it) to `high`, empty by default. about: as of `meant`."""
    return meant((), about, low=low, high=high, above=above, infinite=False)


def needed(what: str) -> Any:
    """A value without a default, that must be given and not be empty. what: it is, for the error."""
    return field(metadata={"needed": what})


def filled(default: tuple[Any, ...], low: int = 1) -> Any:
    """A list that is not empty; one of whole numbers, each from `low`."""
    return field(default=default, metadata={"filled": True, "low": low})


def checked(default: Any, check: Callable[[Any], str], about: str = "", **more: Any) -> Any:
    """A value or list that `check` has nothing to say against: it -> what would be right, empty where it is. about, more: as of
    `meant`."""
    return meant(default, about, check=check, **more)


def named_by(table: Table[Any], bounds: Callable[[Any], Mapping[str, Any]]) -> dict[str, Any]:
    """Metadata of numbers under the names of a table's entries, as keys of the table that this field stands in; the field holds
    those that are not 0. bounds: entry -> the metadata of a `number`."""
    return {"named": table, "bounds": bounds}


def own_of(tables: Mapping[str, Table[Any]]) -> dict[str, Any]:
    """Metadata of options of entries that have some of their own: under KIND.NAME, kinds being the names of `tables`."""
    return {"own": tables}


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fields_of(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a dataclass with their types."""
    return _fields_of(cls)


@cache
def _fields_of(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]


def known_keys(cls: type, prefix: str = "") -> dict[str, Any]:
    """Every settable key, dotted, and the type of its value; not those below names that are free."""
    keys: dict[str, Any] = {}
    for f, hint in fields_of(cls):
        if "named" in f.metadata:
            keys |= {prefix + name: float for name in f.metadata["named"]}
        elif "own" in f.metadata:
            for kind, name, settings in _owners(f.metadata["own"]):
                keys |= known_keys(settings, f"{prefix}{kind}.{name}.")
        elif dataclasses.is_dataclass(hint):
            keys |= known_keys(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            keys[prefix + f.name] = hint
    return keys


def _owners(tables: Mapping[str, Table[Any]]) -> list[tuple[str, str, type]]:
    """(kind, name, dataclass of its options) of every entry that has options."""
    found = ((kind, name, entry.settings()) for kind, table in tables.items() for name, entry in table.items())
    return [(kind, name, settings) for kind, name, settings in found if settings is not None]


def _numbers(text: str, kind: type[int] | type[float]) -> list[Any]:
    """The numbers of `0.5, 1e-2`; what is none stays the text that it is."""

    def read(one: str) -> Any:
        try:
            return kind(one)
        except ValueError:
            return one

    return [read(one) for one in text.split(",") if one.strip()]


@dataclass(frozen=True)
class _Reader:
    """known: every key of the whole, for suggestions. where: stands before each error."""

    known: Mapping[str, Any]
    where: str = ""

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.where}: {text}" if self.where else text)

    def unknown(self, prefix: str, name: str, here: Sequence[str]) -> ConfigError:
        """A slip within the table comes first, then the same name in another one, then what looks alike."""
        key = prefix + name
        close = difflib.get_close_matches(name, here, 1, cutoff=0.75)
        same = [k for k in self.known if k.rpartition(".")[2] == name]
        near = difflib.get_close_matches(key, [*self.known, *(prefix + n for n in here if prefix)], 1, cutoff=0.4)
        best = prefix + close[0] if close and prefix else next(iter([*same, *near]), None)
        told = f"unknown key {key!r};" + (f" did you mean {best!r}?" if best else "")
        if not (close or same):  # a guess, if any
            told += f" {f'[{prefix[:-1]}] has' if prefix else 'there are'} {', '.join(here)}"
        return self.error(told)

    def build(self, cls: type[T], tree: Mapping[str, Any], prefix: str) -> T:
        """An instance of `cls` from the keys of `tree`, which stand under `prefix`."""
        fields = {f.name: (f, hint) for f, hint in fields_of(cls) if not {"named", "own"} & f.metadata.keys()}
        named = {name: f for f, _ in fields_of(cls) for name in f.metadata.get("named", ())}
        kinds = {kind: f for f, _ in fields_of(cls) for kind in f.metadata.get("own", ())}
        arguments: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for name, value in tree.items():
            if name in fields:
                f, hint = fields[name]
                arguments[name] = self.value(prefix + name, value, hint, f.metadata)
            elif name in named:
                f = named[name]
                found = self.value(prefix + name, value, float, f.metadata["bounds"](f.metadata["named"][name]))
                inner.setdefault(f.name, {}).update({name: found} if found else {})
            elif name in kinds:
                f = kinds[name]
                inner.setdefault(f.name, {}).update(self.own(name, value, f.metadata["own"][name], prefix))
            else:
                raise self.unknown(prefix, name, [*fields, *named, *kinds])
        for name, (f, _) in fields.items():
            if "needed" in f.metadata and not tree.get(name):
                raise self.error(f"{prefix}{name} is not set: {f.metadata['needed']}")
        return cls(**arguments, **{name: Frozen(content) for name, content in inner.items()})

    def own(self, kind: str, tree: Any, table: Table[Any], prefix: str) -> dict[str, Any]:
        """kind.name -> options, of [KIND.NAME] tables."""
        found = {}
        for name, values in self.table(prefix + kind, tree).items():
            settings = table[name].settings() if name in table else None
            if settings is None:
                have = [n for k, n, _ in _owners({kind: table})]
                told = f"those that have some: {', '.join(have)}" if have else f"no {table.kind} here has any"
                raise self.error(f"[{prefix}{kind}.{name}] is no {table.kind} with options of its own; {told}")
            key = f"{kind}.{name}"
            found[key] = self.build(settings, self.table(prefix + key, values), f"{prefix}{key}.")
        return found

    def table(self, key: str, value: Any) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(f"{key} is a table of keys, not {value!r}; write {key}.KEY=VALUE")
        return value

    def value(self, key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
        """`value` as the type of its field."""
        found = self.typed(key, value, hint, metadata)
        if "check" in metadata and not isinstance(found, Mapping) and (wrong := metadata["check"](found)):
            raise self.error(f"{key} = {value!r}: {wrong}")
        return found

    def typed(self, key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
        if dataclasses.is_dataclass(hint):
            return self.build(typing.cast(type, hint), self.table(key, value), f"{key}.")
        if typing.get_origin(hint) in (Mapping, Frozen):
            of = typing.get_args(hint)[-1]
            return Frozen({n: self.value(f"{key}.{n}", v, of, metadata) for n, v in self.table(key, value).items()})
        if hint == tuple[int, ...]:
            return self.whole_numbers(key, value, metadata)
        if hint == tuple[float, ...]:
            return self.numbers(key, value, metadata)
        if hint == tuple[Any, ...]:
            return self.anything(key, value, metadata)
        if typing.get_origin(hint) is tuple:
            return self.texts(key, value, metadata)
        if hint is Any:
            return value
        if hint is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not hint:
            raise self.error(f"{key} = {value!r}: {hint.__name__} belongs here, not {type(value).__name__}")
        if "choices" in metadata:
            choose(key, value, metadata["choices"], self.where)
        if "low" in metadata:
            self.bounds(key, value, metadata)
        return value

    def bounds(self, key: str, value: float, metadata: Mapping[str, Any]) -> None:
        low, high, above = metadata["low"], metadata["high"], metadata["above"]
        if not (low < value if above else low <= value) or value > high:
            bound = f"above {low}" if above else f"at least {low}"
            raise self.error(f"{key} = {value!r}: must be {bound}" + (f" and at most {high}" if high < math.inf else ""))
        if math.isinf(value) and not metadata["infinite"]:
            raise self.error(f"{key} = {value!r}: must be a finite number")

    def whole_numbers(self, key: str, value: Any, metadata: Mapping[str, Any]) -> tuple[int, ...]:
        low = metadata.get("low", 1)
        if isinstance(value, str):
            value = _numbers(value, int)
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list | tuple) or not all(type(v) is int and v >= low for v in value):
            raise self.error(f"{key} = {value!r}: a list of whole numbers from {low} belongs here")
        return self.anything(key, value, metadata)

    def numbers(self, key: str, value: Any, metadata: Mapping[str, Any]) -> tuple[float, ...]:
        told = value
        if isinstance(value, str):  # 0.5,1,2
            value = _numbers(value, float)
        value = [value] if type(value) in (int, float) else value
        if not isinstance(value, list | tuple) or not all(type(v) in (int, float) for v in value):
            raise self.error(f"{key} = {told!r}: a list of numbers belongs here")
        for one in value:
            self.bounds(key, float(one), metadata)
        return tuple(map(float, value))

    def anything(self, key: str, value: Any, metadata: Mapping[str, Any]) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or (metadata.get("filled") and not value):
            raise self.error(f"{key} = {value!r}: a list of values{', not empty,' * ('filled' in metadata)} belongs here")
        return tuple(value)

    def texts(self, key: str, value: Any, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        if isinstance(value, str):
            value = [v for v in value.split(",") if v]
        if metadata.get("whole"):  # numbers may stand for themselves
            value = [value] if type(value) is int else value
            value = [str(v) if type(v) is int else v for v in value] if isinstance(value, list | tuple) else value
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise self.error(f"{key} = {value!r}: a list of strings belongs here")
        for one in value if "choices" in metadata else ():
            choose(key, one, metadata["choices"], self.where)
        return tuple(value)


def choose(key: str, value: str, known: Iterable[str], where: str = "") -> None:
    """Raise ConfigError, naming the nearest of `known`, unless `value` is one of them. where: as in `build`."""
    names = list(known)
    if value not in names:
        near = difflib.get_close_matches(value, names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        told = f"{key} = {value!r}: one of {', '.join(names)} belongs here{hint}"
        raise ConfigError(f"{where}: {told}" if where else told)


def check_key(cls: type, key: str, where: str = "") -> None:
    """Raise ConfigError, naming the nearest, unless `key` is one of `known_keys`. where: as in `build`."""
    known = known_keys(cls)
    if key not in known:
        table, dot, name = key.rpartition(".")
        here = [k.removeprefix(table + dot) for k in known if k.rpartition(".")[0] == table]
        raise _Reader(known, where).unknown(table + dot, name, here)


def build(cls: type[T], tree: Mapping[str, Any], where: str = "") -> T:
    """The settings that a tree of keys, as TOML is read, means. where: a file's name, for errors. Raises ConfigError."""
    return _Reader(known_keys(cls), where).build(cls, tree, "")


def read_toml(path: Path, what: str = "file") -> dict[str, Any]:
    """The keys of a TOML file. what: what it is called where it is missing. Raises ConfigError naming it, and a neighbour of a
    like name."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        raise ConfigError(f"{what} not found: {path}" + (f"; did you mean {near[0]}?" if near else "")) from error
    except IsADirectoryError as error:
        run = path / "recipe.toml"
        hint = f"; to go on with a run:  fedkeel run {run} --resume" if run.is_file() else ""
        raise ConfigError(f"{path} is a folder, and a {what} belongs here{hint}") from error
    # ValueError: no UTF-8, no TOML, or a number of too many digits; RecursionError: nested too deep
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)


def tree_of(settings: Any) -> dict[str, Any]:
    """The keys of settings as `build` reads them, every default written out."""
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        if "named" in f.metadata:
            tree |= {name: value.get(name, 0.0) for name in f.metadata["named"]}
        elif "own" in f.metadata:
            for key, options in value.items():
                kind, _, name = key.partition(".")
                tree.setdefault(kind, {})[name] = tree_of(options)
        else:
            tree[f.name] = tree_of(value) if dataclasses.is_dataclass(value) else value
    return tree


def to_toml(settings: Any) -> str:
    """Settings as TOML; `build` of it gives equal ones."""
    return _toml(tree_of(settings), "")


def _toml(tree: Mapping[str, Any], prefix: str) -> str:
    lines = [f"{name} = {toml_value(value)}" for name, value in tree.items() if not isinstance(value, Mapping)]
    head = [f"[{prefix}]"] if prefix and lines else []
    own = "\n".join([*head, *lines]) + "\n" if lines else ""
    inner = [_toml(value, f"{prefix}.{name}" if prefix else name) for name, value in tree.items() if isinstance(value, Mapping)]
    return "\n".join(part for part in (own, *inner) if part)


def dotted(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The keys of a recipe as overrides write them, such as train.lr, and their values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= dotted(value, f"{before}{key}.") if isinstance(value, Mapping) else {before + key: value}
    return found


def unlike(settings: Any, others: Any) -> list[str]:
    """Of each key whose value is another than in `others`: `section.key = value`, as an override names it."""
    known = dotted(tree_of(others))
    found = dotted(tree_of(settings))
    return [f"{key} = {toml_value(value)}" for key, value in found.items() if key not in known or value != known[key]]
