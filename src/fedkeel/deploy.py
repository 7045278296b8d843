"""What a coordinator and each site of a deployment need, written once: `fedkeel deploy init`. docs/deploy.md walks through it.

The folder holds one part a machine, and a part never holds another machine's private key:

    app/            the Flower app: two names, the recipe, the manifest. No data, no weights, no key
    ca/             the private authority's key and certificate: stays offline
    coordinator/    TLS key and certificate, the sites' public keys, the gate, how to start
    site-NAME/      the site's private key, site.toml, how to start
    image/          a Dockerfile, for those who use the Compose files
    CHECKLIST.md    what to copy where, what must never leave, in which order to start

Flower 1.41 answers three interfaces on one port: Fleet (sites), Control (start a run, register a key) and Runtime (apps). Only
Fleet knows who is asking. Whoever reaches the port can therefore start an app of their own, at every site. So SuperLink listens
on the coordinator's loopback address only, and the gate, an nginx of one page, lets nothing but Fleet through.

Imports neither torch nor Flower; `cryptography` comes with Flower.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkeel import __version__
from fedkeel.config import Recipe, make_recipe, read_tree, to_toml, toml_value
from fedkeel.sitefile import MEMBERS
from fedkeel.types import FedKeelError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

PREFIX = "/opt/fedkeel"  # where the units expect a machine's part, and the virtual environment `venv`
AUTHORITY_DAYS, SERVER_DAYS = 1826, 398
EARLY = datetime.timedelta(hours=1)  # certificates are valid from this long ago: a site's clock may be behind
FLOWER = "1.41.0"  # the extra fedkeel[flower] allows 1.41.x
RUNTIME_PORT = 9094  # of the first site's SuperNode, on its loopback address; the next sites count on, to share a machine
SITE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")
DNS_LABEL = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")

EMBEDDED = "keel-nano"

# What decides how a base computes, and how it reads text. Everything else in a folder (README, other formats) is left out.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
)  # fmt: skip


class DeployError(FedKeelError):
    """A deployment that cannot be written or read as asked; the text says what would be right."""


# The base, told by its files


def base_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(files of the model, files of the tokenizer) in `folder`, a base in Hugging Face layout, each sorted by name.

    Of weights, safetensors if there are any, as transformers prefers them. Raises DeployError if a kind is missing.
    """
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    model = sorted([*weights, *(folder / name for name in MODEL_FILES if (folder / name).is_file())])
    tokenizer = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not weights or not tokenizer:
        raise DeployError(
            f"{folder} holds no {'tokenizer' if weights else 'weights'}: a folder in Hugging Face layout belongs here, with "
            f"config.json, *.safetensors and the tokenizer's files"
        )
    return model, tokenizer


def files_hash(files: Sequence[Path]) -> str:
    """SHA-256 over name, size and SHA-256 of each file, in the order given; files are read as a stream."""
    whole = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(f"{path.name} {path.stat().st_size} {digest}\n".encode())
        except OSError as error:
            raise DeployError(f"{path} cannot be read: {error.strerror or error}") from error
    return whole.hexdigest()


def base_hashes(folder: Path) -> tuple[str, str]:
    """(hash of the model's files, hash of the tokenizer's files). Raises DeployError.

    Of files, not of tensors as a site's hello tells them: this one needs no memory for weights and no library.
    """
    model, tokenizer = base_files(folder)
    return files_hash(model), files_hash(tokenizer)


# Names and addresses


def check_sites(names: Sequence[str]) -> tuple[str, ...]:
    """The sites' names. They become folders, file names and words of shell scripts. Raises DeployError."""
    if not names:
        raise DeployError("--sites is empty: name the sites, joined by commas, as in --sites clinic-a,clinic-b")
    for name in names:
        if not SITE_NAME.fullmatch(name):
            raise DeployError(
                f"site {name!r}: 1 to 64 letters, digits, '.', '_' and '-' belong here, the first and the last a letter or "
                f"digit"
            )
    folded = [name.lower() for name in names]  # some file systems do not tell A from a
    twice = sorted({name for name in names if folded.count(name.lower()) > 1})
    if twice:
        raise DeployError(f"--sites names {' and '.join(twice)}: names must differ, in more than capitals")
    return tuple(names)


