"""What every machine of a deployment installs: the releases that are installed here."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement  # of transformers
from packaging.utils import canonicalize_name

from fedkeel import tables
from fedkeel.deploy.manifest import DeployError
from fedkeel.recipe.schema import Recipe

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"  # that the releases are for
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


def needed_extras(recipe: Recipe) -> tuple[str, ...]:
    """The extras of fedkeel that a coordinator and a site of this federation need."""
    base = recipe.model.base
    asked = {
        "hub": recipe.data.source == "hub",
        "gguf": base.endswith(".gguf") or (base in tables.BASES and bool(tables.BASES[base].package)),
        "parquet": any(".parquet" in name for name in recipe.data.files),
        "privacy": recipe.privacy.unit != "none",
        **dict.fromkeys(recipe.track, True),
    }
    return ("flower", *(extra for extra, wanted in asked.items() if wanted))


def pins(extras: Sequence[str]) -> tuple[str, ...]:
    """Lines of a requirements file: each library that fedkeel with `extras` asks for by name, at its release on this machine.

    Of a local build (2.9.0+cpu) the release alone, as a machine with a GPU needs another build of it. One that is not installed
    here has the range that FedKeel allows. Raises DeployError if FedKeel itself is not installed, only imported.
    """
    try:
        wanted = requires("fedkeel") or []
    except PackageNotFoundError as error:
        raise DeployError(
            "fedkeel is not installed here, so what the other machines should install is not known: pip install its source"
        ) from error
    return tuple(sorted(_pin(one) for one in wanted if set(EXTRA.findall(one)) <= set(extras)))


def constraints(extras: Sequence[str]) -> tuple[str, ...]:
    """Lines of a constraints file: each library that fedkeel with `extras` needs in the end, at its release on this machine.

    Constraints, as another machine may need fewer: a library of this system or of this build of PyTorch. What is not installed
    here is not held.
    """
    found = needed([("fedkeel", extra) for extra in ("", *extras)], _requires)
    return tuple(f"{name}=={version(name).partition('+')[0]}" for name in sorted(found) if name != "fedkeel")


def needed(start: Iterable[tuple[str, str]], requires: Callable[[str], Sequence[str] | None]) -> dict[str, set[str]]:
    """name -> what it needs by itself on this machine, of all that `start` needs in the end; names are canonical.

    start: pairs of a name and an extra of it, or "". requires: name -> its Requires-Dist; None: not known, and left out.
    """
    found: dict[str, set[str]] = {}
    todo = list(start)
    seen = set(todo)
    while todo:
        name, extra = todo.pop()
        if (needs := requires(name)) is None:
            continue
        holds = [need for need in map(Requirement, needs) if need.marker is None or need.marker.evaluate({"extra": extra})]
        found.setdefault(name, set()).update(canonicalize_name(need.name) for need in holds)
        asked = {(canonicalize_name(need.name), one) for need in holds for one in ("", *need.extras)}
        todo += asked - seen
        seen |= asked
    return found


def _requires(name: str) -> Sequence[str] | None:
    """Of what is installed here."""
    try:
        return requires(name) or []
    except PackageNotFoundError:
        return None


def _pin(requirement: str) -> str:
    """A line of a requirements file for a requirement as a distribution's metadata has it."""
    asked = requirement.partition(";")[0].strip()
    named = NAME.match(asked)
    assert named is not None, requirement
    try:
        return f"{named[0]}=={version(named[0]).partition('+')[0]}"
    except PackageNotFoundError:
        return f"{asked}  # not installed where this was written"
