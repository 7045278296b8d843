"""A grid without Flower's runtime: messages are stored, and answered by calling the ClientApp, when somebody looks for them.

Calling a ClientApp directly needs Flower's process-global identity, which the runtime sets elsewhere; only tests do this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

Twist = Callable[[Message, Message], list[tuple[int, Message]]]


class FakeGrid(Grid):
    """nodes: node id -> partition. files: of a deployment, the site.toml of each partition. twist: given a message and its
    reply, what arrives instead, each with the number of looks after which it does; a test's way to lose, delay, repeat or
    forge. What nobody asked for arrives all the same."""

    def __init__(self, app: ClientApp, partitions: int, twist: Twist | None = None, files: Sequence[Path] = ()) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 77, 1, 1
        self.app, self.nodes = app, {900 - 7 * n: n for n in range(partitions)}
        self.twist = twist or (lambda message, reply: [(0, reply)])
        self.files = files
        self.sent: list[Message] = []
        self._arriving: list[tuple[int, Message]] = []
        self.looks = 0

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: object, **more: object) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(uuid4())
            ids.append(message.metadata.message_id)
            self.sent.append(message)
            node = message.metadata.dst_node_id
            # what arrives at a site is not the object that was sent
            partition = self.nodes[node]
            told = {"site-config": str(self.files[partition])} if self.files else {"partition-id": partition}
            context = Context(77, node, told, RecordDict(), {})
            reply = self.app(copy.deepcopy(message), context)
            self._arriving += [(self.looks + late, r) for late, r in self.twist(message, reply)]
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies that have arrived, the last first: the order in which sites answer means nothing."""
        self.looks += 1
        here = [r for at, r in self._arriving if at < self.looks]
        self._arriving = [(at, r) for at, r in self._arriving if at >= self.looks]
        return here[::-1]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError
