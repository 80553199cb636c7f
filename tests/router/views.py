"""What a router knows of a mesh, as the tests of routing and placement want it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from router.routing.costs import Work
from router.routing.policy import Plan, RouteRequest, choose
from router.routing.speeds import typical_speeds
from router.routing.view import NodeView, View
from tests.fakes.fake_node import idle_engine
from tests.router.router_mesh import MODEL, make_topology
from topology.geography import link_between
from topology.model import Position, Topology
from wire.messages import ModelOffer

BOTH = ("prefill", "decode")
FRA, IAD, SYD = Position(50.0, 8.6), Position(38.9, -77.4), Position(-33.9, 151.2)
FOUR = make_topology({"fra-1": BOTH, "lhr-1": BOTH, "iad-1": BOTH, "syd-1": BOTH})


def offer(**changes: Any) -> ModelOffer:
    """A model as a node offers it."""
    values = {
        "name": MODEL,
        "identity": "00ff",
        "context_tokens": 4096,
        "kv_bytes_per_token": 20_000,
        "block_tokens": 16,
        "total_blocks": 1024,
        "dtype": "float32",
        "kv_address": "127.0.0.1:1",
    }
    return ModelOffer(**(values | changes))


def node_view(topology: Topology, name: str) -> NodeView:
    """A node of ``topology`` in incarnation "1", up and idle, as a router in fra sees it."""
    node = topology.nodes[name]
    site = topology.sites[node.site]
    return NodeView(
        name=name,
        site=node.site,
        region=site.region,
        position=site.position,
        roles=node.roles,
        phase="up",
        draining=False,
        incarnation="1",
        version=2,
        kin="cpu",
        rtt_ms=link_between(topology, "fra", node.site).rtt_ms or 0.0,
        rtt_measured=True,
        load_at=0.0,
        offers={MODEL: offer()},
        engines={MODEL: idle_engine(MODEL)},
        links={},
        pending={},
    )


def view_of(topology: Topology, **changes: dict[str, Any]) -> View:
    """All nodes up and idle, but for ``changes`` by node name (``-`` written ``_``)."""
    nodes = {
        name: replace(node_view(topology, name), **changes.get(name.replace("-", "_"), {}))
        for name in topology.nodes
    }
    offered = {MODEL: tuple(name for name, node in nodes.items() if MODEL in node.offers)}
    return View(topology, "fra", nodes, offered, typical_speeds(nodes.values()))


def request(client: Position = FRA, tokens: int = 100, **changes: Any) -> RouteRequest:
    """A request of so many prompt tokens."""
    cached = changes.pop("cached", {})
    output = changes.pop("output", 128)
    return RouteRequest(Work(MODEL, tokens, output, cached), client, **changes)


def pick(view: View, asked: RouteRequest, seed: int = 0) -> Plan:
    """The plan that the policy makes."""
    return choose(asked, view, 0.0, random.Random(seed))


def pair(view: View, asked: RouteRequest) -> tuple[str, str]:
    """Names of the prefill and the decode node that the policy picks."""
    plan = pick(view, asked)
    return plan.route.prefill, plan.route.decode
