"""The files of each machine's part, from the templates beside this file.

A template is the file that it becomes, with @NAME@ where a value goes. The values are names and addresses that `init` has
checked, numbers, and what `toml_value` has quoted, so none of them needs quoting for a shell.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedkeel import __version__, tables
from fedkeel.deploy.requirements import PYTHON, constraints, needed_extras, pins
from fedkeel.engines.sitefile import MEMBERS
from fedkeel.recipe.schema import Recipe
from fedkeel.recipe.settings import toml_value

TEMPLATES = Path(__file__).with_name("templates")
PLACEHOLDER = re.compile(r"@([A-Z][A-Z0-9_]*)@")
PREFIX = "/opt/fedkeel"  # where the units expect a machine's part, and the virtual environment `venv`
RUNTIME_PORT = 9094  # of the first site's SuperNode, on its loopback address; the next sites count on, to share a machine


@dataclass(frozen=True)
class Plan:
    """What the parts say of a federation.

    recipe: as it travels; text: the same as recipe.toml. manifest: of `make_manifest`. hosts: names of the coordinator, the
    first is what sites dial.
    """

    recipe: Recipe
    text: str
    manifest: Mapping[str, Any]
    sites: tuple[str, ...]
    hosts: tuple[str, ...]
    port: int

    @property
    def address(self) -> str:
        """What sites dial."""
        return joined(self.hosts[0], self.port)

    @cached_property
    def installs(self) -> dict[str, str]:
        """requirements.txt and constraints.txt, the same in every part."""
        extras = needed_extras(self.recipe)
        named = {"EXTRAS": ",".join(extras), "VERSION": __version__, "PINS": "\n".join(pins(extras))}
        return {
            "requirements.txt": fill("requirements.txt", **named),
            "constraints.txt": fill("constraints.txt", PINS="\n".join(constraints(extras))),
        }


def joined(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def fill(template: str, **values: str) -> str:
    """The text of a file below templates/, with a value in place of each @NAME@.

    Raises ValueError if a placeholder has no value, or a value no placeholder: the template and who fills it have come apart.
    """
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    placeholders = set(PLACEHOLDER.findall(text))
    if odd := placeholders ^ set(values):
        told = ", ".join(f"@{name}@ {'is left' if name in placeholders else 'is unknown'}" for name in sorted(odd))
        raise ValueError(f"{template}: {told}")
    return PLACEHOLDER.sub(lambda found: values[found[1]], text)


def script(template: str, program: str = "", **values: str) -> str:
    """A shell script from its template. program: what it starts and so looks for; empty: it starts other scripts only."""
    if program:
        values["FIND"] = fill("script/find.sh", PROGRAM=program, PREFIX=PREFIX).rstrip("\n")
    return fill(template, HEAD=fill("script/head.sh").rstrip("\n"), **values)


def told(plan: Plan) -> dict[str, str]:
    """What app and sites are told of the federation, none of it secret."""
    return {"recipe.toml": plan.text, "manifest.json": json.dumps(plan.manifest, indent=1) + "\n"}


def app_files(plan: Plan) -> dict[str, str]:
    """The Flower app."""
    name = re.sub(r"[^a-z0-9]+", "-", plan.recipe.name.lower()).strip("-") or "run"
    return {
        "pyproject.toml": fill("app/pyproject.toml", NAME=name, VERSION=__version__, SITES=",".join(plan.sites)),
        **told(plan),
        "LICENSE": fill("app/LICENSE"),
    }


def coordinator_files(plan: Plan) -> dict[str, str]:
    """The coordinator's part, without keys and certificates. SuperLink's port is the one after the gate's."""
    port, inner = str(plan.port), str(plan.port + 1)
    listen = f"[::]:{port}" if ":" in plan.hosts[0] else port
    return {
        "start.sh": script("coordinator/start.sh", "flower-superlink", INNER=inner),
        "flwr.sh": script("coordinator/flwr.sh", "flwr", INNER=inner),
        "run.sh": script("coordinator/run.sh"),
        "register.sh": script("coordinator/register.sh", MEMBERS=MEMBERS),
        "gate.sh": script("coordinator/gate.sh", "nginx"),
        "gate.conf": fill("coordinator/gate.conf", LISTEN=listen, INNER=inner),
        "compose.yaml": fill("coordinator/compose.yaml", PREFIX=PREFIX, VERSION=__version__, PORT=port),
        "fedkeel-coordinator.service": fill("coordinator/fedkeel-coordinator.service", PREFIX=PREFIX),
        "fedkeel-gate.service": fill("coordinator/fedkeel-gate.service", PREFIX=PREFIX),
        **plan.installs,
    }


