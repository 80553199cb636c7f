"""Before a drill: which routers, which model, and may this person do it?"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from popmesh.client import MeshClient
from popmesh.drill.local import LocalMesh
from wire.address import is_loopback
from wire.errors import ConfigError


def routers_of(mesh: str | None, local: LocalMesh | None, default: str) -> tuple[str, ...]:
    """The routers' base URLs: as given, else those of the local mesh, else the default one."""
    if mesh is None:
        return tuple(local.router_urls()) if local is not None else (default,)
    urls = [url.strip().rstrip("/").removesuffix("/v1") for url in mesh.split(",")]
    if not all(urls):
        raise ConfigError(f"{mesh!r} names no routers", where="--mesh", suggestion="URL,URL")
    return tuple(dict.fromkeys(urls))


def check_permission(urls: Sequence[str], operator_key: str | None) -> None:
    """A mesh that is not on this machine is drilled by its operators; raises ``ConfigError``."""
    far = [url for url in urls if not is_loopback(urlsplit(url).hostname or "")]
    if far and operator_key is None:
        raise ConfigError(
            f"{', '.join(far)} is not on this machine",
            suggestion="a drill needs the mesh's operator: pass --operator-key",
        )


async def find_model(url: str, api_key: str | None, name: str | None) -> str:
    """``name`` if it is served, else the first model; raises ``MeshError``."""
    async with MeshClient(url, api_key) as client:
        served = await client.models()
    if not served or (name is not None and name not in served):
        raise ConfigError(f"{url} serves {', '.join(served) or 'no model'}", where="--model")
    return name or served[0]