def check_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """DNS names or IP addresses of the coordinator; the first is what sites dial. Raises DeployError."""
    if not hosts:
        raise DeployError("--host is empty: name the coordinator as sites reach it, as in --host coordinator.example")
    for host in hosts:
        labels = host.split(".")
        dns = len(host) <= 253 and all(DNS_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit()
        if not (_is_ip(host) or dns):
            raise DeployError(f"host {host!r}: a DNS name or an IP address belongs here, without scheme, port or wildcard")
    return tuple(hosts)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def joined(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# Keys and certificates


def new_key() -> EllipticCurvePrivateKey:
    """A fresh EC P-384 key. Raises DeployError without the extra."""
    try:
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise DeployError("keys and certificates need an extra: pip install 'fedkeel[deploy]'") from error
    return ec.generate_private_key(ec.SECP384R1())


def pem(key: EllipticCurvePrivateKey) -> bytes:
    """The private key as PKCS#8, as TLS servers read it."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def ssh_pair(key: EllipticCurvePrivateKey, comment: str) -> tuple[bytes, bytes]:
    """(private, public) in OpenSSH's format, as `flower-supernode` and `flwr supernode register` read them."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return private, public + f" {comment}\n".encode()


def certificate(
    subject: str, key: EllipticCurvePrivateKey, days: float, names: Sequence[str] = (),
    issuer: tuple[x509.Certificate, EllipticCurvePrivateKey] | None = None,
) -> x509.Certificate:  # fmt: skip
    """A certificate for `key`: without issuer an authority that may sign servers and nothing below them; with one a server's,
    for `names` (DNS or IP). Serial numbers are random (159 bits)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    issuing_key = issuer[1] if issuer else key
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign",
         "crl_sign", "encipher_only", "decipher_only"), False,
    ) | ({"digital_signature": True} if issuer else {"key_cert_sign": True, "crl_sign": True})  # fmt: skip
    builder = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(issuer[0].subject if issuer else own)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLY)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None if issuer else 0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuing_key.public_key()), critical=False)
    )
    if issuer:
        general = [x509.IPAddress(ipaddress.ip_address(n)) if _is_ip(n) else x509.DNSName(n) for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False).add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
    return builder.sign(issuing_key, hashes.SHA384())


# The recipe and the manifest


def app_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path | None]:
    """(the recipe as it travels, the folder of its base if it is here): every key, and no path of this machine.

    Rows are not looked for. Raises ConfigError, or DeployError for a recipe that a deployment does not run.
    """
    recipe = make_recipe(read_tree(path, overrides), data=False)
    if recipe.stream.order or recipe.stream.stages:
        raise DeployError(
            f"{path}: a task stream runs in one process or in the simulation, not in a deployment: leave [stream] out"
        )
    if recipe.partition.scheme != "natural":
        raise DeployError(
            f"{path}: partition.scheme = {recipe.partition.scheme!r} deals rows that lie in one place; in a deployment a site "
            f"holds its own rows: set it to 'natural'"
        )
    base = Path(recipe.model.base).expanduser()
    here = base.resolve() if base.is_dir() else None
    if recipe.model.base == EMBEDDED:
        base, here = Path(EMBEDDED), Path(__file__).parent / "keel_nano"
    named = base.name if here or base.is_absolute() else recipe.model.base
    travels = replace(
        recipe,
        out="runs",
        threads=0,
        model=replace(recipe.model, base=named, device="cpu"),
        data=replace(recipe.data, root=""),
    )
    return travels, here


def _manifest(recipe: Recipe, text: str, sites: Sequence[str], address: str, base: Path | None) -> dict[str, Any]:
    """What every part knows of the federation, none of it secret. base: where to compute the hashes; None: left empty."""
    model, tokenizer = base_hashes(base) if base is not None else ("", "")
    return {
        "fedkeel": __version__,
        "coordinator": address,
        "sites": list(sites),
        "recipe": hashlib.sha256(text.encode()).hexdigest(),
        "base": recipe.model.base,
        "base_sha256": model,
        "tokenizer_sha256": tokenizer,
    }


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest that `init` wrote. Raises DeployError naming the file and key."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeployError(f"{path} cannot be read: {error}; copy it from app/ of the deployment's folder") from error
    keys = ("fedkeel", "coordinator", "recipe", "base", "base_sha256", "tokenizer_sha256")
    for key in keys:
        if not isinstance(told, dict) or not isinstance(told.get(key), str):
            raise DeployError(f"{path}: text belongs under {key!r}; copy the file from app/ of the deployment's folder")
    return told


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
serverapp = "fedkeel.flower:server_app"
clientapp = "fedkeel.flower:client_app"

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


def _write(root: Path, files: Mapping[str, str | bytes], private: Sequence[str] = ()) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # with its mode from the start: at no time can another user read a key
        mode = 0o600 if name in private else 0o700 if name.endswith(".sh") else 0o644
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        path.chmod(mode)  # whatever the umask was


def init(
    folder: Path, recipe: Recipe, sites: Sequence[str], hosts: Sequence[str], port: int = 9443, base: Path | None = None
) -> str:
    """Write the folder of a deployment, whole or not at all; returns the check list.

    recipe: of `app_recipe`. hosts: names of the coordinator, the first is what sites dial. base: a folder to take the base's
    hashes from; None: the manifest holds none. Raises DeployError on a bad name or address, or if `folder` exists.
    """
    sites, hosts = check_sites(sites), check_hosts(hosts)
    if not 1 <= port <= 65534:
        raise DeployError(
            f"--port {port}: 1 to 65534 belongs here; the number after it is SuperLink's, on the loopback address"
        )
    if os.path.lexists(folder):
        raise DeployError(f"{folder} exists; name a folder that does not, as its keys may be in use")
    address = joined(hosts[0], port)
    text = to_toml(recipe)
    manifest = json.dumps(_manifest(recipe, text, sites, address, base), indent=1) + "\n"
    authority_key, server_key = new_key(), new_key()
    from cryptography.hazmat.primitives.serialization import Encoding

    authority = certificate(f"FedKeel authority {secrets.token_hex(4)}", authority_key, AUTHORITY_DAYS)
    names = tuple(dict.fromkeys([*hosts, "localhost", "127.0.0.1", "::1"]))  # Flower's own processes dial the loopback
    server = certificate("FedKeel coordinator", server_key, SERVER_DAYS, names, (authority, authority_key))
    ca = authority.public_bytes(Encoding.PEM)
    check_list = _check_list(hosts, port, sites, SERVER_DAYS, base is not None)
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))  # mode 0700
    try:
        _write(partial / "app", _app(recipe, text, manifest, sites))
        _write(partial / "ca", {"ca.key": pem(authority_key), "ca.pem": ca}, ["ca.key"])
        coordinator: dict[str, str | bytes] = {**_coordinator(hosts, port), "ca.pem": ca}
        coordinator |= {"tls.key": pem(server_key), "tls.pem": server.public_bytes(Encoding.PEM)}
        for number, name in enumerate(sites):
            private, public = ssh_pair(new_key(), name)
            coordinator[f"keys/{name}.pub"] = public
            files: dict[str, str | bytes] = {**_site(name, number, recipe, address)}
            files |= {"ca.pem": ca, "recipe.toml": text, "manifest.json": manifest, "node.key": private, "node.pub": public}
            files["worker.key"] = secrets.token_hex(32) + "\n"
            _write(partial / f"site-{name}", files, ["node.key", "worker.key", "site.toml"])
        _write(partial / "coordinator", coordinator, ["tls.key"])
        _write(partial / "image", {"Dockerfile": DOCKERFILE})
        _write(partial, {"CHECKLIST.md": check_list})
        partial.rename(folder.absolute())
    except OSError as error:
        raise DeployError(f"{folder} could not be written: {error.strerror or error}. Nothing of it is left") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial, ignore_errors=True)
    return check_list
