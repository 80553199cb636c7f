"""How a node's services stand in the registry."""

from __future__ import annotations

from collections.abc import Mapping

from registry.client import Registry
from registry.entries import Registration
from registry.keeper import Keeper

TTL_S = 10.0
"""Without a sign of life for so long a service counts as critical. Guess: three missed ones."""

DEREGISTER_AFTER_S = 600.0
"""A service that stays critical for so long is forgotten. Guess: longer than any restart."""


def keeper(
    registry: Registry,
    service_id: str,
    service: str,
    address: tuple[str, int],
    meta: Mapping[str, str],
) -> Keeper:
    """A registration that lasts while the keeper's ``run`` runs. ``address``: host and port."""
    host, port = address
    return Keeper(
        registry,
        Registration(
            service_id=service_id,
            service=service,
            address=host,
            port=port,
            meta=dict(meta),
            ttl_s=TTL_S,
            deregister_after_s=DEREGISTER_AFTER_S,
        ),
    )
