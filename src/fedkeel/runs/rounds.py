"""The loop of a run, once: legs, their stages, the rounds of each, what is scored after them, and where it all can be resumed.

It holds adapters and the run's folder; where the sites are, and who can score a model, is the business of its `Parties`: this
process (`here`), with or without Flower's simulation, or a deployment (`engines.coordinate`). After each round, and after each
scoring, the folder is in a state to resume from.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from fedkeel import tables
from fedkeel.exchange.codecs import header_of
from fedkeel.federation.gather import gather
from fedkeel.federation.kept import layout_of, modules_left_out
from fedkeel.federation.masked import run_masked_round
from fedkeel.federation.server import FederationError, Roster, run_round
from fedkeel.federation.train import steps_a_round
from fedkeel.method.aggregate.common import blend
from fedkeel.method.structure.shares import trained_ranks
from fedkeel.recipe.schema import Recipe
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.legs import Cast, Leg, Stage
from fedkeel.runs.planned import CHOICES, choices_of
from fedkeel.runs.privacy import Spending, spending
from fedkeel.runs.rows import gathered_rows, round_rows
from fedkeel.runs.served import served, share_of
from fedkeel.runs.state import Best, State
from fedkeel.runs.track import Tracks
from fedkeel.runs.watch import Watch, tell_failures
from fedkeel.types import Adapter, Global, Reply, Row, Transport

_LEG: dict[str, Any] = {"round": 0, "tested": 0, "scored": 0, "kept": {}}  # where a leg begins
TRAIN_COST = 3.0  # a training row against a scored row, in forward passes: forward, and backward about twice that


class Carrier(Transport, Protocol):
    """A transport that knows what the sites' answers cost."""

    @property
    def cpu(self) -> float:
        """Seconds of processor time that the answers of sites in other processes took so far."""


@dataclass(frozen=True)
class Memory:
    """What sites keep: tensors by site and name, for the checkpoint, where they are here; else names of what lies there."""

    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


class Progress(Protocol):
    """What hears how far a round is."""

    def __call__(self, reply: Reply) -> None:
        """A site has answered."""

    def step(self, site: str, share: float) -> None:
        """A site has done so much of its training of this round."""


class Parties(Protocol):
    """The sites of a run, wherever they are. initial: what every leg starts from."""

    initial: Adapter

    def begin(self, leg: Leg, current: Global, memory: Memory) -> None:
        """A leg begins, or goes on, from `current` and what its sites kept."""

    def present(self, leg: Leg, stage: int) -> list[str]:
        """The sites of a leg that have something to train on in a stage."""

    def connect(self, leg: Leg, stage: int, done: Progress) -> Carrier:
        """A transport for the rounds of a stage. done: hears of each reply, and where it can of each step."""

    def memory(self) -> Memory:
        """What the leg's sites keep now."""

    def size(self, leg: Leg, stage: int, split: str) -> int:
        """How many rows of `split` are scored after a stage of the leg, as far as is known; 0: there is nothing to score."""

    def score(self, leg: Leg, stage: int, current: Global, split: str) -> list[Row]:
        """Rows of the scores of `current`, as it would be served. split: `validation`, `test` or `unseen-sites`."""

    def spares(self, leg: Leg) -> bool:
        """Whether the run goes on without a leg that failed."""

    def close(self, leg: Leg, current: Global, best: Global | None) -> None:
        """The last stage of a leg is scored: keep what it ends in, and beside it the best by validation rows, if known."""


SERVED = "served_"  # before the names of scores on validation rows of what is served at the end, where the curve has others


