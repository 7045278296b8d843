"""`fedkeel bench` and `pack`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkeel.cli.common import app, names_in, terminal
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from rich.console import Console

    from fedkeel.evidence.suites.plan import Plan, Planned


def _print_suites(console: Console) -> None:
    from rich.table import Table

    from fedkeel.evidence.suites.plan import load_plan, plan_names

    table = Table(title="Suites", title_justify="left")
    for heading in ("name", "what it compares", "streams", "methods", "seeds"):
        table.add_column(heading)
    for name in plan_names():
        plan = load_plan(name)
        table.add_row(name, plan.title, ", ".join(plan.streams), str(len(plan.methods)), ", ".join(map(str, plan.seeds)))
    console.print(table)


def _seeds(given: str) -> list[int]:
    try:
        return [int(seed) for seed in names_in(given)]
    except ValueError:
        raise FedKeelError(f"--seeds {given}: whole numbers joined by commas belong here") from None


def _nothing(plan: Plan, tune: bool, left_out: Sequence[str]) -> str:
    """Why a suite has no run."""
    grids = any(stream.grid for stream in plan.streams.values())
    whys = ["none of its streams has a `grid` of settings to try"] if tune and not grids else []
    return "; ".join([f"suite {plan.name!r}: nothing to run", *whys, *left_out])


def _needed(plan: Plan, given: Mapping[str, Path | None]) -> list[str]:
    """Overrides of the streams that need one of the keys of `given`."""
    return [
        f"{name}:{key}={value}"
        for name, stream in plan.streams.items()
        for key, value in given.items()
        if value is not None and key in stream.needs
    ]


def _write_chosen(console: Console, folder: Path, trials: Sequence[Planned]) -> None:
    from fedkeel.evidence.suites.tuning import trial_scores, tuned_text
    from fedkeel.files import write_atomic

    write_atomic(folder / "tuned.toml", tuned_text(trial_scores(trials, folder)))
    console.print(f"chosen by validation rows: {folder / 'tuned.toml'}", highlight=False)


def _report_suite(console: Console, folder: Path, runs: Sequence[Planned]) -> None:
    from fedkeel.evidence.report import write_suite_report
    from fedkeel.evidence.suites.tuning import chance
    from fedkeel.files import write_atomic

    with console.status("reading the data, for chance levels"):
        path = folder / "chance.json"  # also of other streams, if another call ran those
        known = json.loads(path.read_text()) if path.exists() else {}
        write_atomic(path, json.dumps({**known, **chance(runs)}, indent=1) + "\n")
    console.print(f"report: {write_suite_report(folder)}", highlight=False)


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A suite by name, or a plan (.toml); without one, a list.")] = "",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value for every run, or STREAM:key=value for those of one stream.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="The folder of data, for streams that read one (data.root).")] = None,
    encoder: Annotated[Path | None, typer.Option(help="A pretrained encoder, for streams that need one (model.base).")] = None,
    streams: Annotated[str, typer.Option(help="Only these, joined by commas.")] = "",
    methods: Annotated[str, typer.Option(help="Only these, joined by commas.")] = "",
    seeds: Annotated[str, typer.Option(help="Instead of the plan's, joined by commas.")] = "",
    jobs: Annotated[int, typer.Option(min=0, help="Runs at a time; 0: as cores and memory allow.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of all suites.")] = Path("runs/suites"),
    tune: Annotated[
        bool, typer.Option("--tune", help="The trials of tuning instead, and of each method the best setting.")
    ] = False,
    tuned: Annotated[Path | None, typer.Option(help="A tuned.toml of --tune, in place of the plan's choices.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs; do nothing.")] = False,
) -> None:
    """Run a suite: many methods, seeds and streams, and one report. Stopped, it goes on where it was."""
    console = terminal()
    if not suite:
        _print_suites(console)
        return
    from fedkeel.evidence.suites.plan import load_plan
    from fedkeel.evidence.suites.pool import jobs_for
    from fedkeel.evidence.suites.runs import execute, runs_of

    plan = load_plan(suite, tuned)
    wanted = [*(overrides or []), *_needed(plan, {"data.root": data, "model.base": encoder})]
    runs, left_out = runs_of(plan, names_in(streams), names_in(methods), _seeds(seeds), wanted, tune)
    for why in left_out:
        console.print(f"note: {why}", style="yellow", highlight=False)
    if dry_run:
        for run in runs:
            console.print(run.name, highlight=False)
        console.print(f"{len(runs)} runs")
        return
    if not runs:
        raise FedKeelError(_nothing(plan, tune, left_out))
    folder = out / (f"{plan.name}-tuning" if tune else plan.name)
    jobs = jobs or jobs_for()
    console.print(f"{plan.title} -> {folder}/", highlight=False)
    from fedkeel.display import SuiteDisplay

    try:
        with SuiteDisplay(console, jobs) as display:
            failed = execute(plan, runs, folder, jobs, display)
    except KeyboardInterrupt:
        console.print("\nstopped; the same command goes on from here", highlight=False)
        raise typer.Exit(130) from None
    if tune:
        every, _ = runs_of(plan, extra=wanted, tune=True)  # also trials of another call, for other streams or methods
        _write_chosen(console, folder, every)
    else:
        _report_suite(console, folder, runs)
    if failed:
        raise FedKeelError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(r.name for r in failed)}; see their .log files"
        )


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(help="A suite's folder, such as runs/suites/main.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="Where to keep it, such as results/suites/main.", show_default=False)],
) -> None:
    """Keep a suite's finished runs: their rows in one archive, recipes and tables beside it; `fedkeel report` reads it too."""
    from fedkeel.evidence.suites.pack import pack as keep

    kept, left = keep(folder, target)
    typer.echo(f"{kept} runs: {target}/" + (f"; left out, as they have not ended: {', '.join(left)}" if left else ""))
