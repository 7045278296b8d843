"""The tables of one run, from its Rows alone: by method, by task and by site."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from fedkeel import tables
from fedkeel.scores.metrics import bytes_to_target
from fedkeel.types import FedKeelError, Row

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_TITLES = {name: entry.title for name, entry in tables.BASELINES.items()}
METHODS = {n: _TITLES.get(n, "federated") for n in ("base", "local", "federated", *_TITLES)}  # leg -> as a reader knows it
MISSING = "–"
NOT_FINITE = "not finite"
FAILED = "failed"
MOST_NATS = 700.0  # whose exponential a float still holds
REFERENCE = "reference"  # in a column of differences to it


@dataclass(frozen=True)
class Table:
    """A table of plain text. header: one name a column. lines: as many cells each. notes: sentences below it.

    rules: numbers of lines, from 0, above which a rule sets groups of lines apart where a format can draw one.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    rules: tuple[int, ...] = ()

    def numeric(self) -> list[bool]:
        """Per column, whether it belongs to the right: it is not the first, and each cell is a number or stands for one."""
        columns = list(zip(*self.lines, strict=True)) or [()] * len(self.header)

        def number(cell: str) -> bool:
            return cell.lstrip("+−")[:1].isdigit()

        words = (MISSING, NOT_FINITE, FAILED)
        return [
            k > 0 and all(number(c) or c in words or (c == REFERENCE and any(map(number, cells))) for c in cells)
            for k, cells in enumerate(columns)
        ]

    def markdown(self, level: int = 2) -> str:
        """A heading of `level`, a pipe table and a list of notes, in GitHub's Markdown, all special characters escaped."""
        rule = ["---:" if right else "---" for right in self.numeric()]
        table = [self.header, *self.lines]
        body = ["| " + " | ".join(map(escape, cells)) + " |" for cells in table]
        body.insert(1, "| " + " | ".join(rule) + " |")
        notes = [f"- {escape(note)}" for note in self.notes]
        return "\n".join([f"{'#' * level} {escape(self.title)}", "", *body, *([""] if notes else []), *notes]) + "\n"

    def rich(self) -> RichTable:
        """The same for a terminal, meant to fit into 80 characters: title, table, and the notes as its caption."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title), caption=Text("\n".join(self.notes)), box=SIMPLE_HEAD, show_edge=False)
        table.title_justify = table.caption_justify = "left"
        table.padding = 0
        short = all(len(line[0]) <= 24 for line in self.lines)
        for k, (name, right) in enumerate(zip(self.header, self.numeric(), strict=True)):
            words = Text("\n".join(name.split()))
            table.add_column(words, justify="right" if right else "left", no_wrap=k == 0 and short)
        for line in self.lines:
            table.add_row(*map(Text, line))
        return table


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line, in a table cell too. Underscores inside a word need no escape."""
    special = r"[\\`*|<\[\]~$&]|(?<![^\W_])_|_(?![^\W_])"
    return re.sub(special, lambda found: "\\" + found[0], " ".join(text.split()))


