"""The files of each machine's part."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkeel import __version__
from fedkeel.engines.sitefile import MEMBERS
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import toml_value

if TYPE_CHECKING:
    pass


PREFIX = "/opt/fedkeel"  # where the units expect a machine's part, and the virtual environment `venv`
FLOWER = "1.41.0"  # the extra fedkeel[flower] allows 1.41.x
RUNTIME_PORT = 9094  # of the first site's SuperNode, on its loopback address; the next sites count on, to share a machine

EMBEDDED = "keel-nano"


def joined(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# The parts


QUIET = """\
# no telemetry, no update check, no installing at run time, no look at a hub
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"""
HERE = (
    """\
#!/bin/sh
# {what}
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
umask 077
mkdir -p "$here/state/flwr"
export FLWR_HOME="$here/state/flwr"
"""
    + QUIET
)


def _app(recipe: Recipe, text: str, manifest: str, sites: Sequence[str]) -> dict[str, str]:
    name = re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-") or "run"
    project = f"""\
# A Flower app of two names: all code is in the installed package fedkeel, at the coordinator and at each site.
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedkeel-{name}"
version = "{__version__}"
description = "A federation of FedKeel: recipe.toml says what is trained"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>={FLOWER},<1.42"] # told to Flower; nothing is installed for a run

[tool.flwr.app]
publisher = "fedkeel"
fab-format-version = 1
flwr-version-target = "{FLOWER}"

[tool.flwr.app.components]
serverapp = "fedkeel.engines.flower.apps:server_app"
clientapp = "fedkeel.engines.flower.apps:client_app"

[tool.flwr.app.config]
sites = "{",".join(sites)}"
wait = 600.0 # seconds to wait for all of them before round 1; after that the quorum decides
"""
    licence = (
        "This app folder (pyproject.toml, recipe.toml, manifest.json) was written by FedKeel and is licensed under the\n"
        "Apache License, Version 2.0. SPDX-License-Identifier: Apache-2.0\n"
        "The text of the license is at https://www.apache.org/licenses/LICENSE-2.0\n"
    )
    return {"pyproject.toml": project, "recipe.toml": text, "manifest.json": manifest, "LICENSE": licence}


def _unit(what: str, folder: str, script: str, after: str = "network-online.target") -> str:
    return f"""\
# Copy to /etc/systemd/system/. It expects this folder at {PREFIX}/{folder}, owned by the user fedkeel, and the virtual
# environment {PREFIX}/venv.
[Unit]
Description={what}
Wants=network-online.target
After={after}

[Service]
User=fedkeel
ExecStart={PREFIX}/{folder}/{script}
Environment=PATH={PREFIX}/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin
Restart=on-failure
RestartSec=10
NoNewPrivileges=yes
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={PREFIX}/{folder}/state
UMask=0077

[Install]
WantedBy=multi-user.target
"""


def _coordinator(hosts: Sequence[str], port: int) -> dict[str, str]:
    inner = port + 1
    start = HERE.format(what="Starts SuperLink, on this machine's loopback address only: the gate is what sites reach.") + (
        f"""\
cd "$here/state"
exec flower-superlink --host 127.0.0.1 --port {inner} \\
  --ssl-certfile "$here/tls.pem" --ssl-keyfile "$here/tls.key" --ssl-ca-certfile "$here/ca.pem" \\
  --enable-supernode-auth --disable-runtime-dependency-installation --database "$here/state/superlink.db"
"""
    )
    command = HERE.format(what="Flower's own command, against this SuperLink: ./flwr.sh supernode list") + (
        f"""\
cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "here"

[superlink.here]
address = "127.0.0.1:{inner}"
root-certificates = "$here/ca.pem"
END
exec flwr "$@"
"""
    )
    whole = HERE.format(what="Starts a run, shows its log, and exits with 0 only if the federation really ended.") + (
        r"""told=$("$here/flwr.sh" run "$here/../app" here --format json)
run=$(printf '%s' "$told" | sed -n 's/.*"run-id": *"\{0,1\}\([0-9][0-9]*\).*/\1/p')
[ -n "$run" ] || { echo "the run was not taken: $told" >&2; exit 1; }
echo "run $run; Ctrl-C ends this log and not the run, which ./flwr.sh stop $run does"
trap 'exit 130' INT
while :; do
  "$here/flwr.sh" log "$run" here --stream || true # it may break off: what counts is the status
  status=$("$here/flwr.sh" list --run-id "$run" --format json | sed -n 's/.*"status": *"\([^"]*\)".*/\1/p' | head -n 1)
  case "$status" in
    finished:completed) exit 0 ;;
    finished:*) echo "the federation did not end: $status" >&2; exit 1 ;;
  esac
  sleep 5
