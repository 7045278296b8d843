"""Flower as the engine: it carries our payload bytes between our round loop and our client round. The only file that knows it.

`server_app` and `client_app` are the components of a Flower app; `simulate` runs a federation in Flower's own simulation.

A message is a Flower message with two records: `fedkeel`, whose one entry is a JSON header (run, request, site, recipe and
what the kind of the request needs, see `work.handle`), and `payload`, one uint8 array of serialisation type `fedkeel` with the
sealed bytes of `messages`. The header stands apart so that the payload of many sites is one content-addressed object, stored
once. Flower's own type for an unpickled torch tensor is not used: it fails on bfloat16.

What is ours and not Flower's: which site is asked (our sampling, by logical name; node ids are random and only looked up),
the one deadline of a round, the order of summing, checkpoints, and the decision whether a round counts. Flower's `Strategy`
has no resume, goes on with the old model when every client failed, and adds replies up in the order in which they came.

Telemetry, update checks and the installation of dependencies for a run are off unless the environment asks for them; the
variables are set before flwr is imported, which reads them then.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402

from fedkeel.sitefile import MEMBERS, read_members  # noqa: E402
from fedkeel.types import FedKeelError, Reply, Request  # noqa: E402

if TYPE_CHECKING:
    from fedkeel.client import Kept
    from fedkeel.config import Recipe
    from fedkeel.folder import RunFolder
    from fedkeel.run import Prepared, Watch

LIMIT = 128 * 2**20  # bytes of one payload: Flower's stores hold every message in memory or SQLite, at about 30 MB/s
HELLO = 120.0  # seconds that an answer to hello is waited for, over rounds: a site that comes back may load its base first
STYPE = "fedkeel"
KINDS = {"hello": "query", "train": "train", "evaluate": "evaluate", "start": "query", "export": "query"}  # Flower's categories
ERRORS = {  # of Flower, by its codes
    1: "the ClientApp could not be loaded",
    2: "the ClientApp raised",
    3: "message unavailable",
    4: "reply unavailable",
    5: "Node Unavailable",
    7: "invalid app bundle",
    8: "the ClientApp crashed",
}
SITE_FILE = "site-config"  # of --node-config: the path of site.toml


class FlowerError(FedKeelError):
    """A federation over Flower that cannot go on; the text says what would be right."""


def _pack(header: Mapping[str, Any], payload: Array | None) -> RecordDict:
    records: dict[str, Any] = {"fedkeel": ConfigRecord({"header": json.dumps(header)})}
    if payload is not None:
        records["payload"] = ArrayRecord({"payload": payload})
    return RecordDict(records)


def _array(payload: bytes) -> Array | None:
    # an array without bytes has no chunk, and does not survive the way
    return Array("uint8", (len(payload),), STYPE, payload) if payload else None


def _unpack(message: Message) -> tuple[dict[str, Any], bytes]:
    """Header and payload of a message. Raises FlowerError if it is none of ours."""
    content = message.content
    try:
        header = json.loads(str(content["fedkeel"]["header"]))
        payload = b""
        if "payload" in content:
            array = content["payload"]["payload"]
            if not isinstance(array, Array) or array.stype != STYPE or array.dtype != "uint8":
                raise FlowerError("its payload is no array of FedKeel's")
            payload = bytes(array.data)
    except (KeyError, TypeError, ValueError) as error:
        raise FlowerError(f"a message without FedKeel's header: {error!r}") from error
    if not isinstance(header, dict):
        raise FlowerError("a message whose header is no object")
    return header, payload


def _fail(message: Message) -> str:
    code = message.error.code
    reason = message.error.reason or "no reason given"
    return f"Flower's error {code} ({ERRORS.get(code, 'of no known kind')}): {reason}"


class Courier:
    """Carries requests to sites by their names, and brings the answers of one run.

    nodes: site -> Flower's node id, once it has said hello. hellos: what each said. cpu: seconds of processor time that the
    answers took at the sites. vet: (site, its hello) -> why it is not asked; empty where it may be.
    """

    def __init__(
        self, grid: Grid, recipe: str, run: str, state: Path | None = None, stopped: threading.Event | None = None,
        limit: int = LIMIT, members: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:  # fmt: skip
        """recipe: TOML, sent along with every request. run: names this run. state: of a simulation, where sites keep what they
        keep. stopped: set from another thread, it ends the waiting. limit: bytes of a payload. members: looked up at
        each greeting: site -> the node that its key was registered as, and no other is this site; None: a node is believed."""
        self._grid, self._recipe, self._run, self._state = grid, recipe, run, state
        self._stopped = stopped or threading.Event()
        self._limit, self._members = limit, members
        self.nodes: dict[str, int] = {}
        self.hellos: dict[str, dict[str, Any]] = {}
        self.vet: Callable[[str, Mapping[str, Any]], str] = lambda site, hello: ""
        self.troubles: list[str] = []  # what nodes said that could not say hello
        self._greeted: dict[str, tuple[int, str, float]] = {}  # message -> node, request, when it is given up
        self.cpu = 0.0

    def _send(self, node: int, kind: str, header: Mapping[str, Any], payload: Array | None, seconds: float) -> str:
        """Hand one message over; its id. Raises FlowerError."""
        whole = {**header, "kind": kind, "run": self._run, "recipe": self._recipe, "seconds": seconds}
        if self._state is not None:
            whole["state"] = str(self._state)
        # a message that nobody waits for any more is not worth delivering
        message = Message(_pack(whole, payload), node, KINDS[kind], ttl=min(max(seconds, 1.0), 1e9))
        ids = [one for one in self._grid.push_messages([message]) if one]
        if len(ids) != 1:
            raise FlowerError("Flower did not take the message: is the node still part of the federation?")
        return ids[0]

    def _collect(self, pending: dict[str, Any], end: float) -> Iterator[tuple[Any, Message]]:
        """(key, reply) of pending messages as they come, until none is left or the time `end`. Others are passed over: a
        second reply, one to a round that is over, one that nobody asked for."""
        wait = 0.02
        while pending and time.monotonic() < end:
            if self._stopped.is_set():
                raise FlowerError("the federation was stopped")
            arrived = list(self._grid.pull_messages(list(pending)))
            for message in arrived:
                identity = message.metadata.reply_to_message_id
                if identity in pending:
                    yield pending.pop(identity), message
            # each look is a request over the network in a deployment
            wait = 0.02 if arrived else min(1.0, wait * 1.5)
            time.sleep(max(0.0, min(wait, end - time.monotonic())))

    def _open(self, message: Message, identity: str, site: str) -> tuple[dict[str, Any], bytes]:
        """An answer of this run to this request by this site (empty: any). Raises FlowerError with what is wrong, or with
        what the site says went wrong there."""
        if message.has_error():
            raise FlowerError(_fail(message))
        header, payload = _unpack(message)
        if header.get("run") != self._run or header.get("id") != identity:
            raise FlowerError(
                f"refused: an answer of run {header.get('run')!r} to request {header.get('id')!r}, where {self._run!r} and "
                f"{identity!r} belong"
            )
        if header.get("error"):
            raise SiteFailure(str(header["error"]), bool(header.get("lost")))
        if site and header.get("site") != site:
            raise FlowerError(f"refused: an answer of site {header.get('site')!r}, not {site!r}")
        if len(payload) > self._limit:
            raise FlowerError(f"refused: an answer of {len(payload):,} bytes, over the limit of {self._limit:,}")
        cpu = header.get("cpu", 0.0)
        if isinstance(cpu, int | float) and 0 <= cpu < 1e9:
            self.cpu += cpu
        return header, payload

    def greet(self, enough: Callable[[Mapping[str, int]], bool], seconds: float) -> None:
        """Ask every node that is there who it is, until `enough` says so of the sites found or the time is over.

        A node that has not answered by then is not asked anew in the next call: its answer is still waited for, so that a site
        that needs longer than one call to start is found in the end. Raises FlowerError if two nodes claim one site.
        """
        end = time.monotonic() + seconds
        members = self._members()  # a key may have been registered since
        asked: set[int] = set()  # in this call: one that failed is asked again in the next
        self.troubles = []
        while True:
            present, now = set(self._grid.get_node_ids()), time.monotonic()
            for site in [site for site, node in self.nodes.items() if node not in present]:
                del self.nodes[site]  # it went away, and may come back under another id
            if enough(self.nodes) or now >= end:
                return
            for message, (node, _, over) in list(self._greeted.items()):
                if node not in present or now >= over:
                    del self._greeted[message]
            known = set(self.nodes.values()) | {node for node, _, _ in self._greeted.values()}
            for node in sorted(present - asked - known):
                asked.add(node)
                identity = secrets.token_hex(8)
                sent = self._send(node, "hello", {"id": identity, "site": ""}, None, HELLO)
                self._greeted[sent] = node, identity, now + HELLO
            for (node, identity, _), reply in self._collect(self._greeted, min(end, time.monotonic() + 1.0)):
                try:
                    header, _ = self._open(reply, identity, "")
                    site, hello = str(header["site"]), dict(header["hello"])
                except (FlowerError, SiteFailure, KeyError, TypeError, ValueError) as error:
                    self.troubles.append(f"node {node}: {error}")
                    continue
                if members is not None and members.get(site) != node:
                    key = f"node {members[site]}" if site in members else "no node"
                    said = f"node {node} says that it is site {site!r}, and is not believed"
                    self.troubles.append(f"{said}: that name's key was registered as {key}")
                    continue
                if site in self.nodes:
                    raise FlowerError(
                        f"two nodes say that they are site {site!r} (nodes {self.nodes[site]} and {node}); the name in "
                        f"site.toml must be of one site only"
                    )
                self.nodes[site], self.hellos[site] = node, hello
            if not self._greeted:
                time.sleep(max(0.0, min(0.2, end - time.monotonic())))

    def find(self, names: Sequence[str], seconds: float) -> None:
        """Greet until every one of `names` has a node. Raises FlowerError naming those that have none after `seconds`."""
        self.greet(lambda found: set(names) <= set(found), seconds)
        missing = sorted(set(names) - set(self.nodes))
        if missing:
            told = "".join(f"\n--- {trouble}" for trouble in self.troubles)
            raise FlowerError(
                f"no node says that it is site {', '.join(missing)} after {seconds:g} s; "
                f"{', '.join(sorted(self.nodes)) or 'no site'} answered. Are their SuperNodes running and registered?{told}"
            )

    def ask(
        self, kind: str, requests: Mapping[str, tuple[Mapping[str, Any], bytes]], deadline: float,
        done: Callable[[str], None] = lambda site: None,
    ) -> dict[str, tuple[dict[str, Any], bytes] | FedKeelError]:  # fmt: skip
        """site -> the answer (header, payload) to its request, or what went wrong; all within `deadline` seconds.

        requests: site -> (header, payload). done: called with a site's name as its answer comes.
        """
        end = time.monotonic() + deadline
        self.greet(lambda found: set(requests) <= set(found), min(30.0, deadline / 10))  # one may have come back
        answers: dict[str, tuple[dict[str, Any], bytes] | FedKeelError] = {}
        pending: dict[str, tuple[str, str]] = {}
        arrays: dict[bytes, Array | None] = {}
        for site, (header, payload) in requests.items():
            identity = secrets.token_hex(8)
            try:
                if site not in self.nodes:
                    told = "".join(f"; {trouble}" for trouble in self.troubles if repr(site) in trouble)
                    raise FlowerError(f"no node that is this site: its SuperNode is down, or its name is another{told}")
                if refused := self.vet(site, self.hellos[site]):
                    raise FlowerError(refused)
                if len(payload) > self._limit:
                    raise FlowerError(f"a message of {len(payload):,} bytes is over the limit of {self._limit:,}; not sent")
                if payload not in arrays:
                    arrays[payload] = _array(payload)
                whole = {**header, "id": identity, "site": site}
                sent = self._send(self.nodes[site], kind, whole, arrays[payload], end - time.monotonic())
            except FlowerError as error:
                answers[site] = error
                continue
            pending[sent] = site, identity
        for (site, identity), message in self._collect(pending, end):
            try:
                answers[site] = self._open(message, identity, site)
            except (FlowerError, SiteFailure) as error:
                answers[site] = error
            done(site)
        for site, _ in pending.values():
            answers[site] = FlowerError(f"no answer within {deadline:g} s (federation.deadline)")
            done(site)
        return answers

    def transport(self, rounds: int, ranks: Mapping[str, int], kept: dict[str, str]) -> FlowerTransport:
        """See `coordinate.Sites`."""
        return FlowerTransport(self, rounds, ranks, kept)


class SiteFailure(FedKeelError):
    """What a site says went wrong there. lost: it no longer holds what it kept."""

    def __init__(self, text: str, lost: bool) -> None:
        super().__init__(text)
        self.lost = lost


class FlowerTransport:
    """`types.Transport` over a Courier.

    kept: site -> the name of the state that it is to start from, see `work`; brought up to date as answers are taken.
    """

    def __init__(
        self, courier: Courier, rounds: int, ranks: Mapping[str, int], kept: dict[str, str],
        watch: Callable[[Reply], None] = lambda reply: None,
    ) -> None:  # fmt: skip
        """rounds: of a stage. ranks: of sites whose adapter is not of the recipe's rank. watch: called after each reply."""
        self._courier, self._rounds, self._ranks, self._watch = courier, rounds, ranks, watch
        self.kept = kept

    @property
    def cpu(self) -> float:
        """See `run.Carrier`."""
        return self._courier.cpu

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """See `types.Transport`."""
        asked = {
            r.site: ({"rounds": self._rounds, "rank": self._ranks.get(r.site, 0), "kept": self.kept.get(r.site, "")}, r.payload)
            for r in requests
        }
        answers = self._courier.ask("train", asked, deadline, lambda site: self._watch(Reply(site)))
        replies = []
        for site, outcome in answers.items():
            if isinstance(outcome, FedKeelError):
                if isinstance(outcome, SiteFailure) and outcome.lost:
                    self.kept[site] = ""
                replies.append(Reply(site, error=str(outcome)))
                continue
            header, payload = outcome
            self.kept[site] = str(header.get("kept", ""))  # taken: from here on this is where the site starts from
            replies.append(Reply(site, payload))
        return replies


