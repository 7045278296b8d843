"""Suites: many runs that differ in a few keys, done once each, side by side, whatever interrupts them.

A plan is TOML and holds only differences: what a stream of data needs, what a method is, what tuning chose for it there.
`fedkeel bench` makes of it one run for every stream, method and seed, each a `fedkeel run` in a process of its own, so that a
killed suite continues where it was and a run that cannot work stops nothing but itself.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
import tomllib
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_all_start_methods, get_context
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedkeel.config import ConfigError, Recipe, cores, known_keys, load_recipe, to_toml
from fedkeel.files import write_atomic
from fedkeel.metrics import mean
from fedkeel.report import read_rows, same_value
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

PLANS = Path(__file__).parent / "plans"
POLL = 0.5  # seconds between looks at the processes
TAIL = 20  # lines of a failed run's log that are told


@dataclass(frozen=True)
class Stream:
    """Data, task stream and model that methods are compared on. text: one sentence. set: overrides of every run on it.

    needs: keys that have no default that could work, such as data.root; the stream is left out while one is not given.
    tuned: method -> overrides that tuning chose for it here. trial: overrides of a trial of tuning, such as fewer stages.
    grid: key -> the values that tuning tries, every combination of them for every method: the same effort for each.
    """

    text: str = ""
    set: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    tuned: Mapping[str, Sequence[str]] = field(default_factory=dict)
    trial: tuple[str, ...] = ()
    grid: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def settings(self) -> list[tuple[str, ...]]:
        """The settings that tuning tries, each as overrides; empty without a grid."""
        if not self.grid:
            return []
        return [
            tuple(f"{key}={v}" for key, v in zip(self.grid, values, strict=True)) for values in product(*self.grid.values())
        ]


@dataclass(frozen=True)
class Method:
    """A line of the table. text: what it is. set: its difference, as overrides. streams: where it is run; empty: everywhere.

    tuned_as: another method whose tuning it shares, as with the parts of one; empty: its own. untuned: it has nothing to tune.
    leg: whose validation score tuning judges it by, `federated` or `centralised`.
    """

    text: str = ""
    set: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    tuned_as: str = ""
    untuned: bool = False
    leg: str = "federated"


@dataclass(frozen=True)
class Plan:
    """A suite: see the module. set: overrides of every run. reference: the method that others are compared with.

    tuning_seeds: seeds of trials, none of which is in `seeds`. square: the methods with neither, the first, the second and both
    of two factors. knobs: key -> {value: method}.
    """

    name: str
    title: str
    note: str
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    set: tuple[str, ...]
    streams: Mapping[str, Stream]
    methods: Mapping[str, Method]
    reference: str
    factors: tuple[str, ...]
    square: tuple[str, ...]
    knobs: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Planned:
    """One run of a suite: what `fedkeel run` is told, beside its name and folder. leg: see `Method`."""

    name: str
    stream: str
    method: str
    seed: int
    overrides: tuple[str, ...]
    leg: str = "federated"


def _known(given: Iterable[str], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise ConfigError(f"{where}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def _strings(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"{where} must be a list of strings, not {value!r}")
    return tuple(value)


def _one_of(name: str, known: Sequence[str], where: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        raise ConfigError(
            f"{where}: no {name!r}; there are {', '.join(known)}" + (f". Did you mean {near[0]!r}?" if near else "")
        )


def _stream(name: str, tree: Any, methods: Sequence[str], where: str) -> Stream:
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} must be a table")
    _known(tree, ("text", "set", "needs", "tuned", "trial", "grid"), where)
    tuned, grid = tree.get("tuned", {}), tree.get("grid", {})
    for method in tuned:
        _one_of(method, methods, f"{where}.tuned")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{where}.grid.{key} must be a list of values")
    return Stream(
        str(tree.get("text", "")),
        _strings(tree.get("set", []), f"{where}.set"),
        _strings(tree.get("needs", []), f"{where}.needs"),
        {method: _strings(given, f"{where}.tuned.{method}") for method, given in tuned.items()},
        _strings(tree.get("trial", []), f"{where}.trial"),
        {key: tuple(map(_as_text, values)) for key, values in grid.items()},
    )


def _as_text(value: Any) -> str:
    """A value of a plan as an override writes it."""
    return json.dumps(value) if isinstance(value, bool | list) else str(value)


def _value_of(key: str, overrides: Sequence[str]) -> str:
    """What `key` has under these overrides, as an override writes it. Raises ConfigError on an unknown key."""
    _known([key], list(known_keys()), "knobs")
    given = [o.partition("=")[2] for o in overrides if o.partition("=")[0] == key]
    return given[-1] if given else _as_text(attrgetter(key)(Recipe()))


def _method(tree: Any, streams: Sequence[str], methods: Sequence[str], where: str) -> Method:
    if not isinstance(tree, dict):
        raise ConfigError(f'{where} must be a table, such as {{text = "...", set = ["train.proximal=0.1"]}}')
    _known(tree, ("text", "set", "streams", "tuned_as", "untuned", "leg"), where)
    only, shared = _strings(tree.get("streams", []), f"{where}.streams"), str(tree.get("tuned_as", ""))
    for stream in only:
        _one_of(stream, streams, f"{where}.streams")
    if shared:
        _one_of(shared, methods, f"{where}.tuned_as")
    set_, leg = _strings(tree.get("set", []), f"{where}.set"), str(tree.get("leg", "federated"))
    _one_of(leg, ("federated", "centralised"), f"{where}.leg")
    return Method(str(tree.get("text", "")), set_, only, shared, bool(tree.get("untuned", False)), leg)


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    if not (isinstance(value, list) and value and all(type(s) is int and s >= 0 for s in value)):
        raise ConfigError(f"{where} must be a list of whole numbers from 0, not {value!r}")
    return tuple(value)


def plan_names() -> list[str]:
    """The suites that come with FedKeel."""
    return sorted(path.stem for path in PLANS.glob("*.toml"))


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def load_plan(name: str, tuned: Path | None = None) -> Plan:
    """The suite `name` of those that come with FedKeel, or the plan in the file of that name, which ends in .toml.

    tuned: a file that `write_tuned` wrote, whose choices replace the plan's own.

    `[knobs]` gives each key its values, and every value is a method: the reference with that one key changed, or the reference
    itself where that is its value.
    Raises ConfigError on a file that is missing or malformed, a key or name that is not known, or nothing to compare.
    """
    path = Path(name) if name.endswith(".toml") else PLANS / f"{name}.toml"
    if not name.endswith(".toml"):
        _one_of(name, plan_names(), "suite")
    tree = _read_toml(path)
    for at, chosen in (_read_toml(tuned).get("streams", {}) if tuned else {}).items():
        _one_of(at, list(tree.get("streams", {})), str(tuned))
        tree["streams"][at]["tuned"] = chosen["tuned"]
    top = (
        "title", "note", "seeds", "tuning_seeds", "set", "streams", "methods", "reference", "factors", "square", "knobs",
    )  # fmt: skip
    _known(tree, top, str(path))
    streams, methods = tree.get("streams", {}), dict(tree.get("methods", {}))
    seeds, tuning = (
        _seeds(tree.get("seeds", [1, 2, 3]), f"{path}: seeds"),
        _seeds(tree.get("tuning_seeds", [0]), f"{path}: tuning_seeds"),
    )
    if set(seeds) & set(tuning):
        raise ConfigError(f"{path}: seeds and tuning_seeds share {sorted(set(seeds) & set(tuning))}; tune on others")
    if not streams or not methods:
        raise ConfigError(f"{path}: a plan needs [streams.NAME] and [methods.NAME]")
    reference = str(tree.get("reference", next(iter(methods))))
    _one_of(reference, list(methods), f"{path}: reference")
    knobs: dict[str, dict[str, str]] = {}
    for key, values in tree.get("knobs", {}).items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: knobs.{key} must be a list of values")
        knobs[key] = {}
        for value in values:
            text, of = _as_text(value), methods[reference]
            own = [
                _value_of(key, [*tree.get("set", []), *stream.get("set", []), *of.get("set", [])])
                for stream in streams.values()
            ]
            if all(same_value(text, value) for value in own):  # the reference itself is this point of the curve
                knobs[key][text] = reference
                continue
            knobs[key][text] = f"{key}={text}"
            methods[f"{key}={text}"] = {
                **of, "text": "", "set": [*of.get("set", []), f"{key}={text}"], "tuned_as": of.get("tuned_as") or reference,
            }  # fmt: skip
    square, factors = (_strings(tree.get(key, []), f"{path}: {key}") for key in ("square", "factors"))
    for method in square:
        _one_of(method, list(methods), f"{path}: square")
    if (len(square), len(factors)) not in ((0, 0), (4, 2)):
        raise ConfigError(f"{path}: square names four methods (neither, first, second, both) and factors the two")
    return Plan(
        path.stem, str(tree.get("title", path.stem)), " ".join(str(tree.get("note", "")).split()), seeds, tuning,
        _strings(tree.get("set", []), f"{path}: set"),
        {n: _stream(n, t, list(methods), f"{path}: streams.{n}") for n, t in streams.items()},
        {n: _method(t, list(streams), list(methods), f"{path}: methods.{n}") for n, t in methods.items()},
        reference, factors, square, knobs,
    )  # fmt: skip


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


def final_score(folder: Path, split: str, leg: str = "federated") -> float:
    """A finished run's score at its end on the rows of `split`, in [0, 1]: in a stream the mean over its stages, else over
    tasks. Raises FedKeelError where the run holds none."""
    rows = [r for r in read_rows(folder / "rows.jsonl") if (r.method, r.split, r.task, r.site) == (leg, split, "", "")]
    last = max((r.round for r in rows), default=0)
    by_stage = [r.value for r in rows if r.round == last and r.name.startswith("score_of_stage_")]
    whole = [r.value for r in rows if r.round == last and r.name == "score"]
    if not (by_stage or whole):
        raise FedKeelError(f"{folder}: no score on {split} rows; set evaluation.{split}_rows and a round that is scored")
    return mean(by_stage or whole)


def trial_scores(runs: Sequence[Planned], out: Path) -> dict[str, dict[str, dict[str, float]]]:
    """stream -> method -> setting (overrides, joined by commas) -> mean validation score over seeds, of the runs that ended."""
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for run in runs:
        if finished(out / run.name):
            method, _, setting = run.method.partition("@")
            found[run.stream, method, setting].append(final_score(out / run.name, "validation", run.leg))
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for (stream, method, setting), values in found.items():
        scores.setdefault(stream, {}).setdefault(method, {})[setting] = mean(values)
    return scores


def tuned_text(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What tuning chose, as the `[streams.NAME.tuned]` tables of a plan: of each method the setting with the best score, the
    first of equal ones."""
    lines = []
    for stream, methods in scores.items():
        lines.append(f"[streams.{json.dumps(stream)}.tuned]")
        for method, settings in methods.items():
            best = max(settings, key=settings.__getitem__)
            lines.append(f"{json.dumps(method)} = {json.dumps(best.split(','))} # {100 * settings[best]:.1f}")
    return "\n".join(lines) + "\n"


