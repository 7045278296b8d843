"""The runs that a plan means, and bringing each of them to its end once, side by side, whatever interrupts them.

Every stream, method and seed is a `fedkeel run` in a process of its own, so that a killed suite continues where it was and a
run that cannot work stops nothing but itself.
"""

from __future__ import annotations

import functools
import json
import time
import tomllib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedkeel.evidence.archive import FAILED, RunFiles
from fedkeel.evidence.suites.plan import Plan, Planned
from fedkeel.evidence.suites.pool import POLL, Job, Watch, failure_of, how_far, processes, start, stopped_at_the_end
from fedkeel.files import write_atomic
from fedkeel.recipe.load import differing, load_recipe
from fedkeel.recipe.schema import FREE, Recipe
from fedkeel.recipe.settings import ConfigError, choose, to_toml

UNCOUNTED = {*FREE, "model.device"}  # see `other_recipe`


def _for(stream: str, extra: Sequence[str], streams: Sequence[str]) -> list[str]:
    """Of overrides as given on the command line, those that this stream gets: `key=value`, or `STREAM:key=value`."""
    found = []
    for given in extra:
        head, colon, rest = given.partition(":")
        if colon and "=" not in head:
            choose("streams", head, streams, given)
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
        choose("streams", asked, plan.streams)
    for asked in methods:
        choose("methods", asked, plan.methods)
    if any(seed < 0 for seed in seeds):
        raise ConfigError(f"seeds = {list(seeds)}: whole numbers from 0 belong here")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds = {list(seeds)}: each once belongs here, or one run would count as several")
    if not tune and (shared := sorted(set(seeds) & set(plan.tuning_seeds))):
        raise ConfigError(
            f"seeds = {list(seeds)}: suite {plan.name!r} is tuned on {shared}, which are not compared; take others"
        )
    chosen, left = _streams(plan, streams, extra)
    variants = {at: _variants(plan, at, methods, extra, tune) for at in chosen}
    found = [
        Planned(_file_name(f"{at}-{variant}-s{seed}"), at, variant, seed, given, leg)
        for seed in seeds or (plan.tuning_seeds if tune else plan.seeds)
        for at in chosen
        for variant, given, leg in variants[at]
    ]
    by_name: dict[str, Planned] = {}
    for run in found:
        if by_name.setdefault(run.name, run) is not run:
            raise ConfigError(
                f"suite {plan.name!r}: {by_name[run.name].stream!r}, {by_name[run.name].method!r} and {run.stream!r}, "
                f"{run.method!r} would both be run as {run.name}: rename one"
            )
    return found, left


def _streams(plan: Plan, streams: Sequence[str], extra: Sequence[str]) -> tuple[list[str], list[str]]:
    """The streams to run, and of each other one that lacks what it needs why it is left out; see `runs_of`."""
    chosen, left = [], []
    for name, stream in plan.streams.items():
        if streams and name not in streams:
            continue
        set_keys = {o.partition("=")[0] for o in (*stream.set, *_for(name, extra, list(plan.streams)))}
        lacking = [key for key in stream.needs if key not in set_keys]
        why = f"stream {name!r} needs {' and '.join(f'{name}:{key}=...' for key in lacking)}"
        if lacking and streams:
            raise ConfigError(why)
        if lacking:
            left.append(f"{why}; it is left out")
        else:
            chosen.append(name)
    return chosen, left


def _variants(
    plan: Plan, at: str, methods: Sequence[str], extra: Sequence[str], tune: bool
) -> list[tuple[str, tuple[str, ...], str]]:
    """(method, or METHOD@SETTING of a trial; overrides; leg) of all that is run on the stream `at`; see `runs_of`.

    A recipe is checked here, once for all seeds.
    """
    stream, last = plan.streams[at], _for(at, extra, list(plan.streams))
    found = []
    for name, method in plan.methods.items():
        if (methods and name not in methods) or (method.streams and at not in method.streams):
            continue
        settings: list[tuple[str, tuple[str, ...]]] = [(name, tuple(stream.tuned.get(method.tuned_as or name, ())))]
        if tune:
            own = not (method.untuned or method.tuned_as)
            settings = [(f"{name}@{','.join(s)}", (*stream.trial, *s)) for s in stream.settings() if own]
        for variant, chosen in settings:
            given = (*plan.set, *stream.set, *method.set, *chosen, *last)
            try:
                _recipe(given)
            except ConfigError as error:
                raise ConfigError(f"suite {plan.name!r}, stream {at!r}, method {name!r}: {error}") from error
            found.append((variant, given, method.leg))
    return found


