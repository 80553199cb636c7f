"""``popmesh explain``: why a prompt would go where."""

from __future__ import annotations

import json

import click

from popmesh.commands.common import mesh_options, parse_position


@click.command()
@click.argument("prompt")
@mesh_options
@click.option("--model", metavar="NAME", help="Model. Default: the first one served.")
@click.option("--from", "origin", metavar="LAT,LON", help="Ask as a client at this position.")
@click.option("--json", "as_json", is_flag=True, help="The router's own JSON, for scripts.")
def explain(
    prompt: str,
    mesh: str,
    api_key: str | None,
    model: str | None,
    origin: str | None,
    as_json: bool,
) -> None:
    """Show where a prompt would go, and why.

    PROMPT would be answered there right now, at the cost shown: time that the client would wait.
    Nothing is computed, the router only plans.

    \b
    Example: popmesh explain "Summarise this text: ..." --from 51.5,-0.1
    """
    import msgspec

    from popmesh.client import MeshClient, Plan
    from popmesh.signals import run_until_signal
    from wire.errors import PeerError

    if origin is not None:
        parse_position(origin)

    async def work() -> None:
        async with MeshClient(mesh, api_key) as client:
            chosen = await client.pick_model(model)
            answer = await client.explain(prompt, chosen, origin)
        if as_json:
            click.echo(json.dumps(answer, indent=1))
            return
        from rich.console import Console

        from popmesh.render.routes import plan_view

        try:
            plan = msgspec.convert(answer, Plan)
        except msgspec.ValidationError as exc:
            raise PeerError(f"{mesh} answered something else: {exc}") from exc
        Console().print(plan_view(plan))

    run_until_signal(work)
