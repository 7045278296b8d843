"""`fedkeel doctor` and `keys`: what a recipe may say, and what is wrong with a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkeel.cli.common import RecipeArguments, app, recipe_of, terminal
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from rich.console import Console

    from fedkeel.evidence.report.verdicts import Verdict
    from fedkeel.runs.prepare import Prepared

_LEVELS = {"bad": "bold red", "look": "yellow", "good": "green"}


@app.command()
def keys(section: Annotated[str, typer.Argument(help="One of them, such as train.", show_default=False)] = "") -> None:
    """Every key of a recipe: type, default, what may stand there, unit, meaning."""
    from rich.table import Table

    from fedkeel.recipe.reference import sections
    from fedkeel.tables import load_plugins

    load_plugins()
    found = sections()
    names = [one.name for one in found if one.name]
    if section and section not in names:
        raise FedKeelError(f"there is no section {section!r}; there are {', '.join(names)}")
    table = Table(show_lines=False)
    for heading in ("key", "type", "default", "unit", "meaning"):
        table.add_column(heading, no_wrap=heading == "key")
    for one in found:
        for key in one.keys if section in ("", one.name) else ():
            kind = key.kind if not key.allowed else f"{key.kind}: {key.allowed}".replace("`", "")
            table.add_row(key.name, kind, key.default, key.unit, key.about.replace("`", ""))
    terminal().print(table)


@app.command()
def doctor(
    arguments: RecipeArguments = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Train a few rounds too, and throw them away: disagreement, rate, codec.")
    ] = False,
) -> None:
    """What looks wrong with a recipe, or with the folder of a run: verdicts with their numbers, and what to change."""
    given = arguments or []
    run = Path(given[0]) if given and (Path(given[0]) / "recipe.toml").is_file() else None
    console = terminal()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("reading rows"):
        from rich.table import Table
        from rich.text import Text

        from fedkeel.evidence import doctor as verdicts
        from fedkeel.evidence.report.verdicts import in_order
        from fedkeel.runs.dry import Dry
        from fedkeel.runs.prepare import prepare

        prepared = None
        away = run is not None and not given[1:] and verdicts.rows_are_away(run)
        try:
            if away:
                raise FedKeelError(
                    f"{run} is a coordinator's run, and its rows are at its sites; `fedkeel doctor` on the recipe, at a site "
                    f"and with its data.root, tells of them"
                )
            prepared = prepare(recipe_of([str(run / "recipe.toml"), *given[1:]] if run else given))
            if run is None:
                Dry(prepared)  # what a run would refuse is no matter of taste
        except FedKeelError as error:
            if run is None or probe:
                raise
            console.print(f"note: the rows were not looked at: {error}", style="yellow")
        if run and away:
            found = verdicts.of_coordinator(run)
        else:
            found = verdicts.of_run(run, prepared) if run else verdicts.of_recipe(prepared) if prepared else []
    if probe and prepared:
        guessed = verdicts.payload(prepared.recipe)  # a probe measures it
        found = [*(v for v in found if v != guessed), *_probed(console, prepared, run)]
    table = Table(title="Verdicts", title_justify="left", show_lines=True)
    for heading in ("", "what was found", "what to change"):
        table.add_column(heading)
    for verdict in in_order(found):
        table.add_row(Text(verdict.level, style=_LEVELS[verdict.level]), verdict.told, verdict.change)
    console.print(table)


def _probed(console: Console, prepared: Prepared, run: Path | None) -> list[Verdict]:
    from rich.progress import Progress

    with Progress(console=console, disable=not console.is_terminal) as progress:
        import torch

        from fedkeel.evidence.probe import Probe

        task = progress.add_task("probing: a site's round at a time", total=None)
        torch.set_num_threads(prepared.recipe.threads)
        return list(Probe(prepared, run, lambda done, of: progress.update(task, completed=done, total=of)).verdicts())
