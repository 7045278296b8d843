"""What the update of a site tells of its rows, by rows and steps, guard, and what is trained.

    python benchmarks/inversion.py [--settings NAME ...] RECIPE [key=value ...]

The attacks of `fedkeel audit` on updates of three sites: after round 1, where B is 0 and A does not move in the first step, and
after round 2, from an adapter that those sites made in a round of four steps of 16 rows. A coordinator has the test rows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, replace
from json import dumps
from pathlib import Path
from shlex import quote

import torch

from fedkeel.data.format import Example
from fedkeel.evidence.leaks.updates import GUARDS, Guard, attack, change_of, coordinator
from fedkeel.evidence.report.leaks import Told, told_table
from fedkeel.model.lora import Model
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.schema import Privacy, Recipe
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.prepare import prepare
from fedkeel.types import Global

SITES = 3
SIZES = [(4, 1), (16, 1), (1, 16), (16, 16)]
FEW = {name: GUARDS[name] for name in ("none", "int4", "secure aggregation")}
NOISES = {
    **{f"site noise {z}": Guard(privacy=Privacy(unit="site", clip=0.1, noise=z)) for z in (0.01, 0.001)},
    **{f"row noise {z}": Guard(privacy=Privacy(unit="row", clip=0.1, noise=z)) for z in (0.1, 0.01)},
}
OTHERS = {
    "freeze_a, rank 8": ["federation.rule=freeze_a"],
    "freeze_a, rank 64": ["federation.rule=freeze_a", "lora.rank=64", "lora.alpha=128"],
    "upper half": ["lora.layers=upper-half"],
}


def warm(model: Model, recipe: Recipe, held: dict[str, list[Example]]) -> Global:
    """The state after a round of four steps of 16 rows."""
    assert model.initial is not None
    short = replace(recipe, train=replace(recipe.train, batch_size=16, local_steps=4, local_epochs=0))
    changes = [change_of(model, short, Global(0, model.initial), site, rows) for site, rows in held.items()]
    after = {n: t + sum(c[n] for c in changes if n in c) / len(changes) for n, t in model.initial.tensors().items()}
    return Global(1, model.initial.with_tensors(after))


def setting(path: Path, overrides: list[str], plans: list[tuple[int, tuple[int, int], dict[str, Guard]]]) -> list[Told]:
    recipe = load_recipe(path, overrides)
    prepared = prepare(recipe)
    model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes)
    formatter = formatter_of(model, prepared)
    rows = {name: formatter.encode_all(of["train"]) for name, of in prepared.sites.rows.items()}
    held = {name: rows[name] for name in sorted(rows)[:SITES]}
    tests = sorted(prepared.sites.all("test"), key=lambda r: r.id)[:400]
    attacker = coordinator(model, recipe, formatter.encode_all(tests))
    assert model.initial is not None
    states = {0: Global(0, model.initial), 1: warm(model, recipe, held)}
    found = []
    for round, size, guards in plans:
        told = attack(attacker, states[round], held, size, guards)
        print("\n".join("  ".join(line) for line in told_table(told).lines), flush=True)
        found += told
    return found


def main() -> None:
    one, exact = (1, 1), {name: GUARDS[name] for name in ("none", "int8")}
    other = [(1, one, exact), (0, one, exact), (1, (4, 1), exact)]
    plans = {
        "as the recipe": ([], [(1, one, {**GUARDS, **NOISES}), *((1, size, FEW) for size in SIZES)]),
        "first round": ([], [(0, one, FEW), (0, (4, 1), FEW), (0, (1, 4), FEW)]),
        **{name: (more, other) for name, more in OTHERS.items()},
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--settings", nargs="+", default=list(plans), choices=plans)
    args = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"# python benchmarks/inversion.py {' '.join(map(quote, sys.argv[1:]))}, commit {commit}")
    print("# " + " | ".join(told_table([]).header))
    found = {}
    for name in args.settings:
        print(f"# {name}", flush=True)
        found[name] = setting(args.recipe, [*args.overrides, *plans[name][0]], plans[name][1])
    print(dumps({name: [asdict(one) for one in told] for name, told in found.items()}))


if __name__ == "__main__":
    main()
