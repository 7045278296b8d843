"""The sites of a run in this process: one base model, which trains for each of them in turn and scores for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from fedkeel import tables
from fedkeel.data.format import Example
from fedkeel.data.sites import Sites
from fedkeel.data.template import TODAY
from fedkeel.federation.attacks import hostile_sites, poisoned, target_of, triggered
from fedkeel.federation.client import Site
from fedkeel.federation.kept import Kept
from fedkeel.federation.local import LocalTransport
from fedkeel.federation.train import injection_of
from fedkeel.files import replaced_folder
from fedkeel.method.aggregate.layouts import folded
from fedkeel.model.digest import base_digest
from fedkeel.model.export import save_adapter
from fedkeel.model.lora import Model
from fedkeel.recipe.schema import Attack
from fedkeel.recipe.settings import ConfigError
from fedkeel.runs.answers import asked, chosen, tasks_of
from fedkeel.runs.encode import Encoded
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.legs import Leg
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.prints import prints_of
from fedkeel.runs.rounds import Carrier, Memory, Progress
from fedkeel.runs.rows import score_rows, unseen_rows
from fedkeel.runs.served import beside_of
from fedkeel.runs.watch import Watch
from fedkeel.scores.evaluate import Scored, score
from fedkeel.types import Adapter, Global, Record, Reply, Row


class Engine(Protocol):
    """What carries the messages of the federated leg where its sites are not in this process."""

    def connect(self, rounds: int, kept: dict[str, Kept], watch: Callable[[Reply], None]) -> Carrier:
        """A transport for one stage of `rounds` rounds. kept, watch: as in `local.LocalTransport`."""


class Here:
    """See `rounds.Parties`. engine: where the sites of the federated leg are; None: in this process."""

    def __init__(self, prepared: Prepared, folder: RunFolder, watch: Watch, engine: Engine | None = None) -> None:
        """Loads the base and encodes all rows. Raises ConfigError where the two do not go together."""
        recipe = prepared.recipe
        if engine is not None and recipe.attack.kind != "none":
            raise ConfigError(
                f"attack.kind = {recipe.attack.kind!r}: harm is simulated in one process alone, not over an engine"
            )
        self.prepared, self.folder, self.watch, self.engine = prepared, folder, watch, engine
        self.model = Model(recipe.model, recipe.lora, recipe.seed, prepared.classes)
        assert self.model.initial is not None
        self.initial = self.model.initial
        self._base = base_digest(self.model)
        rows = Encoded(self.model, prepared)
        self.formatter, self.examples, self.held_out, self.cast = rows.formatter, rows.stages, rows.held_out, rows.cast
        self.hostile = hostile_sites(list(prepared.sites.rows), recipe.attack, recipe.seed)
        self._poisoned = [self._spoilt(stage) for stage in prepared.stages]
        self.kept: dict[str, Kept] = {}  # of the present leg
        self._tell(rows)
        self._check_places()
        self._tested: Sequence[Scored] = ()
        self._untrained: dict[tuple[str, tuple[str, ...]], Scored] = {}  # of the base before any training

    def prints(self) -> dict[str, str]:
        """See `prints_of`."""
        return prints_of(self.prepared, self._base, self.model)

    def _spoilt(self, stage: Sites) -> dict[str, list[Example]]:
        """What hostile sites train on in the federation."""
        recipe = self.prepared.recipe
        if not self.hostile or not tables.ATTACKS[recipe.attack.kind].rows:
            return {}
        held = {name: stage.rows[name]["train"] for name in sorted(self.hostile) if name in stage.rows}
        changed = {name: poisoned(rows, recipe.attack, recipe.seed) for name, rows in held.items()}
        if any(held.values()) and changed == held:
            raise ConfigError(
                f"attack.kind = {recipe.attack.kind!r}, attack.target = {recipe.attack.target!r}: no row of a hostile site "
                f"would be another; a label of its task belongs there"
            )
        return {name: self.formatter.encode_all(rows) for name, rows in changed.items()}

    def _tell(self, rows: Encoded) -> None:
        """Notes on the rows."""
        if self.hostile:
            attack = self.prepared.recipe.attack
            self.watch.note(f"a simulation of harm: attack.kind = {attack.kind!r} at {', '.join(sorted(self.hostile))}")
        for note in rows.notes():
            self.watch.note(note)
        if "strftime_now" in str(self.model.tokenizer.chat_template):
            self.watch.note(f"the chat template writes today's date: {TODAY:%d %B %Y} stands in its place, in every row")
        if self.model.bare:
            self.watch.note(f"no branch is at {', '.join(self.model.bare)}: these matrices stay as they are")
        for note in self.prepared.notes:
            self.watch.note(note)

    def _check_places(self) -> None:
        """A structure without a place is an error now, not at a site's first step."""
        recipe = self.prepared.recipe
        injection = injection_of(self.model, recipe)
        if injection is not None:
            with injection:
                pass
        if recipe.distill.weight and recipe.distill.align != "off" and not self.model.taps:
            raise ConfigError(
                f"distill.align = {recipe.distill.align!r}: the blocks of {recipe.model.base!r} are not known, so no hidden "
                f"state can be tapped; set distill.align = 'off'"
            )

    def begin(self, leg: Leg, current: Global, memory: Memory) -> None:
        """See `Parties`. The one base of all sites here takes out the shifts of the leg before, and in those of this one."""
        recipe = leg.stages[0].recipe
        self.model.rewind()
        self.model.replay(current.shifts, 0)
        self.kept = {name: Kept(rank=rank) for name, rank in recipe.lora.ranks(leg.everyone).items()}
        for name, tensors in memory.tensors.items():
            self.kept[name] = self.kept.get(name, Kept()).restored(tensors)

    def present(self, leg: Leg, stage: int) -> list[str]:
        """See `Parties`."""
        return [name for name in leg.stages[stage].rows if self._rows(name, stage)]

    def _rows(self, name: str, stage: int) -> Sequence[Example]:
        """Of one site, or, of the centralised leg's, of all together."""
        examples = self.examples[stage]
        if name in examples:
            return examples[name]
        return sorted((e for encoded in examples.values() for e in encoded), key=lambda e: e.record)

    def connect(self, leg: Leg, stage: int, done: Progress) -> Carrier:
        """See `Parties`."""
        if self.engine is not None and leg.method == "federated":
            return self.engine.connect(leg.rounds, self.kept, done)
        recipe = leg.stages[stage].recipe
        hostile = self.hostile if leg.method == "federated" else ()
        sites = {}
        for name in self.present(leg, stage):
            rows, attack = self._rows(name, stage), Attack()
            if name in hostile:
                rows, attack = self._poisoned[stage].get(name, rows), recipe.attack
            before = [self._rows(name, at) for at in range(stage)]
            sites[name] = Site(name, [*before, rows], leg.rounds, recipe, partial(done.step, name), attack)
        return LocalTransport(self.model, sites, self.kept, done)

    def memory(self) -> Memory:
        """See `Parties`."""
        return Memory({site: tensors for site, kept in self.kept.items() if (tensors := kept.tensors())})

    def size(self, leg: Leg, stage: int, split: str) -> int:
        """See `Parties`."""
        return len(self.held_out[split][stage]) + (len(self._lured(leg, stage)) if split == "test" else 0)

    def score(self, leg: Leg, stage: int, current: Global, split: str) -> list[Row]:
        """See `Parties`."""
        sites = self.prepared.unseen[stage] if split == "unseen-sites" else self.prepared.stages[stage]
        scored = self._scored(leg, stage, current, self.held_out[split][stage], sites)
        if split == "test":
            self._tested = scored
        if split == "unseen-sites":
            return unseen_rows(leg, stage, current.round, scored, self.prepared)
        rows = score_rows(leg, stage, current.round, split, scored, self.prepared)
        return rows + (self._attacked(leg, stage, current, sites) if split == "test" else [])

    def _lured(self, leg: Leg, stage: int) -> list[Record]:
        """Of a backdoor, the test rows of other labels than its target, with the trigger, after the last stage."""
        attack = self.prepared.recipe.attack
        if attack.kind != "backdoor" or leg.method != "federated" or stage + 1 < len(leg.stages):
            return []
        return [triggered(r, attack) for r in self.held_out["test"][stage] if target_of(r, attack) not in ("", r.output)]

    def _attacked(self, leg: Leg, stage: int, current: Global, sites: Sites) -> list[Row]:
        """The share of such rows that are given the target; nothing where there are none."""
        rows, attack = self._lured(leg, stage), self.prepared.recipe.attack
        if not rows:
            return []
        hits = [s.prediction == target_of(s.record, attack) for s in self._scored(leg, stage, current, rows, sites)]
        told = ("attack_success", sum(hits) / len(hits), "share")
        return [Row(self.prepared.recipe.name, leg.method, leg.seed, current.round, *told, stage=stage, split="test")]

    def _scored(self, leg: Leg, stage: int, current: Global, records: Sequence[Record], sites: Sites) -> list[Scored]:
        """Scores of `current`; where factors stay at the sites, of each row by the model of the one of `sites` that holds
        it."""
        self.model.replay(current.shifts, 0)
        self.model.beside = beside_of(leg.stages[stage].recipe, current, alone=leg.method == "analytic")
        self.model.know(current.heads)
        if (
            not leg.rounds and not leg.gathers
        ):  # nothing is trained: after a later stage only rows, or candidates, that came with it are new
            fresh = [r for r in records if (r.id, r.labels) not in self._untrained]
            self.watch.skip(len(records) - len(fresh))
            scored = self._by(current.adapter, fresh)
            self._untrained |= {(s.record.id, s.record.labels): s for s in scored}
            return [found for r in records if (found := self._untrained.get((r.id, r.labels)))]
        if not tables.RULES[leg.stages[stage].recipe.federation.rule].personal:
            return self._by(current.adapter, records)
        scored = []
        for name, held in sites.rows.items():
            ids = {r.id for rows in held.values() for r in rows}
            adapter = self.kept.get(name, Kept()).adapter(current.adapter)
            scored += self._by(adapter, [r for r in records if r.id in ids])
        return sorted(scored, key=lambda s: s.record.id)

    def _by(self, adapter: Adapter, records: Sequence[Record]) -> list[Scored]:
        self.model.write(adapter)
        with self.model.remembering():
            return score(self.model, self.formatter, records, self.prepared.recipe.evaluation, self.watch.advance)

    def spares(self, leg: Leg) -> bool:
        """See `Parties`: what fails here, where all rows are, is to be mended and gone on from."""
        return False

    def close(self, leg: Leg, current: Global, best: Global | None) -> None:
        """See `Parties`: the score of every test row, and of the federated leg the PEFT folder, whole or not at all; one a site
        where factors stay at the sites."""
        self.folder.write_scores(leg.method, leg.site, {s.record.id: (s.record.task, s.score) for s in self._tested})
        if leg.method in ("base", "federated"):
            self._keep_answers(leg.method)
        if leg.method != "federated":
            return
        self.folder.write_tasks(tasks_of(self.prepared.stages[-1].all("train")))
        self._write("adapter", leg, current)
        if best is not None:
            self._write("best", leg, best)

    def _keep_answers(self, who: str) -> None:
        found = chosen(self._tested, self.prepared.recipe.evaluation.samples)
        if found:
            rows = [
                {"id": s.record.id, "task": s.record.task, "prompt": asked(s.record), "wanted": s.record.output} for s in found
            ]
            self.folder.write_answers(who, rows, {s.record.id: s.prediction for s in found})

    def _write(self, name: str, leg: Leg, current: Global) -> None:
        with replaced_folder(self.folder.path / name) as partial:
            if tables.RULES[leg.stages[-1].recipe.federation.rule].personal:
                for site in sorted(self.prepared.sites.rows):  # also of a site that was never asked: it has what is shared
                    self.model.write(self.kept.get(site, Kept()).adapter(current.adapter))
                    save_adapter(self.model, partial / site)
            else:
                self.model.write(current.adapter)
                save_adapter(self.model, partial, folded(self.model.read(), current.shifts) if current.shifts else None)
