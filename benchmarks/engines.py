"""Seconds a round and memory of one federation on three engines: this process, Flower's simulation, a Flower deployment.

    python benchmarks/engines.py [--sites 4 16 64] [--repeats 3] [--rounds 4]

keel-nano, the same rows, steps and messages on every engine; engines take turns, so that a machine whose speed drifts does not
favour one. The deployment (real processes with TLS and site keys on the loopback, each site with its own worker) is run with
the smallest number of sites only: its sites would be machines. The first round loads base models, so it stands apart from the
median of the others; the whole run has the engine's start in it. Memory is the most that all processes of an engine held at a
time, as proportional set size: a page that many of them share counts once. Needs fedkeel[flower-sim], and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import shared

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from loopback import deployed

COLOURS = ["red", "green", "blue", "white"]
THINGS = ["house", "river", "bird", "stone", "tree"]
MARK = "FEDKEEL_BENCHMARK"  # in the environment of every process of an engine, and of what they start


def rows_of(sites: int) -> dict[str, list[dict[str, str]]]:
    """site -> 32 training rows and one test row: which colour stands in the line."""
    found = {}
    for site in range(sites):
        rows = []
        for number in range(33):
            colour, thing = COLOURS[(number + site) % 4], THINGS[number % 5]
            row = {"task": "colour", "instruction": "Which colour?", "input": f"a {colour} {thing} {number}", "output": colour}
            rows.append({**row, "site": f"site-{site:02d}", "split": "train" if number else "test"})
        found[f"site-{site:02d}"] = rows
    return found


def overrides_of(rounds: int, folder: Path) -> list[str]:
    return [
        "name=bench",
        f"out={folder / 'runs'}",
        "threads=1",
        "data.source=jsonl",
        f"data.root={folder}",
        'data.files=["rows.jsonl"]',
        "data.tasks_file=tasks.json",
        "data.site_column=site",
        "partition.scheme=natural",
        "train.local_steps=4",
        "train.batch_size=8",
        f"federation.rounds={rounds}",
        "evaluation.baselines=[]",
        f"evaluation.every={rounds}",
        "evaluation.validation_rows=0",
        "evaluation.test_rows=0",
    ]


class Memory:
    """The most that the processes marked with `token` held at a time, in bytes, by looking twice a second."""

    def __init__(self, token: str) -> None:
        self.most = 0
        self._mark, self._over = f"{MARK}={token}".encode(), threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self.most = max(self.most, shared(self._mark))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def marked() -> Iterator[Memory]:
    """Everything that is started inside carries the mark."""
    token = secrets.token_hex(8)
    os.environ[MARK] = token
    try:
        with Memory(token) as memory:
            yield memory
    finally:
        del os.environ[MARK]


def seconds_of(folder: Path) -> list[float]:
    """Of each round, as the run's rows tell."""
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [row["value"] for row in rows if (row["name"], row["method"]) == ("seconds", "federated")]


def run(engine: str, sites: int, rounds: int) -> dict[str, Any]:
    """One federation: seconds of the first round, the median of the others, of the whole run, and MB."""
    rows = rows_of(sites)
    with tempfile.TemporaryDirectory(prefix="fk-") as given, marked() as memory:
        folder = Path(given)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for of in rows.values() for row in of))
        (folder / "tasks.json").write_text(json.dumps({"tasks": {"colour": {"labels": COLOURS}}}))
        overrides = overrides_of(rounds, folder)
        if engine == "deployment":
            with deployed(folder / "there", overrides, rows, {"colour": COLOURS}, None) as there:
                there.up()
                for name in rows:
                    there.start(name, f"site-{name}/start.sh")
                there.until_online(sites)
                begin = time.perf_counter()
                code, told = there.run()
                whole = time.perf_counter() - begin
                done = there.results.path
        else:
            command = [sys.executable, "-m", "fedkeel.cli", "run", "--engine", engine, *overrides]
            begin = time.perf_counter()
            ended = subprocess.run(command, capture_output=True, text=True)
            whole = time.perf_counter() - begin
            code, told, done = ended.returncode, ended.stdout + ended.stderr, folder / "runs" / "bench"
        if code:
            raise SystemExit(f"{engine}, {sites} sites: exit status {code}\n{told}")
        taken = seconds_of(done)
    return {"first": taken[0], "round": statistics.median(taken[1:]), "whole": whole, "mb": memory.most / 1e6}


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", default=["local", "flower-sim", "deployment"])
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    results = []
    print(f"{'sites':>5} {'engine':<12}{'first s':>9}{'round s':>9}{'ratio':>7}{'whole s':>9}{'MB':>8}{'ratio':>7}")
    for sites in args.sites:
        engines = [e for e in args.engines if e != "deployment" or sites == min(args.sites)]
        runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
        for _ in range(args.repeats):
            for engine in engines:
                runs[engine].append(run(engine, sites, args.rounds))
        for engine in engines:
            pairs = list(zip(runs[engine], runs[engines[0]], strict=True))
            row = {
                "sites": sites,
                "engine": engine,
                **{key: round(median(runs[engine], key), 3) for key in ("first", "round", "whole", "mb")},
                "ratio": round(statistics.median(a["round"] / b["round"] for a, b in pairs), 2),
                "mb_ratio": round(statistics.median(a["mb"] / b["mb"] for a, b in pairs), 2),
            }
            results.append(row)
            print(
                f"{sites:>5} {engine:<12}{row['first']:>9.2f}{row['round']:>9.2f}{row['ratio']:>7.2f}{row['whole']:>9.1f}"
                f"{row['mb']:>8.0f}{row['mb_ratio']:>7.2f}",
                flush=True,
            )
    print(
        json.dumps(
            {
                "benchmark": "engines",
                "rounds": args.rounds,
                "repeats": args.repeats,
                "cores": os.cpu_count(),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