@functools.lru_cache(maxsize=1024)
def _recipe(given: tuple[str, ...]) -> Recipe:
    return load_recipe(None, given)


def recipe_of(run: Planned) -> Recipe:
    """What a planned run is to do. Raises ConfigError."""
    return replace(_recipe(run.given), name=run.name, seed=run.seed)


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
        "name": plan.name,
        "title": plan.title,
        "note": plan.note,
        "reference": plan.reference,
        "streams": {name: s.text for name, s in plan.streams.items() if name in streams},
        "twins": {name: s.twin for name, s in plan.streams.items() if name in streams and s.twin in streams},
        "methods": {name: m.text for name, m in plan.methods.items() if name in shown},
        "trials": {
            # a grid that nobody tried has had no trial
            name: {m: len(s.settings()) * ((plan.methods[m].tuned_as or m) in s.tuned) for m in plan.methods if m in shown}
            for name, s in plan.streams.items()
            if name in streams
        },
        "factors": list(plan.factors),
        "square": list(plan.square),
        "knobs": {key: dict(values) for key, values in plan.knobs.items()},
        "runs": [{"name": r.name, "stream": r.stream, "method": r.method, "seed": r.seed} for r in runs],
    }
    return json.dumps(told, indent=1) + "\n"


def other_recipe(run: Planned, held: str) -> str:
    """What differs between `held`, the recipe.toml that a run had, and the plan's, empty if nothing does.

    Keys that a resumed run may have otherwise, and the device, which changes results by rounding alone, do not count; a key
    that a later version of FedKeel added counts at its default, as the run had it. Raises ConfigError if `held` is no TOML.
    """
    meant = tomllib.loads(to_toml(recipe_of(run)))
    try:
        was_told = tomllib.loads(held)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{run.name}: recipe.toml: {error}") from error
    changed = ((key, was, now) for key, was, now in differing(was_told, meant) if key not in UNCOUNTED)
    return next((f"{key} was {was!r} and is {now!r}" for key, was, now in changed), "")


def execute(plan: Plan, runs: Sequence[Planned], out: Path, jobs: int, watch: Watch) -> list[Planned]:
    """Bring every run to its end, `jobs` at a time, and return those that failed.

    out: the suite's folder; it gets suite.json, and of each run a folder, a log, and where it failed the reason in
    NAME.failed. A finished run, also one in the folder's archive, is passed over, a begun one resumed, a failed one tried
    again. Raises ConfigError where a run there had another recipe than the plan has now: a table must not mix the two.
    """
    files = RunFiles(out)
    for run in runs:
        held = files.text(run.name, "recipe.toml") if files.holds(run.name, "recipe.toml") else ""
        if held and (why := other_recipe(run, held)):
            raise ConfigError(f"{out / run.name} was run with another recipe: {why}; remove it, or set --out to another folder")
    out.mkdir(parents=True, exist_ok=True)
    listed = out / "suite.json"
    before = json.loads(listed.read_text())["runs"] if listed.exists() else []
    write_atomic(listed, describe(plan, runs, before))
    waiting = deque(run for run in runs if files.state(run.name) != "finished")
    watch.begin(len(runs), len(runs) - len(waiting))
    running: list[Job] = []
    failed, context = [], processes()
    with stopped_at_the_end(running):
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(start(context, waiting.popleft(), out))
            watch.at([how_far(job, out) for job in running])
            time.sleep(POLL)
            for job in [job for job in running if not job.process.is_alive()]:
                running.remove(job)
                failure = _end(job, out)
                failed += [job.run] if failure else []
                watch.ended(job.run.name, time.perf_counter() - job.begin, failure)
    return failed


def _end(job: Job, out: Path) -> str:
    """Keep why a run failed, or forget that it once did; returns the failure, empty if there is none."""
    reason, code = out / (job.run.name + FAILED), job.process.exitcode
    failure = failure_of(out, job.run, code) if code else ""
    if failure:
        write_atomic(reason, failure + "\n")
    else:
        reason.unlink(missing_ok=True)
    return failure
