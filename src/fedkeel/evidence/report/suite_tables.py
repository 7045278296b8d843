"""The tables of a suite, a function each: from what its runs left to plain text. Scores in points of 100."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedkeel.evidence.report.chance import MARK, RULE, Chance
from fedkeel.evidence.report.interval import COVERAGE, RESAMPLES
from fedkeel.evidence.report.results import Result, interaction
from fedkeel.evidence.report.run_numbers import (
    by_task,
    damage_names,
    final_score,
    held_out,
    last_stage,
    mean_cka,
    measured,
    split_score,
)
from fedkeel.evidence.report.suite import BASELINES, SKIPPED, Line, Suite
from fedkeel.evidence.report.tables import (
    FAILED,
    MISSING,
    REFERENCE,
    Table,
    mean_and_sd,
    number,
    plural,
    points,
    points_with_sd,
    signed,
)
from fedkeel.recipe.settings import dotted
from fedkeel.scores.metrics import participation_gap, step_cost


def with_sd(values: Collection[float], digits: int = 2, scale: float = 1.0) -> str:
    """Mean ± standard deviation (n − 1) of values times `scale`; the mean alone if there is one value, MISSING for none."""
    if not values:
        return MISSING
    mean, sd = mean_and_sd([scale * v for v in values])
    return f"{number(mean, digits)} ± {number(sd, digits)}" if len(values) > 1 else number(mean, digits)


def signed_points(share: float | None) -> str:
    return MISSING if share is None else signed(100.0 * share)


def ahead_text(values: Collection[float]) -> str:
    """A mean difference in points, ± its standard deviation over seeds."""
    if not values:
        return MISSING
    mean, sd = mean_and_sd([100.0 * v for v in values])
    return f"{signed(mean)} ± {number(sd)}" if len(values) > 1 else signed(mean)


def megabytes(values: Collection[float]) -> str:
    """The mean in MB (1e6 bytes), with a decimal from 10 MB on and two below."""
    if not values:
        return MISSING
    size = mean_and_sd(values)[0] / 1e6
    return number(size, 1 if size >= 10 else 2)


ATTACKED = "attack success"  # a column of suites with a backdoor


def _same(values: Sequence[Any]) -> str:
    """What all values are, or the different ones."""
    return ", ".join(sorted({str(v) for v in values})) if values else MISSING


def _steps(line: Line) -> str:
    trains = [run.recipe.get("train", {}) for run in line.runs]
    return _same(
        [
            plural(t["local_epochs"], "epoch") if t.get("local_epochs") else t["local_steps"]
            for t in trains
            if "local_steps" in t
        ]
    )


def _seeds(line: Line) -> str:
    """`3`, or `2 of 3` where not all that were planned are there."""
    return str(line.planned) if len(line.runs) == line.planned else f"{len(line.runs)} of {line.planned}"


def _final(result: Result) -> str:
    """The final score, or why there is none."""
    return points_with_sd(result.final.values()) if result.final else FAILED if result.line.failed else MISSING


def _header(reference: str) -> tuple[str, ...]:
    """The columns of a suite's scores."""
    low = f"{COVERAGE:.0%} interval".replace("%", " %")
    return (
        "method",
        "seeds",
        "final score",
        f"difference to {reference}",
        low,
        "rounds",
        "local steps",
        "trials",
        "MB up",
        "MB down",
        "step cost",
        "when learnt",
        "BWT",
        "forgetting",
        "retention ratio",
        "worst site",
        "bottom decile",
        "sd over sites",
        "held-out SSI",
        "held-out fall",
        ATTACKED,
    )


