"""A recipe from TOML and `key=value`, and back; and what is left of one whose method is switched off."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedkeel import tables
from fedkeel.recipe.checks import check_data, cross_check, with_order
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError, Frozen, build, cores, dotted, known_keys, read_toml, to_toml


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `path` (TOML; None: all defaults) with `key=value` overrides applied on top.

    Raises ConfigError on a missing or malformed file, an unknown key, or a value that cannot be right.
    """
    return make_recipe(read_tree(path, overrides))


def read_tree(path: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe as its file and `key=value` overrides give them, unchecked. Raises ConfigError on a file that is
    missing or malformed."""
    tables.load_plugins()
    tree = {} if path is None else read_toml(path, "recipe")
    known = known_keys(Recipe)
    for override in overrides:
        _assign(tree, override, known)
    return tree


def known_of(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A finished run's recipe without rules, terms and codecs that are known nowhere but where it ran, as those given from
    Python: its adapter is trained, and needs none of them."""
    found = {**tree}
    federation, default = {**found.get("federation", {})}, Recipe().federation
    if federation.get("rule", default.rule) not in tables.RULES:
        federation["rule"] = default.rule
    for key in ("codec_up", "codec_down"):
        try:
            tables.codec_parts(federation.get(key, getattr(default, key)))
        except ValueError:
            federation[key] = getattr(default, key)
    for kind, table in (("rule", tables.RULES), ("term", tables.TERMS)):
        if isinstance(own := found.get(kind), Mapping):
            found[kind] = {name: options for name, options in own.items() if name in table}
    return {**found, "federation": federation}


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, what it was, what it is) of each key, such as train.lr, that two recipes as TOML is read have otherwise, sorted. A
    key that one of them lacks, as an earlier version did, counts there at its default."""
    default = dotted(tomllib.loads(to_toml(Recipe())))
    was, held = {**default, **dotted(before)}, {**default, **dotted(now)}
    for key in sorted(was.keys() | held.keys()):
        if was.get(key) != held.get(key):
            yield key, was.get(key), held.get(key)


def make_recipe(tree: Mapping[str, Any], data: bool = True, order: bool = False, here: bool = True) -> Recipe:
    """The recipe that a mapping of keys, as TOML is read, means. Raises ConfigError on what cannot be right.

    data: whether the files of data must be there; a coordinator holds none. order: whether stream.order is written out as
    stages even so, for which data.tasks_file must be readable. here: whether it was written on this machine, and may name a
    file for a chat template; one that was sent holds the template's text.
    """
    tables.load_plugins()
    recipe = build(Recipe, tree)
    if here:
        text = _template_text(recipe.model.chat_template)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, chat_template=text))
    if data:
        check_data(recipe)
    if data or order:
        recipe = with_order(recipe)
    cross_check(recipe)
    return recipe


def _template_text(asked: str) -> str:
    """The chat template that a recipe names: of a file its text, so that what is edited later changes no run; else what it says
    as it stands."""
    path = os.path.expanduser(asked)  # as isfile, without an error for a user or a path that cannot be
    if "{" in asked or not asked or not os.path.isfile(path):
        return asked
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.chat_template = {asked!r} cannot be read: {error}") from error


def with_threads(recipe: Recipe) -> Recipe:
    """The recipe with a number of threads, where it names none: OMP_NUM_THREADS of the environment, else for this machine."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    ours = int(asked) if asked.isdigit() and int(asked) else min(cores(), 8)
    return recipe if recipe.threads else dataclasses.replace(recipe, threads=ours)


def _parse_value(text: str) -> Any:
    """A TOML value, or the text itself where it is not one (a bare word, a path)."""
    try:
        parsed = tomllib.loads(f"v = {text}")
    except (ValueError, RecursionError):  # no TOML, a number of too many digits, nested too deep
        return text
    return parsed["v"] if len(parsed) == 1 else text


def _assign(tree: dict[str, Any], override: str, known: Mapping[str, Any]) -> None:
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
    is_text = known.get(key.strip()) is str
    node[leaf] = text.strip() if is_text and not isinstance(value, str) else value


def plain(recipe: Recipe) -> Recipe:
    """The recipe with every part of a method at its default, which is off: plain LoRA (see `tables.switches`)."""
    default = Recipe()
    for switch in tables.switches():
        section, _, key = switch.partition(".")
        if section not in tables.OWN:
            held = getattr(recipe, section)
            fields = {f.name for f in dataclasses.fields(held)}
            off = {key: getattr(getattr(default, section), key)} if key in fields else {"amounts": Frozen()}
            recipe = dataclasses.replace(recipe, **{section: dataclasses.replace(held, **off)})
    own = {key: options for key, options in recipe.own.items() if not key.startswith("term.")}
    return dataclasses.replace(recipe, own=Frozen(own))
