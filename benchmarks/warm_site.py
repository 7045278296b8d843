"""What a site's warm worker saves: a round in a process that holds its base model, against a round in a fresh process.

    python benchmarks/warm_site.py [--shapes keel-nano llama-20m llama-0.5b] [--repeats 3] [--steps 2]

Both rounds are real requests to `fedkeel.engines.worker` over its socket, with the same bytes and the same steps; before a
cold one the worker is told to stop, so that an interpreter starts, imports torch, reads base and tokenizer, hashes the base and
encodes the rows. "from disk": the files of the base were dropped from the page cache before. They take turns; load is the
median over the repeats of (cold - warm of the same repeat). MB: of the base's folder, of which the embedded keel-nano has none.
"hidden at": the seconds that a warm round must take for the load to be a tenth of the cold one. Flower's own process a message
comes on top of both (benchmarks/engines.py). Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path

from step_cost import SHAPES, base_of

from fedkeel.engines.coordinate import read_start
from fedkeel.engines.sitefile import SiteFile, read_site
from fedkeel.engines.worker import ask, stop
from fedkeel.exchange.messages import Way, names_of, pack_global
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import to_toml
from fedkeel.tables import RULES
from fedkeel.types import Global

ROWS = 64
COLOURS = ["red", "green", "blue", "white"]


def site_in(folder: Path, base: str) -> SiteFile:
    """A site of `ROWS` rows whose base is the embedded model or the folder `base`."""
    rows = [
        {
            "task": "colour",
            "instruction": "Which colour?",
            "input": f"row {n}: " + f"a {COLOURS[n % 4]} house; " * 6,
            "output": COLOURS[n % 4],
            "site": "here",
            "split": "train",
        }
        for n in range(ROWS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.json").write_text(json.dumps({"tasks": {"colour": {"labels": COLOURS}}}))
    model = "" if base == "keel-nano" else f'[model]\nbase = "{base}"\n'
    (folder / "site.toml").write_text(f'name = "here"\nthreads = 1\n{model}[data]\nroot = "."\n')
    return read_site(folder / "site.toml")


def forget(folder: str) -> None:
    """Drop a base's files from the page cache."""
    for path in Path(folder).iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


class Bench:
    """One site; `seconds` times one training request, from asking to its answer."""

    def __init__(self, site: SiteFile, base: str, steps: int) -> None:
        overrides = [
            f"model.base={base}",
            "data.source=jsonl",
            f"data.root={site.path.parent}",
            'data.files=["rows.jsonl"]',
            "data.tasks_file=tasks.json",
            "data.site_column=site",
            "partition.scheme=natural",
            f"train.local_steps={steps}",
            "train.batch_size=4",
        ]
        recipe = load_recipe(None, overrides)
        self.site, self.base = site, base
        self._header = {"run": secrets.token_hex(8), "site": "here", "recipe": to_toml(recipe)}
        self._ask("hello", b"")
        adapter = read_start(self._ask("start", b""))
        way = Way(recipe.federation.codec_down, names_of(adapter, RULES[recipe.federation.rule].down))
        self._payload = pack_global("global", Global(0, adapter), way, tasks={})

    def _ask(self, kind: str, payload: bytes) -> bytes:
        header = {**self._header, "kind": kind, "id": secrets.token_hex(8), "kept": ""}
        header |= {"leg": "federated", "rounds": 4, "steps": 0, "rank": 0}
        told, out = ask(self.site, header, payload, 3600.0)
        if told.get("error"):
            raise SystemExit(told["error"])
        return out

    def seconds(self, how: str) -> float:
        if how != "warm":
            stop(self.site)
        if how == "disk" and self.base != "keel-nano":
            forget(self.base)
        begin = time.perf_counter()
        self._ask("train", self._payload)
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["keel-nano", "llama-20m", "llama-0.5b"], choices=["keel-nano", *SHAPES])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps of a round, on 4 rows each")
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    results = []
    print(f"{'base':<12}{'MB':>7}{'warm s':>8}{'cold s':>8}{'load s':>8}{'of cold':>9}{'from disk':>11}{'hidden at':>11}")
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(prefix="fk-") as given:
            (Path(given) / "base").mkdir()
            base = base_of(shape, Path(given) / "base")
            megabytes = sum(path.stat().st_size for path in (Path(given) / "base").iterdir()) / 1e6
            site = site_in(Path(given), base)
            try:
                bench = Bench(site, base, args.steps)
                taken: dict[str, list[float]] = {"warm": [], "cold": [], "disk": []}
                for _ in range(args.repeats):
                    for how, seconds in taken.items():
                        seconds.append(bench.seconds(how))  # a warm one follows a round, and a cold one's process goes on
            finally:
                stop(site)
            load, disk = (
                statistics.median(cold - warm for warm, cold in zip(taken["warm"], taken[how], strict=True))
                for how in ("cold", "disk")
            )
            row = {
                "base": shape,
                "megabytes": round(megabytes, 1),
                "warm": round(statistics.median(taken["warm"]), 2),
                "cold": round(statistics.median(taken["cold"]), 2),
                "load": round(load, 2),
                "share": round(statistics.median((c - w) / c for w, c in zip(taken["warm"], taken["cold"], strict=True)), 2),
                "from_disk": round(disk, 2) if base != "keel-nano" else None,
                "hidden_at": round(9 * load, 1),
            }
            results.append(row)
            told = "-" if row["from_disk"] is None else f"{disk:.1f}"
            print(
                f"{shape:<12}{row['megabytes']:>7.0f}{row['warm']:>8.2f}{row['cold']:>8.2f}{row['load']:>8.2f}"
                f"{row['share']:>9.0%}{told:>11}{row['hidden_at']:>9.0f} s",
                flush=True,
            )
    print(json.dumps({"benchmark": "warm_site", "steps": args.steps, "repeats": args.repeats, "results": results}))


if __name__ == "__main__":
    main()
