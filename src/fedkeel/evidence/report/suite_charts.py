"""The numbers behind the pictures of one stream of a suite, over seeds. What was not measured gives None."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

from fedkeel.evidence.report.charts import Chart, Heat, Panel, Point, Series
from fedkeel.evidence.report.results import Result, interaction, mean_matrix
from fedkeel.evidence.report.run_charts import (
    GATES,
    POINTS,
    ROUND,
    axis_of,
    blocks,
    cka_by_tap,
    damage_curve,
    fairness_lines,
    family_place,
    gate_curve,
    natural,
    sent,
    stage_heat,
    stage_starts,
    strengths,
    validation,
)
from fedkeel.evidence.report.run_numbers import clean_score, damage_names, own_scores
from fedkeel.evidence.report.suite import Suite, SuiteRun
from fedkeel.evidence.report.suite_tables import as_number, knob_lines, knob_table, parts_of, square_table
from fedkeel.evidence.report.tables import MISSING, Table, mean_and_sd, number, points, signed
from fedkeel.types import Row


def _methods(results: Sequence[Result]) -> list[Result]:
    return [r for r in results if not r.line.baseline and r.line.runs]


def over_seeds(x: float | str, values: Sequence[float]) -> Point:
    """The mean of the seeds' values at x, ± sd if they are several."""
    mean, sd = mean_and_sd(values)
    return Point(x, mean, mean - sd, mean + sd) if len(values) > 1 else Point(x, mean)


def pooled(curves: Sequence[Mapping[float | str, float]]) -> tuple[Point, ...]:
    """One curve a seed to one curve: at every x that any seed has, the mean of those that have it, ± sd if they are several."""
    held: dict[float | str, list[float]] = defaultdict(list)
    for curve in curves:
        for x, y in curve.items():
            held[x].append(y)
    return tuple(over_seeds(x, values) for x, values in held.items())


def _series(results: Sequence[Result], read: Callable[[SuiteRun], Mapping[float | str, float]]) -> tuple[Series, ...]:
    found = ((r.line.name, pooled([read(run) for run in r.line.runs])) for r in _methods(results))
    return tuple(Series(name, curve) for name, curve in found if curve)


def _ends(series: Sequence[Series], unit: str) -> str:
    """The best and the worst at the end, in words."""
    ends = sorted(((s.points[-1].y, s.name) for s in series), reverse=True)
    told = f"At the end {ends[0][1]} is highest, with {number(ends[0][0])} {unit}"
    return told + (f", and {ends[-1][1]} lowest, with {number(ends[-1][0])}." if len(ends) > 1 else ".")


def learning(results: Sequence[Result]) -> Chart | None:
    series = _series(results, lambda run: {float(round): score for round, score in sorted(validation(run.rows).items())})
    if not series:
        return None
    starts = stage_starts(_methods(results)[0].line.runs[0].rows)
    notes = ("Upright rules: a new stage begins; validation rows are of the tasks that have come by then.",) if starts else ()
    return Chart(
        "learning",
        "Learning curves by method",
        _ends(series, "points on validation rows"),
        (Panel("Validation score", ROUND, POINTS, series),),
        spread="± sd over seeds",
        drawn="none",
        starts=starts,
        notes=notes,
    )


def traffic(results: Sequence[Result]) -> Chart | None:
    """Validation score against what all sites had sent and received, MB, each the mean over seeds."""
    series = []
    for r in _methods(results):
        scores: dict[int, list[float]] = defaultdict(list)
        moved: dict[int, list[float]] = defaultdict(list)
        for run in r.line.runs:
            bytes_ = sent(run.rows)
            for round, score in validation(run.rows).items():
                if round in bytes_:
                    scores[round].append(score)
                    moved[round].append(bytes_[round] / 1e6)
        if scores:
            curve = [Point(mean_and_sd(moved[n])[0], mean_and_sd(scores[n])[0]) for n in sorted(scores)]
            series.append(Series(r.line.name, tuple(curve)))
    if not series:
        return None
    sizes = sorted((float(s.points[-1].x), s.name) for s in series)
    least, most_sent = (f"{name}, {number(size)} MB" for size, name in (sizes[0], sizes[-1]))
    told = f"In the whole run the least is sent under {least}, and the most under {most_sent}."
    header = (
        "method",
        *(f"read {n}: {what}" for n in range(1, 1 + max(len(s.points) for s in series)) for what in ("MB", "score")),
    )
    lines = []
    for s in series:
        cells = [text for p in s.points for text in (number(float(p.x), 2), number(p.y))]
        lines.append((s.name, *cells, *([MISSING] * (len(header) - 1 - len(cells)))))
    notes = ("MB (10⁶ bytes) up and down of all sites since the start and validation score in points, means over seeds.",)
    return Chart(
        "traffic",
        "Score against traffic by method",
        told,
        (Panel("Validation score", "MB sent up and down, all sites", POINTS, tuple(series), log_x=True),),
        drawn="none",
        table=Table("Score against traffic by method", header, tuple(lines), notes),
    )