def chance(runs: Sequence[Planned]) -> dict[str, dict[str, dict[str, float]]]:
    """stream -> task -> {"majority": the share of the commonest answer among its test rows, "rows": how many}.

    What a report needs to tell a score from chance; tasks without candidate labels are left out. Reads the data of one run of
    each stream, no weights.
    """
    from fedkeel.evaluate import choose
    from fedkeel.run import prepare

    found: dict[str, dict[str, dict[str, float]]] = {}
    for stream, run in {run.stream: run for run in reversed(runs)}.items():
        recipe = load_recipe(None, run.overrides)
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for record in choose(prepare(recipe).sites.all("test"), "test", recipe.evaluation.test_rows):
            if record.labels:
                answers[record.task][record.output] += 1
        found[stream] = {
            task: {"majority": max(counts.values()) / counts.total(), "rows": counts.total()}
            for task, counts in answers.items()
        }
    return found


def finished(folder: Path) -> bool:
    """Whether the run in `folder` has ended; packed rows without a state are those of a committed result, and have."""
    try:
        return bool(json.loads((folder / "state.json").read_text())["finished"])
    except FileNotFoundError:
        return (folder / "rows.jsonl.gz").exists()


class Watch(Protocol):
    """Hears how a suite goes."""

    def begin(self, total: int, done: int) -> None:
        """total runs, of which `done` had ended before."""

    def at(self, running: Sequence[str]) -> None:
        """What runs now, each with how far it is."""

    def ended(self, run: str, seconds: float, failure: str) -> None:
        """A run has ended; failure: the last lines of its log, empty if it did not fail."""