@dataclass
class Loop:
    """A run in progress. state: where it stands; what is saved of it is what is resumed from."""

    recipe: Recipe
    parties: Parties
    folder: RunFolder
    watch: Watch
    state: State
    untold: list[Row] = field(default_factory=list)  # rows that wait for the next state to resume from

    def play(self, legs: Sequence[Leg], tracks: Tracks, promise: str = "", rows: Sequence[Row] = ()) -> None:
        """All legs from the last state on. promise: of privacy, in words. rows: known before the first. Raises what a leg does
        that the parties do not spare."""
        for note in (*self.folder.notes, *([f"private: {promise}"] if promise else [])):
            self.watch.note(note)
        self.watch.begin(self.work(legs))
        with nullcontext() if self.state.finished else tracks as self.folder.tracks:
            if rows:
                self._keep(rows)
            for leg in legs:
                try:
                    self.run(leg)
                except FederationError as error:
                    if not self.parties.spares(leg):
                        raise
                    self.watch.note(f"{leg.name} is left out: {error}")
                    self._leave(leg)
        self._keep([], finished=True)

    def run(self, leg: Leg) -> None:
        """A leg from its last state to its end."""
        if leg.name in self.state.done:
            self.watch.skip(self.work([leg]))
            return
        if self.state.leg != leg.name:
            self.state = replace(self.state, leg=leg.name, **_LEG)
        current = self._begin(leg)
        for stage in range(len(leg.stages)):
            if stage < self.state.tested:
                self.watch.skip(sum(self._work(leg, stage)[1:]))
                continue
            current = self._stage(leg, stage, current)
            current = self._test(leg, stage, current)
        self._leave(leg)

    def _leave(self, leg: Leg) -> None:
        """A leg is over."""
        self._keep([], done=(*self.state.done, leg.name), leg="", **_LEG)

    def _keep(self, rows: Sequence[Row], **more: Any) -> None:
        """Move the state on, with rows that belong to it."""
        self.state = self.folder.save(replace(self.state, **more), rows)

    def _begin(self, leg: Leg) -> Global:
        """Where the leg stands."""
        state, initial = self.state, self.parties.initial
        current, tensors = Global(0, initial), dict[str, dict[str, Tensor]]()
        if state.round:
            current = self.folder.read_checkpoint(leg.name, state.round, initial)
            tensors, optimiser = self.folder.read_kept(leg.name, state.round, initial)
            current = replace(current, optimiser=optimiser)
        self.parties.begin(leg, current, Memory(tensors, state.kept))
        return current

    def _stage(self, leg: Leg, stage: int, current: Global) -> Global:
        """The rounds of one stage from `current` on; each ends in a checkpoint."""
        end = (stage + 1) * leg.rounds
        for round in range(stage * leg.rounds + 1, current.round + 1):  # done before this process began
            scored = self.parties.size(leg, stage, "validation") if self._curve_point(leg, round) else 0
            self.watch.skip(self._work(leg, stage)[0] + scored * (round <= self.state.scored))
        if current.round > stage * leg.rounds:
            self.watch.skip(gather_work(leg, stage))
            self._curve(leg, stage, current)  # it may have been cut off between a round and its scoring
        sites = self.parties.present(leg, stage) if leg.rounds or leg.gathers else []
        if not sites:  # nobody learns in this stage; rounds are counted all the same
            if leg.gathers:
                self.folder.write_known(leg.name, stage + 1, self.folder.read_known(leg.name, stage))
            return replace(current, round=end)
        carrier = self.parties.connect(leg, stage, _Progress(self, leg, stage, len(sites)))
        roster = self._roster(leg, stage, sites)
        if leg.gathers and current.round == stage * leg.rounds:
            current = self._gather(leg, stage, current, carrier, roster)
        while current.round < end and not self._settled(leg, stage):
            current = self._round(leg, stage, current, carrier, roster)
            self._curve(leg, stage, current)
        return self._ended(leg, stage, current)

    def _gather(self, leg: Leg, stage: int, current: Global, carrier: Carrier, roster: Roster) -> Global:
        """The analytic anchor with the rows of a stage, before its first round. What it is made of is kept with the
        checkpoints."""
        self.watch.leg(leg.name, "asking what rows say through the base")
        known = self.folder.read_known(leg.name, stage)
        if leg.stages[stage].recipe.stream.replay:  # rows of all of its tasks may be trained on again
            known = {task: replace(sums, stage=stage) for task, sums in known.items()}
        found = gather(known, carrier, roster, self.parties.initial, current.round, stage)
        for site, text in sorted(found.failures.items()):
            self.watch.note(f"stage {stage + 1}: the anchor is without what site {site} knows: {text.strip()}")
        self.folder.write_known(leg.name, stage + 1, found.known)
        self.watch.advance(gather_work(leg, stage))
        self.untold = gathered_rows(leg, stage, current.round, found, self.recipe.name)
        return replace(current, heads=found.heads)

    def _best(self, leg: Leg, stage: int) -> Best | None:
        """The best point of the validation curve of a stage so far; None where there is none."""
        return self.state.best_of(stage) if leg.method == "federated" else None

    def _settled(self, leg: Leg, stage: int) -> bool:
        """Whether patience with a stage is at its end."""
        patience, best = leg.stages[stage].recipe.federation.patience, self._best(leg, stage)
        return bool(patience and best and best.waited >= patience)

    def _ended(self, leg: Leg, stage: int, current: Global) -> Global:
        """What a stage ends in; its rounds are counted as if all had been."""
        end, best = (stage + 1) * leg.rounds, self._best(leg, stage)
        if current.round < end:
            left = range(current.round + 1, end + 1)
            points = sum(self._curve_point(leg, round) for round in left)
            self.watch.skip(len(left) * self._work(leg, stage)[0] + points * self.parties.size(leg, stage, "validation"))
            assert best  # patience waited for a better one
            self.watch.note(
                f"stage {stage + 1} ends after round {current.round} of {end}: {best.waited} points of the curve were not "
                f"above the {100 * best.score:.1f} of round {best.round}"
            )
        self.state = replace(self.state, last=current.round)
        if leg.stages[stage].recipe.federation.keep == "best" and best:
            kept = self.folder.read_checkpoint(leg.name, best.round, self.parties.initial)
            current = replace(current, adapter=kept.adapter)
        return replace(current, round=end)

    def _roster(self, leg: Leg, stage: int, sites: Sequence[str]) -> Roster:
        of = leg.stages[stage]
        return roster_of(of.recipe, stage, self.parties.initial, sites, leg.everyone, of.rows)

    def _round(self, leg: Leg, stage: int, current: Global, carrier: Carrier, roster: Roster) -> Global:
        """One round, saved."""
        done, recipe = current.round - stage * leg.rounds, leg.stages[stage].recipe
        where = f" of stage {stage + 1}" if len(leg.stages) > 1 else ""
        self.watch.leg(leg.name, f"round {done + 1} of {leg.rounds}{where}")
        remembers = bool(stage and recipe.distill.weight and recipe.distill.memory)
        if not done:  # a new stage: what the sites reported of the last one, whose rate fell, says nothing about this one
            # and if the memory is the global adapter itself, it need not travel twice
            apart = remembers and recipe.stream.averages
            current = replace(current, counts={}, reach={}, memory=self._served(leg, stage - 1) if apart else None)
        self._release(leg, roster, current.round)
        bound = roster.now(current).privacy.clip
        begin, elsewhere = time.process_time(), carrier.cpu
        result = (run_masked_round if roster.privacy.masks else run_round)(current, carrier, roster)
        cpu = time.process_time() - begin + carrier.cpu - elsewhere
        current = result.state
        if remembers and not done:
            current = replace(current, memory=self._served(leg, stage - 1))
        tell_failures(self.watch, result)
        # before it is scored: a base shift that sites hold must not be made again
        rows = round_rows(leg, stage, replace(result, state=current), self.recipe.name, cpu)
        if roster.privacy.unit != "none":
            rows += self._spent(leg, stage, current.round, bound)
        self._save(leg, current, rows)
        self.watch.round(leg.name, current.round, leg.whole, result)
        return current

    def _spent(self, leg: Leg, stage: int, round: int, bound: float) -> list[Row]:
        """What has been promised after a round, told. bound: C of that round."""
        recipe = leg.stages[stage].recipe
        spent = self._spends(leg).after(self.state.asked)
        found, moves = {"epsilon": (spent, "epsilon")}, recipe.privacy.quantile > 0
        found |= {"clip": (bound, "norm")} if moves else {}
        told = f"; changes of this round were clipped to {bound:.3g}" if moves else ""
        self.watch.note(f"private so far: ε = {spent:.2f} at δ = {recipe.privacy.delta:g}{told}")
        run, method, seed = self.recipe.name, leg.method, leg.seed
        return [Row(run, method, seed, round, name, value, unit, stage=stage) for name, (value, unit) in found.items()]

    def _release(self, leg: Leg, roster: Roster, round: int) -> None:
        """Count what the sites are asked for before they are: a round that is cut off and done again is told twice. Raises
        FederationError where that would come to more than privacy.epsilon."""
        privacy = roster.privacy
        if privacy.unit == "none":
            return
        asked = Counter(self.state.asked) + Counter(roster.asked(round))
        spends = self._spends(leg)
        if privacy.epsilon and (comes := spends.after(asked)) > privacy.epsilon:
            raise FederationError(
                f"round {round + 1} would come to ε = {comes:.3g}, over privacy.epsilon = {privacy.epsilon:g}, as rounds were "
                f"asked for again or sites have other rows than at the beginning. The federation ends with round {round}, "
                f"which is kept; resumed with a higher privacy.epsilon it goes on"
            )
        self._keep([], asked=dict(asked), held=spends.rows if privacy.unit == "row" else {})

    def _spends(self, leg: Leg) -> Spending:
        return spending(Cast(leg.stages[0].recipe, [at.rows for at in leg.stages]), self.state.held)

    def _save(self, leg: Leg, current: Global, rows: Sequence[Row], **more: Any) -> None:
        """A state to resume from. What the sites keep is part of it."""
        memory = self.parties.memory()
        self.folder.write_checkpoint(leg.name, current, memory.tensors)
        self._keep([*self.untold, *rows], round=current.round, kept=dict(memory.names), **more)
        self.untold = []
        before = self.state.before  # an early end, or a stage without sites, leaves numbers out between the two
        needed = {current.round, before.round if before and before.leg == leg.name else current.round}
        self.folder.prune_kept(leg.name, needed)
        if self.recipe.keep_checkpoints:
            written = [round for round in self.folder.rounds(leg.name) if round <= current.round]
            last = written[-self.recipe.keep_checkpoints :]
            ends = range(leg.rounds, current.round + 1, leg.rounds) if leg.rounds else ()
            best = {self.state.best.round} if self.state.best and leg.method == "federated" else set()
            self.folder.prune(leg.name, {*needed, *last, *ends, *best})

    def _served(self, leg: Leg, stage: int) -> Adapter:
        """What is served after `stage`, from the checkpoints of the stages' ends."""
        stream = leg.stages[stage].recipe.stream
        return served(self.folder, leg.name, leg.rounds, stage, stream, self.parties.initial)

    def _served_before(self, leg: Leg, stage: int) -> Adapter | None:
        """What was served before a stage; None where no part of it is served later."""
        averages = leg.stages[stage].recipe.stream.averages
        return self._served(leg, stage - 1) if averages and stage and leg.rounds else None

    def _curve_point(self, leg: Leg, round: int) -> bool:
        return leg.method == "federated" and round % self.recipe.evaluation.every == 0

    def _curve(self, leg: Leg, stage: int, current: Global) -> None:
        """Score validation rows where the curve has a point, and it is not scored already."""
        due = self._curve_point(leg, current.round) and self.state.scored < current.round
        if due and self.parties.size(leg, stage, "validation"):
            self.watch.leg(leg.name, "scoring validation rows")
            as_served = _as_served(leg, stage, current, self._served_before(leg, stage))
            rows = self.parties.score(leg, stage, as_served, "validation")
            self._keep(rows, scored=current.round, best=self._judged(leg, stage, current.round, rows))

    def _judged(self, leg: Leg, stage: int, round: int, rows: Sequence[Row]) -> Best | None:
        """The best point of the curve with the one of `round` taken into account."""
        score, best = _score_in(rows), self._best(leg, stage)
        if score is None:  # no site answered
            return self.state.best
        if not best or score > best.score:
            return Best(stage, round, score)
        return replace(best, waited=best.waited + 1)

    def _best_served(self, leg: Leg, stage: int, end: Global, before: Adapter | None) -> Global | None:
        """What would be served of the best point of the curve of a stage that ended in `end`; None where there is no such one
        adapter. before: what was served before the stage."""
        best, rule = self._best(leg, stage), tables.RULES[leg.stages[stage].recipe.federation.rule]
        if not best or rule.shifts or rule.personal:
            return None
        kept = self.folder.read_checkpoint(leg.name, best.round, self.parties.initial)
        return _as_served(leg, stage, replace(kept, average=end.average), before)

    def _test(self, leg: Leg, stage: int, current: Global) -> Global:
        """Score the held-out rows of all stages so far; `current` with what was chosen for it first."""
        before = self._served_before(leg, stage)
        current, rows = self._choose(leg, stage, current, before)
        self.watch.leg(leg.name, "scoring held-out rows")
        last, as_served = stage + 1 == len(leg.stages), _as_served(leg, stage, current, before)
        begin = time.perf_counter()
        rows += self.parties.score(leg, stage, as_served, "test")
        seconds = time.perf_counter() - begin
        if self.parties.size(leg, stage, "unseen-sites"):
            rows += self.parties.score(leg, stage, as_served, "unseen-sites")
        if _judged_apart(leg, stage) and self.parties.size(leg, stage, "validation"):
            found = self.parties.score(leg, stage, as_served, "validation")
            rows += [replace(r, name=SERVED + r.name) for r in found] if leg.method == "federated" else found
        told = ("test_seconds", seconds, "seconds")
        rows.append(Row(self.recipe.name, leg.method, leg.seed, current.round, *told, site=leg.site, stage=stage))
        federation, best = leg.stages[stage].recipe.federation, self._best(leg, stage)
        if best and (federation.patience or federation.keep == "best"):
            for name, value in (("last_round", self.state.last), ("best_round", best.round)):
                rows.append(Row(self.recipe.name, leg.method, leg.seed, current.round, name, value, "rounds", stage=stage))
        if last:
            self.parties.close(leg, as_served, self._best_served(leg, stage, current, before))
        self._save(leg, current, rows, tested=stage + 1)  # also of a stage in which nobody learnt
        return current

    def _choose(self, leg: Leg, stage: int, current: Global, before: Adapter | None) -> tuple[Global, list[Row]]:
        """`current` with the share of `stream.average_from`, and then the weight of `evidence.serve_from`, with which it serves
        validation rows of the stages so far best, of equal ones the first, and how each did; as it is where there is nothing to
        choose by. before: what was served before the stage."""
        rows = list[Row]()
        if not self.parties.size(leg, stage, "validation"):
            return current, rows
        for name, choice in choices_of(leg, stage).items():
            self.watch.leg(leg.name, f"choosing {CHOICES[name][1]}")
            tried = dict[float, float]()
            for value in choice:
                as_served = _as_served(leg, stage, _choosing(current, name, value), before)
                score = _score_in(self.parties.score(leg, stage, as_served, "validation"))
                tried |= {} if score is None else {value: score}  # no site answered
            best = max(tried, key=tried.__getitem__, default=choice[0])
            current = _choosing(current, name, best)
            told = {f"score_at_{name}_{value:g}": (score, "share") for value, score in tried.items()} | {name: (best, "weight")}
            about = self.recipe.name, leg.method, leg.seed, current.round
            rows += [Row(*about, row, v, unit, stage=stage, split="validation") for row, (v, unit) in told.items()]
        return current, rows

    def _work(self, leg: Leg, stage: int) -> tuple[float, float, float]:
        """(work of one round without its scoring, of all rounds of a stage with theirs and the anchor's making, of scoring its
        test rows)."""
        one, size = round_work(leg.stages[stage]), self.parties.size
        points = sum(self._curve_point(leg, stage * leg.rounds + n + 1) for n in range(leg.rounds))
        curve = points * size(leg, stage, "validation") if points else 0
        again = _judged_apart(leg, stage) + sum(map(len, choices_of(leg, stage).values()))
        tested = size(leg, stage, "test") + size(leg, stage, "unseen-sites") + again * size(leg, stage, "validation")
        return one, leg.rounds * one + curve + gather_work(leg, stage), tested

    def work(self, legs: Sequence[Leg]) -> float:
        """What legs take, in row-equivalents."""
        return sum(sum(self._work(leg, stage)[1:]) for leg in legs for stage in range(len(leg.stages)))