def differences(suite: Suite, results: Sequence[Result]) -> Chart | None:
    """Final score less the reference's, with its paired interval, or ± sd over seeds where row scores are missing."""
    paired = any(r.interval for r in results)
    found, lines = [], []
    for r in results:
        if not r.ahead:
            continue
        mean, sd = mean_and_sd([100 * v for v in r.ahead.values()])
        ends = (mean - sd, mean + sd) if len(r.ahead) > 1 and not paired else (math.nan, math.nan)
        if r.interval:
            ends = (100 * r.interval.low, 100 * r.interval.high)
        found.append((r, Point(r.line.name, mean, *ends)))
        text = f"{signed(ends[0])} to {signed(ends[1])}" if math.isfinite(ends[0]) else MISSING
        lines.append((r.line.name, ", ".join(map(str, sorted(r.ahead))), signed(mean), text))
    if not found:
        return None
    spread = "95 % interval of the paired bootstrap over test rows" if paired else "± sd over seeds"
    methods = [p for r, p in found if not r.line.baseline]
    above, below = [p.x for p in methods if p.low > 0], [p.x for p in methods if p.high < 0]
    told = f"Against {suite.reference}: "
    told += (
        f"above it, with the whole bar, {', '.join(map(str, above))}; "
        if above
        else "no method is above it with the whole bar; "
    )
    told += f"below it {', '.join(map(str, below))}." if below else "none is below it."
    series = (
        Series("methods", tuple(p for r, p in found if not r.line.baseline)),
        Series("baselines", tuple(p for r, p in found if r.line.baseline), apart=True),
    )
    title = f"Difference to {suite.reference}"
    table = Table(title, ("method", "seeds", "difference, points", spread), tuple(lines))
    panel = Panel("Final test score", f"difference to {suite.reference}, points", "", tuple(s for s in series if s.points))
    return Chart("differences", title, told, (panel,), "rows", spread, "bars", (0.0,), table=table)


def kept(results: Sequence[Result]) -> Chart | None:
    """What was learnt and what is left of it in the end, a row a method from the one that ends best, and then baselines."""
    ends = {}
    for r in results:
        if r.stream["forgetting"]:
            of = {key: over_seeds(r.line.name, [100 * v for v in r.stream[key]]) for key in ("learnt", "final", "forgetting")}
            ends[r.line.name] = (r.line.baseline, of)
    methods = {name: of for name, (baseline, of) in ends.items() if not baseline}
    if not methods:
        return None
    best, least = max(methods, key=lambda m: methods[m]["final"].y), min(methods, key=lambda m: methods[m]["forgetting"].y)
    end, begin, lost = (number(methods[m][key].y) for m, key in ((best, "final"), (best, "learnt"), (least, "forgetting")))
    told = f"{best} ends best, with {end} points, {begin} when learnt; the least is forgotten under {least}, {lost} points."
    order = [of for _, of in sorted(ends.values(), key=lambda one: (one[0], -one[1]["final"].y))]
    learnt, left = (tuple(of[key] for of in order) for key in ("learnt", "final"))
    series = (Series("when learnt", learnt, apart=True), Series("after the last stage", left))
    panel = Panel("Mean score over the stages", "points", "", series)
    notes = ("Means over stages of what their own rows score; the table of scores has means over tasks.",)
    title = "What is learnt, and what is kept of it"
    return Chart("kept", title, told, (panel,), "rows", "± sd over seeds", "bars", joined=True, notes=notes)


def stages(results: Sequence[Result], left_out: Collection[str]) -> Heat | None:
    """One grid a method, from the best, and then those of baselines; means over seeds."""
    ordered = sorted((r for r in results if r.line.runs), key=lambda r: r.line.baseline)
    return stage_heat({r.line.name: mean_matrix(r.line, left_out) for r in ordered})


