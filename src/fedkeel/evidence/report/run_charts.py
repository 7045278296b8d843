"""The numbers behind the pictures of one run, from its Rows. What was not measured gives None."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from fedkeel import tables
from fedkeel.evidence.report.charts import Chart, Grid, Heat, Panel, Point, Series
from fedkeel.evidence.report.run_numbers import (
    Matrix,
    clean_score,
    damage_names,
    last_stage,
    measured_of,
    own_scores,
    stage_matrix,
    stream_numbers,
)
from fedkeel.evidence.report.tables import (
    METHODS,
    MISSING,
    Table,
    byte_unit,
    human_bytes,
    last_by_site,
    mean_and_sd,
    number,
    points,
    signed,
)
from fedkeel.scores import metrics
from fedkeel.types import Row

ROUND = "round"
POINTS = "score, points"
SITES = 40  # more than these are ranked and not named


def stage_starts(rows: Sequence[Row]) -> tuple[float, ...]:
    """Half a round before the first round of every stage but the first."""
    first: dict[int, int] = {}
    for r in rows:
        if r.method == "federated" and r.name == "loss":
            first[r.stage] = min(first.get(r.stage, r.round), r.round)
    return tuple(first[s] - 0.5 for s in sorted(first) if s)


def validation(rows: Sequence[Row]) -> dict[int, float]:
    """round -> the federated model's validation score over all tasks, in points."""
    key = ("federated", "score", "validation", "", "")
    return {r.round: 100.0 * r.value for r in rows if (r.method, r.name, r.split, r.site, r.task) == key}


def sent(rows: Sequence[Row]) -> dict[int, float]:
    """round -> bytes that all sites had sent and received by its end."""
    moved: dict[int, float] = defaultdict(float)
    for r in rows:
        if r.method == "federated" and r.name in ("bytes_up", "bytes_down"):
            moved[r.round] += r.value
    total, found = 0.0, {}
    for round in sorted(moved):
        total += moved[round]
        found[round] = total
    return found


def by_round(rows: Sequence[Row], name: str) -> dict[int, list[float]]:
    """round -> the federation's values of a name, one a site."""
    found: dict[int, list[float]] = defaultdict(list)
    for r in rows:
        if r.method == "federated" and r.name == name and not r.task:
            found[r.round].append(r.value)
    return dict(sorted(found.items()))


def span(values: Iterable[float]) -> tuple[float, float, float]:
    """(mean, lowest, highest); the ends are NaN for a single value."""
    held = list(values)
    ends = (min(held), max(held)) if len(held) > 1 else (math.nan, math.nan)
    return mean_and_sd(held)[0], *ends


def learning(rows: Sequence[Row]) -> Chart | None:
    scores, losses = validation(rows), by_round(rows, "loss")
    panels = []
    told = []
    if scores:
        curve = tuple(Point(round, score) for round, score in sorted(scores.items()))
        panels.append(Panel("Validation score", ROUND, POINTS, (Series("federated", curve),)))
        told.append(f"The validation score went from {number(curve[0].y)} to {number(curve[-1].y)} points.")
    if losses:
        curve = tuple(Point(round, *span(values)) for round, values in losses.items())
        panels.append(Panel("Training loss over sites", ROUND, "loss, nats a position", (Series("federated", curve),)))
        told.append(f"The mean training loss went from {number(curve[0].y, 2)} to {number(curve[-1].y, 2)} nats a position.")
    if not panels:
        return None
    starts = stage_starts(rows)
    notes = ("Upright rules: a new stage begins; validation rows are of the tasks that have come by then.",) if starts else ()
    return Chart(
        "learning",
        "Learning curves",
        " ".join(told),
        tuple(panels),
        spread="lowest to highest of the sites",
        starts=starts,
        digits=2,
        notes=notes,
    )


