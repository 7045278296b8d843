"""A site's work away from the coordinator: its data, its base model, and what it keeps on its disk between rounds.

The rule of what is kept (residuals of a lossy codec, factors that stay at the site): a site never decides by itself which of
its states holds. Each request names the state to start from, which is the one that the site wrote with the last answer that
the coordinator took; a fresh state is written beside it under the request's own id, and older ones go. So a round
that was lost, repeated, answered too late or cut off by the death of either end starts from what was truly accepted, and ends
in the bits of `local.LocalTransport`, where what is kept moves on only once a site has answered in time. A site whose disk has
lost the named state fails that round, loudly; the coordinator then lets it start from nothing.

The log of base shifts (rules `stack` and `residual`) is kept too: the server sends a site only what it has not seen, and the
next round may meet another process, whose base is fresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from fedkeel import tables
from fedkeel.data import sources
from fedkeel.data.format import Example
from fedkeel.engines.sitefile import SiteFile, for_a_part
from fedkeel.engines.store import LostStateError, Store, WorkError, checked_name, write_shared
from fedkeel.engines.world import cargo_of
from fedkeel.exchange.codecs import header_of
from fedkeel.exchange.messages import (
    layout,
    names_of,
    pack_global,
    pack_tensors,
    unpack_global,
)
from fedkeel.federation.client import Site, answer
from fedkeel.federation.kept import Kept, layout_of
from fedkeel.method.aggregate.layouts import folded
from fedkeel.model.digest import base_digest, digest_of, tokenizer_digest
from fedkeel.model.export import save_adapter
from fedkeel.model.lora import Model
from fedkeel.recipe.load import make_recipe
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import build
from fedkeel.runs.encode import formatter_of
from fedkeel.runs.legs import single
from fedkeel.runs.prepare import prepare
from fedkeel.runs.served import beside_of
from fedkeel.scores.evaluate import Scored, choose, score, weight_of
from fedkeel.types import Adapter, FedKeelError, Global

SPLITS = ("validation", "test")


def localised(text: str, site: SiteFile) -> Recipe:
    """The coordinator's recipe with this site's own paths, device and threads in place of what it says of them: where a site
    reads its rows is not for the coordinator to say. Raises WorkError for a recipe that would read elsewhere."""
    tree = tomllib.loads(text)
    tree["threads"] = site.threads
    tree["model"] = {**tree.get("model", {}), "device": site.device} | ({"base": site.base} if site.base else {})
    tree["data"] = {**tree.get("data", {}), "root": "", **site.data}
    tables.load_plugins()
    data = build(Recipe, tree).data
    named = {"files": data.files, "tasks_file": (data.tasks_file,), "dataset": (data.dataset,)}
    for key, names in named.items():
        odd = [name for name in names if _leaves(name) or (key == "dataset" and name and os.path.exists(name))]
        if odd and key not in site.data:
            raise WorkError(
                f"the recipe's data.{key} = {odd[0]!r} leaves data.root; where site {site.name} reads its rows is for its own "
                f"{site.path.name} to say: set {key} under [data] there"
            )
    return make_recipe(tree, here=False)


def _leaves(name: str) -> bool:
    """Whether a file's name leads out of the folder that it should lie in."""
    path = PureWindowsPath(name)  # which knows both slashes, and drives
    return ".." in path.parts or bool(path.anchor) or name.startswith("~")