def stability(results: Sequence[Result]) -> Chart | None:
    """Score under damage, a panel a family and a curve a method; a method that trained on the family is drawn apart."""
    families: dict[str, list[Series]] = defaultdict(list)
    lines: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for r in _methods(results):
        named = [(damage_names(run.measures), clean_score(run.measures)) for run in r.line.runs if run.measures]
        for family in sorted({family for names, _ in named for family in names}):
            held = [(names[family], clean) for names, clean in named if family in names]
            trained = any(names.get("trained") for names, _ in held)
            curves = [{p.x: p.y for p in damage_curve(names, family, clean)} for names, clean in held]
            families[family].append(Series(r.line.name, pooled(curves), trained))
            for at in strengths(held[0][0], family):
                scores = [names[key] for names, _ in held if (key := f"{at:g}/score") in names]
                falls = [clean - names[key] for names, clean in held if clean is not None and key in names]
                alike = [names[key] for names, _ in held if (key := f"{at:g}/consistency") in names]
                lines[family].append(
                    (
                        family,
                        f"{at:g}",
                        r.line.name,
                        "trained on" if trained else "held out",
                        points(mean_and_sd(scores)[0]),
                        points(mean_and_sd(falls)[0]) if falls else MISSING,
                        number(mean_and_sd(alike)[0], 3) if alike else MISSING,
                    )
                )
    if not families:
        return None
    order = sorted(families, key=lambda f: (any(s.apart for s in families[f]), *family_place(f)))
    panels = []
    for family in order:
        some = sum(s.apart for s in families[family])
        label = f"trained on by {some} of {len(families[family])}" if some else "held out"
        axis = axis_of(family)
        panels.append(Panel(f"{family}, {label}", axis, POINTS, tuple(families[family]), apart=bool(some)))
    falls_by = {r.line.name: mean_and_sd(r.held_out_fall)[0] for r in results if r.held_out_fall}
    told = "Score under damage by family and strength."
    if falls_by:
        least, most = min(falls_by, key=lambda m: falls_by[m]), max(falls_by, key=lambda m: falls_by[m])
        low, high = points(falls_by[least]), points(falls_by[most])
        told = f"Under damage held out of training {least} loses least, {low} points, and {most} most, {high}."
        if low == high:
            told = f"Under damage held out of training every method loses {low} points."
    if any(panel.apart for panel in panels):
        told += " Tinted panels, hollow marks: the method's training had disturbed the same thing."
    header = ("family", "strength", "method", "in training", "score", "fall", "consistency")
    ordered = [line for family in order for line in sorted(lines[family], key=lambda one: order.index(one[0]))]
    rules = tuple(n for n in range(1, len(ordered)) if ordered[n][0] != ordered[n - 1][0])
    notes = ("Score and fall (clean less damaged) in points, consistency = 1 − E[JS]/ln 2; means over draws and seeds.",)
    return Chart(
        "stability",
        "Stability under damage by method",
        told,
        tuple(panels),
        drawn="none",
        table=Table("Stability under damage by method", header, tuple(ordered), notes, rules),
    )


def sites(results: Sequence[Result]) -> tuple[Chart, Table] | None:
    """Every site of every seed on its own rows, a row of dots a method."""
    own = {}
    for r in results:
        values = [v for run in r.line.runs for v in own_scores(run.rows, r.line.leg).values()]
        if values:
            own[r.line.name] = values
    if not own:
        return None
    worst = {name: min(values) for name, values in own.items()}
    best = max(worst, key=lambda name: worst[name])
    told = f"The worst site of all seeds fares best under {best}, with {points(worst[best])} points."
    dots = tuple(Point(name, 100 * v) for name, values in own.items() for v in values)
    means = tuple(Point(name, 100 * mean_and_sd(values)[0]) for name, values in own.items())
    panel = Panel(
        "Score on the site's own rows", POINTS, "", (Series("a site of a seed", dots, apart=True), Series("mean", means))
    )
    table = fairness_lines(own)
    chart = Chart("sites", "Scores of the sites by method", told, (panel,), "rows", drawn="none", table=table)
    return chart, table


def drift(results: Sequence[Result]) -> Chart | None:
    def by_block(rows: Sequence[Row]) -> dict[float | str, float]:
        return {block: mean_and_sd(values.values())[0] for block, values in blocks(rows).items()}

    def by_tap(run: SuiteRun) -> dict[float | str, float]:
        return {tap: mean_and_sd(values)[0] for tap, values in cka_by_tap(run.measures).items()}

    series, moved = _series(results, lambda run: by_block(run.rows)), _series(results, by_tap)
    if not series:
        return None
    means = {s.name: mean_and_sd([p.y for p in s.points])[0] for s in series}
    most, least = max(means, key=lambda m: means[m]), min(means, key=lambda m: means[m])
    told = f"Over all blocks the sites disagree most under {most}, D = {number(means[most], 2)}"
    told += f", and least under {least}, {number(means[least], 2)}." if len(means) > 1 else "."
    panels = [Panel("Drift of the sites' updates", "block", "D, mean over rounds", _ordered(series))]
    if moved:
        panels.append(Panel("One more local round", "tap", "1 − CKA, mean over sites", _ordered(moved)))
    note = ("D = (Σ p‖Δ‖² − ‖Σ p Δ‖²)/‖Σ p Δ‖² of a block's updates Δ: 0 where all sites moved alike; Γ = D + 1.",)
    return Chart(
        "drift", "Drift by layer and method", told, tuple(panels), spread="± sd over seeds", drawn="none", digits=3, notes=note
    )


