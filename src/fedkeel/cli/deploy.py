"""`fedkeel deploy`: several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedkeel.cli.common import app, names_in
from fedkeel.types import FedKeelError

deployment = typer.Typer(no_args_is_help=True, help="Several machines: write what each needs, and check a site before round 1.")
app.add_typer(deployment, name="deploy")


@deployment.command("init")
def deploy_init(
    folder: Annotated[Path, typer.Argument(help="A new folder, one part a machine.", show_default=False)],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe.", show_default=False)] = None,
    *,
    recipe: Annotated[Path, typer.Option(help="What the federation runs.", show_default=False)],
    sites: Annotated[str, typer.Option(help="Their names, joined by commas.", show_default=False)],
    host: Annotated[
        str,
        typer.Option(help="DNS names or addresses of the coordinator, by commas; sites dial the first.", show_default=False),
    ],
    port: Annotated[int, typer.Option(help="Its port.")] = 9443,
    base: Annotated[
        Path | None, typer.Option(help="The base model's folder, for its hashes; without it, the recipe's own if it is here.")
    ] = None,
) -> None:
    """Write a deployment: the app, certificates of a private authority, a key a site, how to start; prints a check list."""
    from fedkeel.deploy.init import app_recipe, init

    travels, here, notes = app_recipe(recipe, overrides or [])
    typer.echo(init(folder, travels, names_in(sites), names_in(host), port, base or here))
    for note in notes:
        typer.echo(f"note: {note}")
    typer.echo(f"written: {folder}/ (this text: {folder}/CHECKLIST.md)")


@deployment.command("lock")
def deploy_lock(
    folder: Annotated[Path, typer.Argument(help="A folder that init wrote, or one part of it.", show_default=False)],
    wheels: Annotated[
        Path | None, typer.Option(help="Wheels for parts without a wheelhouse of their own; FOLDER/wheelhouse otherwise.")
    ] = None,
    index: Annotated[
        list[str] | None,
        typer.Option(help="URL of a package index to ask for what is not there, over the network; repeatable."),
    ] = None,
) -> None:
    """Hold what machines install to the SHA-256 of each wheel: requirements.lock and sbom.cdx.json (CycloneDX) in each part."""
    from fedkeel.deploy.lock import lock

    for line in lock(folder, wheels, index or []):
        typer.echo(line)


@deployment.command("check")
def deploy_check(
    site: Annotated[Path, typer.Argument(help="The site's site.toml, where init's files lie.", show_default=False)],
    coordinator: Annotated[str, typer.Option(help="host:port; without it, the manifest's.")] = "",
) -> None:
    """From a site, before round 1: network, certificate, clock, keys, disk, base, tokenizer, rows. Exit 1 if one fails."""
    from fedkeel.deploy.check import check

    failed = 0
    for finding in check(site, coordinator):
        failed += not finding.ok
        typer.echo(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:12}{finding.text}")
    if failed:
        raise FedKeelError(f"{failed} check{'s' * (failed != 1)} failed")