def read_rows(path: Path) -> list[Row]:
    """The Rows of a rows.jsonl; a value of null becomes NaN. Raises FedKeelError, naming file and line."""
    try:
        return rows_of(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise FedKeelError(f"{path} cannot be read: {error}") from error


KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
CHECKED = tuple((one.name, str(one.type), KINDS[str(one.type)]) for one in fields(Row))
USUAL = tuple({"str": str, "int": int, "float": float}[kind] for _, kind, _ in CHECKED)


def rows_of(text: str, where: str) -> list[Row]:
    """The Rows of a rows.jsonl's text. where: the file, for messages. Raises FedKeelError, naming file and line."""
    return [_row(line, where, number) for number, line in enumerate(text.splitlines(), 1)]


def _row(line: str, where: str, number: int) -> Row:
    try:
        row = Row.from_json(json.loads(line))
    except (json.JSONDecodeError, TypeError) as error:
        raise FedKeelError(f"{where}:{number}: not a row of a run: {error}") from error
    if tuple(map(type, vars(row).values())) == USUAL:  # nearly always, and a suite has 10⁵ rows
        return row
    for name, kind, types in CHECKED:
        value = getattr(row, name)
        if not isinstance(value, types) or isinstance(value, bool):
            raise FedKeelError(f"{where}:{number}: not a row of a run: {name} is {value!r}, and should be of type {kind}")
    return row


def check_one_run(rows: Sequence[Row]) -> None:
    """Raises FedKeelError if the Rows are of several runs or seeds: their numbers must not be added up."""
    runs = sorted({(r.run, r.seed) for r in rows})
    if len(runs) > 1:
        told = ", ".join(f"{run} (seed {seed})" for run, seed in runs[:5])
        raise FedKeelError(f"a report is of one run, and these rows are of {len(runs)}: {told}")


def by_site(rows: Sequence[Row], method: str, name: str, split: str = "") -> dict[str, list[float]]:
    """Values over all tasks, by site (empty: all sites together), in the order of rounds and in their Row's unit."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for r in rows:
        if (r.method, r.name, r.split, r.task) == (method, name, split, ""):
            found[r.site].append((r.round, r.value))
    return {site: [value for _, value in sorted(pairs, key=lambda p: p[0])] for site, pairs in sorted(found.items())}


def last_by_site(rows: Sequence[Row], method: str, name: str, split: str = "") -> dict[str, float]:
    """As by_site, the value of the last round only."""
    return {site: values[-1] for site, values in by_site(rows, method, name, split).items()}


def total(rows: Sequence[Row], method: str, name: str) -> float | None:
    """The sum over sites and rounds in the Rows' unit; None if nothing was measured."""
    values = [v for values in by_site(rows, method, name).values() for v in values]
    return sum(values) if values else None


def site_names(rows: Sequence[Row]) -> list[str]:
    """Every site that took part, sorted; the one site of the centralised leg, which holds all rows, is none."""
    sites = (r for r in rows if r.site and r.split != "unseen-sites")
    return sorted({r.site for r in sites if r.method != "centralised" or r.name == "own_score"})


def task_names(rows: Sequence[Row]) -> list[str]:
    """Every task with held-out test rows, sorted."""
    return sorted({r.task for r in rows if r.task and r.split == "test"})


def rounds_done(rows: Sequence[Row]) -> int:
    """Rounds that the federation has finished; those that an early end left out are none."""
    done = {r.round for r in rows if r.method == "federated" and r.name == "seconds" and not r.site}
    return len(done) or max((r.round for r in rows if r.method == "federated"), default=0)


def mean_and_sd(values: Iterable[float]) -> tuple[float, float]:
    """(mean, sample standard deviation with n − 1; 0 for a single value). NaN in, NaN out."""
    held = list(values)
    mean = sum(held) / len(held)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in held) / max(1, len(held) - 1))


def lowest(values: Iterable[float]) -> float:
    """The minimum, NaN if any value is."""
    held = list(values)
    return math.nan if any(map(math.isnan, held)) else min(held)


def number(value: float, digits: int = 1) -> str:
    """With `digits` decimals and a true minus; NOT_FINITE for NaN and infinity."""
    if not math.isfinite(value):
        return NOT_FINITE
    shown = f"{value:.{digits}f}"
    return shown.lstrip("-") if float(shown) == 0.0 else shown.replace("-", "−")


def signed(value: float, digits: int = 1) -> str:
    """As `number`, with a plus above 0."""
    shown = number(value, digits)
    return f"+{shown}" if math.isfinite(value) and float(f"{value:.{digits}f}") > 0.0 else shown


def points(share: float) -> str:
    """A share in [0, 1] in points of 100, one decimal."""
    return number(100 * share)


def points_with_sd(shares: Iterable[float]) -> str:
    """Mean in points, and ± the standard deviation where there is more than one value."""
    held = list(shares)
    if not held:
        return MISSING
    mean, sd = mean_and_sd(held)
    return f"{points(mean)} ± {points(sd)}" if len(held) > 1 and math.isfinite(sd) else points(mean)


