"""A federation whose data never come together: the coordinator of a deployment.

It holds adapters, not models: no base weights, no GPU, no rows. What the federation starts from is made by the sites, each from
the recipe's seed and its own copy of the base, and must have one hash everywhere. The legs and their loop are those of
`run.rounds`; baselines on pooled data are what a deployment exists to avoid. Held-out scores are sums and counts that the sites
report of their own rows; a local-only model is scored by the site that trained it, and by no other. The adapter's PEFT folder
is written by two sites, compared with the coordinator's tensors, and with one another.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedkeel import tables
from fedkeel.engines.exported import differing, read_folder
from fedkeel.engines.hello import ONE, Hello
from fedkeel.exchange.codecs import EnvelopeError, open_envelope
from fedkeel.exchange.messages import MEMORY, pack_global, read_counts
from fedkeel.federation.server import FederationError
from fedkeel.files import replaced_folder, write_atomic
from fedkeel.model.digest import digest_of
from fedkeel.recipe.checks import check_deployed
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.legs import Cast, Leg
from fedkeel.runs.planned import planned
from fedkeel.runs.rounds import Carrier, Loop, Memory, Progress
from fedkeel.runs.rows import Sums, pooled_rows
from fedkeel.runs.track import Tracks
from fedkeel.runs.watch import Watch
from fedkeel.types import Adapter, FedKeelError, Global, Lora, Reply, Row

NATS = 1e6  # of a token, more than any model of float32 gives it
ASKED = 3  # sites for the adapter's folder, until two agree
Answers = Mapping[str, "tuple[dict[str, Any], bytes] | FedKeelError"]


@dataclass(frozen=True)
class Terms:
    """What every training request of a leg's stage says beside its payload. ranks: of sites whose adapter is not of the
    recipe's rank. steps: of a local leg, which trains by itself for so many; else 0."""

    leg: str
    rounds: int
    steps: int
    ranks: Mapping[str, int]


class Sites(Protocol):
    """The sites, as `courier.Courier` reaches them. vet: (site, what it said) -> why it is not asked, or nothing."""

    hellos: dict[str, Hello]
    vet: Callable[[str, Hello], str]

    def ask(
        self,
        kind: str,
        requests: Mapping[str, tuple[Mapping[str, Any], bytes]],
        deadline: float,
        done: Callable[[str], None] = ...,
    ) -> Answers:
        """site -> its answer to a request (header, payload), or what went wrong."""

    def transport(self, terms: Terms, kept: dict[str, str], watch: Callable[[Reply], None]) -> Carrier:
        """kept: site -> the name of the state that it starts from, brought up to date as answers are taken."""


def reference_of(hellos: Mapping[str, Hello]) -> dict[str, str]:
    """What most sites say of base, tokenizer and the rest of ONE. Raises FederationError where no answer has most."""
    groups: dict[str, list[str]] = {}
    for site, hello in sorted(hellos.items()):
        groups.setdefault(json.dumps([hello.one[key] for key in ONE]), []).append(site)
    most, *level = _most(groups)
    if level:
        first, second = (dict(zip(ONE, json.loads(told), strict=True)) for told in (most, *level))
        odd = [name for key, name in ONE.items() if first[key] != second[key]]
        parts = " against ".join(", ".join(groups[told]) for told in (most, *level))
        raise FederationError(f"the sites disagree about the {' and the '.join(odd)}, {parts}: nothing was trained")
    return dict(zip(ONE, json.loads(most), strict=True))


def _most(groups: Mapping[str, Sequence[str]]) -> list[str]:
    """What most sites say, and another thing that as many say if there is one. groups: what is said -> who says it."""
    first, *others = sorted(groups, key=lambda told: -len(groups[told]))[:2]
    return [first, *(told for told in others if len(groups[told]) == len(groups[first]))]


