"""Who may speak to this node: routers of its mesh, and nodes that its topology knows.

Where there are certificates they decide; without, listeners are on loopback and a name is believed.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from topology.model import Topology
from wire.errors import PeerError
from wire.messages import Hello
from wire.tls import Credentials, peer_identity


@dataclass(frozen=True, slots=True)
class Authorization:
    """What both listeners of a node ask."""

    topology: Topology
    credentials: Credentials | None

    def check_router(self, hello: Hello, ssl_object: ssl.SSLObject | None) -> None:
        """A router of this mesh, proven by its certificate where there is one; else raises
        ``PeerError``."""
        mesh = self.topology.mesh
        if hello.kind != "router" or hello.mesh != mesh:
            raise _mismatch(
                f"{hello.kind} {hello.name!r} of mesh {hello.mesh!r} is not a router of {mesh!r}"
            )
        if self.credentials is not None:
            identity = peer_identity(ssl_object)
            if (identity.mesh, identity.kind, identity.name) != (mesh, "router", hello.name):
                raise _mismatch(
                    f"the certificate of {identity.name!r} does not name router {hello.name!r}"
                )

    def check_node(self, name: str, ssl_object: ssl.SSLObject | ssl.SSLSocket | None) -> None:
        """The far end of a KV stream, or of a fetch, is the node it says it is, and the topology
        knows it; else raises ``PeerError``."""
        known = self.topology.nodes.get(name)
        if known is None:
            raise _mismatch(f"node {name!r} is not in the topology")
        if self.credentials is not None:
            identity = peer_identity(ssl_object)
            expected = (self.topology.mesh, "node", name, known.site)
            if (identity.mesh, identity.kind, identity.name, identity.site) != expected:
                raise _mismatch(f"the certificate of {identity.name!r} does not name node {name!r}")


def _mismatch(message: str) -> PeerError:
    return PeerError(message, code="identity_mismatch", retryable=False)
