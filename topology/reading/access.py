"""The sections about who may ask: tenants and trusted networks."""

from __future__ import annotations

from topology.model import TRUSTED_BY_DEFAULT, Tenant
from topology.reading.fields import Fields
from topology.reading.listeners import check_network
from topology.reading.names import Names, check_hex

_TENANT = ("key_sha256", "regions", "operator")


def read_tenants(names: Names) -> dict[str, Tenant]:
    """All tenants; a key belongs to one of them."""
    tenants: dict[str, Tenant] = {}
    owners: dict[str, str] = {}
    for name, entry in names.tenants.items():
        fields = Fields(entry, _TENANT, names.problems)
        keys = fields.texts("key_sha256", required=True) or []
        for key, line in keys:
            owner = owners.setdefault(key, name)
            if check_hex("key_sha256", key, line, names.problems) and owner != name:
                message = f"tenants {owner!r} and {name!r} share a key"
                names.problems.add(line, message, "give each its own: the key says who asks")
        tenants[name] = Tenant(
            name=name,
            key_sha256=tuple(key for key, _ in keys),
            regions=names.regions_of(fields),
            operator=fields.flag("operator", False),
        )
    return tenants


def read_trusted_networks(top: Fields) -> tuple[str, ...]:
    """Networks whose geography headers count; loopback when absent, none for an empty list."""
    given = top.texts("trusted_networks", empty=True)
    if given is None:
        return TRUSTED_BY_DEFAULT
    for text, line in given:
        check_network(text, line, top.problems)
    return tuple(text for text, _ in given)