# The two components of the app.

client_app = ClientApp()
server_app = ServerApp()


def _answer(message: Message, context: Context) -> Message:
    """A site's answer. In a simulation the node is a partition of the recipe's data; in a deployment it is what its own
    site.toml says, and the warm worker there does the work."""
    header, payload = _unpack(message)
    where = context.node_config.get(SITE_FILE)
    if where is not None:
        from fedkeel.sitefile import read_site
        from fedkeel.worker import ask

        told: dict[str, Any] = {"run": header.get("run"), "id": header.get("id"), "site": header.get("site")}
        try:
            site = read_site(Path(str(where)))
            if site.warm:
                told, out = ask(site, header, payload, float(header["seconds"]))
            else:
                from fedkeel.work import handle

                told, out = handle(header, payload, site)
        except FedKeelError as error:
            told, out = {**told, "error": str(error)}, b""
    else:
        from fedkeel.work import handle

        if "partition-id" not in context.node_config:
            raise FlowerError(
                f"this node is neither of a simulation nor told its site: start the SuperNode with --node-config "
                f"'{SITE_FILE}=\"/path/to/site.toml\"'"
            )
        partition = int(str(context.node_config["partition-id"]))
        told, out = handle(header, payload, None, partition, Path(str(header["state"])))
    if len(out) > LIMIT:
        told, out = {**told, "error": f"an answer of {len(out):,} bytes is over the limit of {LIMIT:,}; not sent"}, b""
    return Message(_pack(told, _array(out)), reply_to=message)