class Work:
    """One recipe in this process: its data, dealt; its base model, once, whatever the number of sites and rounds."""

    def __init__(self, recipe: Recipe, alone: str = "") -> None:
        """alone: the site that holds all of the data here; empty: the recipe's partition deals them to its sites."""
        if recipe.attack.kind != "none":
            raise WorkError(f"attack.kind = {recipe.attack.kind!r}: this is a real site, and does no harm")
        torch.set_num_threads(recipe.threads)
        begin = time.perf_counter()
        self.recipe = recipe
        self.prepared = prepare(recipe, alone)
        self.names = sorted(self.prepared.sites.rows)
        self.model = Model(recipe.model, recipe.lora, recipe.seed, self.prepared.classes)
        assert self.model.initial is not None
        self.initial: Adapter = self.model.initial
        self.formatter = formatter_of(self.model, self.prepared)
        self.base = base_digest(self.model)  # now: base shifts change it
        self.words = tokenizer_digest(self.model.tokenizer)
        self._examples: dict[str, list[list[Example]]] = {}
        self._run, self._leg = "", ""
        self.seconds = time.perf_counter() - begin

    def examples(self, site: str) -> list[list[Example]]:
        """The site's encoded training rows of each stage."""
        if site not in self._examples:
            stages = [stage.rows[site]["train"] for stage in self.prepared.stages]
            self._examples[site] = [self.formatter.encode_all(rows) for rows in stages]
            if any(stages) and not any(self._examples[site]):
                raise WorkError(
                    f"site {site}: none of its rows fits into data.max_length = {self.recipe.data.max_length} tokens"
                )
        return self._examples[site]

    def begin(self, run: str, leg: str = "") -> None:
        """Base shifts belong to a leg of a run: another one begins on the base as it was. leg: empty: none in particular."""
        if run != self._run or (leg and leg != self._leg):
            self.model.rewind()
            self._run, self._leg = run, leg

    @property
    def sameness(self) -> str:
        """What a site must have in every round as when it said hello, in words: ε of rows goes by how many there are."""
        return "base, tokenizer or number of training rows" if self.recipe.privacy.unit == "row" else "base or tokenizer"

    def same(self, site: str) -> str:
        """The same as a text that is another one where any of it is."""
        counts = [str(len(rows)) for rows in self.examples(site)] if self.recipe.privacy.unit == "row" else []
        return " ".join([self.base + self.words, *counts])

    def hello(self, site: str) -> dict[str, Any]:
        """What a coordinator checks before round 1: that this site would train the same thing as the others."""
        versions = {name: metadata.version(name) for name in ("fedkeel", "torch", "transformers", "peft")}
        privacy = self.recipe.privacy
        most = 1 if privacy.unit == "site" else 2**63  # how many rows there are is a number about them, and so is the time
        rows = [{split: min(most, len(held)) for split, held in stage.rows[site].items()} for stage in self.prepared.stages]
        return {
            "site": site,
            "versions": versions,
            "kind": self.model.kind,
            "base": self.base,
            "tokenizer": self.words,
            "layout": layout(self.initial),
            "initial": digest_of(self.initial.tensors()),
            "classes": hashlib.sha256(json.dumps(self.model.classes).encode()).hexdigest(),
            "tasks": self._meanings(),
            "rows": rows,
            "encoded": [min(most, len(stage)) for stage in self.examples(site)],
            "load_seconds": 0.0 if privacy.hides else self.seconds,
        }

    def _meanings(self) -> dict[str, str]:
        """task -> a hash of the labels that its rows choose from, the instruction that they share and, in a stream, the group
        of each label. Where rows differ in these, or ask by themselves, there is nothing that sites could differ in."""
        listed = sources.metadata(self.recipe.data).get("tasks", {})
        streams = bool(self.recipe.stream.stages)
        asked: dict[str, set[tuple[tuple[str, ...], str]]] = {}
        for record in (
            r for stage in self.prepared.stages for held in stage.rows.values() for rows in held.values() for r in rows
        ):
            if record.labels or listed.get(record.task, {}).get("instruction") == record.instruction:
                asked.setdefault(record.task, set()).add((record.labels, record.instruction))
        found = {}
        for task, all_of in sorted(asked.items()):
            if len(all_of) == 1:
                groups = listed.get(task, {}).get("label_domain") if streams else None
                told = [*next(iter(all_of)), *([groups] if groups else [])]
                found[task] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return found

    def recipe_of(self, leg: str, steps: int) -> Recipe:
        """What a leg trains by: the recipe, or on its own plain LoRA for so many steps. Raises WorkError for another leg."""
        if leg in ("federated", "analytic"):
            return self.recipe
        if not leg.startswith("local/") or not 1 <= steps <= 2**31:
            raise WorkError(f"leg {leg!r} with {steps} steps: federated, or local/SITE with at least one step, belongs here")
        return single(self.recipe, steps)

    def train(self, site: str, header: Mapping[str, Any], payload: bytes, store: Store) -> tuple[dict[str, Any], bytes]:
        """One round of the site; header: `leg` and `steps` (see `recipe_of`), `rounds` of a stage, `rank` (0: the recipe's),
        `kept` and `id`, see `Store`."""
        rank, before, leg = int(header["rank"]), str(header["kept"]), str(header["leg"])
        recipe = self.recipe_of(leg, int(header["steps"]))
        self.begin(self._run, leg)
        kept = Kept(rank=rank, masks=store.read_masks()).restored(store.read(before))
        rule = tables.RULES[recipe.federation.rule]
        if rule.shifts and header_of(payload).get("kind") == "global":  # other questions tell nothing of the base
            like = layout_of(self.initial, recipe.lora, rank)
            told, state = unpack_global(payload, "global", like, names_of(like, rule.down), recipe.federation.codec_down)
            first = int(told["shifts"]["first"])
            store.write_shifts(state.shifts, first)
            if self.model.shifts < first:
                self.model.replay(store.read_shifts(self.model.shifts, first), self.model.shifts)
        update = answer(payload, self.model, Site(site, self.examples(site), int(header["rounds"]), recipe), kept)
        store.write_masks(kept.masks)
        return {"kept": store.write(str(header["id"]), kept.tensors(), before)}, update

    def evaluate(self, site: str, header: Mapping[str, Any], payload: bytes, store: Store) -> tuple[dict[str, Any], bytes]:
        """Sums and counts of the site's held-out rows, by the stage they came in, task and measure, under an adapter; no text
        leaves the site. header: `split`, `stage` (whose rows), `kept`, `leg`."""
        if self.recipe.privacy.unit != "none":
            raise WorkError("scores are numbers about private rows, which privacy.unit keeps here")
        split, stage = header.get("split"), int(header.get("stage", 0))
        if split not in SPLITS or not 0 <= stage < len(self.prepared.stages):
            raise WorkError(
                f"split {split!r} of stage {stage}: one of {', '.join(SPLITS)}, of a stage of this run, belongs here"
            )
        _, state = unpack_global(payload, "checkpoint", self.initial)
        kept = Kept().restored(store.read(str(header["kept"])))
        if self.model.shifts > len(state.shifts):
            self.model.rewind()
        store.write_shifts(state.shifts, 0)
        self.model.replay(state.shifts, 0)
        self.model.write(kept.adapter(state.adapter))
        self.model.beside = beside_of(self.recipe, state, alone=header.get("leg") == "analytic")
        self.model.know(state.heads)
        evaluation = self.recipe.evaluation
        chosen = {r.id for r in choose(self.prepared.stages[-1].rows[site][split], split, evaluation.limit(split))}
        rows = choose([r for r in self.prepared.stages[stage].rows[site][split] if r.id in chosen], split, 0)
        with self.model.remembering():
            scored = score(self.model, self.formatter, rows, evaluation)
        return {"sums": self._sums(scored)}, b""

    def _sums(self, scored: Sequence[Scored]) -> dict[int, dict[str, dict[str, list[float]]]]:
        """See `rows.Sums`."""
        sums: dict[int, dict[str, dict[str, list[float]]]] = {}
        for one in scored:
            of_task = sums.setdefault(self.prepared.arrival[one.record.id], {}).setdefault(one.record.task, {})
            for name, value in {**one.metrics, "score": one.score}.items():
                total = of_task.setdefault(name, [0.0, 0])
                weight = weight_of(name, one)
                total[0], total[1] = total[0] + weight * value, total[1] + weight
        return sums

    def start(self) -> bytes:
        """The adapter that a federation starts from, which is the same at every site of one seed and base."""
        scales = {path: factors.scale for path, factors in self.initial.lora.items()}
        return pack_global("checkpoint", Global(0, self.initial), scales=scales)

    def export(self, payload: bytes) -> bytes:
        """The files of a PEFT folder of an adapter, by name, as bytes: what a coordinator without a base cannot make."""
        _, state = unpack_global(payload, "checkpoint", self.initial)
        self.model.write(state.adapter)
        self.model.know(state.heads)
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(self.model, Path(folder), folded(state.adapter, state.shifts) if state.shifts else None)
            files = {p.name: torch.frombuffer(bytearray(p.read_bytes()), dtype=torch.uint8) for p in Path(folder).iterdir()}
        return pack_tensors(files, kind="export")


