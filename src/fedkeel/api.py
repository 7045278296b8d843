"""FedKeel from Python: a federation over rows that are at hand, with terms and a rule of one's own, and what comes of a run.

    import fedkeel

    result = fedkeel.run({"federation.rounds": 5}, sites={"north": rows, "south": more}, watch=print)
    result.scores, result.rows, result.model

What is run is a recipe like any other, in a folder like any other: the commands of FedKeel read it too.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkeel import tables
from fedkeel.recipe.checks import check_one_model
from fedkeel.recipe.load import known_of, make_recipe, read_tree, with_threads
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import to_toml
from fedkeel.types import FedKeelError, Row

if TYPE_CHECKING:
    from fedkeel.data.given import Rows
    from fedkeel.model.lora import Model
    from fedkeel.runs.watch import Watch

EXISTING = ("refuse", "resume", "replace")
# a recipe: its file, its keys (nested as in TOML, or dotted), or what was read already; None is all defaults
Given = Path | str | Mapping[str, Any] | Recipe | None


@dataclass(frozen=True)
class Result:
    """What a run came to. folder: where all of it lies, see `RunFolder`. recipe: as it was resolved."""

    folder: Path
    recipe: Recipe
    _trained: Model | None = field(default=None, repr=False)

    @cached_property
    def measured(self) -> list[Row]:
        """All that was measured."""
        from fedkeel.evidence.report.tables import read_rows

        return read_rows(self.folder / "rows.jsonl")

    @property
    def rows(self) -> Any:
        """All that was measured, as a pandas frame where pandas is installed, else a list of Rows (`types.Row`)."""
        try:
            import pandas
        except ImportError:
            return list(self.measured)
        return pandas.DataFrame([row.as_json() for row in self.measured])

    @property
    def scores(self) -> dict[str, float]:
        """method -> its score on the test rows at the end of the run, a share; of local models, the mean over the sites."""
        from fedkeel.evidence.report.tables import final_scores

        return final_scores(self.measured)

    @property
    def adapter(self) -> Path:
        """The folder of the federated adapter in PEFT's format. Raises FedKeelError where factors stayed at the sites."""
        path = self.folder / "adapter"
        if not (path / "adapter_model.safetensors").exists():
            if self.recipe.federation.rule in tables.RULES:
                check_one_model(self.recipe, path)
            raise FedKeelError(f"{path} is missing: the federation has not ended, or has not ended in one adapter")
        return path

    @property
    def best(self) -> Path:
        """The folder of the adapter that was the best of the last stage by validation rows. Raises FedKeelError without one."""
        path = self.folder / "best"
        if not (path / "adapter_model.safetensors").exists():
            raise FedKeelError(f"{path} is missing: no validation rows were scored, or with a rule that leaves no such adapter")
        return path

    @cached_property
    def _whole(self) -> Model:
        from fedkeel.runs.served import trained_model

        return self._trained or trained_model(self.recipe, self.adapter.parent)

    @property
    def model(self) -> Any:
        """The base with the federated adapter in it, a `peft.PeftModel` in float32, ready to generate. Raises as `adapter`
        does."""
        return self._whole.net.float()

    @property
    def tokenizer(self) -> Any:
        """Of the base."""
        return self._whole.tokenizer

    def report(self) -> Path:
        """Write the report, pictures and tables, into the folder; returns the path of its page."""
        from fedkeel.evidence.report import write_report

        return write_report(self.folder).with_suffix(".html")


def run(
    recipe: Given = None,
    *,
    sites: Mapping[str, Rows] | None = None,
    terms: Sequence[Callable[..., Any] | tables.Term] = (),
    rule: Callable[..., Any] | tables.Rule | None = None,
    watch: Callable[[str], object] | Watch | None = None,
    existing: str = "refuse",
) -> Result:
    """Run a recipe in this process: its federation and its baselines.

    sites: name -> its rows, in place of the recipe's data: dicts as in JSON Lines (docs/recipes.md), a pandas frame or a data
    set. terms: losses beside the task's, each a function `forward -> mean per position` of `types.Forward`, taken with the
    recipe's `term.NAME.weight`, or with 1; or a `tables.Term`, which can say more. rule: a function (reference, updates,
    weights[, options]) -> Aggregate, see `aggregate.rule`, or a `tables.Rule`. Both go by the functions' names. watch: told
    lines, as by print, or a `Watch`. existing: what happens where the folder holds this run already: `refuse`, `resume`,
    `replace`. Raises FedKeelError.
    """
    if callable(terms):
        raise FedKeelError(f"terms = {terms!r}: a list of functions belongs here")
    if sites is not None and not isinstance(sites, Mapping):
        raise FedKeelError(f"sites = {type(sites).__name__}: a dict, name -> rows, belongs here")
    if not isinstance(recipe, Recipe | Mapping | str | Path | None):
        raise FedKeelError(f"recipe = {recipe!r:.60}: a path, a dict of keys or a Recipe belongs here")
    if existing not in EXISTING:
        raise FedKeelError(f"existing = {existing!r}: one of {', '.join(EXISTING)} belongs here")
    tables.load_plugins()
    own = [_term(term) for term in terms]
    mine = None if rule is None else _rule(rule)
    with _entered(tables.TERMS, own), _entered(tables.RULES, [mine] if mine else []):
        tree = _tree(recipe)
        for term in own:
            if not term.section:  # its weight is a key of its own
                _section(tree, "term", term.name).setdefault("weight", 1.0)
        if mine:
            _section(tree, "federation")["rule"] = mine.name
        return _run(tree, sites, watch, existing)


