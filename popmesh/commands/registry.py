"""``popmesh registry``: the embedded registry as a process of its own."""

from __future__ import annotations

import click

from popmesh.commands.common import log_to_stderr


@click.command()
@click.option(
    "--listen",
    default="127.0.0.1:8500",
    show_default=True,
    metavar="127.0.0.1:PORT",
    help="Loopback only: across machines, use Consul.",
)
def registry(listen: str) -> None:
    """Run a registry for one machine, no Consul.

    It answers the part of Consul's HTTP API that popmesh uses. What it knows is lost when it ends;
    nodes register again by themselves.

    \b
    Example: popmesh registry --listen 127.0.0.1:8500
    """
    import asyncio
    import logging

    from popmesh.signals import run_until_signal
    from registry.embedded import EmbeddedRegistry
    from wire.address import is_loopback, parse_address
    from wire.errors import ConfigError

    host, port = parse_address(listen)
    if not is_loopback(host):
        raise ConfigError(
            f"the embedded registry does not listen on {host}",
            where="--listen",
            suggestion="it trusts everyone who reaches it; use Consul across machines",
        )
    log_to_stderr()

    async def work() -> None:
        server = EmbeddedRegistry(host, port)
        logging.getLogger("popmesh.registry").info("serving at %s", await server.start())
        try:
            await asyncio.get_running_loop().create_future()  # until cancelled
        finally:
            await server.stop()

    run_until_signal(work)
