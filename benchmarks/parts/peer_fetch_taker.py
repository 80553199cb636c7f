"""A node that lacks the given model: its supply of bundles, as an agent has it, and nothing else.

    python benchmarks/parts/peer_fetch_taker.py WORK REGISTRY_URL

Brings the model into an empty store below ``WORK`` and prints JSON. ``seconds``: from the first
question to peers until the last chunk is verified and written; ``named_seconds``: until the bundle
has its name; ``cpu_seconds`` of this process meanwhile.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))
from parts.peer_fetch_world import GIVEN, LINK_MAP, TAKER, TOPOLOGY
from pop_node.agent_config import AgentConfig
from pop_node.peers.bring import Bringing
from pop_node.residency.supply import Supply
from popmesh.links.plan import read_link_map
from registry.client import Registry
from topology.load import load_topology
from wire.address import Dialer


async def take_bundle(work: Path, registry_url: str) -> dict[str, float]:
    """See the module's text."""
    store = work / "taken"
    shutil.rmtree(store, ignore_errors=True)
    mesh = load_topology(work / TOPOLOGY)
    dialer = Dialer(read_link_map(work / LINK_MAP))
    config = AgentConfig(mesh.nodes[TAKER], mesh, registry_url, store, dialer)
    fetched_at, nbytes = 0.0, 0

    def watch(bringing: Bringing) -> None:
        nonlocal fetched_at, nbytes
        if bringing.phase == "fetch":
            nbytes = bringing.total_bytes
        elif bringing.phase == "verify" and not fetched_at:
            fetched_at = time.monotonic()

    async with Registry.connect(registry_url) as registry:
        supply = Supply(config, registry, lambda: False)
        cpu, begin = time.process_time(), time.monotonic()
        await supply.bring(GIVEN, watch)
        end, cpu = time.monotonic(), time.process_time() - cpu
        await supply.close()
    return {
        "bytes": nbytes,
        "seconds": fetched_at - begin,
        "named_seconds": end - begin,
        "cpu_seconds": cpu,
    }


if __name__ == "__main__":
    print(json.dumps(uvloop.run(take_bundle(Path(sys.argv[1]), sys.argv[2]))))