def load(folder: Path | str) -> Result:
    """What a finished run came to, from its folder. Raises FedKeelError where there is none.

    Terms, rules and codecs that were given from Python need not be there: they have had their say.
    """
    folder = Path(folder)
    recipe = make_recipe(known_of(read_tree(folder / "recipe.toml")), data=False)
    if not (folder / "rows.jsonl").exists():
        raise FedKeelError(f"{folder} holds no run: rows.jsonl is missing")
    return Result(folder, recipe)


def _run(
    tree: dict[str, Any], sites: Mapping[str, Rows] | None, watch: Callable[[str], object] | Watch | None, existing: str
) -> Result:
    from fedkeel.data.given import records_of
    from fedkeel.data.sources import whole
    from fedkeel.evidence import doctor
    from fedkeel.runs.execute import execute
    from fedkeel.runs.folder import RunFolder
    from fedkeel.runs.prepare import prepare
    from fedkeel.runs.watch import Lines

    if sites is not None:
        _section(tree, "data")["source"] = "rows"
        _section(tree, "partition")["scheme"] = "natural"
    recipe = with_threads(make_recipe(tree))
    given = None if sites is None else whole(records_of(sites, recipe.data), recipe.data, recipe.seed)
    looker = Lines(watch or (lambda line: None)) if watch is None or callable(watch) else watch
    folder = RunFolder(Path(recipe.out) / recipe.name)
    prepared = prepare(recipe, records=given)
    model = execute(prepared, folder, looker, resume=existing == "resume", fresh=existing == "replace")
    doctor.keep(prepared, folder.path, doctor.of_recipe(prepared))
    return Result(folder.path, recipe, None if tables.RULES[recipe.federation.rule].personal else model)


def _tree(recipe: Given) -> dict[str, Any]:
    """The keys of a recipe, nested."""
    if isinstance(recipe, Recipe):
        return tomllib.loads(to_toml(recipe))
    if not isinstance(recipe, Mapping):
        return read_tree(None if recipe is None else Path(recipe))
    tree: dict[str, Any] = {}
    for name, value in recipe.items():
        *sections, key = str(name).split(".")
        node = _section(tree, *sections)
        if isinstance(value, Mapping):
            node.setdefault(key, {}).update(_tree(value))
        else:
            node[key] = _plain(value)
    return tree


def _plain(value: Any) -> Any:
    """A value as TOML has it: a number of NumPy's or torch's is the number."""
    if isinstance(value, tuple | set | list):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") and getattr(value, "shape", None) == () else value


def _section(tree: MutableMapping[str, Any], *names: str) -> MutableMapping[str, Any]:
    """The table of keys under these names, made where it is not there."""
    for name in names:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise FedKeelError(f"{'.'.join(names)} is a table of keys, not {tree!r}")
    return tree


def _named(function: Callable[..., Any]) -> str:
    if not callable(function):
        raise FedKeelError(f"{function!r} is given for a term or rule, where a function belongs")
    name = getattr(function, "__name__", type(function).__name__)
    if not tables.NAME.fullmatch(name):
        raise FedKeelError(f"{name}: a term or rule goes by its function's name, so it must have one; define it with def")
    return name


def _taking(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The function, called with its first arguments where it takes fewer than `count`."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return wraps(function)(lambda *arguments: function(*arguments[: count - 1]))
    except ValueError:  # of C, without a signature
        pass
    return function


def _term(given: Callable[..., Any] | tables.Term) -> tables.Term:
    if isinstance(given, tables.Term):
        return replace(given, name=given.name or _named(given.load()))
    name = _named(given)
    return tables.Term(_taking(given, 2), row=f"{name}_loss", name=name)


def _rule(given: Callable[..., Any] | tables.Rule) -> tables.Rule:
    if isinstance(given, tables.Rule):
        return replace(given, name=given.name or _named(given.load()))
    return tables.Rule(_taking(given, 4), name=_named(given))


@contextmanager
def _entered(table: tables.Table[Any], entries: Sequence[tables.Entry]) -> Iterator[None]:
    """While it lasts, the entries are in the table. Raises FedKeelError for a name that is taken."""
    for entry in entries:
        if entry.name in table:
            raise FedKeelError(f"there is a {table.kind} {entry.name!r} already; give yours another name")
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        raise FedKeelError(f"two {table.kind}s of one name among {', '.join(names)}")
    try:
        for entry in entries:
            table[entry.name] = entry
        yield
    finally:
        for name in names:
            table.pop(name, None)