_present: tuple[tuple[Recipe, str], str, Work] | None = None  # a process has memory for one base model


def present(recipe: Recipe, alone: str) -> Work:
    """The Work of this process, made anew where the last one was another recipe's, or the files that it read have changed."""
    global _present
    cargo = cargo_of(recipe)
    if _present is not None and _present[0] == (recipe, alone) and _present[1] != cargo:
        print(f"{time.strftime('%F %T')} rows or base have changed: they are read anew", file=sys.stderr, flush=True)
    if _present is None or _present[:2] != ((recipe, alone), cargo):
        _present = None  # the old base goes before the new one comes
        _present = (recipe, alone), cargo, Work(recipe, alone)
    return _present[2]


def _told(error: Exception, private: bool, site_file: SiteFile | None) -> str:
    """What a coordinator hears of a failure. private: what is not about the request itself tells of rows, by a loss, a label or
    the line of a file, and stays in the site's log."""
    text = str(error) if isinstance(error, FedKeelError) else traceback.format_exc()
    text = text if site_file is None else for_a_part(text)
    if not private or isinstance(error, WorkError):
        return text
    print(f"{time.strftime('%F %T')} a request failed: {text}", file=sys.stderr, flush=True)
    return "it failed; what went wrong stands in the log of that site, as its rows are private"


