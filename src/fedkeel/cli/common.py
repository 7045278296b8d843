"""What the commands share: the app, arguments that several take, and how they find a run and talk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkeel import __version__, tables
from fedkeel.recipe.checks import check_one_model
from fedkeel.recipe.load import known_of, load_recipe, make_recipe, read_tree, with_threads
from fedkeel.recipe.schema import Recipe
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from rich.console import Console


app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Federated fine-tuning of language models that keeps its course when the sites' data differ.",
)

RecipeArguments = Annotated[
    list[str] | None,
    typer.Argument(help="A recipe file (.toml), then key=value overrides such as train.lr=1e-3.", show_default=False),
]
BaseOption = Annotated[
    str, typer.Option(help="Where the base model is here, if not where the recipe says.", show_default=False)
]
BestOption = Annotated[bool, typer.Option("--best", help="The best round by validation rows, not the last.")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.", show_default=False)]


def terminal() -> Console:
    """Where commands print."""
    from rich.console import Console

    # A file or pipe has no width of its own; tables there should not be broken at 80 columns.
    # Names of sites, tasks and files may hold brackets: nothing that is printed is markup.
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=120)


def recipe_of(arguments: Sequence[str]) -> Recipe:
    """The recipe that the command line means: an optional file first, then overrides; threads resolved to a number."""
    path = Path(arguments[0]) if arguments and "=" not in arguments[0] else None
    return with_threads(load_recipe(path, arguments[1:] if path else arguments))


def finished(folder: Path, which: str = "adapter", base: str = "", needs_base: bool = True) -> tuple[Recipe, Path]:
    """The recipe and the PEFT folder of a run whose federation has ended, or an error that says what is missing. Its rows need
    not be here, as a coordinator has none.

    which: `adapter`, or `best` for the best by validation rows. base: where the base is on this machine; empty: where the
    recipe says. needs_base: whether it must be here.
    """
    from fedkeel.evidence.card import base_is_away

    recipe, adapter = folder / "recipe.toml", folder / "adapter" / "adapter_model.safetensors"
    if not recipe.is_file():
        raise FedKeelError(f"{recipe} is missing: {folder} is not a run whose federation has ended")
    loaded = with_threads(make_recipe(known_of(read_tree(recipe, [f"model.base={base}"] if base else [])), data=False))
    if needs_base and base_is_away(loaded, folder):
        raise FedKeelError(
            f"the base {loaded.model.base!r} of this run is a folder at its sites: say where it is here with --base PATH"
        )
    if base:
        from fedkeel.runs.served import check_base

        check_base(loaded, folder)
    check_one_model(loaded, folder / "adapter")
    if not adapter.is_file():
        raise FedKeelError(f"{adapter} is missing: {folder} is not a run whose federation has ended")
    if not (folder / which).is_dir():
        raise FedKeelError(
            f"{folder / which} is missing: no validation rows were scored in the last stage, or with a rule that "
            f"leaves no such adapter"
        )
    return loaded, folder / which


def names_in(given: str) -> list[str]:
    """Those that stand between the commas."""
    return [name for name in given.split(",") if name]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    tables.load_plugins()


def main() -> None:
    """The entry point: a FedKeelError becomes one paragraph on stderr and exit status 1."""
    try:
        app()
    except FedKeelError as error:
        print(f"fedkeel: {error}", file=sys.stderr)
        sys.exit(1)
