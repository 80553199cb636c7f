"""``popmesh router``: one router of the mesh."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from popmesh.commands.common import (
    FILE,
    load_credentials,
    load_dialer,
    log_to_stderr,
    process_options,
)

if TYPE_CHECKING:
    import ssl


@click.command()
@process_options
@click.option("--name", metavar="NAME", help="Router of the topology. Default: its only one.")
@click.option(
    "--listen", metavar="HOST:PORT", help="Where clients connect. Default: as the topology says."
)
@click.option(
    "--cache-key",
    "cache_key",
    type=FILE,
    metavar="FILE",
    help="The key of all the mesh's routers, by which they know what nodes have cached. Default: "
    "the one that 'popmesh tls issue' put beside the certificate, else one of this start alone.",
)
@click.option(
    "--https-certificate",
    type=FILE,
    metavar="FILE",
    help="Serve clients by HTTPS with this certificate and the chain above it, as PEM.",
)
@click.option("--https-key", type=FILE, metavar="FILE", help="The key of --https-certificate.")
@click.option("--mmdb", type=FILE, metavar="FILE", help="GeoIP database that places clients.")
def router(
    topology: Path,
    registry: str,
    tls: Path | None,
    link_map: Path | None,
    name: str | None,
    listen: str | None,
    cache_key: Path | None,
    https_certificate: Path | None,
    https_key: Path | None,
    mmdb: Path | None,
) -> None:
    """Run a router: the OpenAI-compatible door of the mesh.

    It finds the nodes through the registry and serves until SIGTERM or Ctrl-C, after which it ends
    what is running.

    \b
    Example:
      popmesh router --topology mesh.yaml --registry consul://127.0.0.1:8500 \\
        --listen 127.0.0.1:8080
      curl http://127.0.0.1:8080/v1/models
    """
    from popmesh.cache_key import load_cache_key
    from router.app import RouterConfig
    from router.main import run
    from topology.load import load_topology
    from wire.address import parse_address
    from wire.errors import ConfigError

    mesh = load_topology(topology)
    if name is None and len(mesh.routers) == 1:
        name = next(iter(mesh.routers))
    if name not in mesh.routers:
        known = ", ".join(mesh.routers) or "the topology has none: add one under routers"
        problem = "which router is this?" if name is None else f"no router is called {name!r}"
        raise ConfigError(problem, where=str(topology), suggestion=f"--name: {known}")
    cache_key = cache_key or _beside(tls)
    host, port = parse_address(listen or str(mesh.routers[name].listen))
    config = RouterConfig(
        name=name,
        topology=mesh,
        registry_url=registry,
        listen_host=host,
        listen_port=port,
        credentials=load_credentials(tls, mesh, name),
        dialer=load_dialer(link_map),
        mmdb=mmdb,
        cache_key=None if cache_key is None else load_cache_key(cache_key),
        https=_https(https_certificate, https_key),
    )
    log_to_stderr()
    run(config, lambda url: click.echo(f"router {name} serves {url}"))


def _https(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """What clients meet; None: no TLS. Raises ``ConfigError``."""
    from router.http.https import https_context
    from wire.errors import ConfigError

    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigError("--https-certificate and --https-key go together")
    return https_context(certificate, key)


def _beside(tls: Path | None) -> Path | None:
    """The cache key beside the certificate in ``tls``, if there is one."""
    from popmesh.cache_key import FILE as NAME

    return tls / NAME if tls is not None and (tls / NAME).exists() else None
