"""Writes a topology as YAML that ``topology.load`` reads back equal."""

from __future__ import annotations

from typing import Any

import yaml

from topology.model import Link, Model, Node, Router, Site, Tenant, Topology


def dump_topology(topology: Topology) -> str:
    """YAML for ``topology``: ``parse_topology(dump_topology(t), t.source) == t``.

    Holds for topologies as ``topology.load`` makes them (checked, with absolute store paths). What
    is None or empty is left out; everything else is written, defaults included.
    """
    document = {
        "mesh": topology.mesh,
        "models": {name: _model(model) for name, model in topology.models.items()},
        "sites": {name: _site(site) for name, site in topology.sites.items()},
        "nodes": {name: _node(node) for name, node in topology.nodes.items()},
        "routers": {name: _router(router) for name, router in topology.routers.items()},
        "links": [_link(link) for link in topology.links.values()],
        "tenants": {name: _tenant(tenant) for name, tenant in topology.tenants.items()},
        "trusted_networks": list(topology.trusted_networks),
        "defaults": {
            "detour": topology.defaults.detour,
            "base_rtt_ms": topology.defaults.base_rtt_ms,
            "bandwidth_mbps": topology.defaults.bandwidth_mbps,
            "local_rtt_ms": topology.defaults.local_rtt_ms,
            "local_bandwidth_mbps": topology.defaults.local_bandwidth_mbps,
        },
        "detection_s": topology.detection_s,
        "placement": {
            "warm_per_min": topology.placement.warm_per_min,
            "cool_after_s": topology.placement.cool_after_s,
        },
    }
    return yaml.safe_dump(
        document, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )


def _model(model: Model) -> dict[str, Any]:
    return _given(
        source=model.source,
        digest=model.digest,
        dtype=model.dtype,
        context_tokens=model.context_tokens,
        regions=sorted(model.regions),
    )


def _site(site: Site) -> dict[str, Any]:
    return _given(lat=site.position.lat, lon=site.position.lon, region=site.region, city=site.city)


def _node(node: Node) -> dict[str, Any]:
    return _given(
        site=node.site,
        roles=sorted(node.roles),
        models=list(node.models),
        mesh=str(node.mesh),
        kv=str(node.kv),
        device=node.device,
        hardware=node.hardware,
        store=None if node.store is None else str(node.store),
        threads=node.threads,
        backend=node.backend,
        kv_tokens=node.kv_tokens,
        batch_invariant=node.batch_invariant,
        weights=node.weights,
        memory_gb=node.memory_gb,
        pinned=list(node.pinned),
        disk_gb=node.disk_gb,
        bundles=str(node.bundles),
        give_mbps=node.give_mbps,
    )


def _router(router: Router) -> dict[str, Any]:
    return {"site": router.site, "listen": str(router.listen)}


def _link(link: Link) -> dict[str, Any]:
    return _given(between=[link.a, link.b], rtt_ms=link.rtt_ms, bandwidth_mbps=link.bandwidth_mbps)


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return _given(
        key_sha256=list(tenant.key_sha256),
        regions=sorted(tenant.regions),
        operator=tenant.operator,
    )


def _given(**values: Any) -> dict[str, Any]:
    """``values`` without None, empty text and empty lists: the reader takes them as absent."""
    return {key: value for key, value in values.items() if value not in (None, "", [])}