def meanings_of(hellos: Mapping[str, Hello]) -> dict[str, str]:
    """What most sites mean by each task, see `work.Work.hello`. Raises FederationError where no answer has most."""
    said: dict[str, dict[str, list[str]]] = {}
    for site, hello in sorted(hellos.items()):
        for task, meaning in hello.tasks.items():
            said.setdefault(task, {}).setdefault(meaning, []).append(site)
    found = {}
    for task, groups in said.items():
        most, *level = _most(groups)
        if level:
            parts = " against ".join(", ".join(sites) for sites in groups.values())
            raise FederationError(
                f"the sites disagree about the labels or the instruction of task {task!r}, {parts}: nothing was trained. Give "
                "all of them the same data.tasks_file, which lists every label of the task, also those that one lacks"
            )
        found[task] = most
    return found


def vetted(reference: Mapping[str, Any], hello: Hello) -> str:
    """Why a site that says `hello` is refused; nothing if it is not."""
    odd = [name for key, name in ONE.items() if hello.one[key] != reference[key]]
    if odd:
        return f"refused before training: its {' and its '.join(odd)} is not that of the other sites"
    agreed = reference.get("tasks", {})
    other = [repr(task) for task, meaning in hello.tasks.items() if agreed.get(task, meaning) != meaning]
    if other:
        return (
            f"refused before training: the labels or the instruction of its task {' and its task '.join(other)} are not those "
            f"of the other sites; give all of them the same data.tasks_file"
        )
    if not any(hello.encoded):
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


def read_sums(header: Mapping[str, Any], stages: int, rows: int, tokens: int) -> Sums:
    """`work.Work.evaluate`'s sums. rows: that the site said it holds; tokens: of a row, at most. Raises ValueError if they are
    none: a site whose rows count more than it holds would speak for the others."""
    found: dict[int, dict[str, dict[str, tuple[float, float]]]] = {}
    left = rows
    for came, tasks in header["sums"].items():
        if not 0 <= int(came) < stages:
            raise ValueError(f"rows of stage {came!r}")
        read_counts(dict.fromkeys(tasks, 0))  # no more of them than a message may name
        for task, measures in tasks.items():
            if "score" not in measures:
                raise ValueError(f"{task}: no score")
            held = found.setdefault(int(came), {}).setdefault(str(task), {})
            for name, (total, count) in measures.items():
                if name != "score" and name not in tables.METRICS:
                    raise ValueError(f"{task}: no measure {name!r}")
                # a measure is a share of a row, or nats of a token
                nats = tables.by_token(name)
                if not (1 <= count <= left * (tokens if nats else 1) and 0 <= total <= count * (NATS if nats else 1)):
                    raise ValueError(f"{task}: {name} of {total!r} over {count!r} rows, of {rows} that the site has")
                held[str(name)] = float(total), float(count)
            left -= int(held["score"][1])
    return found