def jobs_for(memory_each: float = 2e9) -> int:
    """Runs at a time: one a core, as far as free memory allows `memory_each` bytes for each; at least 1."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, StopIteration):  # Linux tells what is free, caches counted as free
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    return max(1, min(cores(), int(free // memory_each)))


def _die_with(suite: int) -> None:
    """On Linux: when the process `suite` is killed, so is this one, at once, and no run goes on unseen.

    The parent of this process is the server that forked it, which dies too, but only after it has put its libraries away.
    """
    if sys.platform != "linux":
        return
    try:
        handle = os.pidfd_open(suite)
    except ProcessLookupError:  # it died before this line
        os.kill(os.getpid(), signal.SIGKILL)

    def wait() -> None:
        select.select([handle], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _work(suite: int, arguments: Sequence[str], log: str) -> None:
    """A run in a process of its own: `fedkeel run` with these arguments, everything it prints in `log`."""
    _die_with(suite)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab", buffering=0) as told:
        for stream in (1, 2):
            os.dup2(told.fileno(), stream)
    sys.argv = ["fedkeel", "run", *arguments]
    runpy.run_module("fedkeel.cli", run_name="__main__")


def _processes() -> ForkServerContext | SpawnContext:
    """Processes that begin with the libraries loaded, where the system can fork: that is a tenth of a short run."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["fedkeel.run", "fedkeel.display", "fedkeel.report", "peft"])
    return context