def _ordered(series: Sequence[Series]) -> tuple[Series, ...]:
    return tuple(Series(s.name, tuple(sorted(s.points, key=lambda p: natural(str(p.x))))) for s in series)


def _gate_of(name: str) -> Callable[[SuiteRun], dict[float | str, float]]:
    return lambda run: {p.x: p.y for p in gate_curve(run.rows, name)}


def gates(results: Sequence[Result]) -> Chart | None:
    panels = []
    for name, title in GATES.items():
        series = _series(results, _gate_of(name))
        if series:
            panels.append(Panel(title, ROUND, "share" if name == "dropped" else "weight", series))
    if not panels:
        return None
    first = panels[0]
    ends = sorted((s.points[-1].y, s.name) for s in first.series)
    told = f"{first.title} ends at {number(ends[0][0], 2)} under {ends[0][1]}"
    told += f" and at {number(ends[-1][0], 2)} under {ends[-1][1]}." if len(ends) > 1 else "."
    return Chart(
        "gates",
        "Gates over time by method",
        told,
        tuple(panels),
        spread="± sd over seeds",
        drawn="none",
        digits=3,
        starts=stage_starts(_methods(results)[0].line.runs[0].rows),
    )


def square(suite: Suite, stream: str, results: Sequence[Result]) -> Chart | None:
    """The 2 × 2: parallel lines would mean that the factors add up."""
    found = interaction(results, suite.square)
    if not found:
        return None
    first, second = suite.factors

    def at(x: str, key: str) -> Point:
        return over_seeds(x, [100 * one[key] for one in found.values()])

    without, with_ = f"without {first}", f"with {first}"
    series = (
        Series(f"without {second}", (at(without, "neither"), at(with_, "first"))),
        Series(f"with {second}", (at(without, "second"), at(with_, "both"))),
    )
    mean, sd = mean_and_sd([100 * one["interaction"] for one in found.values()])
    told = f"Interaction of {first} and {second}: {signed(mean)}" + (f" ± {number(sd)}" if len(found) > 1 else "") + " points."
    return Chart(
        "square",
        f"{first} × {second}",
        told,
        (Panel("Final test score", "", POINTS, series),),
        spread="± sd over seeds",
        drawn="bars",
        table=square_table(suite, stream, results),
    )


def parts(suite: Suite, results: Sequence[Result]) -> Chart | None:
    """What every part gives alone over the method with neither factor."""
    found = []
    for r, gains in parts_of(suite, results):
        if gains:
            found.append(over_seeds(r.line.name, [100 * v for v in gains]))
    if not found:
        return None
    best = max(found, key=lambda p: p.y)
    told = f"Alone, {best.x} is best, {signed(best.y)} points against {suite.square[0]}."
    panel = Panel("Final test score", f"gain over {suite.square[0]}, points", "", (Series("part", tuple(found)),))
    return Chart("parts", "Every part alone", told, (panel,), "rows", "± sd over seeds", "bars", (0.0,))


def knob(suite: Suite, stream: str, results: Sequence[Result], key: str, number_of: int) -> Chart | None:
    """Final score and forgetting against the values of one key, the reference's own marked."""
    read: Mapping[str, Callable[[Result], Collection[float]]] = {
        "Final test score": lambda r: list(r.final.values()),
        "Forgetting": lambda r: r.stream["forgetting"],
    }
    values = [value for value, _, _ in knob_lines(suite, results, key)]
    numeric = all(as_number(value) is not None for value in values)
    panels = []
    for title, of in read.items():
        found: dict[bool, list[Point]] = {False: [], True: []}
        for value, r, own in knob_lines(suite, results, key):
            held = [100 * v for v in of(r)]
            if held:
                point = over_seeds(float(value) if numeric else value, held)
                found[False].append(point)
                found[True] += [point] if own else []
        if found[False]:
            series = [Series("value", tuple(found[False])), Series("reference's value", tuple(found[True]), apart=True)]
            y = POINTS if title != "Forgetting" else "forgetting, points"
            panels.append(Panel(title, key, y, tuple(s for s in series if s.points)))
    if not panels:
        return None
    scores = panels[0].series[0].points
    best = max(scores, key=lambda p: p.y)
    told = (
        f"{key}: the final score is between {number(min(p.y for p in scores))} and {number(best.y)} points, best at {best.x}."
    )
    return Chart(
        f"knob-{number_of}",
        f"Sensitivity: {key}",
        told,
        tuple(panels),
        spread="± sd over seeds",
        drawn="bars",
        table=knob_table(suite, stream, results, key),
    )
