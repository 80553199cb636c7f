"""``popmesh tls``: the mesh's own certificate authority."""

from __future__ import annotations

from pathlib import Path

import click

from popmesh.commands.common import DIRECTORY, FILE


@click.group()
def tls() -> None:
    """Certificates for links between machines.

    Off loopback every link of a mesh is TLS 1.3 with certificates on both ends. They come from an
    authority of your own; its key (DIR/ca-key.pem) never has to leave this machine.

    \b
    Example:
      popmesh tls init certs
      popmesh tls issue certs fra-1 --topology mesh.yaml
      scp -r certs/fra-1 fra-1.example:certs   # then: popmesh node fra-1 --tls certs ...
    """


@tls.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
def init(directory: Path) -> None:
    """Make a certificate authority in DIR.

    \b
    Example: popmesh tls init certs
    """
    from popmesh.authority import init_authority

    certificate = init_authority(directory)
    click.echo(f"{certificate} is the mesh's authority for ten years.")
    click.echo(f"Whoever has {directory / 'ca-key.pem'} can join the mesh: keep it here.")


@tls.command()
@click.argument("directory", metavar="DIR", type=DIRECTORY)
@click.argument("name")
@click.option("--topology", required=True, type=FILE, metavar="FILE", help="The mesh, as YAML.")
def issue(directory: Path, name: str, topology: Path) -> None:
    """Make a certificate for the node or router NAME, in DIR/NAME.

    It says what the topology says: mesh, site, name and roles. Issue a new one when they change.

    \b
    Example: popmesh tls issue certs fra-1 --topology mesh.yaml
    """
    from popmesh.authority import CERT_LIFETIME, identity_of, issue
    from topology.load import load_topology

    identity = identity_of(load_topology(topology), name)
    folder = issue(directory, identity)
    click.echo(f"{folder} holds the certificate of {identity.uri()}")
    click.echo(f"It is valid for {CERT_LIFETIME.days} days. Copy the folder to its machine.")
