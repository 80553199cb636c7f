"""``popmesh status``: what a router sees."""

from __future__ import annotations

import json

import click

from popmesh.commands.common import mesh_options


@click.command()
@mesh_options
@click.option("--json", "as_json", is_flag=True, help="The router's own JSON, for scripts.")
def status(mesh: str, api_key: str | None, as_json: bool) -> None:
    """Show nodes, links and load, as a router sees them.

    \b
    Examples:
      popmesh status
      popmesh status --mesh http://router.example:8080 --json
    """
    from popmesh.client import MeshClient
    from popmesh.signals import run_until_signal

    async def work() -> None:
        async with MeshClient(mesh, api_key) as client:
            seen = await client.status()
        if as_json:
            click.echo(json.dumps(seen, indent=1))
            return
        from rich.console import Console

        from popmesh.render.status import status_view

        Console().print(status_view(seen))

    run_until_signal(work)
