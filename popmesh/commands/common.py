"""Options and shells that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from topology.model import Position, Topology
    from wire.address import Dialer
    from wire.tls import Credentials, Identity

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_MESH = "http://127.0.0.1:8080"
FILE = click.Path(dir_okay=False, path_type=Path)
DIRECTORY = click.Path(file_okay=False, path_type=Path)


def user_data(variable: str, *parts: str) -> Path:
    """What the environment ``variable`` names, else ``parts`` under popmesh's data directory."""
    if named := os.environ.get(variable):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data, "popmesh", *parts)


def default_store() -> Path:
    """``$POPMESH_STORE``, else under the user's data directory."""
    return user_data("POPMESH_STORE", "store")


def mesh_option(
    help_text: str = "A router of the mesh.",
    metavar: str = "URL",
    default: str | None = DEFAULT_MESH,
) -> Callable[[F], F]:
    """``--mesh``: where the mesh is asked."""
    return click.option(
        "--mesh",
        envvar="POPMESH_MESH",
        show_envvar=True,
        default=default,
        show_default=True,
        metavar=metavar,
        help=help_text,
    )


def api_key_option(command: F) -> F:
    """``--api-key``: as which tenant."""
    return click.option(
        "--api-key",
        envvar="POPMESH_API_KEY",
        show_envvar=True,
        metavar="KEY",
        help="Key of a tenant, where the topology has tenants.",
    )(command)


def mesh_options(command: F) -> F:
    """``--mesh`` and ``--api-key`` of the commands that talk to a running mesh."""
    return mesh_option()(api_key_option(command))


def process_options(command: F) -> F:
    """Options of the long-running processes of a mesh."""
    for option in (
        click.option(
            "--link-map",
            type=FILE,
            metavar="FILE",
            help="JSON that replaces addresses to dial (written by 'popmesh up').",
        ),
        click.option(
            "--tls",
            type=DIRECTORY,
            metavar="DIR",
            help="Certificates of this process, from 'popmesh tls issue'. Needed off loopback.",
        ),
        click.option(
            "--registry",
            required=True,
            metavar="consul://HOST:PORT",
            help="Where nodes and routers find each other.",
        ),
        click.option(
            "--topology", required=True, type=FILE, metavar="FILE", help="The mesh, as YAML."
        ),
    ):
        command = option(command)
    return command


def store_option(command: F) -> F:
    """``--store`` with its default."""
    return click.option(
        "--store",
        type=DIRECTORY,
        default=default_store,
        show_default="$POPMESH_STORE or ~/.local/share/popmesh/store",
        metavar="DIR",
        help="Model store.",
    )(command)


def load_dialer(link_map: Path | None) -> Dialer:
    """A dialer with the map's replacements; raises ``ConfigError``."""
    from wire.address import Dialer

    if link_map is None:
        return Dialer()
    from popmesh.links.plan import read_link_map

    return Dialer(read_link_map(link_map))


def load_credentials(directory: Path | None, topology: Topology, name: str) -> Credentials | None:
    """Certificates of the node or router ``name``, where there is a directory of them.

    Raises ``ConfigError``, also where its peers would refuse them: they are somebody else's, of
    another site for a node, or do not allow all of its roles.
    """
    if directory is None:
        return None
    from popmesh.authority import identity_of
    from wire.errors import ConfigError
    from wire.tls import Credentials

    credentials, wanted = Credentials.load(directory), identity_of(topology, name)
    if not _stands_for(credentials.identity, wanted):
        raise ConfigError(
            f"this is the certificate of {credentials.identity.uri()}, not of {wanted.uri()}",
            where=str(directory),
            suggestion=f"popmesh tls issue DIR {name} --topology {topology.source}",
        )
    return credentials


def _stands_for(proven: Identity, wanted: Identity) -> bool:
    """Whether peers take one for the other: nobody asks for a router's site, and roles that were
    taken away leave a certificate good."""
    return (
        (proven.mesh, proven.kind, proven.name) == (wanted.mesh, wanted.kind, wanted.name)
        and (proven.site == wanted.site or wanted.kind == "router")
        and proven.roles >= wanted.roles
    )


def parse_position(text: str) -> Position:
    """``LAT,LON`` in degrees; raises ``ConfigError``."""
    from topology.model import Position
    from wire.errors import ConfigError

    try:
        lat, lon = (float(part) for part in text.split(","))
    except ValueError:
        lat = lon = float("nan")
    if not (-90 <= lat <= 90 and -180 <= lon <= 180):
        raise ConfigError(
            f"{text!r} is not a position", suggestion="write LAT,LON, such as 52.37,4.90"
        )
    return Position(lat, lon)


def parse_size(text: str) -> int:
    """``500GB``, ``1.5 TiB`` or plain bytes, as bytes; raises ``ConfigError``."""
    from popmesh.units import size_of
    from wire.errors import ConfigError

    nbytes = size_of(text)
    if nbytes is None:
        raise ConfigError(f"{text!r} is not a size", suggestion="write e.g. 500GB, 1.5TiB or 0")
    return int(nbytes)


def log_to_stderr() -> None:
    """Logging of a process that somebody else keeps the output of."""
    import logging

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
