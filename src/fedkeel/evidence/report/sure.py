"""How sure a run's own comparisons are: the federated model against every other, over the same test rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedkeel.evidence.report.interval import COVERAGE, RESAMPLES, Interval, Scores, paired_difference
from fedkeel.evidence.report.tables import METHODS, Table, mean_and_sd, plural, points, signed
from fedkeel.types import FedKeelError

Models = Mapping[tuple[str, str], Scores]  # (leg, its site or nothing) -> scores
ENOUGH = 20  # test rows; a bootstrap of fewer, which knows no answers but these, may see no spread at all


def read_scores(folder: Path) -> Models:
    """What a run's scores.jsonl says; empty where there is none yet. Raises FedKeelError, see `scores_by_model`."""
    path = folder / "scores.jsonl"
    try:
        return scores_by_model(path.read_text(encoding="utf-8"), str(path)) if path.exists() else {}
    except (OSError, UnicodeDecodeError) as error:
        raise FedKeelError(f"{path} cannot be read: {error}") from error


def scores_by_model(text: str, where: str) -> dict[tuple[str, str], dict[str, dict[str, float]]]:
    """See `Models`, of the text of a scores.jsonl. where: the file, for messages. Raises FedKeelError, naming file and line."""
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for count, line in enumerate(text.splitlines(), 1):
        try:
            one = json.loads(line)
            found[one["method"], one["site"]][one["task"]][one["id"]] = float(one["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise FedKeelError(f"{where}:{count}: not a score of a run: {error!r}") from error
    return found


def mean_score(scores: Scores) -> float:
    """Over tasks, each task counting the same, in [0, 1]."""
    return mean_and_sd(mean_and_sd(of.values())[0] for of in scores.values())[0]


def sure_table(models: Models) -> Table:
    """A line a model that the federated one is compared with; empty where there is nothing to compare. See the notes."""
    mine = next((scores for (leg, _), scores in models.items() if leg == "federated"), None)
    others = [key for method in METHODS for key in sorted(models) if key[0] == method != "federated"]
    compared = [] if mine is None else [(key, paired_difference({0: mine}, {0: models[key]}, *key)) for key in others]
    found = [(key, interval) for key, interval in compared if interval is not None]
    percent = f"{COVERAGE:.0%}".replace("%", " %")
    header = ("against", "its score, points", "federated, ahead by", f"{percent} interval")
    lines = [(_name(key), points(mean_score(models[key])), *_cells(interval)) for key, interval in found]
    return Table("How sure that is", header, tuple(lines), _notes(found) if found else ())


def surely(interval: Interval) -> int:
    """1 where a difference is above 0 for sure, −1 where below, 0 where it may be either."""
    if interval.rows < ENOUGH:
        return 0
    return (interval.low > 0) - (interval.high < 0)


def _name(key: tuple[str, str]) -> str:
    return f"{METHODS.get(key[0], key[0])}, {key[1]}" if key[0] == "local" else METHODS.get(key[0], key[0])


def _cells(interval: Interval) -> tuple[str, str]:
    return signed(100 * interval.mean), f"{signed(100 * interval.low)} to {signed(100 * interval.high)}"


def _notes(found: Sequence[tuple[tuple[str, str], Interval]]) -> tuple[str, ...]:
    rows = max(interval.rows for _, interval in found)
    notes = [
        f"Paired bootstrap over the test rows within each task ({plural(rows, 'row')}, {RESAMPLES:,} resamples): how far the "
        "choice of test rows could have moved a difference. Another seed, or other data, is not in it."
    ]
    local = [interval for (leg, _), interval in found if leg == "local"]
    if local:
        ahead, behind = ([surely(i) for i in local].count(way) for way in (1, -1))
        open_ = len(local) - ahead - behind
        notes.insert(
            0,
            f"On all sites' rows the federated model is surely better than {ahead} of {plural(len(local), 'local model')}"
            + (f", surely worse than {behind}" if behind else "")
            + (f", and {open_} stay open" if open_ else "")
            + ".",
        )
    return tuple(notes)