def site_files(plan: Plan, site: str) -> dict[str, str]:
    """A site's part, without keys and certificates."""
    runtime = str(RUNTIME_PORT + plan.sites.index(site))
    return {
        "site.toml": fill(
            "site/site.toml",
            SITE=site,
            RECIPE_SHA256=plan.manifest["recipe"],
            BASE=_base(plan.recipe),
            ROWS=_rows(plan.recipe, site),
        ),
        "start.sh": script("site/start.sh", "flower-supernode", SITE=site, ADDRESS=plan.address, RUNTIME=runtime),
        "compose.yaml": fill("site/compose.yaml", PREFIX=PREFIX, VERSION=__version__, SITE=site),
        f"fedkeel-site-{site}.service": fill("site/fedkeel-site.service", PREFIX=PREFIX, SITE=site),
        **told(plan),
        **plan.installs,
    }


def image_files(plan: Plan) -> dict[str, str]:
    """What the image of the Compose files is built from, without FedKeel's wheel."""
    return {"Dockerfile": fill("image/Dockerfile", VERSION=__version__, PYTHON=PYTHON), **plan.installs}


def check_list(plan: Plan, days: int) -> str:
    """What to do with the folder, in order. days: how long the server certificate is valid."""
    unhashed = (
        "   `manifest.json` holds no hash of the base: `init` was run without `--base`. Each site's check then prints its\n"
        "   own; compare them by telephone, or run `init` again with `--base PATH`.\n"
    )
    return fill(
        "CHECKLIST.md",
        ADDRESS=plan.address,
        SITES=", ".join(plan.sites),
        DAYS=str(days),
        PARTS="\n".join(f"   - `site-{name}/` to site {name}, and to nobody else" for name in plan.sites),
        PREFIX=PREFIX,
        PORT=str(plan.port),
        UNHASHED="" if plan.manifest["base_sha256"] else unhashed,
    )


def _base(recipe: Recipe) -> str:
    """The line of site.toml that says where the base is."""
    name = recipe.model.base
    if name in tables.BASES:
        how = "nothing to set" if tables.BASES[name].embedded else f"fetch it there:  fedkeel fetch {name}"
        return f'# base = "/srv/fedkeel/models/NAME"  # this recipe uses {name}: {how}'
    base = toml_value(f"/srv/fedkeel/models/{Path(name).name}")
    return f"base = {base}  # a folder in Hugging Face layout, the same at every site"


def _rows(recipe: Recipe, site: str) -> str:
    """The lines of site.toml that say where the rows are."""
    data, root = recipe.data, toml_value(f"/srv/fedkeel/{site}")
    if tables.SOURCES[data.source].everywhere:
        return f"# root = {root}  # a folder of Python files; without it, the library of this Python"
    if "dataset" in tables.SOURCES[data.source].needs:
        return (
            f"dataset = {toml_value(data.dataset)}  # an id in this machine's cache, or a folder\n"
            f"subset = {toml_value(data.subset)}"
        )
    files = toml_value(data.files or ("rows.jsonl",))
    lines = [f"root = {root}", f"files = {files}  # relative to root; docs/recipes.md has the forms"]
    if data.tasks_file:
        lines.append(f"tasks_file = {toml_value(data.tasks_file)}  # relative to root; the same content at every site")
    return "\n".join(lines)
