"""Copy what is worth keeping of a suite's finished runs into results/suites/: rows, scores, measures, recipes, environments.

    python experiments/collect_suite.py build/suites/main [--into results/suites]

Gzipped without a time stamp, so that the same rows give the same bytes. `out` in a recipe says where the run lay on the machine
it ran on; it is written as the suite's name. Adapters, checkpoints and logs stay out of git; a failed run's reason is kept.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from pathlib import Path

from fedkeel.evidence.suites.runs import finished
from fedkeel.files import write_atomic

PACKED = ("rows.jsonl", "scores.jsonl", "measures.jsonl")


def collect(suite: Path, into: Path) -> tuple[int, list[str]]:
    """Copy a suite's folder. Returns how many runs were copied, and the names of those that have not ended."""
    target, copied, left = into / suite.name, 0, []
    for name in ("suite.json", "chance.json"):
        if (suite / name).exists():
            write_atomic(target / name, (suite / name).read_text())
    for run in (entry["name"] for entry in json.loads((suite / "suite.json").read_text())["runs"]):
        source = suite / run
        if (reason := suite / f"{run}.failed").exists():
            write_atomic(target / reason.name, reason.read_text())
        if not finished(source):
            left.append(run)
            continue
        recipe = re.sub(r"^out = .*$", f'out = "{suite.name}"', (source / "recipe.toml").read_text(), flags=re.MULTILINE)
        write_atomic(target / run / "recipe.toml", recipe)
        write_atomic(target / run / "env.json", (source / "env.json").read_text())
        for name in PACKED:
            if (source / name).exists():
                write_atomic(target / run / f"{name}.gz", gzip.compress((source / name).read_bytes(), 9, mtime=0))
        copied += 1
    return copied, left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", type=Path, nargs="+")
    parser.add_argument("--into", type=Path, default=Path("results/suites"))
    args = parser.parse_args()
    for suite in args.suites:
        copied, left = collect(suite, args.into)
        print(f"{suite.name}: {copied} runs copied" + (f", {len(left)} not ended: {', '.join(left)}" if left else ""))


if __name__ == "__main__":
    main()