def score_table(suite: Suite, stream: str, results: Sequence[Result], chances: Mapping[str, Chance]) -> Table:
    """A line a method of one stream, its cost beside its score; columns that no line has a number for are left out."""
    reference = next((r for r in results if r.line.method == suite.reference and not r.line.baseline), None)
    cost = reference.cost if reference and sum(reference.cost) > 0.0 else ()
    header = _header(suite.reference)
    lines = []
    for r in results:
        is_reference = r is reference
        federated = not r.line.baseline
        trials = suite.trials.get(stream, {}).get(r.line.method)
        lines.append(
            (
                r.line.name + (" (reference)" if is_reference else ""),
                _seeds(r.line),
                _final(r),
                REFERENCE if is_reference else ahead_text(r.ahead.values()),
                f"{signed_points(r.interval.low)} to {signed_points(r.interval.high)}" if r.interval else MISSING,
                _same(r.rounds),
                _steps(r.line) if federated else MISSING,
                MISSING if trials is None or not federated else str(trials),
                megabytes(r.up),
                megabytes(r.down),
                number(step_cost(r.cost, cost), 2) if cost and r.cost else MISSING,
                points_with_sd(r.stream["learnt"]),
                points_with_sd(r.stream["bwt"]),
                points_with_sd(r.stream["forgetting"]),
                with_sd(r.stream["retention"]),
                *(points_with_sd(values) for values in (r.worst, r.decile, r.spread)),
                with_sd(r.held_out_ssi),
                points_with_sd(r.held_out_fall),
                points_with_sd(r.fooled),
            )
        )
    shown = [k for k in range(len(header)) if k < 3 or any(line[k] not in (MISSING, REFERENCE) for line in lines)]
    title = f"{stream}: scores"
    short = tuple(tuple(line[k] for k in shown) for line in lines)
    baselines = sum(r.line.baseline for r in results)
    absent = [header[k] for k in range(len(header)) if k not in shown and header[k] != ATTACKED]
    notes = _score_notes(results, chances, absent)
    return Table(title, tuple(header[k] for k in shown), short, notes, (baselines,) if 0 < baselines < len(lines) else ())


def _score_notes(results: Sequence[Result], chances: Mapping[str, Chance], missing: Sequence[str]) -> tuple[str, ...]:
    notes = [
        "Final score: after the last stage, on held-out test rows, the mean over tasks, in points from 0 to 100; mean ± "
        "standard deviation (n − 1) over seeds. Differences are of equal seeds. "
        "Baselines come first, then methods, each from the best.",
    ]
    if any(r.interval for r in results):
        notes.append(
            f"Interval: paired bootstrap of the difference, {RESAMPLES:,} resamples of the test rows within each task, all "
            "seeds of a row together. It tells of the choice of test rows alone; the spread over seeds is the ± beside it."
        )
    if any(r.stream["learnt"] for r in results):
        notes.append(
            "When learnt: each stage's score right after it. BWT: final score less when learnt, mean over earlier stages. "
            "Forgetting: best score of an earlier stage less its final one. Retention ratio: final over best. Of local-only "
            "models, from the mean over sites."
        )
    if any(r.worst for r in results):
        notes.append(
            "Sites: scores on a site's own test rows after the last stage; bottom decile is the mean of the lowest tenth of "
            "the sites, rounded up; sd over sites with n − 1. All their tasks count."
        )
    if any(r.fooled for r in results):
        notes.append(
            "Attack success: of test rows with the backdoor's trigger and another label than its target, the share, in points, "
            "that is given the target."
        )
    measures = [run.measures for r in results for run in r.line.runs]
    families = held_out(measures)
    if any(r.held_out_ssi for r in results):
        notes.append(
            f"Held-out: damage of families that the training of no method here used ({', '.join(families)}). SSI: area under "
            "score against strength, 1 where no damage cost anything. Fall: clean score less damaged score, in points."
        )
    notes.append(
        "MB (10⁶ bytes) of all sites and rounds, as serialised. Local steps are those of a site and round. Trials: settings "
        "that tuning tried. Step cost: processor time of a round, as a multiple of the reference's. A baseline takes the "
        "optimiser steps of what it stands against."
    )
    out = [task for task, chance in chances.items() if chance.out]
    if out:
        notes.append(f"At chance, kept out of averages: {', '.join(out)}; see the table of tasks.")
    if not families and any(map(damage_names, measures)):
        notes.append("Damage was measured, but of no family that every method's training had left alone: see the figure.")
        missing = [name for name in missing if not name.startswith("held-out")]
    if missing:
        notes.append(f"Not measured here: {', '.join(missing)}.")
    told = set()
    for r in results:
        for run in r.line.failed:
            if run.name not in told:
                notes.append(f"{run.name} failed: {run.reason or 'no reason was written'}")
            told.add(run.name)
    return tuple(notes)


