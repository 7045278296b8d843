"""A federation whose data never come together: the coordinator of a deployment.

It holds adapters, not models: no base weights, no GPU, no rows. What the federation starts from is made by the sites, each from
the recipe's seed and its own copy of the base, and must have one hash everywhere. Only the `federated` leg is run, and the base
model scored; baselines on pooled data are what a deployment exists to avoid. Held-out scores are sums and counts that the sites
report of their own rows; the adapter's PEFT folder is written by one site and compared with the coordinator's tensors.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from fedkeel.engines.work import digest_of
from fedkeel.exchange.codecs import EnvelopeError, open_envelope
from fedkeel.exchange.messages import MEMORY, pack_global
from fedkeel.federation.kept import layout_of, modules_left_out
from fedkeel.federation.server import FederationError, run_round
from fedkeel.files import write_atomic
from fedkeel.method.aggregate import AGGREGATORS
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import ConfigError
from fedkeel.run.folder import RunFolder
from fedkeel.run.legs import Leg, Stage
from fedkeel.run.loop import Carrier
from fedkeel.run.rows import round_rows
from fedkeel.run.watch import Watch, tell_failures
from fedkeel.scores.evaluate import over_tasks
from fedkeel.scores.metrics import macro
from fedkeel.types import Adapter, FedKeelError, Global, Lora, Row

# what must be one at all sites, and how a person would say it
ONE = {
    "base": "base model",
    "tokenizer": "tokenizer",
    "kind": "kind of model",
    "classes": "list of classes (list a task's labels in data.tasks_file)",
    "layout": "adapter layout",
    "initial": "initial adapter",
}
Answers = Mapping[str, "tuple[dict[str, Any], bytes] | FedKeelError"]


class Sites(Protocol):
    """The sites, as `flower.Courier` reaches them. vet: (site, what it said) -> why it is not asked, or nothing."""

    hellos: dict[str, dict[str, Any]]
    vet: Callable[[str, Mapping[str, Any]], str]

    def ask(
        self, kind: str, requests: Mapping[str, tuple[Mapping[str, Any], bytes]], deadline: float,
        done: Callable[[str], None] = ...,
    ) -> Answers: ...  # fmt: skip

    def transport(self, rounds: int, ranks: Mapping[str, int], kept: dict[str, str]) -> Carrier:
        """kept: site -> the name of the state that it starts from."""


def reference_of(hellos: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What most sites say of base, tokenizer and the rest of ONE. Raises FederationError where no answer has most."""
    groups: dict[str, list[str]] = {}
    for site, hello in sorted(hellos.items()):
        groups.setdefault(json.dumps([hello.get(key) for key in ONE]), []).append(site)
    counted = Counter({told: len(sites) for told, sites in groups.items()}).most_common(2)
    if len(counted) > 1 and counted[0][1] == counted[1][1]:
        first, second = (dict(zip(ONE, json.loads(told), strict=True)) for told, _ in counted)
        odd = [name for key, name in ONE.items() if first[key] != second[key]]
        parts = " against ".join(", ".join(groups[told]) for told, _ in counted)
        raise FederationError(f"the sites disagree about the {' and the '.join(odd)}, {parts}: nothing was trained")
    return dict(zip(ONE, json.loads(counted[0][0]), strict=True))


def vetted(reference: Mapping[str, Any], hello: Mapping[str, Any]) -> str:
    """Why a site that says `hello` is refused; nothing if it is not."""
    odd = [name for key, name in ONE.items() if hello.get(key) != reference[key]]
    if odd:
        return f"refused before training: its {' and its '.join(odd)} is not that of the other sites"
    if not any(hello.get("encoded", [])):
        return "refused before training: it has no training row"
    return ""


def read_start(payload: bytes) -> Adapter:
    """The adapter that `work.Work.start` packed. Raises EnvelopeError."""
    header, sent = open_envelope(payload)
    scales = header.get("scales")
    if header.get("kind") != "checkpoint" or not isinstance(scales, dict) or any(n.startswith(MEMORY) for n in sent):
        raise EnvelopeError("this is no adapter to start from")
    factors = {f"{path}.{side}" for path in scales for side in "ab"}
    if not factors <= set(sent) or not all(type(s) is float and 0 < s < math.inf for s in scales.values()):
        raise EnvelopeError("an adapter to start from without all of its factors")
    lora = {path: Lora(sent[f"{path}.a"], sent[f"{path}.b"], scale) for path, scale in scales.items()}
    return Adapter(lora, {name: t for name, t in sent.items() if name not in factors})


