"""Who is asking: tenants by API key, operators by key or by being on this machine.

Pure over the topology's tenants. Keys are compared as SHA-256 digests, so a look-up tells nothing
about a key's characters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from topology.model import Tenant
from wire.address import is_loopback
from wire.errors import RequestError


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated caller; ``tenant`` is empty in a mesh without tenants."""

    tenant: str
    regions: frozenset[str]
    operator: bool


class Authenticator:
    """Maps ``Authorization`` headers to callers."""

    def __init__(self, tenants: Iterable[Tenant]) -> None:
        self._by_digest = {
            digest.lower(): tenant for tenant in tenants for digest in tenant.key_sha256
        }
        self._open = not self._by_digest

    def client(self, authorization: str | None, peer: str) -> Caller:
        """The caller of the model API; raises ``RequestError`` (``invalid_api_key``)."""
        local = is_loopback(peer)
        if self._open:
            return Caller("", frozenset(), operator=local)
        tenant = self._tenant(authorization)
        if tenant is None:
            raise RequestError(
                "send a valid API key as 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        return Caller(tenant.name, tenant.regions, operator=local or tenant.operator)

    def require_operator(self, authorization: str | None, peer: str) -> None:
        """Let operators and this machine pass; raises ``RequestError`` (``forbidden``)."""
        if is_loopback(peer):
            return
        tenant = self._tenant(authorization)
        if tenant is None or not tenant.operator:
            raise RequestError("this needs an operator's key", code="forbidden")

    def _tenant(self, authorization: str | None) -> Tenant | None:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            return None
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).hexdigest()
        return self._by_digest.get(digest)
