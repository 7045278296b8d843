"""A suite to keep: the rows of its runs in one archive, and beside it what a person reads."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedkeel.evidence.archive import ARCHIVE, FAILED, KEPT, RunFiles, to_archive
from fedkeel.evidence.report import suite_markdown
from fedkeel.evidence.report.suite import SKIPPED
from fedkeel.evidence.report.tables import escape
from fedkeel.evidence.suites.tuning import trial_tables
from fedkeel.files import write_atomic
from fedkeel.recipe.settings import dotted, toml_value
from fedkeel.types import FedKeelError

BESIDE = ("chance.json", "tuned.toml")  # copied, where the suite has them


def pack(suite: Path, target: Path) -> tuple[int, list[str]]:
    """Keep the suite in the folder `suite` in the folder `target`, which may be the same.

    target gets runs.tar.xz (see `archive`), suite.json, chance.json and tuned.toml where the suite has them, recipes.toml (what
    most methods of a stream set, and what each set otherwise) and tables.md (every table that a report has). Adapters,
    checkpoints and logs stay where they are. Equal runs give equal bytes.

    Returns how many runs are kept and the names of those that have neither ended nor failed. Raises FedKeelError if the suite
    holds no finished run, or a file there is missing or malformed.
    """
    listed = suite / "suite.json"
    try:
        plan = json.loads(listed.read_text(encoding="utf-8"))
        runs = [(r["name"], r["stream"], r["method"]) for r in plan["runs"]]
    except FileNotFoundError as error:
        raise FedKeelError(f"{suite} is no suite's folder: suite.json, which `fedkeel bench` writes, is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FedKeelError(f"{listed} is not what `fedkeel bench` writes: {error!r}") from error
    files = RunFiles(suite)
    kept: dict[str, bytes] = {}
    recipes: list[tuple[str, str, dict[str, Any]]] = []
    left = []
    for run, stream, method in runs:
        state = files.state(run)
        if state == "finished":
            held = {name: files.text(run, name) for name in KEPT if files.holds(run, name)}
            held["recipe.toml"] = _moved(files.text(run, "recipe.toml"), plan.get("name", suite.resolve().name))
            recipes.append((stream, method, _parsed(held["recipe.toml"], files.where(run, "recipe.toml"))))
            kept |= {f"{run}/{name}": text.encode() for name, text in held.items()}
        elif state == "failed":
            kept[run + FAILED] = _ends(files.reason(run) or "").encode()
        else:
            left.append(run)
    if not recipes:
        raise FedKeelError(f"{suite} holds no finished run: there is nothing to keep")
    for name in ("suite.json", *BESIDE):
        if (suite / name).exists():
            write_atomic(target / name, (suite / name).read_bytes())
    write_atomic(target / ARCHIVE, to_archive(kept))
    write_atomic(target / "recipes.toml", _recipes(plan["title"], recipes))
    write_atomic(target / "tables.md", tables_of(target, plan))  # from what was just packed
    return len(recipes), left


def tables_of(folder: Path, plan: Mapping[str, Any]) -> str:
    """tables.md of the packed suite in `folder`. plan: its suite.json."""
    files = RunFiles(folder)
    held = [run["name"] for run in plan["runs"] if files.holds(run["name"], "env.json")]
    commits = sorted({json.loads(files.text(run, "env.json")).get("commit") or "not known" for run in held})
    rows = f"Rows, recipe and environment of each run: {ARCHIVE}; commit {', '.join(commits)}.\n"
    if any("@" in run["method"] for run in plan["runs"]):
        tables = [table.markdown() for table in trial_tables(folder)]
        return "\n".join([f"# {escape(plan['title'])}: tuning\n", rows, *tables])
    note = [plan["note"] + "\n"] if plan["note"] else []  # Markdown as its plan has it
    return "\n".join([f"# {escape(plan['title'])}\n", *note, rows, suite_markdown(folder)])


def _moved(recipe: str, name: str) -> str:
    """A recipe that does not say where its run lay on the machine that it ran on."""
    return re.sub(r"^out = .*$", lambda _: f"out = {toml_value(name)}", recipe, flags=re.MULTILINE)


def _ends(reason: str) -> str:
    """The first and the last line of a failure: exit status and error, without a traceback's paths of a machine."""
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    return "\n".join(dict.fromkeys([*lines[:1], *lines[-1:]])) + "\n"


def _parsed(recipe: str, where: str) -> dict[str, Any]:
    """A recipe's dotted keys, without SKIPPED, and their values."""
    try:
        return {key: value for key, value in dotted(tomllib.loads(recipe)).items() if key not in SKIPPED}
    except tomllib.TOMLDecodeError as error:
        raise FedKeelError(f"{where} cannot be read: {error}") from error


def _recipes(title: str, recipes: list[tuple[str, str, dict[str, Any]]]) -> str:
    """recipes.toml. recipes: (stream, method, dotted keys) of every finished run."""
    by_stream: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for stream, method, recipe in recipes:
        by_stream[stream][method] = {**by_stream[stream].get(method, {}), **recipe}
    lines = [
        f"# {' '.join(title.split())}: of each stream, what most of its methods set, and what a method set otherwise,",
        "# as resolved; without name, seed, folder and threads. The recipe of each run is in the archive.",
    ]
    for stream, methods in by_stream.items():
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for recipe in methods.values():
            for key, value in recipe.items():
                counts[key][toml_value(value)] += 1
        most = {key: count.most_common(1)[0][0] for key, count in counts.items()}
        lines += ["", f"[{_key(stream)}.most]", *_assigned(most)]
        for method, recipe in methods.items():
            own = {key: toml_value(value) for key, value in recipe.items() if toml_value(value) != most[key]}
            lines += ["", f"[{_key(stream)}.methods.{_key(method)}]", *_assigned(own)]
    return "\n".join(lines) + "\n"


def _assigned(values: Mapping[str, str]) -> list[str]:
    return [f"{key} = {value}" for key, value in values.items()]


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_value(name)