def pooled(leg: Leg, round: int, split: str, sums: Mapping[str, Any], run: str) -> list[Row]:
    """Rows of one scoring from the sites' sums: per task and over all tasks, of all rows together, and of each site.

    sums: site -> task -> measure -> [sum, rows].
    """

    def row(name: str, value: float, unit: str = "share", task: str = "", site: str = "") -> Row:
        return Row(run, leg.method, leg.seed, round, name, value, unit, site=site, task=task, split=split)

    totals: dict[str, dict[str, list[float]]] = {}
    rows = []
    for site, tasks in sorted(sums.items()):
        for task, measures in tasks.items():
            for name, (total, count) in measures.items():
                held = totals.setdefault(task, {}).setdefault(name, [0.0, 0.0])
                held[0], held[1] = held[0] + total, held[1] + count
        if tasks:
            rows.append(row("own_score", macro({t: m["score"][0] / m["score"][1] for t, m in tasks.items()}), site=site))
    means = {task: {n: total / count for n, (total, count) in held.items()} for task, held in sorted(totals.items())}
    found = []
    for task, measures in means.items():
        found += [row(name, value, task=task) for name, value in measures.items()]
        found.append(row("rows", totals[task]["score"][1], "rows", task))
    return [*found, *(row(name, value) for name, value in over_tasks(means).items()), *rows]