@dataclass
class _Job:
    run: Planned
    process: BaseProcess
    begin: float


def _start(context: ForkServerContext | SpawnContext, run: Planned, out: Path) -> _Job:
    resume = ["--resume"] if (out / run.name / "state.json").exists() else []
    arguments = [*run.overrides, f"out={out}", "--no-report", *resume]  # the suite's report is what is read
    # not a daemon: those may not have processes of their own, and a federation may
    process = context.Process(target=_work, args=(os.getpid(), arguments, str(out / f"{run.name}.log")))
    process.start()
    return _Job(run, process, time.perf_counter())


def _how_far(job: _Job, out: Path) -> str:
    try:
        state = json.loads((out / job.run.name / "state.json").read_text())
    except (OSError, ValueError):
        return f"{job.run.name}: starting"
    return f"{job.run.name}: {state['leg'] or 'between legs'}, round {state['round']}"


def _failure(out: Path, run: Planned, code: int) -> str:
    lines = (out / f"{run.name}.log").read_text(errors="replace").splitlines()
    return f"exit status {code}\n" + "\n".join(lines[-TAIL:])


@contextlib.contextmanager
def _stopped_at_the_end(jobs: Sequence[_Job]) -> Iterator[None]:
    """Whatever ends the suite also ends its runs, with time to leave a whole state behind."""
    try:
        yield
    finally:
        for job in jobs:
            if job.process.pid is not None and job.process.is_alive():
                os.kill(job.process.pid, signal.SIGINT)
        for job in jobs:
            job.process.join()


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