def _agreed(text: str, site_file: SiteFile) -> str:
    """The recipe's text. Raises WorkError for one that the site has not agreed to."""
    seal = hashlib.sha256(text.encode()).hexdigest()
    if site_file.recipe_sha256 not in ("", seal):
        raise WorkError(
            f"site {site_file.name} refuses: it agreed to the recipe with sha256 {site_file.recipe_sha256[:16]}…, and this one "
            f"has {seal}; to take part in this one, read it and write that number as recipe_sha256 into {site_file.path.name}"
        )
    return text


def handle(
    header: Mapping[str, Any], payload: bytes, site_file: SiteFile | None = None, partition: int = 0, state: Path | None = None
) -> tuple[dict[str, Any], bytes]:
    """Answer one request of a coordinator, whatever carried it; what goes wrong becomes `error` in the answer.

    header: `kind` (hello, train, evaluate, start, export), `run`, `id`, `site` (empty: whoever it is), `recipe` (TOML) and
    what the kind needs. site_file: of the site that this machine is. Without one, in a simulation, the recipe's partition
    deals the data, the site is number `partition` of the sorted names, and `state` is the folder for what sites keep.
    """
    begin = time.process_time()
    told: dict[str, Any] = {"run": header.get("run"), "id": header.get("id"), "site": header.get("site")}
    private = False
    try:
        text, run, kind = str(header["recipe"]), checked_name(header["run"]), header["kind"]
        recipe = make_recipe(tomllib.loads(text)) if site_file is None else localised(_agreed(text, site_file), site_file)
        private = recipe.privacy.hides
        work = present(recipe, "" if site_file is None else site_file.name)
        if site_file is None and not 0 <= partition < len(work.names):
            raise WorkError(f"partition {partition} of {len(work.names)} sites")
        site = work.names[partition] if site_file is None else site_file.name
        root = state or Path() if site_file is None else site_file.state
        told["site"] = site
        if header["site"] not in ("", site):
            raise WorkError(f"the message is for site {header['site']!r}; this is {site!r}")
        folder = root / run
        mark = folder / "recipe.sha256"
        seal = hashlib.sha256(text.encode()).hexdigest()
        said, now = folder / "base.sha256", work.same(site)
        if kind == "hello":
            if not mark.exists():
                write_shared(mark, seal)
            write_shared(said, now)
        elif not mark.exists():
            raise WorkError(f"site {site} refuses a message of a foreign run: {run!r} has not said hello here")
        elif said.exists() and said.read_text() != now:
            raise WorkError(f"site {site}: its {work.sameness} is another than when it said hello; put it back")
        if mark.read_text() != seal:
            raise WorkError(f"site {site} refuses a message of a foreign run: the recipe of {run!r} was another when it began")
        work.begin(run)
        store, out = Store(folder, site), b""
        more: dict[str, Any] = {}
        if kind == "hello":
            more = {"hello": work.hello(site)}
        elif kind == "train":
            more, out = work.train(site, header, payload, store)
        elif kind == "evaluate":
            more, out = work.evaluate(site, header, payload, store)
        elif kind == "start":
            out = work.start()
        elif kind == "export":
            out = work.export(payload)
        else:
            raise WorkError(f"a message of kind {kind!r}")
    except LostStateError as error:
        return {**told, "error": str(error), "lost": True}, b""
    except Exception as error:  # whatever it is, it is this site's failure, and the coordinator repeats the text
        return {**told, "error": _told(error, private, site_file)}, b""
    # how long a site took tells how many rows it has
    return {**told, **more, "cpu": 0.0 if private else time.process_time() - begin}, out