for _category in (client_app.query, client_app.train, client_app.evaluate):
    _category()(_answer)


class _Lines:
    """A `run.Watch` that prints lines: what a coordinator's log holds."""

    def begin(self, total_work: float) -> None:
        """See `run.Watch`."""

    def leg(self, name: str, detail: str) -> None:
        """See `run.Watch`."""
        print(f"{name}: {detail}", flush=True)

    def advance(self, work: float) -> None:
        """See `run.Watch`."""

    def round(self, leg: str, done: int, rounds: int, result: Any) -> None:
        """See `run.Watch`."""
        sent = sum(result.bytes_down.values()) + sum(result.bytes_up.values())
        losses = [u.stats["loss"] for u in result.updates]
        print(
            f"round {done} of {rounds}: {len(result.updates)} sites, loss {sum(losses) / len(losses):.3f} nats, "
            f"{result.seconds:.1f} s, {sent:,} bytes", flush=True,
        )  # fmt: skip

    def note(self, text: str) -> None:
        """See `run.Watch`."""
        print(f"note: {text}", flush=True)


def _app_file(name: str) -> Path:
    """A file of the Flower app that this process runs: Flower puts the app's folder into the path of imports."""
    found = [Path(folder) / name for folder in sys.path if (Path(folder) / name).is_file()]
    if not found:
        raise FlowerError(f"the app holds no {name}; write one with: fedkeel deploy init")
    return found[0]


