"""A federation in Flower's own simulation: its sites in Ray's workers, all else in this process."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkeel.engines.coordinate import Terms
from fedkeel.engines.flower.apps import client_app
from fedkeel.engines.flower.courier import Courier, Errand, FlowerError, FlowerTransport
from fedkeel.engines.store import Store
from fedkeel.federation.kept import Kept
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import cores, to_toml
from fedkeel.runs.execute import execute
from fedkeel.runs.folder import RunFolder
from fedkeel.runs.prepare import Prepared
from fedkeel.runs.watch import Watch
from fedkeel.types import Reply, Request


class Simulation:
    """`here.Engine` over a grid of Flower's simulation, or one that behaves like it: site n of the sorted names is partition n.

    folder: what sites keep lies here, as it does at a site; it is filled from the run's checkpoint when a stage begins, and
    read after each round for the next checkpoint, so that a run can be resumed on any engine.
    """

    def __init__(self, grid: Grid, prepared: Prepared, folder: Path, stopped: threading.Event | None = None) -> None:
        self._names = sorted(prepared.sites.rows)
        self._run = secrets.token_hex(8)
        self._folder = folder
        self._courier = Courier(grid, Errand(to_toml(_absolute(prepared.recipe)), self._run, folder), stopped)
        self._deadline = prepared.recipe.federation.deadline

    def connect(self, rounds: int, kept: dict[str, Kept], watch: Callable[[Reply], None]) -> _Simulated:
        """See `here.Engine`."""
        if not self._courier.nodes:
            self._courier.find(self._names, self._deadline)
        return _Simulated(self._courier, rounds, kept, watch, self._folder / self._run)


class _Simulated(FlowerTransport):
    """A FlowerTransport that has what its sites keep on its own disk."""

    def __init__(
        self, courier: Courier, rounds: int, kept: dict[str, Kept], watch: Callable[[Reply], None], folder: Path
    ) -> None:
        self._tensors, self._stores = kept, {site: Store(folder, site) for site in courier.nodes}
        tokens = {}
        for site, held in kept.items():
            tokens[site] = self._stores[site].write(secrets.token_hex(8), held.tensors())
        ranks = {site: held.rank for site, held in kept.items()}
        super().__init__(courier, Terms("federated", rounds, 0, ranks), tokens, watch)

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """See `types.Transport`."""
        replies = super().exchange(requests, deadline)
        for reply in replies:
            token = self.kept.get(reply.site, "")
            if token and not reply.error:
                held = self._tensors.get(reply.site, Kept())
                self._tensors[reply.site] = held.restored(self._stores[reply.site].read(token))
        return replies


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with paths that hold from any working directory."""
    base = Path(recipe.model.base).expanduser()
    model = replace(recipe.model, base=str(base.absolute())) if base.exists() else recipe.model
    root = str(Path(recipe.data.root).absolute()) if recipe.data.root else ""
    return replace(recipe, model=model, data=replace(recipe.data, root=root))


def resources(recipe: Recipe, sites: int) -> tuple[int, dict[str, float]]:
    """(workers, what Ray reserves for one): a worker has the recipe's threads, and on CUDA a device of its own."""
    needs = {"num_cpus": float(recipe.threads), "num_gpus": 1.0 if recipe.model.device.startswith("cuda") else 0.0}
    return min(max(1, cores() // recipe.threads), sites), needs


def _quiet(processors: int, home: str) -> dict[str, Any]:
    """What Ray begins with: so many processors, its files below `home`, and nothing shown."""
    shown = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    return {"num_cpus": processors, "_temp_dir": f"{home}/ray", **shown}


def simulate(prepared: Prepared, folder: RunFolder, watch: Watch, resume: bool = False, fresh: bool = False) -> None:
    """`execute` with the federated leg in Flower's simulation; returns only once a federation has really ended.

    Base, local and centralised legs, and all scoring, stay in this process: they have no one to talk to. `run_simulation` is
    deprecated in Flower 1.41, which points to `flwr run`; that starts a detached, shared SuperLink, packs an app, forgets what
    the run returned and exits with 0 when it failed. The function is public, takes our apps as objects and runs the ServerApp
    in a thread of this process, so that errors come back as exceptions; there is no other public way.
    Raises what `execute` raises, and FlowerError if the simulation itself fails.
    """
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError as error:
        raise FlowerError(f"the simulation needs an extra: pip install 'fedkeel[flower-sim]' ({error})") from error
    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what matters is told by exceptions; the rest is for developers
    sites = len(prepared.sites.rows)
    workers, needs = resources(prepared.recipe, sites)
    each = f"{prepared.recipe.threads} threads{' and a GPU' if needs['num_gpus'] else ''}"
    watch.note(
        f"Flower's simulation: {sites} sites on {workers} worker{'s' if workers > 1 else ''} of {each}, one base model a "
        f"worker, and one here for scoring and baselines"
    )
    stopped = threading.Event()
    ended = threading.Event()
    failures: list[BaseException] = []
    kept = folder.path.with_name(folder.path.name + ".sites")  # beside the run: a new run's folder must be empty
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        try:
            execute(prepared, folder, watch, resume, fresh, Simulation(grid, prepared, kept.absolute(), stopped))
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    app.main()(main)
    with tempfile.TemporaryDirectory(prefix="fk-", ignore_cleanup_errors=True) as home:
        os.environ["FLWR_HOME"] = home
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: they would stand back behind all else that runs
        config = {"init_args": _quiet(workers * prepared.recipe.threads, home), "client_resources": needs}
        crash: BaseException | None = None
        try:
            run_simulation(app, client_app, sites, backend_config=config)
        except BaseException as error:
            crash = error
        stopped.set()
        ended.wait(60.0)
        shutil.rmtree(kept, ignore_errors=True)
    if isinstance(crash, KeyboardInterrupt):
        raise crash
    if failures:
        raise failures[0]
    if crash is not None:
        raise FlowerError(f"Flower's simulation failed: {crash!r}; its cause: {crash.__cause__!r}") from crash
    if not folder.state().finished:
        raise FlowerError("Flower's simulation ended before the federation did")
