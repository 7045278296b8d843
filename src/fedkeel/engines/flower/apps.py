"""The two components of FedKeel's Flower app: a site's answers, and the coordinator of a deployment.

Flower starts a process for each message to a site. It only hands the message to the warm worker, so it does without torch: what
is heavy is imported where it is needed.
"""

from __future__ import annotations

import logging
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedkeel.engines.flower.courier import LIMIT, Courier, Errand, FlowerError, array, pack, unpack
from fedkeel.engines.sitefile import MEMBERS, read_members, read_site
from fedkeel.engines.worker import ask
from fedkeel.recipe.load import make_recipe
from fedkeel.runs.watch import Lines
from fedkeel.types import FedKeelError

SITE_FILE = "site-config"  # of --node-config: the path of site.toml


# The two components of the app.

client_app = ClientApp()
server_app = ServerApp()


def _answer(message: Message, context: Context) -> Message:
    """A site's answer. In a simulation the node is a partition of the recipe's data; in a deployment it is what its own
    site.toml says, and the warm worker there does the work."""
    header, payload = unpack(message)
    where = context.node_config.get(SITE_FILE)
    if where is not None:
        told: dict[str, Any] = {"run": header.get("run"), "id": header.get("id"), "site": header.get("site")}
        try:
            site = read_site(Path(str(where)))
            if site.warm:
                told, out = ask(site, header, payload, float(header["seconds"]))
            else:
                from fedkeel.engines.work import handle

                told, out = handle(header, payload, site)
        except FedKeelError as error:
            told, out = {**told, "error": str(error)}, b""
    else:
        from fedkeel.engines.work import handle

        if "partition-id" not in context.node_config:
            raise FlowerError(
                f"this node is neither of a simulation nor told its site: start the SuperNode with --node-config "
                f"'{SITE_FILE}=\"/path/to/site.toml\"'"
            )
        partition = int(str(context.node_config["partition-id"]))
        told, out = handle(header, payload, None, partition, Path(str(header["state"])))
    if len(out) > LIMIT:
        told, out = {**told, "error": f"an answer of {len(out):,} bytes is over the limit of {LIMIT:,}; not sent"}, b""
    return Message(pack(told, array(out)), reply_to=message)


for _category in (client_app.query, client_app.train, client_app.evaluate):
    _category()(_answer)


def _app_file(name: str) -> Path:
    """A file of the Flower app that this process runs: Flower puts the app's folder into the path of imports."""
    found = [Path(folder) / name for folder in sys.path if (Path(folder) / name).is_file()]
    if not found:
        raise FlowerError(f"the app holds no {name}; write one with: fedkeel deploy init")
    return found[0]


class Waiting:
    """Whether every one of `names` is among the sites that have a node. tell: hears who came, and who is still waited for."""

    def __init__(self, names: Sequence[str], tell: Callable[[str], None]) -> None:
        self._names, self._tell = names, tell
        self._come: set[str] = set()

    def __call__(self, found: Mapping[str, int]) -> bool:
        left = [name for name in self._names if name not in found]
        if fresh := sorted(found.keys() - self._come):
            self._come.update(fresh)
            self._tell(f"{', '.join(fresh)} said hello; " + (f"waiting for {', '.join(left)}" if left else "all are here"))
        return not left


class OneSentence(logging.Filter):
    """Of what Flower says of an exception, for FedKeel's own its text: it says what is wrong and what would be right, and
    twenty lines of a traceback around it hide that."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else record.exc_info
        if isinstance(error, FedKeelError):
            record.msg, record.args, record.exc_info = "fedkeel: %s", (str(error),), None
        return True


def coordinator(grid: Grid, context: Context) -> None:
    """A deployment's coordinator. The app's config holds `sites`, joined by commas, and `wait`, the seconds that it waits for
    them at most before round 1; recipe.toml lies in the app's folder. Which key a site's name belongs to stands in `members`,
    below the working directory of SuperLink.

    The run's folder is `out`/`name` of the recipe, below the working directory of SuperLink. If it holds a run of the same
    recipe that has not ended, the run goes on from its last round.
    """
    from fedkeel.engines.coordinate import coordinate
    from fedkeel.runs.folder import RunFolder

    logging.getLogger("flwr").addFilter(OneSentence())
    text = _app_file("recipe.toml").read_text(encoding="utf-8")
    recipe = make_recipe(tomllib.loads(text), data=False)
    names = [name for name in str(context.run_config.get("sites", "")).split(",") if name]
    if not names or len(set(names)) < len(names):
        raise FlowerError("the app's config must hold `sites`: the names of all sites, joined by commas, each once")
    seconds = float(context.run_config.get("wait", 600.0))
    watch = Lines(partial(print, flush=True))
    members = read_members(Path(MEMBERS))
    if members is None:
        watch.note(f"sites are believed what they are called: {Path(MEMBERS).absolute()}, which register.sh writes, is missing")
    elif unknown := sorted(set(names) - set(members)):
        watch.note(f"no key was registered for {', '.join(unknown)}: ./register.sh")

    def meet(run: str) -> Courier:
        courier = Courier(grid, Errand(text, run), members=lambda: read_members(Path(MEMBERS)))
        courier.tell = watch.note  # at once: who is missing can be looked after while the others are waited for
        watch.leg("federated", f"waiting for {', '.join(names)}, at most {seconds:.0f} s")
        courier.greet(Waiting(names, watch.note), seconds)
        return courier

    coordinate(recipe, names, RunFolder(Path(recipe.out) / recipe.name), watch, meet)
    print("the federation has ended", flush=True)


server_app.main()(coordinator)
