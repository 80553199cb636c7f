"""``popmesh topology``: look at a topology file."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import FILE


@click.group()
def topology() -> None:
    """Work with topology files: the whole mesh as YAML.

    \b
    Example: popmesh topology check mesh.yaml
    """


@topology.command()
@click.argument("file", type=FILE)
def check(file: Path) -> None:
    """Check FILE without starting anything, and show what it says.

    Every mistake is named with its line. What the file leaves open about links is estimated from
    the distance and shown with a ~.

    \b
    Example: popmesh topology check topology/examples/demo.yaml
    """
    from rich.console import Console

    from popmesh.render.topology import site_table
    from topology.load import load_topology

    mesh = load_topology(file)
    console = Console()
    console.print(site_table(mesh))
    console.print(
        f"{file}: mesh {mesh.mesh!r} is fine: {len(mesh.sites)} sites, {len(mesh.nodes)} nodes, "
        f"{len(mesh.routers)} routers, {len(mesh.models)} models",
        highlight=False,
        soft_wrap=True,
    )
