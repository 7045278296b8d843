"""Every key of a recipe in words: type, default, what may stand there, unit, meaning."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from fedkeel import tables
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import fields_of, toml_value

KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}


@dataclass(frozen=True)
class Key:
    """name: dotted. kind: of its value, in words. default: as TOML writes it. allowed: what may stand there, in words."""

    name: str
    kind: str
    default: str
    allowed: str
    unit: str
    about: str


@dataclass(frozen=True)
class Section:
    """name: empty for the keys at the top of a recipe. about: its docstring's first paragraph."""

    name: str
    about: str
    keys: tuple[Key, ...]


def sections() -> list[Section]:
    """All keys, in the order of the schema; then those of entries of tables that have some of their own."""
    top = [(f, hint) for f, hint in fields_of(Recipe) if "own" not in f.metadata]
    own = [(f, hint) for f, hint in top if not dataclasses.is_dataclass(hint)]
    found = [Section("", "Of the whole run.", tuple(key for f, hint in own for key in _keys(f, hint, "")))]
    for f, hint in top:
        if dataclasses.is_dataclass(hint):
            keys = tuple(key for g, of in fields_of(hint) for key in _keys(g, of, f"{f.name}."))
            found.append(Section(f.name, _paragraph(cast(type, hint)), keys))
    return found + [
        _of_entry(kind, entry) for kind, table in tables.OWN.items() for entry in table.values() if entry.settings()
    ]


def _of_entry(kind: str, entry: tables.Entry) -> Section:
    name, asked = f"{kind}.{entry.name}", getattr(entry, "asks", None)
    about = f"Of the {kind} `{entry.name}`" + (f", which needs `{asked[0]} = {toml_value(asked[1])}`." if asked else ".")
    return Section(name, about, tuple(key for f, of in fields_of(entry.settings()) for key in _keys(f, of, f"{name}.")))


def _paragraph(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split("\n\n")[0].split())


def _keys(field: dataclasses.Field[Any], hint: Any, prefix: str) -> Iterator[Key]:
    told = field.metadata
    if "named" in told:
        for name, entry in told["named"].items():
            bounds = told["bounds"](entry)
            unit = "probability" if entry.chance else ""
            yield Key(prefix + name, "number", "0.0", _allowed(bounds), unit, entry.about)
    else:
        # an entry's own options may be any dataclass
        made = field.default if field.default is not dataclasses.MISSING else cast(Any, field.default_factory)()
        default = toml_value(made)
        yield Key(prefix + field.name, _kind(hint), default, _allowed(told), told.get("unit", ""), told.get("about", ""))


def _kind(hint: Any) -> str:
    if hint in KINDS:
        return KINDS[hint]
    return {tuple[int, ...]: "list of whole numbers", tuple[float, ...]: "list of numbers"}.get(hint, "list of texts")


def _allowed(told: Mapping[str, Any]) -> str:
    if "choices" in told:
        return ", ".join(f"`{name}`" for name in cast(Iterable[str], told["choices"]))
    if "low" not in told:
        return ""
    low, high = (f"{told[end]:g}" for end in ("low", "high"))
    first = f"above {low}" if told["above"] else f"from {low}"
    return first + (f" to {high}" if math.isfinite(told["high"]) else "")