class Away:
    """See `rounds.Parties`: the sites of a deployment. initial: set by `start`."""

    initial: Adapter

    def __init__(self, recipe: Recipe, names: Sequence[str], sites: Sites, folder: RunFolder, watch: Watch) -> None:
        self.recipe, self.names, self.sites, self.folder, self.watch = recipe, sorted(names), sites, folder, watch
        self._kept: dict[str, str] = {}  # of the present leg: site -> the name of its state

    def fine(self) -> list[str]:
        """Sites that may be asked, as far as they have said hello."""
        return [n for n in self.names if n in self.sites.hellos and not self.sites.vet(n, self.sites.hellos[n])]

    def admit(self, reference: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse the sites that would train something else; the reference that they were held to. Raises FederationError where
        too few are left, with what is wrong with each."""
        hellos = {name: self.sites.hellos[name] for name in self.names if name in self.sites.hellos}
        found: dict[str, Any] = dict(reference)
        if not reference and hellos:
            found = {**reference_of(hellos), "tasks": meanings_of(hellos)}
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
        torches = {hello.versions.get("torch", "") for hello in hellos.values()}
        if len(torches) > 1:
            self.watch.note(f"the sites run torch {', '.join(sorted(torches))}: the last bits of their sums may differ")
        for stage, name in enumerate(self.recipe.stream.stages):
            if not any(self._trained(site, stage) for site in self.fine()):
                raise FederationError(f"stream.stages: no site holds a training row of stage {stage + 1} ({name})")
        return found

    def _rows(self, site: str, stage: int, split: str) -> int:
        """Rows that a site said it holds; 0 of one that has not."""
        return self.sites.hellos[site].held(stage, split) if site in self.sites.hellos else 0

    def _trained(self, site: str, stage: int) -> int:
        """Rows that a site said it trains on: those that fit; of one that has not said hello, which may still come, one."""
        return self.sites.hellos[site].trained(stage) if site in self.sites.hellos else 1

    def cast(self) -> Cast:
        """Who takes part."""
        stages = range(max(1, len(self.recipe.stream.stages)))
        rows = [{name: self._trained(name, stage) for name in self.names} for stage in stages]
        return Cast(self.recipe, rows)

    def loads(self) -> list[Row]:
        """How long each site took from nothing to a loaded base and encoded rows: what a warm worker saves every round."""
        told = {site: self.sites.hellos[site].load_seconds for site in self.fine()}
        run, seed = self.recipe.name, self.recipe.seed
        return [Row(run, "federated", seed, 0, "load_seconds", s, "seconds", site=site) for site, s in told.items()]

    def start(self, digest: str) -> None:
        """What the federation starts from: from the first site that can say, held to the hash that all of them told."""
        told = []
        for site in self.fine():
            outcome = self.sites.ask("start", {site: ({"kept": ""}, b"")}, self.recipe.federation.deadline)[site]
            if not isinstance(outcome, FedKeelError):
                try:
                    adapter = read_start(outcome[1])
                    if digest_of(adapter.tensors()) == digest:
                        self.initial = adapter
                        return
                    outcome = FederationError("its initial adapter is not the one whose hash it told")
                except EnvelopeError as error:
                    outcome = FederationError(str(error))
            told.append(f"\n--- {site}: {outcome}")
        raise FederationError(f"no site gave the initial adapter; nothing was trained.{''.join(told)}")

    def begin(self, leg: Leg, current: Global, memory: Memory) -> None:
        """See `Parties`."""
        self._kept = dict(memory.names)

    def present(self, leg: Leg, stage: int) -> list[str]:
        """See `Parties`."""
        return list(leg.stages[stage].rows) if leg.stages[stage].rows and any(leg.stages[stage].rows.values()) else []

    def connect(self, leg: Leg, stage: int, done: Progress) -> Carrier:
        """See `Parties`."""
        recipe = leg.stages[stage].recipe
        steps = recipe.train.local_steps if leg.method == "local" else 0
        return self.sites.transport(Terms(leg.name, leg.rounds, steps, recipe.lora.ranks(leg.everyone)), self._kept, done)

    def memory(self) -> Memory:
        """See `Parties`."""
        return Memory(names=self._kept)

    def size(self, leg: Leg, stage: int, split: str) -> int:
        """See `Parties`."""
        return 0 if self._silent else sum(self._rows(site, stage, split) for site in self._scoring(leg))

    @property
    def _silent(self) -> bool:
        """Whether sites keep their scores, which are numbers about their rows, to themselves."""
        return self.recipe.privacy.unit != "none"

    def _scoring(self, leg: Leg) -> list[str]:
        """The sites that score a leg's model: a local one stays with the site that trained it."""
        return [site for site in self.fine() if leg.method != "local" or site == leg.site]

    def score(self, leg: Leg, stage: int, current: Global, split: str) -> list[Row]:
        """See `Parties`. A site without an answer is left out, and said so."""
        if self._silent:
            self.watch.note("no scores: they are numbers about private rows, which privacy.unit keeps at the sites")
            return []
        payload = pack_global("checkpoint", current, since=0)  # the whole state, exactly
        header = {"split": split, "stage": stage, "leg": leg.name}
        asked = {s: ({**header, "kept": self._kept.get(s, "")}, payload) for s in self._scoring(leg)}
        sums = {}
        for site, outcome in self.sites.ask("evaluate", asked, self.recipe.federation.deadline).items():
            try:
                if isinstance(outcome, FedKeelError):
                    raise outcome
                rows = self._rows(site, stage, split)
                sums[site] = read_sums(outcome[0], len(leg.stages), rows, self.recipe.data.max_length)
            except (FedKeelError, KeyError, TypeError, ValueError, AttributeError) as error:
                self.watch.note(f"round {current.round}: the {split} rows of site {site} are not in the score: {error}")
        return pooled_rows(leg, stage, current.round, split, sums, self.recipe.name)

    def spares(self, leg: Leg) -> bool:
        """See `Parties`: the federation has ended well when a baseline fails, which does not undo that."""
        return leg.method == "local"

    def close(self, leg: Leg, current: Global, best: Global | None) -> None:
        """See `Parties`: of the federated leg the PEFT folder."""
        if leg.method != "federated":
            return
        if tables.RULES[self.recipe.federation.rule].personal:
            self.watch.note("every site keeps an adapter of its own: there is none to write here")
        else:
            self._export("adapter", current)
            if best is not None:
                self._export("best", best)

    def _export(self, name: str, current: Global) -> None:
        """The PEFT folder, as two sites write it; where no two of the first ASKED agree, the first one's, and that is said.
        Raises FederationError if no site's files hold the coordinator's tensors."""
        told, wrote, agreed = list[str](), dict[str, dict[str, bytes]](), ""
        heads = current.heads if self.recipe.model.head == "analytic" else {}
        payload = pack_global("checkpoint", current, since=0)
        for site in self.fine():
            outcome = self.sites.ask("export", {site: ({"kept": ""}, payload)}, self.recipe.federation.deadline)[site]
            try:
                if isinstance(outcome, FedKeelError):
                    raise outcome
                files = read_folder(outcome[1], current, heads, self.recipe.model.base)
            except (FedKeelError, EnvelopeError) as error:
                told.append(f"\n--- {site}: {error}")
                continue
            agreed = site if any(not differing(files, its) for its in wrote.values()) else ""
            wrote[site] = files
            if agreed or len(wrote) == ASKED:
                break
        if not wrote:
            raise FederationError(f"no site could write the adapter; the last checkpoint holds it.{''.join(told)}")
        kept = agreed or next(iter(wrote))
        told += [f"\n--- {site}: another {', '.join(odd)}" for site in wrote if (odd := differing(wrote[kept], wrote[site]))]
        if told:
            alike = "two sites" if agreed else "no other site"
            self.watch.note(f"{name}/ is as site {kept} wrote it, and {alike} alike:{''.join(told)}")
        with replaced_folder(self.folder.path / name) as partial:
            for inside, content in wrote[kept].items():
                write_atomic(partial / Path(inside).name, content)


def coordinate(recipe: Recipe, names: Sequence[str], folder: RunFolder, watch: Watch, meet: Callable[[str], Sites]) -> None:
    """Run a deployment's federation from the folder's last state on, or from the beginning where there is none.

    names: the sites. meet: given the run's name, the sites, once they have said hello.
    Raises FederationError, ConfigError, or what a Sites raises; returns only when the federation has really ended.
    """
    check_deployed(recipe, len(names))
    if recipe.privacy.unit != "none" and recipe.evaluation.baselines:
        watch.note("no baselines: their scores are numbers about private rows, which privacy.unit keeps at the sites")
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, baselines=()))
    pooling = [name for name in recipe.evaluation.baselines if tables.BASELINES[name].pools]
    if pooling:
        watch.note(f"not run here, as it needs the rows of all sites in one place: {', '.join(pooling)}")
        left = tuple(name for name in recipe.evaluation.baselines if name not in pooling)
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, baselines=left))
    with folder.alone():
        _coordinate(recipe, names, folder, watch, meet)


def _coordinate(recipe: Recipe, names: Sequence[str], folder: RunFolder, watch: Watch, meet: Callable[[str], Sites]) -> None:
    resume = (folder.path / "state.json").exists()
    folder.check(recipe, resume, False)
    before = folder.state()
    if before.finished:
        raise FederationError(f"{folder.path} holds a federation that has ended; move it away, or give the recipe another name")
    run = before.run or secrets.token_hex(8)
    tracks = Tracks(recipe.track, folder.path, recipe.name, watch.note)
    away = Away(recipe, names, meet(run), folder, watch)
    reference = away.admit(before.reference)
    away.start(reference["initial"])
    legs, promise = planned(away.cast(), away.size)
    state = replace(folder.open(recipe, resume, False), run=run, reference=reference)
    Loop(recipe, away, folder, watch, state).play(legs, tracks, promise, away.loads())