def _as_served(leg: Leg, stage: int, current: Global, before: Adapter | None) -> Global:
    """`current` with the adapter that would be served if the stage ended now. before: what was served before the stage."""
    if before is None:
        return current
    share = share_of(leg.stages[stage].recipe.stream, current)
    return replace(current, adapter=blend(before, current.adapter, share))


def _judged_apart(leg: Leg, stage: int) -> bool:
    """Whether validation rows are scored once more at the end, by which tuning judges a leg: of the centralised one, which has
    no curve, as a reference must not be worse for another's learning rate, and where the last point of the curve is of another
    thing than what is served."""
    if stage + 1 < len(leg.stages):
        return False
    chosen = choices_of(leg, stage) or leg.stages[stage].recipe.federation.keep == "best"
    return leg.method == "centralised" or (leg.method == "federated" and bool(chosen))


def _choosing(current: Global, name: str, value: float) -> Global:
    more: dict[str, Any] = {name: value}
    return replace(current, **more)


def roster_of(
    recipe: Recipe, stage: int, initial: Adapter, sites: Sequence[str], everyone: Sequence[str], rows: Mapping[str, int]
) -> Roster:
    """What the rounds of a stage go by. sites: those asked. everyone: the sites of all stages. rows: of the stage, by site."""
    layouts = {name: layout_of(initial, recipe.lora, rank) for name, rank in recipe.lora.ranks(everyone).items()}
    out, own = modules_left_out(recipe, initial.lora), recipe.options("rule", recipe.federation.rule)
    steps = max((steps_a_round(recipe.train, count) for count in rows.values()), default=1)
    return Roster(
        sites,
        recipe.federation,
        recipe.seed,
        layouts,
        out,
        own,
        recipe.privacy,
        recipe.evidence,
        by_head=recipe.model.head == "analytic",
        moves=recipe.train.lr * steps,  # AdamW moves a number by about its rate in a step
        ranks=trained_ranks(recipe, stage) if recipe.stream.slices else None,
    )