def stage_grid(name: str, matrix: Matrix) -> Grid:
    """A stage × stage matrix in points, with what it says in words."""
    columns = sorted({i for line in matrix.values() for i in line})
    numbers = stream_numbers(matrix)
    last = matrix[max(matrix)]
    told = f"{name}: after the last stage, the stages' rows score {', '.join(points(last[i]) for i in sorted(last))} points"
    if "bwt" in numbers:
        told += f"; backward transfer {signed(100 * numbers['bwt'])}, forgetting {points(numbers['forgetting'])} points"
    return Grid(
        name,
        told + ".",
        tuple(f"after stage {s + 1}" for s in sorted(matrix)),
        tuple(f"stage {i + 1}" for i in columns),
        tuple(tuple(100 * matrix[s][i] if i in matrix[s] else None for i in columns) for s in sorted(matrix)),
    )


def stages(rows: Sequence[Row]) -> Heat | None:
    order = ("federated", "local", "centralised", "analytic", "base")
    found = {METHODS[m]: matrix for m in order if (matrix := stage_matrix(rows, m))}
    return stage_heat(found)


def stage_heat(matrices: Mapping[str, Matrix]) -> Heat | None:
    """matrices: name -> R; None without any of two stages."""
    grids = tuple(stage_grid(name, matrix) for name, matrix in matrices.items() if len(matrix) > 1)
    if not grids:
        return None
    return Heat(
        "stages",
        "Score by stage",
        "test rows of",
        "read",
        "points from 0 to 100",
        grids,
        (0.0, 100.0),
        notes=("The diagonal is what was just learnt; down a column, what is left of it.",),
    )


def traffic(rows: Sequence[Row]) -> Chart | None:
    scores, moved = validation(rows), sent(rows)
    held = [(moved[round], score) for round, score in sorted(scores.items()) if round in moved]
    if not held:
        return None
    unit, bytes_ = byte_unit(held[-1][0])
    curve = tuple(Point(size / bytes_, score) for size, score in held)
    told = f"{number(curve[-1].y)} points after {human_bytes(held[-1][0])} were sent up and down."
    panel = Panel("Validation score", f"{unit} sent up and down, all sites", POINTS, (Series("federated", curve),))
    return Chart("traffic", "Score against traffic", told, (panel,))


def methods(rows: Sequence[Row]) -> Chart | None:
    """The test score of each method, a row each; of several local-only models their mean, ± sd over sites."""
    found = []
    for method, name in METHODS.items():
        scores = [100 * v for v in last_by_site(rows, method, "score", "test").values()]
        if scores:
            mean, sd = mean_and_sd(scores)
            ends = (mean - sd, mean + sd) if len(scores) > 1 else (math.nan, math.nan)
            found.append(Series(name, (Point(name, mean, *ends),)))
    if not found:
        return None
    told = f"In points: {', '.join(f'{s.name} {number(s.points[0].y)}' for s in found)}."
    panel = Panel("Held-out test score by method", POINTS, "", tuple(found))
    return Chart("methods", "Held-out test score by method", told, (panel,), "rows", "± sd over sites", "bars")


def fairness_lines(own: Mapping[str, Sequence[float]]) -> Table:
    """Worst, bottom decile, mean and standard deviation over sites, a line a name, in points."""
    lines = tuple(
        (
            name,
            str(len(v)),
            points(metrics.worst(v)),
            points(metrics.bottom_decile(v)),
            points(mean_and_sd(v)[0]),
            points(max(v)),
            points(metrics.spread(v)) if len(v) > 1 else MISSING,
        )
        for name, v in own.items()
    )
    header = ("model", "sites", "worst", "bottom decile", "mean", "best", "sd")
    notes = (
        "Points on a site's own test rows. Bottom decile: the mean of the lowest tenth of the sites, rounded up; "
        "sd with n − 1.",
    )
    return Table("Spread over sites", header, lines, notes)


