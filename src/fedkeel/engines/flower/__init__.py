"""Flower as the engine: it carries our payload bytes between our round loop and our client round. Nothing else knows Flower.

`apps`: the components of a Flower app. `courier`: requests to sites by name, and their answers. `simulation`: a federation in
Flower's own simulation.

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

import os

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