def coordinator(grid: Grid, context: Context) -> None:
    """A deployment's coordinator. The app's config holds `sites`, joined by commas, and `wait`, the seconds that it waits for
    them at most before round 1; recipe.toml lies in the app's folder. Which key a site's name belongs to stands in `members`,
    below the working directory of SuperLink.

    The run's folder is `out`/`name` of the recipe, below the working directory of SuperLink. If it holds a run of the same
    recipe that has not ended, the run goes on from its last round.
    """
    from fedkeel.config import make_recipe
    from fedkeel.coordinate import coordinate
    from fedkeel.folder import RunFolder

    text = _app_file("recipe.toml").read_text(encoding="utf-8")
    recipe = make_recipe(tomllib.loads(text), data=False)
    names = [name for name in str(context.run_config.get("sites", "")).split(",") if name]
    if not names or len(set(names)) < len(names):
        raise FlowerError("the app's config must hold `sites`: the names of all sites, joined by commas, each once")
    seconds = float(context.run_config.get("wait", 600.0))
    watch = _Lines()
    members = read_members(Path(MEMBERS))
    if members is None:
        watch.note(f"sites are believed what they are called: {Path(MEMBERS).absolute()}, which register.sh writes, is missing")
    elif unknown := sorted(set(names) - set(members)):
        watch.note(f"no key was registered for {', '.join(unknown)}: ./register.sh")

    def meet(run: str) -> Courier:
        courier = Courier(grid, text, run, members=lambda: read_members(Path(MEMBERS)))
        watch.leg("federated", f"waiting for {len(names)} sites, at most {seconds:.0f} s")
        courier.greet(lambda found: set(names) <= set(found), seconds)
        for trouble in courier.troubles:
            watch.note(trouble)
        return courier

    coordinate(recipe, names, RunFolder(Path(recipe.out) / recipe.name), watch, meet)
    print("the federation has ended", flush=True)