done
"""
    )
    register = HERE.format(
        what="Registers keys/NAME.pub of the sites named, or of all: they may take part, under that name."
    ) + (
        rf"""[ $# -gt 0 ] || for key in "$here"/keys/*.pub; do set -- "$@" "$(basename "$key" .pub)"; done
failed=0
for name in "$@"; do
  told=$("$here/flwr.sh" supernode register "$here/keys/$name.pub" --name "$name" --format json 2>&1) || true
  node=$(printf '%s' "$told" | sed -n 's/.*"node-id": *"\{{0,1\}}\([0-9][0-9]*\).*/\1/p')
  if [ -n "$node" ]; then
    echo "$node $name" >> "$here/state/{MEMBERS}"
    echo "$name: registered, node $node"
  else
    echo "not registered: $name: $told" >&2
    failed=1
  fi
done
exit $failed
"""
    )
    gate = HERE.format(what="Starts the gate: nginx, in the foreground.") + (
        'exec nginx -p "$here" -c "$here/gate.conf" -e stderr -g "daemon off;"\n'
    )
    listen = f"[::]:{port}" if ":" in hosts[0] else str(port)
    conf = f"""\
# What sites reach: Flower's Fleet interface, where every request is signed with a site's key, and nothing else. Control
# (start a run, register a key) and Runtime have no authentication in Flower 1.41; they answer on this machine alone.
worker_processes 1;
pid state/gate.pid;
error_log stderr;
events {{ worker_connections 512; }}
http {{
  access_log off;
  server_tokens off;
  client_body_temp_path state/gate-body;
  proxy_temp_path state/gate-proxy;
  fastcgi_temp_path state/gate-fastcgi;
  uwsgi_temp_path state/gate-uwsgi;
  scgi_temp_path state/gate-scgi;
  client_max_body_size 64m; # Flower sends pieces of 5 MB
  server {{
    listen {listen} ssl;
    ssl_certificate tls.pem;
    ssl_certificate_key tls.key;
    ssl_protocols TLSv1.2 TLSv1.3;
    if ($request_uri !~ ^/v1/fleet/[a-z-]+$) {{ return 403; }} # the path as it was sent, before any decoding
    location / {{ return 403; }}
    location /v1/fleet/ {{
      proxy_pass https://127.0.0.1:{inner};
      proxy_http_version 1.1;
      proxy_request_buffering off; # nothing of a payload touches the disk here
      proxy_buffering off;
      proxy_ssl_verify on;
      proxy_ssl_trusted_certificate ca.pem;
      proxy_ssl_name localhost;
      proxy_read_timeout 600s;
      proxy_send_timeout 600s;
    }}
  }}
}}
"""
    compose = f"""\
# docker compose up -d; then, once: docker compose exec superlink {PREFIX}/coordinator/register.sh.
# The image is built from ../image/Dockerfile.
services:
  superlink:
    image: fedkeel:{__version__}
    user: "${{FEDKEEL_UID:-1000}}"
    volumes: [".:{PREFIX}/coordinator", "../app:{PREFIX}/app:ro"]
    command: ["{PREFIX}/coordinator/start.sh"]
    ports: ["{port}:{port}"]
    restart: on-failure
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
  gate: # shares superlink's network, and so its loopback address
    image: nginx:stable
    user: "${{FEDKEEL_UID:-1000}}"
    network_mode: "service:superlink"
    volumes: [".:{PREFIX}/coordinator"]
    entrypoint: ["{PREFIX}/coordinator/gate.sh"]
    restart: on-failure
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
"""
    return {
        "start.sh": start,
        "flwr.sh": command,
        "run.sh": whole,
        "register.sh": register,
        "gate.sh": gate,
        "gate.conf": conf,
        "compose.yaml": compose,
        "fedkeel-coordinator.service": _unit("FedKeel coordinator: SuperLink", "coordinator", "start.sh"),
        "fedkeel-gate.service": _unit(
            "FedKeel coordinator: the gate", "coordinator", "gate.sh", "network-online.target fedkeel-coordinator.service"
        ),
    }


def _site(name: str, number: int, recipe: Recipe, address: str) -> dict[str, str]:
    data = recipe.data
    if data.source == "pydocs":
        rows = f'# root = "/srv/fedkeel/{name}"  # a folder of Python files; without it, the library of this Python\n'
    elif data.source == "hub":
        rows = f"dataset = {toml_value(data.dataset)}  # an id in this machine's cache, or a folder\n"
        rows += f"subset = {toml_value(data.subset)}\n"
    else:
        files = toml_value(data.files or ("rows.jsonl",))
        rows = f'root = "/srv/fedkeel/{name}"\nfiles = {files}  # JSON Lines, relative to root; docs/recipes.md has the forms\n'
        if data.tasks_file:
            rows += f"tasks_file = {toml_value(data.tasks_file)}  # relative to root; the same content at every site\n"
    base = "" if recipe.model.base == EMBEDDED else f"/srv/fedkeel/models/{Path(recipe.model.base).name}"
    if base:
        model = f"base = {toml_value(base)}  # a folder in Hugging Face layout, the same at every site"
    else:
        model = '# base = "/srv/fedkeel/models/NAME"  # this recipe uses the embedded keel-nano: nothing to set'
    site = f"""\
# What site {name} says of itself. It stays on this machine; only the name is told to the coordinator. Paths may be relative
# to this file.
name = "{name}"
device = "cpu"  # or "cuda", "cuda:1"
threads = 2  # of torch, on a CPU
state = "state"  # what the site keeps between rounds, and logs; lose it and the site starts again from the global adapter

[model]
{model}

[data]
{rows}
[worker]
warm = true  # keep the base model loaded between messages
socket = "state/worker.sock"  # at most 100 bytes, with all folders
key = "worker.key"
idle = 3600  # seconds without a request after which the worker ends, and gives its memory back
"""
    start = HERE.format(what=f"Starts the SuperNode of site {name}; its worker starts with the first message.") + (
        f"""\
exec flower-supernode --superlink {address} --root-certificates "$here/ca.pem" \\
  --auth-supernode-private-key "$here/node.key" --host 127.0.0.1 --port {RUNTIME_PORT + number} \\
  --node-config "site-config=\\"$here/site.toml\\""
"""
    )
    compose = f"""\
# The image is built from ../image/Dockerfile. site.toml is read inside the container: its paths are those on the right.
services:
  supernode:
    image: fedkeel:{__version__}
    user: "${{FEDKEEL_UID:-1000}}"
    volumes:
      - ".:{PREFIX}/site-{name}"
      - "${{FEDKEEL_DATA:-/srv/fedkeel}}:/srv/fedkeel:ro"
    command: ["{PREFIX}/site-{name}/start.sh"]
    restart: on-failure
    cap_drop: [ALL]
    security_opt: ["no-new-privileges:true"]
"""
    unit = _unit(f"FedKeel site {name}: SuperNode", f"site-{name}", "start.sh")
    return {"site.toml": site, "start.sh": start, "compose.yaml": compose, f"fedkeel-site-{name}.service": unit}


DOCKERFILE = f"""\
# First FedKeel's wheel beside this file: pip wheel --no-deps -w image/ PATH. Then: docker build -t fedkeel:{__version__} image/
FROM python:3.11-slim
WORKDIR /build
COPY fedkeel-*.whl ./
RUN pip install --no-cache-dir "$(ls ./fedkeel-*.whl)[flower]" && rm ./fedkeel-*.whl
"""


def _check_list(hosts: Sequence[str], port: int, sites: Sequence[str], days: int, hashes: bool) -> str:
    parts = "\n".join(f"   - `site-{name}/` to site {name}, and to nobody else" for name in sites)
    note = "" if hashes else (
        "   `manifest.json` holds no hash of the base: `init` was run without `--base`. Each site's check then prints its\n"
        "   own; compare them by telephone, or run `init` again with `--base PATH`.\n"
    )  # fmt: skip
    return f"""\
# Check list of this federation

Coordinator {joined(hosts[0], port)}; sites {", ".join(sites)}. The server certificate is valid for {days} days.

1. **Copy**, over a channel you trust (a private key is in each part):
   - `coordinator/` and `app/` to the coordinator
{parts}
   Each machine: the part at `{PREFIX}/`, owned by a user `fedkeel`; `pip install 'fedkeel[flower]'` into `{PREFIX}/venv`.
2. **Must never leave its machine:** `coordinator/tls.key`; `site-*/node.key`, `site-*/worker.key`, `site-*/site.toml` and the
   data. **Stays offline:** `ca/ca.key`, which signs certificates; no running machine needs it. Private keys are files of mode
   0600. When all parts are copied, keep `ca/` and delete the rest of this folder.
3. **Each site** fills in `site.toml` and the base's folder.
4. **Coordinator:** open port {port} to the sites' addresses; `./start.sh` (SuperLink), then `./register.sh` (the public keys in
   `keys/`, once: whoever holds the key of `keys/NAME.pub` is site NAME, and nobody else), then `./gate.sh`. Or the two units.
5. **Each site, before round 1:** `fedkeel deploy check {PREFIX}/site-NAME/site.toml`: every line says ok.
{note}6. **Each site:** `./start.sh`, or its unit. `./flwr.sh supernode list` at the coordinator shows it online.
7. **Coordinator:** `./run.sh` starts the run, shows its log, and exits with 0 only if the federation really ended.
   (`./flwr.sh run ../app` says 0 also for a run that fails later.)
8. **To revoke a site:** `./flwr.sh supernode list`, then `./flwr.sh supernode unregister NODE_ID`, and delete its
   file in `keys/`.
"""
