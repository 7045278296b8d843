"""A recipe from TOML and `key=value`, and back."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkeel.recipe.checks import _check_data, _cross_check, _with_order
from fedkeel.recipe.schema import CASTS, QUANTIZERS, Recipe
from fedkeel.recipe.settings import ConfigError


def _fields(cls: Any) -> list[tuple[dataclasses.Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return [(f, hints[f.name]) for f in dataclasses.fields(cls)]


def known_keys(cls: Any = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every settable key, dotted, and the type of its value."""
    keys: dict[str, Any] = {}
    for f, hint in _fields(cls):
        keys |= known_keys(hint, f"{prefix}{f.name}.") if dataclasses.is_dataclass(hint) else {prefix + f.name: hint}
    return keys


def _check_choice(key: str, value: Any, choices: Sequence[str] | None) -> None:
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key} = {value!r}: one of {', '.join(choices)} belongs here{hint}")


def _check(key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` as the type of its field, or a ConfigError."""
    if hint == tuple[int, ...]:
        if isinstance(value, str):
            value = [int(v) if v.isdecimal() else v for v in value.split(",") if v]
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, list | tuple) or not all(type(v) is int and v >= 1 for v in value):
            raise ConfigError(f"{key} = {value!r}: a list of whole numbers from 1 belongs here")
        return tuple(value)
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str):
            value = [v for v in value.split(",") if v]
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{key} = {value!r}: a list of strings belongs here")
        for one in value:
            _check_choice(key, one, metadata.get("choices"))
        return tuple(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key} = {value!r}: {hint.__name__} belongs here, not {type(value).__name__}")
    _check_choice(key, value, metadata.get("choices"))
    if metadata.get("codec"):
        _check_codec(key, value)
    if "low" in metadata:
        low, high, above = metadata["low"], metadata["high"], metadata["above"]
        if not (low < value if above else low <= value) or value > high:
            bound = f"above {low}" if above else f"at least {low}"
            raise ConfigError(f"{key} = {value!r}: must be {bound}" + (f" and at most {high}" if high < float("inf") else ""))
    return value


def _check_codec(key: str, spec: str) -> None:
    """Raise ConfigError unless `codecs.make_codec` would take `spec`; here too, as that one needs torch."""
    first, plus, second = spec.partition("+")
    fine = not plus and first in (*CASTS, *QUANTIZERS)
    if first.startswith("topk=") and (not plus or second in (*CASTS, *QUANTIZERS)):
        try:
            fine = 0.0 < float(first.removeprefix("topk=")) < 1.0
        except ValueError:
            fine = False
    if not fine:
        known = ", ".join((*CASTS, *QUANTIZERS))
        raise ConfigError(f"{key} = {spec!r}: one of {known}, or topk=SHARE with 0 < SHARE < 1, as in topk=0.1+int8")


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {f.name: (f, hint) for f, hint in _fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            key = prefix + name
            # a slip within this table comes first
            here = difflib.get_close_matches(name, fields, 1, cutoff=0.75) if prefix else []
            same = [k for k in known_keys() if k.rpartition(".")[2] == name]
            near = difflib.get_close_matches(key, known_keys(), 1, cutoff=0.4)
            best = prefix + here[0] if here else next(iter([*same, *near]), None)
            raise ConfigError(f"unknown key {key!r}" + (f"; did you mean {best!r}?" if best else ""))
        f, hint = fields[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{prefix}{name} is a table of keys, not {value!r}; write {prefix}{name}.KEY=VALUE")
            arguments[name] = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
        else:
            arguments[name] = _check(prefix + name, value, hint, f.metadata)
    return cls(**arguments)


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is not one (a bare word, a path)."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["v"] if len(parsed) == 1 else text


def _assign(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{override!r} is neither a recipe file nor key=value")
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key.strip()}: {parent!r} is a value, not a table")
    value = _parse_value(text.strip())
    # `name=7` or `data.root=2024`: a field of text takes the text as it was written
    is_text = known_keys().get(key.strip()) is str
    node[leaf] = text.strip() if is_text and not isinstance(value, str) else value


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` (TOML; None: all defaults) with `key=value` overrides applied on top.

    Raises ConfigError on a missing or malformed file, an unknown key, or a value that cannot be right.
    """
    return make_recipe(read_tree(path, overrides))


def read_tree(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe as its file and `key=value` overrides give them, unchecked. Raises ConfigError on a file that is
    missing or malformed."""
    tree: dict[str, Any] = {}
    if path is not None:
        try:
            tree = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
            raise ConfigError(f"recipe not found: {path}" + (f"; did you mean {near[0]}?" if near else "")) from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
    for override in overrides:
        _assign(tree, override)
    return tree


def make_recipe(tree: Mapping[str, Any], data: bool = True) -> Recipe:
    """The recipe that a mapping of keys, as TOML is read, means. Raises ConfigError on what cannot be right.

    data: whether the files of data must be there; a coordinator holds none.
    """
    recipe: Recipe = _build(Recipe, tree, "")
    if data:
        _check_data(recipe)
        recipe = _with_order(recipe)
    _cross_check(recipe)
    return recipe


def toml_value(value: Any) -> str:
    """A value of a recipe as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML string, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(v) for v in value) + "]"
    return repr(value)


def to_toml(recipe: Recipe) -> str:
    """The whole recipe as TOML, every default written out; `load_recipe` reads it back to an equal Recipe."""
    lines, tables = [], []
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        if dataclasses.is_dataclass(value):
            inner = [f"{g.name} = {toml_value(getattr(value, g.name))}" for g in dataclasses.fields(value)]
            tables.append("\n".join([f"[{f.name}]", *inner]))
        else:
            lines.append(f"{f.name} = {toml_value(value)}")
    return "\n\n".join(["\n".join(lines), *tables]) + "\n"