def task_table(stream: str, results: Sequence[Result], chances: Mapping[str, Chance]) -> Table:
    """A line a task after the last stage, a column a method, means over seeds; the majority share where it is known.

    Tasks at chance are marked and come last; the averages in the last line are without them. No line where a stream has one
    task, whose score is the final score.
    """
    scored = [r for r in results if r.final]
    found = {r.line.name: _tasks(r.line) for r in scored}
    names = sorted({task for tasks in found.values() for task in tasks})
    out = [task for task in names if task in chances and chances[task].out]
    if len(names) == 1 and not out:
        return Table(f"{stream}: score by task", ("task",), ())
    lines = []
    for task in [*(t for t in names if t not in out), *out]:
        majority = points(chances[task].majority) if task in chances else MISSING
        cells = [points(found[r.line.name][task]) if task in found[r.line.name] else MISSING for r in scored]
        lines.append((task + (f" {MARK}" if task in out else ""), majority, *cells))
    if len(names) > 1:
        means = [points(r.mean) if r.mean is not None else MISSING for r in scored]
        lines.append((f"mean{f' without {MARK}' if out else ''}", MISSING, *means))
    header = ("task", "majority share", *(r.line.name for r in scored))
    columns = [k for k in range(len(header)) if k != 1 or any(line[1] != MISSING for line in lines)]
    notes = ["Final test score in points from 0 to 100, mean over seeds; local-only is the mean over sites."]
    if out:
        notes.append(f"{MARK} at chance, and kept out of every average. {RULE}")
    rules = (len(lines) - 1,) if len(names) > 1 else ()
    short = tuple(tuple(line[k] for k in columns) for line in lines)
    return Table(f"{stream}: score by task", tuple(header[k] for k in columns), short, tuple(notes), rules)


def _tasks(line: Line) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for run in line.runs:
        for task, score in by_task(run.rows, line.leg, last_stage(run.rows, line.leg)).items():
            scores.setdefault(task, []).append(score)
    return {task: mean_and_sd(values)[0] for task, values in scores.items()}


def chance_table(stream: str, chances: Mapping[str, Chance]) -> Table:
    """What the rule for tasks at chance decided, task by task."""
    lines = tuple(
        (task, f"{c.rows:,}", points(c.majority), points(c.bar), points(c.centralised), "left out" if c.out else "kept")
        for task, c in chances.items()
    )
    header = ("task", "test rows", "majority share", "bar", "centralised", "averages")
    return Table(f"{stream}: tasks against chance", header, lines, (RULE,))


def square_table(suite: Suite, stream: str, results: Sequence[Result]) -> Table:
    """The 2 × 2 of two factors, what each part gives alone, and their interaction, mean ± sd over seeds."""
    found = interaction(results, suite.square)
    first, second = suite.factors if len(suite.factors) == 2 else ("", "")
    what = (
        ("neither", "neither", False),
        (f"{first} alone", "first", False),
        (f"{second} alone", "second", False),
        ("both", "both", False),
        (f"gain of {first} alone", "first alone", True),
        (f"gain of {second} alone", "second alone", True),
        ("gain of both together", "together", True),
        ("interaction", "interaction", True),
    )
    lines = []
    for name, key, gain in what if found else ():
        values = [one[key] for one in found.values()]
        per_seed = [signed_points(v) if gain else points(v) for v in values]
        method = dict(zip(("neither", "first", "second", "both"), suite.square, strict=True)).get(key, MISSING)
        lines.append((name, method, ahead_text(values) if gain else points_with_sd(values), *per_seed))
    header = ("", "method", "mean ± sd", *(f"seed {seed}" for seed in found))
    notes = (
        "Final score in points; gains over neither. Interaction: both − first − second + neither, what the two give together "
        "beyond the sum of what each gives alone.",
    )
    return Table(f"{stream}: {first} × {second}", header, tuple(lines), notes, (4,) if lines else ())


