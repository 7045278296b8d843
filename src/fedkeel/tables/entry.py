"""An entry of a table, the table, and how packages of others add to it."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any, Generic, TypeVar

from fedkeel.types import FedKeelError

PLUGINS = "fedkeel"  # the group of entry points
NAME = re.compile(r"[A-Za-z0-9_-]+")  # a bare key of TOML


class TableError(FedKeelError):
    """A name that a table does not hold, or an entry whose code cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """code: `module:name` of what does it, or the thing itself; given first. options: the dataclass of its own keys, frozen, or
    where it is. name: set by the table.
    """

    code: str | Callable[..., Any] = dataclasses.field(kw_only=False)
    options: str | type | None = None
    name: str = ""

    def load(self) -> Any:
        """What `code` names. Raises TableError if it cannot be imported."""
        return imported(self.code, self.name)

    def settings(self) -> type | None:
        """The dataclass of its options; None without any."""
        return None if self.options is None else imported(self.options, self.name)


def imported(code: Any, name: str) -> Any:
    """What `module:attribute` names, or the thing itself. name: of the entry, for the TableError of what cannot be imported."""
    if not isinstance(code, str):
        return code
    module, _, attribute = code.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise TableError(f"{name}: {code} cannot be loaded: {error}") from error


E = TypeVar("E", bound=Entry)


class Table(MutableMapping[str, E], Generic[E]):
    """Entries of one kind by name, in the order in which they were put in."""

    def __init__(self, kind: str, entries: dict[str, E]) -> None:
        self.kind = kind
        self._entries: dict[str, E] = {}
        for name, entry in entries.items():
            self[name] = entry

    def __getitem__(self, name: str) -> E:
        """Raises TableError, a KeyError too, naming the nearest known one."""
        try:
            return self._entries[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._entries, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(self._entries)}"
            raise UnknownNameError(f"no {self.kind} {name!r}; {hint}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own asks for the entry, and so for the nearest name

    def __setitem__(self, name: str, entry: E) -> None:
        """Raises TableError for a name that could be no key of a recipe."""
        if not NAME.fullmatch(name):
            raise TableError(f"{self.kind} {name!r}: letters, digits, _ and - belong here")
        self._entries[name] = dataclasses.replace(entry, name=name)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class UnknownNameError(TableError, KeyError):
    """A name that a table does not hold."""

    __str__ = Exception.__str__  # KeyError's shows the text's repr


@cache
def load_plugins() -> None:
    """Let installed packages add their entries, once a process. Raises TableError naming the package whose function fails."""
    for point in metadata.entry_points(group=PLUGINS):
        try:
            point.load()()
        except Exception as error:  # whatever a stranger's code raises
            raise TableError(f"the plug-in {point.name!r} ({point.value}) cannot be used: {error!r}") from error
