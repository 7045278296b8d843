"""Transport inside this process: one base model in memory, the sites' adapters put into it in turn."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fedkeel.federation.client import Site, answer
from fedkeel.federation.kept import Kept
from fedkeel.model.lora import Model
from fedkeel.types import FedKeelError, Reply, Request


class LocalTransport:
    """All sites in this process, one after the other, in the order of the requests.

    Memory does not grow with sites or rounds, but for what the recipe has sites keep: a site is its encoded rows, stage by
    stage; the model is shared and overwritten in place.
    kept: what each site keeps, brought up to date as they answer. watch: called after each site, for progress.
    """

    cpu = 0.0  # of other processes

    def __init__(
        self,
        model: Model,
        sites: Mapping[str, Site],
        kept: dict[str, Kept] | None = None,
        watch: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        self._model, self._sites, self._watch = model, sites, watch
        self._kept = {} if kept is None else kept

    def exchange(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """See `types.Transport`. A site that raises becomes a reply with its error; Ctrl-C goes through."""
        replies = []
        for request in requests:
            begin = time.perf_counter()
            try:
                # A copy takes the place of what was kept only once the site has answered: a round that failed half-way
                # leaves no trace, and the next one finds the residual of what was truly sent.
                kept = replace(self._kept.get(request.site, Kept()))
                payload = answer(request.payload, self._model, self._sites[request.site], kept)
                seconds = time.perf_counter() - begin
                if seconds > deadline:
                    reply = Reply(request.site, error=f"answered after {seconds:.1f} s; federation.deadline is {deadline:g} s")
                else:
                    reply = Reply(request.site, payload)
                    self._kept[request.site] = kept
            except FedKeelError as error:
                reply = Reply(request.site, error=str(error))
            except Exception:
                # Whatever a site raises is that site's failure; the round loop decides by the quorum and repeats this text.
                reply = Reply(request.site, error=traceback.format_exc())
            replies.append(reply)
            self._watch(reply)
        return replies