def parts_of(suite: Suite, results: Sequence[Result]) -> list[tuple[Result, list[float]]]:
    """Methods that are neither of the 2 × 2 nor a knob's value, each with its gains over the method with neither, by seed."""
    of_knobs = {method for values in suite.knobs.values() for method in values.values()}
    base = next((r for r in results if suite.square and r.line.name == suite.square[0]), None)
    if base is None:
        return []
    alone = [r for r in results if not r.line.baseline and r.line.name not in (*suite.square, *of_knobs)]
    return [(r, [score - base.final[seed] for seed, score in r.final.items() if seed in base.final]) for r in alone]


def parts_table(suite: Suite, stream: str, results: Sequence[Result]) -> Table:
    """Every part alone, see `parts_of`."""
    lines = tuple(
        (
            r.line.name,
            suite.methods.get(r.line.name) or MISSING,
            _final(r),
            ahead_text(gains),
            points_with_sd(r.stream["forgetting"]),
        )
        for r, gains in parts_of(suite, results)
    )
    header = ("part", "what it is", "final score", f"gain over {suite.square[0] if suite.square else 'neither'}", "forgetting")
    return Table(f"{stream}: every part alone", header, lines, ("In points; mean ± sd over seeds.",) if lines else ())


def knob_value(suite: Suite, results: Sequence[Result], key: str) -> str:
    """What the reference's recipe holds for `key`, as text; empty if it is not known."""
    for r in results:
        if r.line.method == suite.reference and r.line.runs:
            at: Any = r.line.runs[0].recipe
            for part in key.split("."):
                at = at.get(part) if isinstance(at, dict) else None
            return "" if at is None else str(at)
    return ""


def knob_lines(suite: Suite, results: Sequence[Result], key: str) -> list[tuple[str, Result, bool]]:
    """(value, result, whether it is the reference) of a knob, the reference's own value among them, numbers in their order."""
    by_name = {r.line.name: r for r in results if not r.line.baseline}
    found = [(value, by_name[method], False) for value, method in suite.knobs[key].items() if method in by_name]
    own = knob_value(suite, results, key)
    if suite.reference in by_name and own:
        found = [one for one in found if not same_value(one[0], own)]
        found.append((own, by_name[suite.reference], True))
    return sorted(found, key=lambda one: (as_number(one[0]) is None, as_number(one[0]) or 0.0, one[0]))


def as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def same_value(a: str, b: str) -> bool:
    """Whether two values of a key, as text, are one: as numbers, where both are numbers."""
    x, y = as_number(a), as_number(b)
    return x == y if x is not None and y is not None else a == b


def knob_table(suite: Suite, stream: str, results: Sequence[Result], key: str) -> Table:
    """How final score and forgetting answer to one key, all else as in the reference."""
    lines = tuple(
        (
            value + (" (reference)" if own else ""),
            _seeds(r.line),
            _final(r),
            REFERENCE if own else ahead_text(r.ahead.values()),
            points_with_sd(r.stream["forgetting"]),
        )
        for value, r, own in knob_lines(suite, results, key)
    )
    header = (key, "seeds", "final score", f"difference to {suite.reference}", "forgetting")
    return Table(f"{stream}: {key}", header, lines, ("In points; mean ± sd over seeds.",))


