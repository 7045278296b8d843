"""Score finished runs under damage: what is left of the federated model, by family and strength.

    python experiments/stability.py RUN_FOLDER… [--draws 20] [--rows 300] [--families heads,bits] [--out FILE.jsonl]

Rows are held-out test rows of the last stage, at most --rows a task, the same for every run of one data set; draws are the
same damage in every run on one base. A line of FILE is one (run, family, strength), with `trained`: the amounts of the
recipe's structures that disturb the same thing, empty where the family is held out. The headline of a run is the mean
stability index of its held-out families. A run that FILE holds already, with this adapter, rows, draws and seed, is not scored
again. Run it where the recipe's relative paths hold. Last on stdout: one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from fedkeel.cli import finished
from fedkeel.config import Recipe
from fedkeel.damage import FAMILIES, STRENGTHS, family_index, stability
from fedkeel.data import Formatter
from fedkeel.evaluate import choose
from fedkeel.files import append_lines
from fedkeel.run import prepare, trained_model
from fedkeel.types import FedKeelError

# family of damage -> structures that disturb the same thing while training
TRAINED_BY = {
    "heads": ("heads",),
    "channels": ("channels",),
    "skip": ("layers",),
    "modules": ("branch", "lodrop"),
    "scale": ("rank",),
    "noise": ("weights",),
    "bits": (),
}
Line = dict[str, Any]


def trained(recipe: Recipe, family: str) -> dict[str, float]:
    """The recipe's amounts of the structures that disturb what this family damages; empty where none does."""
    amounts = asdict(recipe.structure)
    return {name: amounts[name] for name in TRAINED_BY[family] if amounts[name]}


def identity(folder: Path, args: argparse.Namespace) -> Line:
    """What makes a line of the file stand for this run, as it is now, and these settings."""
    recipe, adapter = finished(folder)
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]
    return {"run": recipe.name, "adapter": digest, "seed": args.seed, "rows_a_task": args.rows, "draws_asked": args.draws}


def scored(folder: Path, families: Sequence[str], args: argparse.Namespace) -> list[Line]:
    """One line a family and strength."""
    recipe, _ = finished(folder)
    prepared = prepare(recipe)
    model = trained_model(prepared, folder)
    formatter = Formatter(
        model.tokenizer, model.kind, recipe.data.max_length, recipe.data.list_labels, classes=prepared.classes
    )
    rows = choose(prepared.stages[-1].all("test"), "test", args.rows)
    if not rows:
        raise FedKeelError(f"{folder}: its data has no test row")
    begin = time.perf_counter()
    clean, *outcomes = stability(
        model, formatter, rows, recipe.evaluation, {f: STRENGTHS[f] for f in families}, args.draws, args.seed
    )
    seconds = (time.perf_counter() - begin) / (1 + len(outcomes))
    print(f"{recipe.name}: {1 + len(outcomes)} scorings of {len(rows)} rows, {seconds:.2f} s each", file=sys.stderr)
    lines = []
    for family in families:
        for strength in STRENGTHS[family]:
            mine = [o for o in outcomes if (o.family, o.strength) == (family, strength)]
            scores = [o.score for o in mine]
            lines.append({
                **identity(folder, args), "recipe_seed": recipe.seed, "family": family, "strength": strength,
                "trained": trained(recipe, family), "clean": clean.score, "score": mean(scores),
                "sd": stdev(scores) if len(scores) > 1 else None, "agreement": mean(o.agreement for o in mine),
                "draws": len(mine), "rows": len(rows), "seconds_each": round(seconds, 3),
            })  # fmt: skip
    return lines


def summary(lines: Sequence[Line]) -> Line:
    """A run's stability index by family, and its mean over the families that training left alone and over those it used."""
    clean, families = lines[0]["clean"], list(dict.fromkeys(line["family"] for line in lines))
    index: dict[str, float] = {}  # where the undamaged model scores 0 there is none
    for family in families if clean else ():
        scores = {line["strength"]: line["score"] for line in lines if line["family"] == family}
        index[family] = family_index(family, scores, clean)
    used = [f for f in families if any(line["trained"] for line in lines if line["family"] == f)]

    def over(some: Sequence[str]) -> float | None:
        return mean(index[f] for f in some) if some and index else None

    held_out = over([f for f in families if f not in used])
    return {"clean": clean, "held_out": held_out, "trained_on": over(used), "trained_families": used, "index": index}


def table(name: str, lines: Sequence[Line]) -> str:
    """The lines of a run for reading, in points of 100."""
    text = [f"{name}: clean score {100 * lines[0]['clean']:.1f}, {lines[0]['rows']} rows"]
    for line in lines:
        spread = "" if line["sd"] is None else f"± {100 * line['sd']:.1f}"
        mark = ", ".join(f"trained on {k} {v:g}" for k, v in line["trained"].items())
        text.append(
            f"  {line['family']:<9}{line['strength']:<6g}{100 * line['score']:6.1f} {spread:<8}"
            f"agreement {100 * line['agreement']:5.1f}  {mark}".rstrip()
        )
    return "\n".join(text)


def kept(path: Path) -> list[Line]:
    """The lines of a file that need not be there yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def one_run(folder: Path, families: Sequence[str], args: argparse.Namespace) -> list[Line]:
    """The lines of a run, as the file holds them; what it lacks is scored and appended, all of it at once."""
    mine = identity(folder, args)
    held = [line for line in kept(args.out) if {key: line[key] for key in mine} == mine]
    found: Mapping[tuple[str, float], Line] = {(line["family"], line["strength"]): line for line in held}
    lacking = [f for f in families if any((f, strength) not in found for strength in STRENGTHS[f])]
    if lacking:
        new = scored(folder, lacking, args)
        append_lines(args.out, map(json.dumps, new))
        found = {**found, **{(line["family"], line["strength"]): line for line in new}}
    return [found[family, strength] for family in families for strength in STRENGTHS[family]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--rows", type=int, default=300, help="held-out rows a task; 0: all")
    parser.add_argument("--families", default=",".join(FAMILIES), help=f"of {', '.join(FAMILIES)}, joined by commas")
    parser.add_argument("--out", type=Path, default=Path("build/stability.jsonl"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    families = [f for f in args.families.split(",") if f]
    if unknown := [f for f in families if f not in FAMILIES]:
        parser.error(f"--families {','.join(unknown)}: there are {', '.join(FAMILIES)}")
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    runs = {}
    try:
        for folder in args.folders:
            lines = one_run(folder, families, args)
            runs[lines[0]["run"]] = summary(lines)
            print(table(lines[0]["run"], lines), flush=True)
    except FedKeelError as error:
        sys.exit(f"stability: {error}")
    print(json.dumps({"draws": args.draws, "rows_a_task": args.rows, "seed": args.seed, "runs": runs}))


if __name__ == "__main__":
    main()
