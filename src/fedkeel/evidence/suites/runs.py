"""Suites: many runs that differ in a few keys, done once each, side by side, whatever interrupts them.

A plan is TOML and holds only differences: what a stream of data needs, what a method is, what tuning chose for it there.
`fedkeel bench` makes of it one run for every stream, method and seed, each a `fedkeel run` in a process of its own, so that a
killed suite continues where it was and a run that cannot work stops nothing but itself.
"""

from __future__ import annotations

import json
import time
import tomllib
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkeel.files import write_atomic
from fedkeel.recipe.load import load_recipe
from fedkeel.recipe.settings import ConfigError, to_toml

if TYPE_CHECKING:
    pass

from fedkeel.evidence.suites.plan import Plan, Planned, _one_of, _read_toml
from fedkeel.evidence.suites.pool import POLL, Watch, _failure, _how_far, _Job, _processes, _start, _stopped_at_the_end


def _for(stream: str, extra: Sequence[str], streams: Sequence[str]) -> list[str]:
    """Of overrides as given on the command line, those that this stream gets: `key=value`, or `STREAM:key=value`."""
    found = []
    for given in extra:
        head, colon, rest = given.partition(":")
        if colon and "=" not in head:
            _one_of(head, streams, given)
            found += [rest] if head == stream else []
        else:
            found.append(given)
    return found


def _file_name(text: str) -> str:
    """`text` as part of a file's name."""
    return "".join(c if c.isalnum() or c in "._=-" else "-" for c in text)


def runs_of(
    plan: Plan,
    streams: Sequence[str] = (),
    methods: Sequence[str] = (),
    seeds: Sequence[int] = (),
    extra: Sequence[str] = (),
    tune: bool = False,
) -> tuple[list[Planned], list[str]]:
    """The runs of a plan, all methods of a seed before the next seed, and why streams are left out, a sentence each.

    streams, methods, seeds: only these; empty: all, of streams those whose needs are given. extra: overrides that come last,
    see `_for`. Later overrides win: the suite's, the stream's, the method's, what tuning chose, `extra`.
    tune: the trials of tuning instead, one for each method and setting of its stream's grid, named METHOD@SETTING.
    Raises ConfigError on unknown names, a stream asked for whose needs are not given, or a recipe that cannot be right.
    """
    for asked in streams:
        _one_of(asked, list(plan.streams), "streams")
    for asked in methods:
        _one_of(asked, list(plan.methods), "methods")
    left, chosen = [], []
    for name, stream in plan.streams.items():
        set_keys = {o.partition("=")[0] for o in (*stream.set, *_for(name, extra, list(plan.streams)))}
        lacking = [key for key in stream.needs if key not in set_keys]
        if streams and name not in streams:
            continue
        if lacking:
            why = f"stream {name!r} needs {' and '.join(f'{name}:{key}=...' for key in lacking)}"
            if streams:
                raise ConfigError(why)
            left.append(f"{why}; it is left out")
            continue
        chosen.append(name)
    found = []
    for seed in seeds or (plan.tuning_seeds if tune else plan.seeds):
        for at in chosen:
            stream, last = plan.streams[at], _for(at, extra, list(plan.streams))
            for name, method in plan.methods.items():
                if (methods and name not in methods) or (method.streams and at not in method.streams):
                    continue
                tuned = stream.tuned.get(method.tuned_as or name, ())
                variants: list[tuple[str, tuple[str, ...]]] = [(name, tuple(tuned))]
                if tune:
                    own = not (method.untuned or method.tuned_as)
                    variants = [(f"{name}@{','.join(s)}", (*stream.trial, *s)) for s in stream.settings() if own]
                for variant, settings in variants:
                    run = _file_name(f"{at}-{variant}-s{seed}")
                    given = [*plan.set, *stream.set, *method.set, *settings, *last]
                    overrides = (*given, f"name={run}", f"seed={seed}")
                    try:
                        load_recipe(None, overrides)
                    except ConfigError as error:
                        raise ConfigError(f"suite {plan.name!r}, stream {at!r}, method {name!r}: {error}") from error
                    found.append(Planned(run, at, variant, seed, overrides, method.leg))
    return found, left