def sites(rows: Sequence[Row]) -> tuple[Chart, Table] | None:
    """Own scores of every site under each leg, the worst federated first, and their spread in a table."""
    own = {METHODS[leg]: found for leg in METHODS if (found := own_scores(rows, leg))}
    main = own.get("federated") or next(iter(own.values()), {})
    if not main:
        return None
    order = sorted({site for found in own.values() for site in found}, key=lambda s: (main.get(s, math.inf), s))
    named = len(order) <= SITES
    series = tuple(
        Series(name, tuple(Point(site if named else n, 100 * found[site]) for n, site in enumerate(order, 1) if site in found))
        for name, found in own.items()
    )
    mean, low, high = span(main.values())
    name = "federated" if "federated" in own else next(iter(own))
    told = f"{name}: {points(mean)} points in the mean over sites"
    told += f", from {points(low)} to {points(high)}." if math.isfinite(low) else "."
    if name == "federated" and "local-only" in own:
        local = own["local-only"]
        ahead = sum(main[s] > local[s] for s in main if s in local)
        told += f" It is above the site's own local-only model at {ahead} of {sum(s in local for s in main)} sites."
    panel = Panel(
        "Score on the site's own rows", POINTS if named else "site, from the worst", "site" if named else POINTS, series
    )
    chart = Chart("sites", "Scores of the sites", told, (panel,), "rows" if named else "dots", drawn="none")
    return chart, fairness_lines({name: list(found.values()) for name, found in own.items()})


