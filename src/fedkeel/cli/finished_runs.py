"""Commands on a finished run: `ask`, `evaluate`, `measure`, `export`, `report`, `audit`."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from fedkeel import tables
from fedkeel.cli.common import BaseOption, BestOption, RunArgument, app, finished, names_in, terminal
from fedkeel.recipe.load import known_of, load_recipe, make_recipe, read_tree, with_threads
from fedkeel.recipe.schema import Recipe
from fedkeel.types import FedKeelError


@app.command()
def ask(
    run_folder: RunArgument,
    prompt: Annotated[str | None, typer.Argument(help="A question; without one, a chat.", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of an answer, at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    task: Annotated[
        str, typer.Option(help="Ask as this task's rows do: behind its instruction, and for its labels.", show_default=False)
    ] = "",
    best: BestOption = False,
    base: BaseOption = "",
) -> None:
    """Ask a run: its base and its federated model answer side by side."""
    which = "best" if best else "adapter"
    recipe, _ = finished(run_folder, which, base)
    console = terminal()
    with console.status("loading libraries and model"):
        import torch

        from fedkeel.display import Answers
        from fedkeel.runs.ask import WHO, Ask

        torch.set_num_threads(recipe.threads)
        models = Ask(recipe, run_folder, which)

    said: dict[str, list[tuple[str, str]]] = {who: [] for who in WHO}

    def put(question: str) -> None:
        with Answers(console, WHO) as answers:
            for who in WHO if task else ():
                models.answer_as(who, task, question, tokens, partial(answers.told, who))
            for who in () if task else WHO:
                turns = [*said[who], ("user", question)]
                text = models.answer(who, turns, tokens, temperature, partial(answers.told, who))
                said[who] = [*turns, ("assistant", text)] if models.remembers else []

    if prompt is not None:
        put(prompt)
        return
    console.print(
        "Each model goes by what it said itself. " if models.remembers and not task else "Each question is taken alone. ",
        end="",
        style="dim",
    )
    console.print("An empty line ends this.", style="dim")
    while True:
        try:
            question = console.input("[bold]> [/bold]")
        except (EOFError, KeyboardInterrupt):
            break
        if not question.strip():
            break
        put(question)


def _as_said(run: Path, given: list[str]) -> Recipe:
    """A run's recipe with other keys. Who says one weight means it, whatever the run had to choose from."""
    said = {override.partition("=")[0].strip() for override in given}
    one = [f"{key}_from=[]" for key in ("evidence.serve", "stream.average") if key in said and f"{key}_from" not in said]
    return with_threads(make_recipe(known_of(read_tree(run / "recipe.toml", [*given, *one]))))