def _score_in(rows: Sequence[Row]) -> float | None:
    """The score over all tasks and sites of one scoring; None where no site answered."""
    return next((r.value for r in rows if r.name == "score" and not r.task and not r.site), None)


def gather_work(leg: Leg, stage: int) -> float:
    """What the analytic anchor of a stage takes, in row-equivalents: the base once over each row."""
    return float(sum(leg.stages[stage].rows.values())) if leg.gathers else 0.0


def round_work(stage: Stage) -> float:
    """The training of one round, in row-equivalents."""
    train = stage.recipe.train
    return TRAIN_COST * train.batch_size * sum(steps_a_round(train, rows) for rows in stage.rows.values() if rows)


@dataclass
class _Progress:
    """See `Progress`: tells the watch what part of a round that was. begun: site -> the share of its training that was told."""

    loop: Loop
    leg: Leg
    stage: int
    sites: int
    begun: dict[str, float] = field(default_factory=dict)

    def __call__(self, reply: Reply) -> None:
        if reply.payload and header_of(reply.payload).get("kind") not in ("update", "masked"):
            return  # to a question beside the training
        self.step(reply.site, 1 - self.begun.get(reply.site, 0.0))
        del self.begun[reply.site]

    def step(self, site: str, share: float) -> None:
        self.begun[site] = self.begun.get(site, 0.0) + share
        at = self.leg.stages[self.stage]
        rows = at.rows.get(site, 0)
        part = rows / max(1, sum(at.rows.values())) if at.recipe.train.local_epochs else 1 / self.sites
        self.loop.watch.advance(round_work(at) * part * share)
