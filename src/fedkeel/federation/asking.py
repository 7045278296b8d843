"""Questions beside the training of a round: who answered what, in how many bytes, and what went wrong where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fedkeel.exchange.codecs import EnvelopeError
from fedkeel.types import Reply, Request, Transport

Found = TypeVar("Found")


@dataclass
class Asking:
    """Questions to sites, one after the other. down, up: bytes so far, by site. failures: site -> what went wrong first."""

    transport: Transport
    deadline: float
    down: Counter[str] = field(init=False, default_factory=Counter)
    up: Counter[str] = field(init=False, default_factory=Counter)
    failures: dict[str, str] = field(init=False, default_factory=dict)

    def ask(self, to: Mapping[str, bytes], read: Callable[[Reply], Found]) -> dict[str, Found]:
        """Answers by site, as `read` reads them; it raises EnvelopeError for one that is none. to: site -> its question."""
        requests = [Request(site, payload) for site, payload in sorted(to.items())]
        found = {}
        for reply in sorted(self.transport.exchange(requests, self.deadline), key=lambda r: r.site):
            self.down[reply.site] += len(to[reply.site])
            self.up[reply.site] += len(reply.payload)
            try:
                if reply.error:
                    raise EnvelopeError(reply.error)
                found[reply.site] = read(reply)
            except EnvelopeError as error:
                self.failures.setdefault(reply.site, str(error))
        for site in to.keys() - found.keys():
            self.failures.setdefault(site, "no reply")
        return found


def told(failures: Mapping[str, str]) -> str:
    """What went wrong, a paragraph a site."""
    return "\n".join(f"--- {site}: {text.strip()}" for site, text in sorted(failures.items()))