def byte_unit(size: float) -> tuple[str, float]:
    """The decimal unit in which `size` bytes read best, and its bytes: ("MB", 1e6)."""
    units = [("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)]
    return next(((name, bytes_) for name, bytes_ in units if size < 999.95 * bytes_), units[-1])


def human_bytes(size: float) -> str:
    """Bytes in the decimal unit that reads best: 659788 -> `659.8 kB`."""
    if not math.isfinite(size):
        return number(size)
    name, bytes_ = byte_unit(size)
    return f"{size / bytes_:.{0 if name == 'B' else 1}f} {name}"


def seconds_text(seconds: float) -> str:
    """Seconds, with a decimal below 100."""
    return number(seconds, 1 if seconds < 100 else 0)


def plural(count: int, noun: str) -> str:
    """`1 site`, `1,200 sites`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def rows_scored(rows: Sequence[Row], method: str) -> int:
    """Held-out test rows that a model of this method was scored on (every local-only model is scored on the same)."""
    counts: dict[str, float] = defaultdict(float)
    for r in rows:
        if (r.method, r.name, r.split) == (method, "rows", "test") and r.task:
            counts[r.site] += r.value
    return int(max(counts.values(), default=0))


def final(rows: Sequence[Row]) -> list[Row]:
    """The rows without the test scores of earlier stages of a stream: what the model is worth in the end."""
    last = max((r.stage for r in rows if r.split == "test"), default=0)
    return [r for r in rows if r.split != "test" or r.stage == last]


def final_scores(rows: Sequence[Row]) -> dict[str, float]:
    """method -> its score on the test rows in the end, a share; of local models, the mean over the sites."""
    found = {method: last_by_site(final(rows), method, "score", "test") for method in METHODS}
    return {method: mean_and_sd(scores.values())[0] for method, scores in found.items() if scores}


def stage_table(rows: Sequence[Row], method: str = "federated") -> Table:
    """The stage × stage matrix of a task stream, in points of 100: a line a stage that has ended, a column a stage's rows."""
    check_one_run(rows)
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for r in rows:
        if r.method == method and r.split == "test" and r.name.startswith("score_of_stage_"):
            found[r.stage][int(r.name.rpartition("_")[2])] = r.value
    count = len(found)
    lines = []
    for stage, scores in sorted(found.items()):
        cells = [points(scores[of]) if of in scores else MISSING for of in range(1, count + 1)]
        lines.append((f"after stage {stage + 1}", *cells, points(mean_and_sd(scores.values())[0])))
    header = ("", *(f"rows of stage {of}" for of in range(1, count + 1)), "mean")
    note = "In points from 0 to 100, on test rows. The diagonal is what was just learnt, the last line what is left of it."
    return Table(f"{METHODS[method]}: score by stage", header, tuple(lines), (note,) if lines else ())


SHARES = (0.5, 0.8, 0.9, 0.95, 1.0)  # of the best validation score


def traffic_table(rows: Sequence[Row]) -> Table:
    """Bytes to a target score: when the federation's validation score first reached shares of its best, and what all sites
    had sent and received by then. Empty where there is no curve, and in a stream, whose rows change with its stages."""
    check_one_run(rows)
    scores = {
        r.round: r.value
        for r in rows
        if (r.method, r.name, r.split, r.site, r.task) == ("federated", "score", "validation", "", "")
    }
    header = ("share of the best score", "score, points", "round", "bytes up", "bytes down")
    title = "Traffic to a target score"
    if not scores or any(r.stage for r in rows) or max(scores.values()) <= 0:
        return Table(title, header, ())
    rounds, lines = sorted(scores), []
    for share in SHARES:
        target = share * max(scores.values())
        reached = next(round for round in rounds if scores[round] >= target)
        sent = []
        for name in ("bytes_up", "bytes_down"):
            of = [(r.round, r.value) for r in rows if (r.method, r.name) == ("federated", name)]
            by = [sum(value for round, value in of if round <= point) for point in rounds]
            sent.append(bytes_to_target([scores[point] for point in rounds], by, target) or 0.0)
        lines.append((f"{share:.0%}", points(scores[reached]), str(reached), *map(human_bytes, sent)))
    note = "Of the federation, on validation rows; bytes of all sites since the start, as serialised, headers included."
    return Table(title, header, tuple(lines), (note,))


def method_table(rows: Sequence[Row]) -> Table:
    """A line a method that has any Row. Scores in points of 100, bytes in decimal units, training in seconds."""
    check_one_run(rows)
    rows = final(rows)
    present = [m for m in METHODS if any(r.method == m for r in rows)]
    counting = {name: m.title for name, m in tables.METRICS.items() if m.counts}
    named = {r.name for r in rows if r.split == "test" and not r.task}
    found, losses = counting.keys() & named, [name for name in tables.METRICS if tables.by_token(name) and name in named]
    scores = {"score": "score, points"} | ({n: counting[n] for n in counting if n in found} if len(found) > 1 else {})
    own_header = ("worst site, own rows", "mean over sites, own rows")
    loss_header = [title for name in losses for title in (tables.METRICS[name].title, "perplexity")]
    header = ("method", *scores.values(), *loss_header, *own_header, "bytes up", "bytes down", "train, s", "rows scored")
    lines = []
    for method in present:
        own = last_by_site(rows, method, "own_score", "test").values()
        moved = [total(rows, method, name) if method == "federated" else None for name in ("bytes_up", "bytes_down")]
        trained = total(rows, method, "site_seconds")
        lines.append(
            (
                METHODS[method],
                *(points_with_sd(last_by_site(rows, method, name, "test").values()) for name in scores),
                *(cell for name in losses for cell in _loss(last_by_site(rows, method, name, "test").values())),
                points(lowest(own)) if own else MISSING,
                points(mean_and_sd(own)[0]) if own else MISSING,
                *(MISSING if size is None else human_bytes(size) for size in moved),
                MISSING if trained is None else seconds_text(trained),
                f"{rows_scored(rows, method):,}" if rows_scored(rows, method) else MISSING,
            )
        )
    return Table("Scores on held-out test rows", header, tuple(lines), _notes(rows, present))


def _loss(nats: Iterable[float]) -> tuple[str, str]:
    """Mean loss in nats, and its perplexity."""
    held = list(nats)
    if not held:
        return MISSING, MISSING
    mean = mean_and_sd(held)[0]
    return number(mean, 3), number(math.exp(mean), 2) if mean < MOST_NATS else NOT_FINITE


def _notes(rows: Sequence[Row], present: Sequence[str]) -> tuple[str, ...]:
    sites, rounds = site_names(rows), rounds_done(rows)
    scored = max((rows_scored(rows, m) for m in present), default=0)
    where = f"{plural(len(sites), 'site')}, {plural(rounds, 'round')}, seed {', '.join(sorted({str(r.seed) for r in rows}))}"
    notes = [
        f"{plural(scored, 'test row')} of {plural(len(task_names(rows)), 'task')}; {where}. "
        "A score is the mean over tasks, each task counting the same, in points from 0 to 100."
        if scored
        else f"No test row is scored yet; {where}."
    ]
    own = {m: last_by_site(rows, m, "own_score", "test") for m in present}
    tested = sorted({site for found in own.values() for site in found})
    if tested:
        without = len(sites) - len(tested) if set(present) - {"local"} else 0
        notes.append(
            "Own rows: the test rows of one site, the mean over its tasks"
            + (f"; {plural(without, 'site')} without test rows left out." if without else ".")
        )
    locals_ = last_by_site(rows, "local", "score", "test")
    if "local" in present:
        notes.append(
            f"local-only: one model a site ({len(locals_)} of {plural(len(sites), 'site')} scored), each scored on all test "
            "rows; mean ± standard deviation (n − 1) over them. Its own-rows columns take each model on its own site's rows."
        )
    if "analytic" in present:
        notes.append(
            "analytic head: a ridge classifier of sums over all sites' rows, without training; free text is the base's."
        )
    if "centralised" in present:
        bound = "it forgets what a stage after the other teaches" if max(r.stage for r in rows) else "an upper reference"
        notes.append(f"centralised pools all rows: what federation avoids; {bound}.")
    up, down = (total(rows, "federated", name) for name in ("bytes_up", "bytes_down"))
    if up is not None and down is not None:
        notes.append(f"Federated bytes are the messages of all sites and rounds: {up:,.0f} up to the server, {down:,.0f} down.")
    errors = by_site(rows, "federated", "aggregation_error").get("", [])
    if errors:
        mean = mean_and_sd(errors)[0]
        told = f"{100 * mean:.2g} % of the exact change" if math.isfinite(mean) else number(mean)
        notes.append(f"Mean aggregation error of the federated rounds: {told} (Frobenius norm, low-rank modules).")
    if bounds := by_site(rows, "federated", "clip").get("", []):
        notes.append(f"Changes of sites were clipped to C = {bounds[0]:.3g} at first and {bounds[-1]:.3g} at last.")
    scoring = {m: total(rows, m, "test_seconds") for m in present}
    apart = [f"{METHODS[m]} {seconds_text(s)} s" for m, s in scoring.items() if s is not None]
    notes.append(
        "Training seconds are summed over sites and rounds"
        + (f"; scoring the test rows took, apart from them, {', '.join(apart)}." if apart else ".")
    )
    failed = {site: len(values) for site, values in by_site(rows, "federated", "failed").items()}
    if failed:
        times = ", ".join(f"{site} {count}×" for site, count in failed.items())
        notes.append(f"Failures: {sum(failed.values())}, each left out of its round ({times}).")
    return tuple(notes)


def task_table(rows: Sequence[Row]) -> Table:
    """A line a task, sorted by name, and a column a method, in points of 100; local-only is the mean over sites. Under a task
    of free text a line with the loss of the given answers, in nats a token."""
    check_one_run(rows)
    rows = final(rows)
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    losses: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    counts: dict[str, float] = {}
    kinds: dict[str, set[str]] = defaultdict(set)
    metrics = {name: m.title for name, m in tables.METRICS.items() if m.counts}
    for r in rows:
        if r.task and r.split == "test":
            if r.name == "score":
                found[r.task, r.method].append(r.value)
            elif r.name == "rows":
                counts[r.task] = r.value
            elif tables.by_token(r.name):
                losses[r.task, r.name, r.method].append(r.value)
            elif r.name in metrics:
                kinds[r.task].add(metrics[r.name])
    present = [m for m in METHODS if any(method == m for _, method in found)]
    lines = []
    for task in task_names(rows):
        cells = [found[task, m] for m in present]
        shown = [points(mean_and_sd(values)[0]) if values else MISSING for values in cells]
        count = f"{counts.get(task, 0):,.0f}"
        lines.append((task, " and ".join(sorted(kinds[task])) or MISSING, count, *shown))
        for name in sorted({name for of, name, _ in losses if of == task}):
            told = [_loss(losses[task, name, m])[0] for m in present]
            lines.append((task, tables.METRICS[name].title, count, *told))
    names = ["local-only (mean)" if m == "local" else METHODS[m] for m in present]
    notes = ("Scores in points from 0 to 100.",) if lines else ("No test row is scored yet.",)
    return Table("Score by task", ("task", "metric", "rows", *names), tuple(lines), notes)


def site_table(rows: Sequence[Row]) -> Table:
    """A line a site of the federation: positions, loss in nats a position, bytes, and scores on its own test rows."""
    check_one_run(rows)
    positions, losses, up, down = (by_site(rows, "federated", n) for n in ("positions", "loss", "bytes_up", "bytes_down"))
    local, federated = (last_by_site(rows, m, "own_score", "test") for m in ("local", "federated"))
    lines = []
    for site in site_names(rows):
        lines.append(
            (
                site,
                f"{sum(positions[site]):,.0f}" if site in positions else MISSING,
                number(losses[site][-1], 3) if site in losses else MISSING,
                human_bytes(sum(up[site])) if site in up else MISSING,
                human_bytes(sum(down[site])) if site in down else MISSING,
                points(local[site]) if site in local else MISSING,
                points(federated[site]) if site in federated else MISSING,
            )
        )
    header = ("site", "positions trained", "last loss, nats", "bytes up", "bytes down")
    scores = ("own rows: local-only", "own rows: federated")
    notes = (
        "Positions (supervised tokens), bytes and loss are of the federation: positions and bytes over all rounds, the loss "
        "in nats a position of the last round that the site took part in.",
        "Own rows: points from 0 to 100 on the site's own test rows, of the model it trained alone and of the federated one.",
    )
    return Table("Sites", (*header, *scores), tuple(lines), notes)
