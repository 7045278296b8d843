"""One table of a plan's runs: final score, score when learnt, backward transfer and forgetting, mean ± sd over seeds.

    python experiments/stream_table.py FOLDER [--split test] [--markdown]

FOLDER holds run folders (or committed copies) named PLAN-METHOD-sSEED with a rows.jsonl or rows.jsonl.gz each.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from fedkeel.evidence.report.tables import Table, mean_and_sd, points
from fedkeel.scores.metrics import average_final, average_learnt, backward_transfer, forgetting

HEADER = ("method", "seeds", "final score", "when learnt", "backward transfer", "forgetting", "MB up", "training s")


def rows_in(folder: Path) -> list[dict[str, object]]:
    """The rows of one run as plain objects."""
    packed = folder / "rows.jsonl.gz"
    text = gzip.decompress(packed.read_bytes()).decode() if packed.exists() else (folder / "rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def matrix(rows: list[dict[str, object]], split: str) -> list[list[float]]:
    """table[s][i]: the federated model's score on the rows of stage i after stage s; the last reading of each stage."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for row in rows:
        name = str(row["name"])
        if row["method"] == "federated" and row["split"] == split and name.startswith("score_of_stage_"):
            found[int(str(row["stage"]))][int(name.rpartition("_")[2]) - 1] = float(str(row["value"]))
    return [[scores[i] for i in range(stage + 1)] for stage, scores in sorted(found.items())]


def measures(folder: Path, split: str) -> dict[str, float]:
    """The measures of one run, shares of 1; bytes in MB, seconds of training as summed over sites."""
    rows = rows_in(folder)
    table = matrix(rows, split)
    totals = {
        name: sum(float(str(r["value"])) for r in rows if r["name"] == name and r["method"] == "federated")
        for name in ("bytes_up", "site_seconds")
    }
    return {
        "final": average_final(table),
        "learnt": average_learnt(table),
        "transfer": backward_transfer(table),
        "forgetting": forgetting(table),
        "megabytes": totals["bytes_up"] / 1e6,
        "seconds": totals["site_seconds"],
    }


def collect(
    folder: Path, split: str, measure: Callable[[Path, str], dict[str, float]] = measures
) -> dict[str, dict[int, dict[str, float]]]:
    """method -> seed -> measures, for every finished run in `folder`."""
    found: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for run in sorted(folder.iterdir()):
        name = re.fullmatch(rf"{re.escape(folder.name)}-(.+)-s(\d+)", run.name)
        state = run / "state.json"
        if name and run.is_dir() and (not state.exists() or json.loads(state.read_text())["finished"]):
            found[name[1]][int(name[2])] = measure(run, split)
    return found


def signed(shares: list[float]) -> str:
    """Mean ± sd in points, with a true minus sign."""
    mean, sd = mean_and_sd(shares)
    return f"{100 * mean:+.1f}".replace("-", "−") + (f" ± {points(sd)}" if len(shares) > 1 else "")


def table_of(folder: Path, split: str) -> Table:
    """The table of a plan, a line a method in the order of final score."""
    lines = []
    for method, seeds in collect(folder, split).items():
        values = {key: [m[key] for m in seeds.values()] for key in next(iter(seeds.values()))}
        final = mean_and_sd(values["final"])[0]
        cells = [signed(values[key]).lstrip("+") for key in ("final", "learnt")]
        cells += [signed(values[key]) for key in ("transfer", "forgetting")]
        moved = f"{mean_and_sd(values['megabytes'])[0]:.1f}", f"{mean_and_sd(values['seconds'])[0]:.0f}"
        lines.append((final, (method, str(len(seeds)), *cells, *moved)))
    ordered = tuple(cells for _, cells in sorted(lines, key=lambda line: -line[0]))
    note = f"Points of 100 on {split} rows, mean ± standard deviation (n − 1) over seeds."
    return Table(f"{folder.name}: scores on {split} rows", HEADER, ordered, (note,))


FLAT = ("method", "seeds", "score", "against the first", "MB up", "times fewer up", "MB down", "training s")


def flat_measures(folder: Path, split: str) -> dict[str, float]:
    """The last score of a run without stages, a share of 1; bytes in MB, seconds of training as summed over sites."""
    rows = [r for r in rows_in(folder) if r["method"] == "federated"]
    scores = {
        int(str(r["round"])): float(str(r["value"]))
        for r in rows
        if (r["name"], r["split"], r["task"], r["site"]) == ("score", split, "", "")
    }
    names = ("bytes_up", "bytes_down", "site_seconds")
    up, down, seconds = (sum(float(str(r["value"])) for r in rows if r["name"] == name) for name in names)
    return {"score": scores[max(scores)], "up": up / 1e6, "down": down / 1e6, "seconds": seconds}


def flat_table_of(folder: Path, split: str, first: str) -> Table:
    """The table of a plan without stages: score and bytes of each method, `first` on top, against it seed by seed."""
    found = collect(folder, split, flat_measures)
    base = found[first]
    lines = []
    for method, seeds in found.items():
        values = {key: [m[key] for m in seeds.values()] for key in ("score", "up", "down", "seconds")}
        against = [m["score"] - base[seed]["score"] for seed, m in seeds.items() if seed in base]
        score = signed(values["score"]).lstrip("+")
        fewer = mean_and_sd([m["up"] for m in base.values()])[0] / mean_and_sd(values["up"])[0]
        up, down, seconds = (mean_and_sd(values[key])[0] for key in ("up", "down", "seconds"))
        shown = "–" if method == first else signed(against)
        cells = (method, str(len(seeds)), score, shown, f"{up:.1f}", f"{fewer:.1f}", f"{down:.1f}", f"{seconds:.0f}")
        lines.append((method != first, -mean_and_sd(values["score"])[0], cells))
    note = f"Points of 100 on {split} rows, mean ± standard deviation (n − 1) over seeds; differences are taken seed by seed."
    return Table(f"{folder.name}: scores on {split} rows", FLAT, tuple(cells for *_, cells in sorted(lines)), (note,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", default="test", choices=["test", "validation"])
    parser.add_argument("--flat", default="", help="a plan without stages; the method that the others are set against")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args()
    table = flat_table_of(args.folder, args.split, args.flat) if args.flat else table_of(args.folder, args.split)
    if args.markdown:
        print(table.markdown())
    else:
        from rich.console import Console

        Console(width=120).print(table.rich())


if __name__ == "__main__":
    main()