def _read_sums(header: Mapping[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """`work.Work.evaluate`'s sums. Raises ValueError if they are none."""
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for task, measures in header["sums"].items():
        for name, (total, count) in measures.items():
            # every measure is a share of a row
            if not (math.isfinite(total) and 0 <= total <= count and count >= 1):
                raise ValueError(f"{task}: {name} of {total!r} over {count!r} rows")
            found.setdefault(str(task), {})[str(name)] = float(total), float(count)
        if "score" not in measures:
            raise ValueError(f"{task}: no score")
    return found


class _Federation:
    """A deployment's run in progress."""

    def __init__(self, recipe: Recipe, names: Sequence[str], sites: Sites, folder: RunFolder, watch: Watch) -> None:
        self.recipe, self.names, self.sites, self.folder, self.watch = recipe, sorted(names), sites, folder, watch
        self.state: dict[str, Any] = {}
        self.kept: dict[str, str] = {}

    def leg(self, method: str, rounds: int) -> Leg:
        return Leg(method, method, rounds, [Stage(self.recipe, {})])

    def fine(self) -> list[str]:
        """Sites that may be asked, as far as they have said hello."""
        return [n for n in self.names if n in self.sites.hellos and not self.sites.vet(n, self.sites.hellos[n])]

    def admit(self, reference: Mapping[str, Any] | None) -> dict[str, Any]:
        """Refuse the sites that would train something else; the reference that they were held to. Raises FederationError where
        too few are left, with what is wrong with each."""
        hellos = {name: self.sites.hellos[name] for name in self.names if name in self.sites.hellos}
        found = dict(reference or (reference_of(hellos) if hellos else {}))
        self.sites.vet = lambda site, hello: vetted(found, hello)
        wrong = {name: vetted(found, hello) for name, hello in hellos.items()}
        wrong |= {name: "has not said hello" for name in self.names if name not in hellos}
        told = "".join(f"\n--- {name}: {text}" for name, text in sorted(wrong.items()) if text)
        fine, quorum = len(self.fine()), self.recipe.federation.quorum
        if not fine or fine / len(self.names) < quorum:
            raise FederationError(
                f"{fine} of {len(self.names)} sites are fit to train, and federation.quorum = {quorum:g}: nothing was "
                f"trained.{told}"
            )
        if told:
            self.watch.note(f"the federation begins without some sites (the quorum holds):{told}")
        torches = {str(hello.get("versions", {}).get("torch")) for hello in hellos.values()}
        if len(torches) > 1:
            self.watch.note(f"the sites run torch {', '.join(sorted(torches))}: the last bits of their sums may differ")
        return found

    def loads(self) -> list[Row]:
        """How long each site took from nothing to a loaded base and encoded rows: what a warm worker saves every round."""
        rows = []
        for site in self.fine():
            seconds = self.sites.hellos[site].get("load_seconds")
            if isinstance(seconds, float) and 0 <= seconds < 1e6:
                rows.append(
                    Row(self.recipe.name, "federated", self.recipe.seed, 0, "load_seconds", seconds, "seconds", site=site)
                )
        return rows

    def start(self, digest: str) -> Adapter:
        """What the federation starts from: from the first site that can say, held to the hash that all of them told."""
        told = []
        for site in self.fine():
            outcome = self.sites.ask("start", {site: ({"kept": ""}, b"")}, self.recipe.federation.deadline)[site]
            if not isinstance(outcome, FedKeelError):
                try:
                    adapter = read_start(outcome[1])
                    if digest_of(adapter.tensors()) == digest:
                        return adapter
                    outcome = FederationError("its initial adapter is not the one whose hash it told")
                except EnvelopeError as error:
                    outcome = FederationError(str(error))
            told.append(f"\n--- {site}: {outcome}")
        raise FederationError(f"no site gave the initial adapter; nothing was trained.{''.join(told)}")

    def payload(self, current: Global) -> bytes:
        """The whole state, exactly, for scoring and export."""
        return pack_global("checkpoint", current, "fp32", since=0)

    def score(self, leg: Leg, current: Global, split: str) -> list[Row]:
        """Rows of the sites' scores. A site without an answer is left out, and said so."""
        asked = {site: ({"kept": self.kept.get(site, ""), "split": split}, self.payload(current)) for site in self.fine()}
        sums = {}
        for site, outcome in self.sites.ask("evaluate", asked, self.recipe.federation.deadline).items():
            try:
                if isinstance(outcome, FedKeelError):
                    raise outcome
                sums[site] = _read_sums(outcome[0])
            except (FedKeelError, KeyError, TypeError, ValueError, AttributeError) as error:
                self.watch.note(f"round {current.round}: the {split} rows of site {site} are not in the score: {error}")
        return pooled(leg, current.round, split, sums, self.recipe.name)

    def rounds(self, current: Global, initial: Adapter) -> Global:
        recipe = self.recipe
        leg = self.leg("federated", recipe.federation.rounds)
        ranks = recipe.lora.ranks(self.names)
        layouts = {name: layout_of(initial, recipe.lora, rank) for name, rank in ranks.items()}
        transport = self.sites.transport(leg.rounds, ranks, self.kept)
        out = modules_left_out(recipe, initial.lora)
        while current.round < leg.rounds:
            self.watch.leg(leg.name, f"round {current.round + 1} of {leg.rounds}")
            begin, elsewhere = time.process_time(), transport.cpu
            result = run_round(current, transport, self.names, recipe.federation, recipe.seed, layouts=layouts, hold=out)
            cpu = time.process_time() - begin + transport.cpu - elsewhere
            current = result.state
            rows = round_rows(leg, 0, result, recipe.name, cpu)
            tell_failures(self.watch, result)
            self.watch.round(leg.name, current.round, leg.rounds, result)
            # before anybody is shown it: a base shift that sites hold must not be made again
            self.save(leg, current, rows)
            if current.round % recipe.evaluation.every == 0:
                self.folder.save(self.state, self.score(leg, current, "validation"))
        return current

    def save(self, leg: Leg, current: Global, rows: Sequence[Row]) -> None:
        """A state to resume from. The sites' names of what they keep are part of it."""
        self.folder.write_checkpoint(leg.name, current)
        self.state.update(round=current.round, kept=self.kept)
        self.folder.save(self.state, rows)

    def export(self, current: Global) -> None:
        """The PEFT folder, from the first site whose files hold the coordinator's tensors. Raises FederationError."""
        told = []
        target = self.folder.path / "adapter"
        for site in self.fine():
            asked = {site: ({"kept": ""}, self.payload(current))}
            outcome = self.sites.ask("export", asked, self.recipe.federation.deadline)[site]
            try:
                if isinstance(outcome, FedKeelError):
                    raise outcome
                files = {name: t.numpy().tobytes() for name, t in open_envelope(outcome[1])[1].items()}
                _check_export(files, current)
            except (FedKeelError, ValueError, KeyError) as error:
                told.append(f"\n--- {site}: {error}")
                continue
            config = json.loads(files["adapter_config.json"])
            config["base_model_name_or_path"] = self.recipe.model.base  # where it lies at a site is that site's business
            files["adapter_config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
            partial = target.with_name(target.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            for name, content in files.items():
                write_atomic(partial / Path(name).name, content)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
            return
        raise FederationError(f"no site could write the adapter; the last checkpoint holds it.{''.join(told)}")


def _check_export(files: Mapping[str, bytes], current: Global) -> None:
    """Raise EnvelopeError unless the files hold the adapter that was asked for; where its rank changes on the way (base
    shifts), unless they hold its maps."""
    given = load_tensors(files["adapter_model.safetensors"])
    expected: dict[str, Tensor] = {}
    for path, factors in current.adapter.lora.items():
        expected |= {f"{path}.lora_A.weight": factors.a, f"{path}.lora_B.weight": factors.b}
    for name, tensor in (expected | dict(current.adapter.dense)).items():
        found = given.get(f"base_model.model.{name}")
        if found is None or (not current.shifts and not torch.equal(found, tensor)):
            raise EnvelopeError(f"{name} in the PEFT folder is not the coordinator's")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One coordinator a run's folder: a ServerApp can outlive the SuperLink that started it. Raises FederationError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise FederationError(
                f"{folder} is being worked on by process {lock.read().strip() or 'unknown'} of this machine, perhaps of an "
                f"earlier run; end it first"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def coordinate(
    recipe: Recipe, names: Sequence[str], folder: RunFolder, watch: Watch, meet: Callable[[str], Sites]
) -> None:  # fmt: skip
    """Run a deployment's federation from the folder's last state on, or from the beginning where there is none.

    names: the sites. meet: given the run's name, the sites, once they have said hello.
    Raises FederationError, ConfigError, or what a Sites raises; returns only when the federation has really ended.
    """
    if recipe.stream.stages:
        raise ConfigError("stream.stages: a task stream runs in one process or in the simulation, not in a deployment")
    with alone(folder.path):
        _coordinate(recipe, names, folder, watch, meet)


def _coordinate(
    recipe: Recipe, names: Sequence[str], folder: RunFolder, watch: Watch, meet: Callable[[str], Sites]
) -> None:  # fmt: skip
    resume = bool(folder.path.exists() and (folder.path / "state.json").exists())
    folder.check(recipe, resume, False)
    if resume and folder.state()["finished"]:
        raise FederationError(f"{folder.path} holds a federation that has ended; move it away, or give the recipe another name")
    before = folder.state() if resume else {}
    run = str(before.get("run") or secrets.token_hex(8))
    run_ = _Federation(recipe, names, meet(run), folder, watch)
    reference = run_.admit(before.get("reference"))
    initial = run_.start(reference["initial"])
    run_.state = folder.open(recipe, resume, False)
    run_.state.update(run=run, reference=reference)
    folder.save(run_.state, run_.loads())
    run_.kept.update(run_.state.get("kept", {}))
    base, leg = run_.leg("base", 0), run_.leg("federated", recipe.federation.rounds)
    current = Global(0, initial)
    if "base" in recipe.evaluation.baselines and "base" not in run_.state["done"]:
        watch.leg("base", "scoring held-out rows")
        rows = run_.score(base, current, "test")
        run_.state["done"] = [*run_.state["done"], "base"]
        folder.save(run_.state, rows)
    run_.state["leg"] = leg.name
    if run_.state["round"]:
        current = folder.read_checkpoint(leg.name, run_.state["round"], initial)
        optimiser = folder.read_kept(leg.name, run_.state["round"], initial)[1]
        current = replace(current, optimiser=optimiser)
    current = run_.rounds(current, initial)
    watch.leg(leg.name, "scoring held-out rows")
    rows = run_.score(leg, current, "test")
    if AGGREGATORS[recipe.federation.rule].personal:
        watch.note("every site keeps an adapter of its own: there is none to write here")
    else:
        run_.export(current)
    run_.state.update(done=[*run_.state["done"], leg.name], finished=True, leg="", tested=1)
    folder.save(run_.state, rows)