def describe(plan: Plan, runs: Sequence[Planned], before: Sequence[Mapping[str, Any]] = ()) -> str:
    """suite.json: what a reader of the folder must know beside the runs themselves.

    before: runs that the file listed already; those of other methods, streams or seeds than `runs` stay in it.
    """
    names = {run.name for run in runs}
    kept = [Planned(r["name"], r["stream"], r["method"], r["seed"], ()) for r in before if r["name"] not in names]
    runs = [*kept, *runs]
    streams = {run.stream for run in runs}
    shown = {run.method.partition("@")[0] for run in runs}
    told = {
        "name": plan.name, "title": plan.title, "note": plan.note, "reference": plan.reference,
        "streams": {name: s.text for name, s in plan.streams.items() if name in streams},
        "methods": {name: m.text for name, m in plan.methods.items() if name in shown},
        "trials": {
            name: {m: 0 if plan.methods[m].untuned else len(s.settings()) for m in plan.methods if m in shown}
            for name, s in plan.streams.items()
            if name in streams
        },
        "factors": list(plan.factors), "square": list(plan.square),
        "knobs": {key: dict(values) for key, values in plan.knobs.items()},
        "runs": [{"name": r.name, "stream": r.stream, "method": r.method, "seed": r.seed} for r in runs],
    }  # fmt: skip
    return json.dumps(told, indent=1) + "\n"


def finished(folder: Path) -> bool:
    """Whether the run in `folder` has ended; packed rows without a state are those of a committed result, and have."""
    try:
        return bool(json.loads((folder / "state.json").read_text())["finished"])
    except FileNotFoundError:
        return (folder / "rows.jsonl.gz").exists()


def other_recipe(run: Planned, folder: Path) -> str:
    """What differs between the recipe that `folder` was run with and the plan's, empty if nothing does.

    Where it lies, the number of threads, and keys that a later version of FedKeel added do not count.
    """
    meant = tomllib.loads(to_toml(load_recipe(None, run.overrides)))
    for key, value in _read_toml(folder / "recipe.toml").items():
        for name, was in value.items() if isinstance(value, dict) else [("", value)]:
            now = meant.get(key, {}).get(name) if name else meant.get(key)
            if (key, name) not in (("out", ""), ("threads", "")) and now != was:
                return f"{key}{'.' * bool(name)}{name} was {was!r} and is {now!r}"
    return ""


def execute(plan: Plan, runs: Sequence[Planned], out: Path, jobs: int, watch: Watch) -> list[Planned]:
    """Bring every run to its end, `jobs` at a time, and return those that failed.

    out: the suite's folder; it gets suite.json, and of each run a folder, a log, and where it failed the reason in
    NAME.failed. A finished run is passed over, a begun one resumed, a failed one tried again. Raises ConfigError where a
    finished run had another recipe than the plan has now: a table must not mix the two.
    """
    for run in runs:
        if (out / run.name / "recipe.toml").exists() and (why := other_recipe(run, out / run.name)):
            raise ConfigError(f"{out / run.name} was run with another recipe: {why}; remove it, or set --out to another folder")
    out.mkdir(parents=True, exist_ok=True)
    listed = out / "suite.json"
    before = json.loads(listed.read_text())["runs"] if listed.exists() else []
    write_atomic(listed, describe(plan, runs, before))
    waiting = deque(run for run in runs if not finished(out / run.name))
    watch.begin(len(runs), len(runs) - len(waiting))
    running: list[_Job] = []
    failed, context = [], _processes()
    with _stopped_at_the_end(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.popleft(), out))
            watch.at([_how_far(job, out) for job in running])
            time.sleep(POLL)
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                reason, code = out / f"{job.run.name}.failed", job.process.exitcode
                failure = _failure(out, job.run, code) if code else ""
                if failure:
                    failed.append(job.run)
                    write_atomic(reason, failure + "\n")
                else:
                    reason.unlink(missing_ok=True)
                watch.ended(job.run.name, time.perf_counter() - job.begin, failure)
    return failed
