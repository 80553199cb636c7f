"""All that one node process is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from topology.model import Node, Topology
from wire.address import Dialer
from wire.tls import Credentials, require_tls

SERVICE = "popmesh-node"
"""Under which nodes are registered."""


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """``drills`` lets routers ask the node to harm itself."""

    node: Node
    topology: Topology
    registry_url: str
    store: Path
    dialer: Dialer
    credentials: Credentials | None = None
    status_file: Path | None = None
    drills: bool = False


def check_listeners(node: Node, credentials: Credentials | None) -> None:
    """Off loopback all listeners need certificates; raises ``ConfigError``."""
    for address in (node.mesh, node.kv, node.bundles):
        require_tls(address.host, credentials)