@app.command()
def evaluate(
    run_folder: RunArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as evaluation.test_rows=0")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test")] = "test",
    best: BestOption = False,
    base: BaseOption = "",
    predictions: Annotated[Path | None, typer.Option(help="Write every row's prediction to this JSON Lines file.")] = None,
) -> None:
    """Score a run's federated adapter, on more rows or other data than the run did."""
    if split not in ("train", "validation", "test"):
        raise FedKeelError(f"--split {split}: one of train, validation, test belongs here")
    which = "best" if best else "adapter"
    finished(run_folder, which, base)
    recipe = _as_said(run_folder, [*([f"model.base={base}"] if base else []), *(overrides or [])])
    console = terminal()
    with console.status("loading libraries, data and model"):
        import torch
        from rich.progress import track
        from rich.table import Table

        from fedkeel.files import write_atomic
        from fedkeel.runs.encode import formatter_of
        from fedkeel.runs.prepare import prepare
        from fedkeel.runs.served import trained_model
        from fedkeel.scores.evaluate import choose, score, task_table

        torch.set_num_threads(recipe.threads)
        prepared = prepare(recipe)
        model = trained_model(recipe, run_folder, which)
        formatter = formatter_of(model, prepared)
        rows = choose(prepared.stages[-1].all(split), split, recipe.evaluation.limit(split))
    if not rows:
        raise FedKeelError(f"the data has no row of split {split!r}")
    ticks = iter(track(range(len(rows)), description=f"scoring {len(rows):,} rows", console=console))

    def advance(count: int) -> None:
        for _ in range(count):
            next(ticks, None)

    scored = score(model, formatter, rows, recipe.evaluation, advance)
    next(ticks, None)
    beside = f" with the analytic head beside it, weight {model.beside.weight:g}," if model.beside.heads else ""
    table = Table(title=f"{run_folder}: federated adapter{beside} on {split} rows", title_justify="left")
    for heading in ("task", "rows", "score", *(metric.title for metric in tables.METRICS.values())):
        table.add_column(heading, justify="left" if heading == "task" else "right")
    found = task_table(scored)
    for task, metrics in found.items():
        cells = ["" if k not in metrics else _shown(k, metrics[k]) for k in ("score", *tables.METRICS)]
        table.add_row(task, f"{metrics['rows']:.0f}", *cells)
    mean = sum(m["score"] for m in found.values()) / len(found)
    table.add_row("mean over tasks", f"{len(scored)}", f"{100 * mean:.1f}", *[""] * len(tables.METRICS), style="bold")
    console.print(table)
    if predictions:
        lines = [
            {"id": s.record.id, "task": s.record.task, "output": s.record.output, "prediction": s.prediction, **s.metrics}
            for s in scored
        ]
        write_atomic(predictions, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        console.print(f"predictions: {predictions}", highlight=False)


def _shown(metric: str, value: float) -> str:
    return f"{value:.3f}" if tables.by_token(metric) else f"{100 * value:.1f}"


@app.command()
def measure(
    run_folders: Annotated[list[Path], typer.Argument(help="Run folders, such as runs/quickstart.", show_default=False)],
    families: Annotated[
        str | None, typer.Option(help="Families of damage, joined by commas; '' for none.", show_default="all")
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of each random damage.")] = 20,
    rows: Annotated[int, typer.Option(help="Test rows a task, chosen by hash; 0: all.")] = 300,
    general: Annotated[
        list[Path] | None, typer.Option(help="Held-out general text, a paragraph a line; may be given again.")
    ] = None,
    general_rows: Annotated[int, typer.Option(help="Paragraphs of each such file, chosen by hash; 0: all.")] = 100,
    unseen: Annotated[Path | None, typer.Option(help="Rows of tasks that no site trained on, JSON Lines.")] = None,
    unseen_tasks_file: Annotated[Path | None, typer.Option(help="Their instructions and labels, as data.tasks_file.")] = None,
    threads: Annotated[int, typer.Option(help="Of torch.")] = 1,
    states: Annotated[bool, typer.Option(help="Compare hidden states of stages and sites with the final model's.")] = True,
    speculation: Annotated[bool, typer.Option(help="Let lower blocks draft the model's answers, and count what fits.")] = True,
) -> None:
    """Measure finished runs: under damage, on general text, unseen tasks, hidden states, drafts; see measures.jsonl in each."""
    console = terminal()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("loading libraries"):
        import torch
        from rich.markup import escape
        from rich.progress import Progress

        from fedkeel.evidence.measure.parts import measure as measure_runs
        from fedkeel.evidence.measure.run import Settings
        from fedkeel.evidence.measure.table import measures_table

    named = None if families is None else tuple(names_in(families))
    settings = Settings(named, draws, rows, tuple(general or ()), general_rows, unseen, unseen_tasks_file, states, speculation)
    torch.set_num_threads(threads)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("loading", total=None)
        begun: list[Path] = []

        def watch(folder: Path, part: str, done: int, total: int) -> None:
            if folder not in begun:
                begun.append(folder)
                if not console.is_terminal:
                    console.print(f"{folder}: measuring", highlight=False)
            where = f"{folder.name} ({len(begun)} of {len(run_folders)}): {part}"
            progress.update(task, description=escape(where), completed=done, total=total)

        found = measure_runs(run_folders, settings, watch)
    console.print(measures_table(found).rich())
    console.print(f"rows: {', '.join(str(f / 'measures.jsonl') for f in found)}", highlight=False)


@app.command()
def export(
    run_folder: RunArgument,
    target: Annotated[Path, typer.Argument(help="A folder to create.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Base and adapter in one, instead of the adapter.")] = False,
    gguf: Annotated[bool, typer.Option("--gguf", help="For llama.cpp and Ollama, as GGUF.")] = False,
    kind: Annotated[
        str, typer.Option("--type", help="Of the matrices of --merged --gguf: f16, bf16 or f32.", show_default="f16")
    ] = "",
    depth: Annotated[
        float, typer.Option("--depth", min=0.05, max=1, help="The share of blocks to keep; an adapter brings its base along.")
    ] = 1.0,
    least: Annotated[
        bool,
        typer.Option(
            "--least",
            help="Of --depth: leave out the blocks of least influence, as `fedkeel measure` found it, not the top ones.",
        ),
    ] = False,
    best: BestOption = False,
    base: BaseOption = "",
) -> None:
    """Write a run's federated adapter in PEFT format, or merged into its base in Hugging Face layout, or as GGUF; with a model
    card that says how to load it."""
    if kind and not (merged and gguf):
        raise FedKeelError("--type is of the matrices of --merged --gguf; leave it out, or add both")
    if depth < 1 and gguf:
        raise FedKeelError("--depth writes Hugging Face layout: leave --gguf out, and convert what it writes")
    if least and depth == 1:
        raise FedKeelError("--least says which blocks --depth leaves out; add --depth")
    if kind:
        from fedkeel.model.gguf_write import TYPES

        if kind not in TYPES:
            raise FedKeelError(f"--type {kind}: one of {', '.join(TYPES)} belongs here")
    which = "best" if best else "adapter"
    recipe, _ = finished(run_folder, which, base, merged or gguf or depth < 1)
    if target.exists():
        raise FedKeelError(f"{target} exists; name a folder that does not")
    console = terminal()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("writing"):
        from fedkeel.evidence import export as files

        notes: list[str] = []
        if gguf:
            files.export_gguf(recipe, run_folder, target, merged, which, kind or "f16")
        else:
            notes = files.export(recipe, run_folder, target, merged, which, files.Depth(depth, least))
    what = f"{'merged model' if merged else 'adapter'}{' as GGUF' if gguf else ''}"
    for note in notes:
        console.print(f"note: {note}", style="yellow", highlight=False)
    console.print(f"{what}: {target}\nhow to load it: {target / 'README.md'}", highlight=False)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="A run's folder or a suite's.", show_default=False)],
) -> None:
    """Write report.html and report.md of a run or a suite, as far as it has come."""
    from fedkeel.evidence.report import write_report, write_suite_report

    if (folder / "suite.json").is_file():
        path = write_suite_report(folder)
    elif (folder / "recipe.toml").is_file():
        path = write_report(folder)
    else:
        raise FedKeelError(f"{folder} holds neither suite.json nor recipe.toml: it is no folder of a suite or a run")
    typer.echo(f"report: {path.with_suffix('.html')}")


@app.command()
def audit(
    run_folder: RunArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.root=PATH")] = None,
) -> None:
    """Attack a run's model, which rows it was trained on, and single updates, which words and answers were behind them.

    It needs the rows, and trains up to 16 steps at four sites for the first round and the last; the report then shows it."""
    finished(run_folder)
    recipe = with_threads(load_recipe(run_folder / "recipe.toml", overrides or []))
    console = terminal()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("attacking"):
        import torch

        from fedkeel.evidence.leaks.audit import audit as attack
        from fedkeel.evidence.report.leaks import audit_tables
        from fedkeel.runs.prepare import prepare

        torch.set_num_threads(recipe.threads)
        found = attack(prepare(recipe), run_folder)
    for table in audit_tables(found):
        console.print(table.rich())
