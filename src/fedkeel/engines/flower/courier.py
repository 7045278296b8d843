"""Requests to sites by their names over Flower's grid, and the answers of one run."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedkeel.engines.hello import Hello, read_hello
from fedkeel.types import FedKeelError, Reply, Request

if TYPE_CHECKING:
    from fedkeel.engines.coordinate import Terms

LIMIT = 128 * 2**20  # bytes of one payload: Flower's stores hold every message in memory or SQLite, at about 30 MB/s
AGAIN = 60.0  # seconds after which a node whose greeting failed is asked again
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


class FlowerError(FedKeelError):
    """A federation over Flower that cannot go on; the text says what would be right."""


def pack(header: Mapping[str, Any], payload: Array | None) -> RecordDict:
    records: dict[str, Any] = {"fedkeel": ConfigRecord({"header": json.dumps(header)})}
    if payload is not None:
        records["payload"] = ArrayRecord({"payload": payload})
    return RecordDict(records)


def array(payload: bytes) -> Array | None:
    # an array without bytes has no chunk, and does not survive the way
    return Array("uint8", (len(payload),), STYPE, payload) if payload else None


def unpack(message: Message) -> tuple[dict[str, Any], bytes]:
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
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise FlowerError(f"a message without FedKeel's header: {error!r}") from error
    if not isinstance(header, dict):
        raise FlowerError("a message whose header is no object")
    return header, payload


def _fail(message: Message) -> str:
    code = message.error.code
    reason = message.error.reason or "no reason given"
    return f"Flower's error {code} ({ERRORS.get(code, 'of no known kind')}): {reason}"


@dataclass(frozen=True)
class Errand:
    """What every request of a run says. recipe: TOML. run: its name. state: where sites of a simulation keep things."""

    recipe: str
    run: str
    state: Path | None = None

    def told(self) -> dict[str, Any]:
        """As keys of a header."""
        return {"run": self.run, "recipe": self.recipe} | ({} if self.state is None else {"state": str(self.state)})


class Courier:
    """Carries requests to sites by their names, and brings the answers of one run.

    nodes: site -> Flower's node id, once it has said hello. hellos: what each said. cpu: seconds of processor time that the
    answers took at the sites. vet: (site, its hello) -> why it is not asked; empty where it may be.
    """

    def __init__(
        self,
        grid: Grid,
        errand: Errand,
        stopped: threading.Event | None = None,
        limit: int = LIMIT,
        members: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:
        """stopped: set from another thread, it ends the waiting. limit: bytes of a payload. members: looked up at each
        greeting: site -> the node that its key was registered as, and no other is this site; None: a node is believed."""
        self._grid, self._errand = grid, errand
        self._stopped = stopped or threading.Event()
        self._limit, self._members = limit, members
        self.nodes: dict[str, int] = {}
        self.hellos: dict[str, Hello] = {}
        self.vet: Callable[[str, Hello], str] = lambda site, hello: ""
        self.troubles: list[str] = []  # of the present greeting: what nodes said that could not say hello
        self.tell: Callable[[str], None] = lambda trouble: None  # called with each of them as it comes, once in a run
        self._told: set[str] = set()
        self._greeted: dict[str, tuple[int, str, float]] = {}  # message -> node, request, when it is given up
        self.cpu = 0.0

    def _send(self, node: int, kind: str, header: Mapping[str, Any], payload: Array | None, seconds: float) -> str:
        """Hand one message over; its id. Raises FlowerError."""
        whole = {**header, **self._errand.told(), "kind": kind, "seconds": seconds}
        # a message that nobody waits for any more is not worth delivering
        message = Message(pack(whole, payload), node, KINDS[kind], ttl=min(max(seconds, 1.0), 1e9))
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
        header, payload = unpack(message)
        if header.get("run") != self._errand.run or header.get("id") != identity:
            raise FlowerError(
                f"refused: an answer of run {header.get('run')!r} to request {header.get('id')!r}, where "
                f"{self._errand.run!r} and {identity!r} belong"
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
        asked: dict[int, float] = {}  # node -> when, in this call
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
            # one that failed may have been away without Flower's knowing
            late = {node for node, at in asked.items() if now < at + AGAIN}
            for node in sorted(present - late - known):
                asked[node] = now
                identity = secrets.token_hex(8)
                sent = self._send(node, "hello", {"id": identity, "site": ""}, None, HELLO)
                self._greeted[sent] = node, identity, now + HELLO
            for (node, identity, _), reply in self._collect(self._greeted, min(end, time.monotonic() + 1.0)):
                try:
                    header, _ = self._open(reply, identity, "")
                    site, hello = str(header["site"]), read_hello(header.get("hello"))
                except (FlowerError, SiteFailure, KeyError, TypeError, ValueError) as error:
                    named = [f"site {name!r} (node {node})" for name, key in (members or {}).items() if key == node]
                    self._trouble(f"{named[0] if named else f'node {node}'}: {error}")
                    continue
                if members is not None and members.get(site) != node:
                    key = f"node {members[site]}" if site in members else "no node"
                    said = f"node {node} says that it is site {site!r}, and is not believed"
                    self._trouble(f"{said}: that name's key was registered as {key}")
                    continue
                if site in self.nodes:
                    raise FlowerError(
                        f"two nodes say that they are site {site!r} (nodes {self.nodes[site]} and {node}); the name in "
                        f"site.toml must be of one site only"
                    )
                self.nodes[site], self.hellos[site] = node, hello
            if not self._greeted:
                time.sleep(max(0.0, min(0.2, end - time.monotonic())))

    def _trouble(self, text: str) -> None:
        if text not in self.troubles:
            self.troubles.append(text)
        if text not in self._told:
            self._told.add(text)
            self.tell(text)

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
        self,
        kind: str,
        requests: Mapping[str, tuple[Mapping[str, Any], bytes]],
        deadline: float,
        done: Callable[[str], None] = lambda site: None,
    ) -> dict[str, tuple[dict[str, Any], bytes] | FedKeelError]:
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
                    arrays[payload] = array(payload)
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

    def transport(self, terms: Terms, kept: dict[str, str], watch: Callable[[Reply], None]) -> FlowerTransport:
        """See `coordinate.Sites`."""
        return FlowerTransport(self, terms, kept, watch)


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
        self,
        courier: Courier,
        terms: Terms,
        kept: dict[str, str],
        watch: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        """watch: called after each reply."""
        self._courier, self._terms, self._watch = courier, terms, watch
        self.kept = kept

    @property
    def cpu(self) -> float:
        """See `rounds.Carrier`."""
        return self._courier.cpu

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """See `types.Transport`."""
        from fedkeel.exchange.codecs import header_of  # needs torch, which a process that hands messages over does not

        terms = self._terms
        told = {"leg": terms.leg, "rounds": terms.rounds, "steps": terms.steps}
        asked = {
            r.site: ({**told, "rank": terms.ranks.get(r.site, 0), "kept": self.kept.get(r.site, "")}, r.payload)
            for r in requests
        }
        trained = {r.site for r in requests if header_of(r.payload).get("kind") == "global"}  # others are questions beside it

        def done(site: str) -> None:
            if site in trained:
                self._watch(Reply(site))

        answers = self._courier.ask("train", asked, deadline, done)
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
