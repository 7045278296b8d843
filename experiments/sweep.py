"""Run a plan: many runs that differ in a few keys, two at a time, each finished one kept.

    python experiments/sweep.py experiments/streams/clinc150.toml --out build/streams [--jobs 2] [--only fedit,full]

A plan is TOML: `recipe` (a recipe file), `common` (overrides of every run), `seeds`, and `[methods]`: name = list of overrides,
nothing but the method's difference. A run is named PLAN-METHOD-sSEED and goes to OUT/PLAN/; it is `fedkeel run` in a process
of its own, so it resumes, and a failed one stays in the list as failed. Plain file in, plain files out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def runs_of(plan: dict[str, Any], name: str, out: Path, only: Sequence[str] = ()) -> list[tuple[Path, list[str]]]:
    """(run folder, command line) of each run, all methods of a seed before the next seed."""
    found = []
    for seed in plan["seeds"]:
        for method, overrides in plan["methods"].items():
            if only and method not in only:
                continue
            run = f"{name}-{method}-s{seed}"
            folder = out / name / run
            command = [
                str(Path(sys.executable).parent / "fedkeel"), "run", plan["recipe"], *plan["common"], *overrides,
                f"name={run}", f"seed={seed}", f"out={folder.parent}",
            ]  # fmt: skip
            found.append((folder, command))
    return found


def finished(folder: Path) -> bool:
    """Whether the run has ended."""
    state = folder / "state.json"
    return state.exists() and bool(json.loads(state.read_text())["finished"])


def work(folder: Path, command: Sequence[str]) -> tuple[str, float, int]:
    """Run or resume one; (name, seconds, exit status)."""
    if finished(folder):
        return folder.name, 0.0, 0
    begin = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (folder / "state.json").exists() else []
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        code = subprocess.run([*command, *resume], stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    return folder.name, time.perf_counter() - begin, code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--out", type=Path, default=Path("build/streams"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="methods, joined by commas")
    args = parser.parse_args()
    plan = tomllib.loads(args.plan.read_text())
    runs = runs_of(plan, args.plan.stem, args.out, [m for m in args.only.split(",") if m])
    failed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for done, (name, seconds, code) in enumerate(pool.map(lambda run: work(*run), runs), 1):
            failed += [name] if code else []
            print(f"[{done}/{len(runs)}] {name}: {'failed' if code else 'finished'} after {seconds:.0f} s", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see their .log files")


if __name__ == "__main__":
    main()