server_app.main()(coordinator)


class Simulation:
    """`run.Engine` over a grid of Flower's simulation, or one that behaves like it: site n of the sorted names is partition n.

    folder: what sites keep lies here, as it does at a site; it is filled from the run's checkpoint when a stage begins, and
    read after each round for the next checkpoint, so that a run can be resumed on any engine.
    """

    def __init__(self, grid: Grid, prepared: Prepared, folder: Path, stopped: threading.Event | None = None) -> None:
        from fedkeel.config import to_toml

        self._names = sorted(prepared.sites.rows)
        self._run = secrets.token_hex(8)
        self._folder = folder
        self._courier = Courier(grid, to_toml(_absolute(prepared.recipe)), self._run, folder, stopped)
        self._deadline = prepared.recipe.federation.deadline

    def connect(self, rounds: int, kept: dict[str, Kept], watch: Callable[[Reply], None]) -> _Simulated:
        """See `run.Engine`."""
        if not self._courier.nodes:
            self._courier.find(self._names, self._deadline)
        return _Simulated(self._courier, rounds, kept, watch, self._folder / self._run)


class _Simulated(FlowerTransport):
    """A FlowerTransport that has what its sites keep on its own disk."""

    def __init__(
        self, courier: Courier, rounds: int, kept: dict[str, Kept], watch: Callable[[Reply], None], folder: Path
    ) -> None:
        from fedkeel.work import Store

        self._tensors, self._stores = kept, {site: Store(folder, site) for site in courier.nodes}
        tokens = {}
        for site, held in kept.items():
            tokens[site] = self._stores[site].write(secrets.token_hex(8), held.tensors())
        super().__init__(courier, rounds, {site: held.rank for site, held in kept.items()}, tokens, watch)

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """See `types.Transport`."""
        from fedkeel.client import Kept

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
    model = replace(recipe.model, base=str(base.absolute())) if base.is_dir() else recipe.model
    root = str(Path(recipe.data.root).absolute()) if recipe.data.root else ""
    return replace(recipe, model=model, data=replace(recipe.data, root=root))


def resources(recipe: Recipe, sites: int) -> tuple[int, dict[str, float]]:
    """(workers, what Ray reserves for one): a worker has the recipe's threads, and on CUDA a device of its own."""
    from fedkeel.config import cores

    needs = {"num_cpus": float(recipe.threads), "num_gpus": 1.0 if recipe.model.device.startswith("cuda") else 0.0}
    return min(max(1, cores() // recipe.threads), sites), needs


def simulate(prepared: Prepared, folder: RunFolder, watch: Watch, resume: bool = False, fresh: bool = False) -> None:
    """`run.execute` with the federated leg in Flower's simulation; returns only once a federation has really ended.

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
    from fedkeel.run import execute

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
        init = {"num_cpus": workers * prepared.recipe.threads, "include_dashboard": False, "log_to_driver": False,
                "_temp_dir": f"{home}/ray", "logging_level": logging.ERROR}  # fmt: skip
        crash: BaseException | None = None
        try:
            run_simulation(app, client_app, sites, backend_config={"init_args": init, "client_resources": needs})
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
    if not folder.state()["finished"]:
        raise FlowerError("Flower's simulation ended before the federation did")