def retention_table(stream: str, results: Sequence[Result]) -> Table:
    """What was kept of the base and how it carries over: KL, perplexity, CKA, unseen tasks and sites, if measured."""
    lines = []
    for r in results:
        if r.line.baseline or not r.line.runs:
            continue
        measures = [run.measures for run in r.line.runs]
        kl, ratio = ([v for m in measures if (v := measured(m, n)) is not None] for n in ("kl_to_base", "perplexity_ratio"))
        cka, site = ([v for m in measures if (v := mean_cka(m, n)) is not None] for n in ("state_cka", "site_cka"))
        tasks = [v for m in measures if (v := split_score(m, "unseen")) is not None]
        both = [(final_score(run.rows, r.line.leg), split_score(run.rows, "unseen-sites")) for run in r.line.runs]
        pairs = [(seen, unseen) for seen, unseen in both if seen is not None and unseen is not None]
        gaps = [participation_gap(seen, unseen) for seen, unseen in pairs]
        apart = (points_with_sd([unseen for _, unseen in pairs]), points_with_sd(gaps))
        cells = (with_sd(kl, 3), with_sd(ratio, 3), with_sd(cka, 3), with_sd([1 - v for v in site], 3))
        lines.append((r.line.name, *cells, points_with_sd(tasks), *apart))
    header = (
        "method",
        "KL to base, nats",
        "perplexity ratio",
        "CKA to stage ends",
        "1 − CKA of sites",
        "unseen tasks",
        "unseen sites",
        "participation gap",
    )
    shown = [k for k in range(len(header)) if k == 0 or any(line[k] != MISSING for line in lines)]
    if len(shown) == 1:
        return Table(f"{stream}: retention and generalisation", header, ())
    notes = (
        "KL and perplexity: fine-tuned against base on held-out general text; a ratio above 1 is worse than the base. CKA: "
        "mean over layers and stages on fixed prompts, 1 where nothing moved; 1 − CKA of sites: how far a local round moves "
        "a site. Unseen tasks: scores on tasks that no site trained on. Participation gap: final score on rows of sites that "
        "trained, less that on rows of sites that did not. Scores in points. Mean ± sd over seeds.",
    )
    short = tuple(tuple(line[k] for k in shown) for line in lines)
    return Table(f"{stream}: retention and generalisation", tuple(header[k] for k in shown), short, notes)


def _settings(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in dotted(recipe).items() if key not in (*SKIPPED, "evaluation.baselines")}


def method_list(suite: Suite, stream: str, results: Sequence[Result]) -> Table:
    """What each method is, and in which keys its recipe differs from the reference's on this stream.

    A key that the reference's recipe lacks is newer than that recipe, and no difference."""
    recipes = {r.line.name: r.line.runs[0].recipe for r in results if r.line.runs and not r.line.baseline}
    base = _settings(recipes.get(suite.reference, {}))
    lines = []
    for r in results:
        if r.line.baseline:
            continue
        mine = _settings(recipes.get(r.line.name, {}))
        changed = [f"{key} = {value}" for key, value in mine.items() if key in base and base[key] != value]
        own = "reference" if r.line.name == suite.reference else MISSING
        lines.append((r.line.name, suite.methods.get(r.line.name) or MISSING, "; ".join(changed) or own))
    return Table(f"{stream}: methods", ("method", "what it is", f"differs from {suite.reference} in"), tuple(lines))


def run_table(suite: Suite) -> Table:
    """Every run that was planned, how far it came, and with which commit and versions."""
    lines = []
    for run in suite.runs:
        versions = run.environment.get("versions", {})
        told = ", ".join(
            f"{name} {versions[name]}" for name in ("fedkeel", "torch", "transformers", "peft") if name in versions
        )
        commit = str(run.environment.get("commit") or MISSING)
        lines.append((run.name, run.stream, run.method, str(run.seed), run.state, commit, told or MISSING))
    header = ("run", "stream", "method", "seed", "state", "commit", "versions")
    return Table("Runs", header, tuple(lines), ("Each run's folder holds its recipe, rows and environment.",))


def suite_summary(suite: Suite) -> str:
    """How much of the suite is there, in a sentence."""
    done = sum(r.state == "finished" for r in suite.runs)
    failed = sum(r.state == "failed" for r in suite.runs)
    methods = [m for m in suite.methods if m != BASELINES]
    told = (
        f"{plural(len(methods), 'method')} on {plural(len({r.stream for r in suite.runs}), 'stream')}: "
        f"{done} of {plural(len(suite.runs), 'run')} finished"
    )
    return told + (f", {failed} failed." if failed else ".")