def blocks(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """block -> round -> drift D of the federation, blocks in the order of their numbers."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for r in rows:
        if r.method == "federated" and r.name.startswith("drift/"):
            found[r.name.removeprefix("drift/")][r.round] = r.value
    return {block: dict(sorted(found[block].items())) for block in sorted(found, key=natural)}


def natural(text: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def drift(rows: Sequence[Row]) -> Heat | None:
    found = blocks(rows)
    if not found:
        return None
    order = sorted({round for values in found.values() for round in values})
    means = {block: mean_and_sd(values.values())[0] for block, values in found.items()}
    most = max(means, key=lambda block: means[block])
    told = f"The sites disagree most in {most}, with D = {number(means[most], 2)} in the mean over rounds."
    grid = Grid(
        "federated",
        told,
        tuple(found),
        tuple(str(round) for round in order),
        tuple(tuple(values.get(round) for round in order) for values in found.values()),
    )
    note = ("D = (Σ p‖Δ‖² − ‖Σ p Δ‖²)/‖Σ p Δ‖² of the sites' updates Δ of a block: 0 where all moved alike; Γ = D + 1.",)
    return Heat("drift", "Drift by layer", "round", "block", "D, a ratio", (grid,), digits=2, notes=note)


def site_cka(rows: Sequence[Row]) -> Chart | None:
    taps = cka_by_tap(rows)
    if not taps:
        return None
    curve = tuple(Point(tap, *span(values)) for tap, values in taps.items())
    most = max(curve, key=lambda p: p.y)
    told = f"A further local round moves a site most at tap {most.x}: 1 − CKA {number(most.y, 3)} in the mean over sites."
    panel = Panel("One more local round against the final model", "tap", "1 − CKA", (Series("federated", curve),))
    note = ("On fixed prompts; 0 where the site's hidden states are those of the final model.",)
    return Chart(
        "site-cka",
        "What a local round changes, by layer",
        told,
        (panel,),
        spread="lowest to highest of the sites",
        drawn="bars",
        digits=3,
        notes=note,
    )


def cka_by_tap(rows: Sequence[Row]) -> dict[str, list[float]]:
    """tap -> 1 − CKA of every site."""
    found: dict[str, list[float]] = defaultdict(list)
    for r in rows:
        if r.name.startswith("site_cka/"):
            found[r.name.removeprefix("site_cka/")].append(1.0 - r.value)
    return {tap: found[tap] for tap in sorted(found, key=natural)}


# What the gates are called in a picture: docs/method.md has them.
GATES = {
    "gate_a": "a: trust in the gold part",
    "gate_b": "b: trust in the rest",
    "gate_w_gold": "w, gold part",
    "gate_w_rest": "w, rest",
    "strength": "strength of structures",
    "dropped": "share of units dropped",
}


def gate_curve(rows: Sequence[Row], name: str) -> tuple[Point, ...]:
    """The mean over sites by round, and for a gate the means of the sites' lower and upper quartiles."""
    mean = by_round(rows, f"{name}_mean") or by_round(rows, name)
    low, high = (by_round(rows, f"{name}_{q}") for q in ("q1", "q3"))
    return tuple(
        Point(
            round,
            mean_and_sd(values)[0],
            *((mean_and_sd(low[round])[0], mean_and_sd(high[round])[0]) if round in low and round in high else ()),
        )
        for round, values in mean.items()
    )


def gates(rows: Sequence[Row]) -> Chart | None:
    panels = []
    told = []
    for name, title in GATES.items():
        curve = gate_curve(rows, name)
        if curve:
            panels.append(Panel(title, ROUND, "share" if name == "dropped" else "weight", (Series("federated", curve),)))
            told.append(f"{title} from {number(curve[0].y, 2)} to {number(curve[-1].y, 2)}")
    if not panels:
        return None
    return Chart(
        "gates",
        "Gates over time",
        f"Means over sites: {'; '.join(told)}.",
        tuple(panels),
        starts=stage_starts(rows),
        digits=3,
        spread="lower to upper quartile over positions, mean over sites",
    )


def _family(name: str) -> tables.Damage:
    """Its entry; a plain one for a family that this version does not know."""
    return tables.DAMAGES.get(name, tables.Damage(""))


def axis_of(family: str) -> str:
    """What a strength of a family is called."""
    return _family(family).axis


def family_place(family: str) -> tuple[int, str]:
    """A key that puts families in the order of their table, and those that it lacks behind them by name."""
    order = list(tables.DAMAGES)
    return order.index(family) if family in order else len(order), family


def strengths(named: Mapping[str, float], family: str) -> list[float]:
    """The strengths of a family, from the least damage to the most."""
    held = sorted(float(name.removesuffix("/score")) for name in named if name.endswith("/score"))
    order = _family(family).strengths
    return held[::-1] if len(order) > 1 and order[0] > order[-1] else held


def damage_curve(named: Mapping[str, float], family: str, clean: float | None) -> tuple[Point, ...]:
    """Score by strength in points, the clean score at the strength that is none; ± sd over draws where there is one."""
    undamaged = _family(family).none
    found = [] if clean is None else [Point(undamaged, 100 * clean)]
    for at in strengths(named, family):
        score, sd = 100 * named[f"{at:g}/score"], 100 * named.get(f"{at:g}/sd", math.nan)
        found.append(Point(f"{at:g}" if isinstance(_family(family).none, str) else at, score, score - sd, score + sd))
    return tuple(found if isinstance(_family(family).none, str) else sorted(found, key=lambda p: p.x))


def stability(measures: Sequence[Row]) -> Chart | None:
    """Score under damage, a panel a family, those that training did not use first."""
    found = damage_names(measures)
    clean = clean_score(measures)
    order = sorted(found, key=lambda f: (bool(found[f].get("trained")), *family_place(f)))
    panels: list[Panel] = []
    lines: list[tuple[str, ...]] = []
    rules: list[int] = []
    for family in order:
        named = found[family]
        trained = bool(named.get("trained"))
        if trained and lines and not rules:
            rules.append(len(lines))
        curve = damage_curve(named, family, clean)
        label = "trained on" if trained else "held out"
        series = (Series("trained on" if trained else "held out", curve, trained),)
        panels.append(Panel(f"{family}, {label}", axis_of(family), POINTS, series, apart=trained))
        for at in strengths(named, family):
            cells = [
                points(named[key]) if (key := f"{at:g}/{what}") in named else MISSING for what in ("score", "sd", "agreement")
            ]
            consistency = number(named[key], 3) if (key := f"{at:g}/consistency") in named else MISSING
            ssi = number(named["ssi"], 3) if "ssi" in named else MISSING
            lines.append((family, label, f"{at:g}", *cells, consistency, ssi))
    if not panels:
        return None
    told = _stability_words(measures, clean)
    header = ("family", "in training", "strength", "score", "sd over draws", "agreement", "consistency", "SSI of the family")
    clean_note = f"Clean score {points(clean)} points. " if clean is not None else ""
    notes = (
        clean_note
        + "Score, sd and agreement (equal answers) in points of 100; consistency = 1 − E[JS]/ln 2; SSI: area under the "
        "curve against the clean score held all the way. The headline is of the held-out families.",
    )
    table = Table("Score under damage", header, tuple(lines), notes, tuple(rules))
    return Chart(
        "stability",
        "Stability under damage",
        told,
        tuple(panels),
        spread="± sd over draws",
        table=table,
    )


def _stability_words(measures: Sequence[Row], clean: float | None) -> str:
    named = {r.name: r.value for r in measures if r.name.startswith("damage/")}
    told = []
    if clean is not None:
        told.append(f"Undamaged, the model scores {points(clean)} points.")
    if "damage/held_out_fall" in named:
        told.append(
            f"Under damage that training did not use it loses {points(named['damage/held_out_fall'])} points on average"
        )
        ssi = named.get("damage/held_out_ssi")
        told[-1] += f", SSI {number(ssi, 3)}." if ssi is not None else "."
    if "damage/trained_ssi" in named:
        told.append(f"For damage like that of training the SSI is {number(named['damage/trained_ssi'], 3)}.")
    return " ".join(told) or "Score under damage, by family and strength."


def blocks_table(measures: Sequence[Row]) -> Table:
    """Scores without the blocks of least influence, a line a number of blocks; see `measure.blocks`."""
    found = measured_of(measures, "blocks")
    weighed, turns = found.pop("influence", {}), found.pop("turn", {})
    how = "weighed anew whenever one has gone" if turns else "weighed once, as earlier versions did"
    order = turns or {n: value for n, value in weighed.items() if n != "0"}
    lines = [(number(of["kept"], 0), points(of["score"]), number(of["seconds"], 2)) for of in found.values()]
    note = (
        f"Influence: 1 − cos of what a block is given and gives, on validation rows, {how}. In the "
        "order in which they go, each with its influence while all are there: "
        + ", ".join(f"{n} ({number(weighed[n], 3)})" for n in sorted(order, key=lambda n: order[n]))
        + ". The first block, 0, stays always."
    )
    header = ("blocks left", "score", "seconds, as a share")
    return Table("Without the blocks of least influence", header, tuple(dict.fromkeys(lines)), (note,))


def drafts_table(measures: Sequence[Row]) -> Table:
    """What lower blocks foretell of the whole model's answers, a line a share of the blocks; see `measure.speculation`."""
    lines = [
        (number(of["blocks"], 0), points(of["acceptance"]), number(of["tokens_a_pass"], 2), number(of["speed_up"], 2))
        for of in measured_of(measures, "speculation").values()
    ]
    header = ("blocks that draft", "tokens foretold, %", "tokens a pass of all blocks", "fewer blocks a token, times")
    note = (
        "Four tokens are drafted, then checked by all blocks in one pass, which counts once: below 1 drafting is no gain. "
        "Lower blocks predict through the model's own norm and head."
    )
    return Table("Drafts of the lower blocks", header, tuple(dict.fromkeys(lines)), (note,))


def kept_table(rows: Sequence[Row], measures: Sequence[Row]) -> Table:
    """What was kept of the base and how the model carries over, a line a number."""
    names = {"kl_to_base": ("KL to the base on general text, nats", 3), "perplexity_ratio": ("perplexity ratio to the base", 3)}
    lines = []
    for r in measures:
        if r.name in names:
            what, digits = names[r.name]
            lines.append((what, number(r.value, digits)))
        elif r.name.startswith("state_cka/"):
            lines.append(
                (f"CKA to the end of stage {r.stage + 1}, tap {r.name.removeprefix('state_cka/')}", number(r.value, 3))
            )
        elif (r.name, r.split) == ("score", "unseen"):
            lines.append((f"unseen task {r.task}" if r.task else "unseen tasks, mean, points", points(r.value)))
    last = last_stage(rows, "federated")
    for r in rows:
        if r.method == "federated" and r.split == "unseen-sites" and r.stage == last:
            if r.name == "score" and not r.task:
                lines.append(("unseen sites, mean over tasks, points", points(r.value)))
            elif r.name == "own_score":
                lines.append((f"unseen site {r.site}, points", points(r.value)))
    return Table("Retention and generalisation", ("what", "value"), tuple(lines))
