"""A run's folder: recipe, rows, checkpoints, and the state to resume from."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import subprocess
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedkeel.exchange.codecs import open_envelope
from fedkeel.exchange.messages import pack_global, pack_shift, pack_tensors, read_counts, unpack_global, unpack_shift
from fedkeel.exchange.sums import pack_known, read_known
from fedkeel.files import append_lines, write_atomic
from fedkeel.recipe.load import differing
from fedkeel.recipe.schema import FREE, Recipe
from fedkeel.recipe.settings import read_toml, to_toml
from fedkeel.runs.state import State, read_state
from fedkeel.runs.track import Tracks
from fedkeel.types import Adapter, FedKeelError, Global, Row, Sums


class RunError(FedKeelError):
    """A run folder that cannot be used as asked."""


def environment() -> dict[str, Any]:
    """Versions, machine and, in a checkout of FedKeel, its commit."""
    packages = ("fedkeel", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")
    versions = {name: metadata.version(name) for name in packages}
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {
        "commit": commit,
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
    }


def _count(header: Mapping[str, Any], key: str) -> int:
    """How many files a header speaks of. Raises ValueError; they are opened one by one, so that a lie ends at the first."""
    if type(header.get(key)) is not int or header[key] < 0:
        raise ValueError(f"{key} = {header.get(key)!r} where a count of files belongs")
    return int(header[key])


class RunFolder:
    """`runs/<name>`: the resolved recipe, rows, checkpoints and the state to resume from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows_file = path / "rows.jsonl"
        self.tracks: Tracks | None = None  # told of every row that is saved
        self.notes: list[str] = []  # what `open` found that a person should know
        self._saved: State | None = None  # the state as it was saved last
        self._scored: set[tuple[str, str]] | None = None  # legs in scores.jsonl: (method, site)

    @property
    def _state_file(self) -> Path:
        return self.path / "state.json"

    def state(self) -> State:
        """Where the run stands; of none the beginning. Raises RunError."""
        if not self._state_file.exists():
            return State()
        try:
            return read_state(json.loads(self._state_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{self._state_file} is not as it was written ({error}); start over with --fresh") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process a run's folder, while it lasts. Raises RunError where another works on it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"out = {str(self.path.parent)!r} cannot be made: {error.strerror or error}") from error
        with self.path.with_name(f".{self.path.name}.lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                    yield
                    return
                lock.seek(0)
                raise RunError(
                    f"{self.path} is being worked on by process {lock.read().strip() or 'unknown'} of this machine, perhaps of "
                    f"an earlier run; end it first"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def check(self, recipe: Recipe, resume: bool, fresh: bool) -> None:
        """Raise RunError if `open` would; touches nothing."""
        if self._state_file.exists() and not fresh:
            if not resume:
                raise RunError(
                    f"{self.path} holds a run already; continue it with --resume, replace it with --fresh, or set name=OTHER "
                    f"(from Python: existing = 'resume' or 'replace')"
                )
            before = read_toml(self.path / "recipe.toml", "the run's recipe")
            if changed := [one for one in differing(before, tomllib.loads(to_toml(recipe))) if one[0] not in FREE]:
                key, was, now = changed[0]
                raise RunError(
                    f"{self.path} cannot be resumed with another recipe: {key} = {was!r} became {now!r}; only "
                    f"{', '.join(FREE)} may be changed"
                )
        elif resume:
            raise RunError(f"{self.path} holds no run to resume")
        elif self.path.exists():
            found = {p.name.removesuffix(".partial") for p in self.path.iterdir()}  # of one that was killed at its first file
            if found and not found & {"recipe.toml", "state.json"}:
                raise RunError(f"{self.path} exists and is not a run of FedKeel; set out= or name= to another folder")

    def open(self, recipe: Recipe, resume: bool, fresh: bool, prints: Mapping[str, str] | None = None) -> State:
        """Make the folder for a new run, or go back to the last whole state of an old one. prints: what it works with -> its
        fingerprint; a run goes on only with what it began with. Raises RunError."""
        self.check(recipe, resume, fresh)
        if self._state_file.exists() and not fresh:
            state = self._whole(self.state())
            self._check_prints(state.prints, prints or {})
            write_atomic(self.path / "recipe.toml", to_toml(recipe))
            self._cut_rows(state.rows_bytes)
            return state
        if self.path.exists():
            shutil.rmtree(self.path)
        write_atomic(self.path / "recipe.toml", to_toml(recipe))
        write_atomic(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")
        return self._keep(State(prints=prints or {}))

    def _keep(self, state: State) -> State:
        """Write the state. What it says of the round before is needed in the file alone."""
        write_atomic(self._state_file, json.dumps(state.as_json()))
        self._saved = replace(state, before=None)
        return state

    def _cut_rows(self, size: int) -> None:
        """Rows written after the last checkpoint belong to work that is done again. Raises RunError where some are missing."""
        if not self.rows_file.exists():
            return
        with self.rows_file.open("rb+") as rows:
            there = rows.seek(0, os.SEEK_END)
            rows.seek(max(0, min(size, there) - 1))
            if size > there or (size and rows.read(1) != b"\n"):
                raise RunError(
                    f"{self.rows_file} is not as it was written: no row ends at byte {size}; start over with --fresh"
                )
            rows.truncate(size)

    def _whole(self, state: State) -> State:
        """The state, or that of the round before where what it points to is torn or altered. Raises RunError where both are."""
        self._saved = replace(state, before=None)
        wrong = self._damage(state)
        if not wrong:
            return state
        before = state.before
        if not before or self._damage(before):
            raise RunError(f"{wrong}, and the round before cannot be used either; start over with --fresh")
        self.notes.append(f"{wrong}: this run goes on from round {before.round}, the one before")
        # what was sent cannot be taken back, and counts for privacy
        self._saved = replace(before, asked=state.asked, held=state.held)
        return self._saved

    def _damage(self, state: State) -> str:
        """What is wrong with the files of a state's checkpoint; nothing where they are as they were written."""
        leg, round = state.leg, state.round
        if not leg or not round:
            return ""
        path = self.checkpoint(leg, round)
        try:
            header, _ = open_envelope(path.read_bytes())
            for n in range(_count(header, "log")):
                path = self._shift(leg, n + 1)
                unpack_shift(path.read_bytes())
            if header.get("kept"):
                path = self._kept(leg, round) / "optimiser.fkl"
                told, _ = open_envelope(path.read_bytes())
                for n in range(_count(told, "sites")):
                    path = path.with_name(f"{n}.fkl")
                    open_envelope(path.read_bytes())
        except (OSError, ValueError) as error:
            return f"checkpoint {path} is not as it was written ({error})"
        return ""

    def prune(self, leg: str, keep: Collection[int]) -> None:
        """Remove a leg's checkpoints of other rounds than `keep`, and no base shift, as each is needed for all later ones."""
        for round in self.rounds(leg):
            if round not in keep:
                self.checkpoint(leg, round).unlink()

    def prune_kept(self, leg: str, keep: Collection[int]) -> None:
        """Remove what sites and server optimiser kept after other rounds than `keep`: it is as large as the adapters of all
        sites together, and needed to go on from a saved state only."""
        for path in self.checkpoint(leg, 0).parent.glob("kept-*"):
            if path not in {self._kept(leg, round) for round in keep}:
                shutil.rmtree(path, ignore_errors=True)

    def rounds(self, leg: str) -> list[int]:
        """The rounds of a leg whose checkpoints are there."""
        found = self.checkpoint(leg, 0).parent.glob("round-*.fkl")
        return sorted(int(path.stem.removeprefix("round-")) for path in found)

    def _check_prints(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        if not before:
            return  # of a run that began before there were any
        changed = sorted(what for what in before.keys() | now.keys() if before.get(what) != now.get(what))
        if changed:
            raise RunError(
                f"{self.path} cannot be resumed: not as they were when it began: {', '.join(changed)}. Put them back, or begin "
                f"anew with --fresh or another name"
            )

    def save(self, state: State, rows: Sequence[Row]) -> State:
        """Append rows and move the state on, and say how it stands then: the one point after which a resumed run continues."""
        size = append_lines(self.rows_file, [json.dumps(r.as_json(), allow_nan=False) for r in rows])
        moved = self._saved and (self._saved.leg, self._saved.round) != (state.leg, state.round)
        state = self._keep(replace(state, rows_bytes=size, before=self._saved if moved else state.before))
        if self.tracks and rows:
            self.tracks.log(rows)
        return state

    def write_scores(self, method: str, site: str, scores: Mapping[str, tuple[str, float]]) -> None:
        """Keep the score of every final test row of a leg, in place of those it had: what paired comparisons resample.

        scores: row id -> (task, score in [0, 1]).
        """
        path = self.path / "scores.jsonl"
        if self._scored is None:
            held = path.read_bytes() if path.exists() else b""
            whole = held[: held.rfind(b"\n") + 1]  # of a run that was killed in a line
            if whole != held:
                write_atomic(path, whole)
            self._scored = {(line["method"], line["site"]) for line in map(json.loads, whole.splitlines())}
        if (method, site) in self._scored:
            held_lines = path.read_text().splitlines()
            kept = [line for line in held_lines if ((told := json.loads(line))["method"], told["site"]) != (method, site)]
            write_atomic(path, "".join(f"{line}\n" for line in kept))
        self._scored.add((method, site))
        about = {"method": method, "site": site}
        append_lines(path, [json.dumps({**about, "task": t, "id": row, "score": score}) for row, (t, score) in scores.items()])

    def write_answers(self, who: str, rows: Sequence[Mapping[str, str]], said: Mapping[str, str]) -> None:
        """Keep what one of the models said to a few test rows, in place of what it had. rows: their id, task, prompt and wanted
        answer, the same for every model. said: id -> its answer."""
        path = self.path / "answers.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"said": {}}
        told = {"rows": list(rows), "said": {**held["said"], who: dict(said)}}
        write_atomic(path, json.dumps(told, ensure_ascii=False, indent=1) + "\n")

    def write_tasks(self, tasks: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep how the rows of each task ask, see `answers.tasks_of`."""
        write_atomic(self.path / "tasks.json", json.dumps(tasks, ensure_ascii=False, indent=1) + "\n")

    def tasks(self) -> dict[str, dict[str, Any]]:
        """What `write_tasks` kept; empty where nothing was."""
        path = self.path / "tasks.json"
        try:
            held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return {
                str(name): {"instruction": str(t["instruction"]), "labels": [*map(str, t["labels"])]}
                for name, t in held.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path} cannot be used: {error!r}") from error

    def exchanged(self) -> int:
        """Bytes that the messages of the rounds so far took."""
        saved = self.rows_file.read_bytes()[: self.state().rows_bytes] if self.rows_file.exists() else b""
        rows = [json.loads(line) for line in saved.splitlines()]
        return int(sum(row["value"] for row in rows if row["name"] in ("bytes_up", "bytes_down")))

    def checkpoint(self, leg: str, round: int) -> Path:
        """Where the adapter after `round` rounds of a leg lies."""
        return self.path / "checkpoints" / leg / f"round-{round:04d}.fkl"

    def _shift(self, leg: str, number: int) -> Path:
        """One entry of the log of base shifts."""
        return self.checkpoint(leg, number).with_name(f"shift-{number:04d}.fkl")

    def _kept(self, leg: str, round: int) -> Path:
        """The folder of what sites and server optimiser keep."""
        return self.checkpoint(leg, round).with_name(f"kept-{round:04d}")

    def write_checkpoint(self, leg: str, state: Global, kept: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Exact: float32, whatever the exchange rounds to. An entry of the log of base shifts is written once.

        kept: what sites keep, by site and name.
        """
        for number, entry in enumerate(state.shifts, 1):
            # the last one anew: it may lie there from a round that was cut off, and was done again with another outcome
            if number == len(state.shifts) or not self._shift(leg, number).exists():
                write_atomic(self._shift(leg, number), pack_shift(entry))
        more: dict[str, Any] = {
            "counts": {site: dict(told) for site, told in state.counts.items()},
            "held": dict(state.held),
            "log": len(state.shifts),
            "kept": bool(kept or state.optimiser),
        }
        try:
            if more["kept"]:
                target = self._kept(leg, state.round)
                for n, (site, tensors) in enumerate(sorted((kept or {}).items())):
                    write_atomic(target / f"{n}.fkl", pack_tensors(tensors, kind="kept", site=site))
                optimiser = pack_tensors(state.optimiser, kind="optimiser", sites=len(kept or {}))
                write_atomic(target / "optimiser.fkl", optimiser)
            write_atomic(self.checkpoint(leg, state.round), pack_global("checkpoint", state, **more))
        except ValueError as error:
            raise RunError(
                f"the checkpoint of round {state.round} cannot be written: {error}; the one before stands"
            ) from error

    def read_checkpoint(self, leg: str, round: int, like: Adapter) -> Global:
        """What `write_checkpoint` wrote, without what its last rounds alone keep. Raises RunError."""
        path = self.checkpoint(leg, round)
        try:
            header, state = unpack_global(path.read_bytes(), "checkpoint", like)
            counts = {site: read_counts(held) for site, held in header["counts"].items()}
            shifts = [unpack_shift(self._shift(leg, n + 1).read_bytes(), like) for n in range(_count(header, "log"))]
            held = read_counts(header["held"])
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise RunError(f"checkpoint {path} cannot be used: {error}; start over with --fresh") from error
        return replace(state, counts=counts, shifts=shifts, held=held)

    def _known(self, leg: str, stages: int) -> Path:
        """What the rows of the first stages said through the base."""
        return self.checkpoint(leg, 0).with_name(f"known-{stages:04d}.fkl")

    def knows(self, leg: str) -> bool:
        """Whether a leg made an analytic anchor."""
        return self._known(leg, 1).exists()

    def write_known(self, leg: str, stages: int, known: Mapping[str, Sums]) -> None:
        """Keep the sums that the analytic anchor of the first `stages` stages is made of."""
        write_atomic(self._known(leg, stages), pack_known(known))

    def read_known(self, leg: str, stages: int) -> dict[str, Sums]:
        """What `write_known` kept; empty for no stage. Raises RunError."""
        path = self._known(leg, stages)
        if not stages:
            return {}
        try:
            return read_known(path.read_bytes())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} cannot be used: {error}; start over with --fresh") from error

    def read_kept(self, leg: str, round: int, like: Adapter) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """(what sites keep, what the server's optimiser keeps) after `round`, one of the last two that were written; both
        empty where nobody keeps anything. Raises RunError."""
        target = self._kept(leg, round)
        kept = {}
        try:
            if not unpack_global(self.checkpoint(leg, round).read_bytes(), "checkpoint", like)[0].get("kept"):
                return {}, {}
            header, optimiser = open_envelope((target / "optimiser.fkl").read_bytes())
            for n in range(_count(header, "sites")):
                told, tensors = open_envelope((target / f"{n}.fkl").read_bytes())
                kept[str(told["site"])] = tensors
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{target} cannot be used: {error}; start over with --fresh") from error
        return kept, optimiser
