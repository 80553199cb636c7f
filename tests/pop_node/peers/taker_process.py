"""A node that brings the model ``tiny`` and says when data arrives; to be killed. Run as

python -m tests.pop_node.peers.taker_process STORE GIVER_ADDRESS
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from pop_node.peers import swarm
from pop_node.peers.bring import Bringing
from tests.pop_node.peers.peer_mesh import Neighbour, entry_of, mesh_of
from topology.model import Model


async def main(root: str, giver: str) -> None:
    topology = mesh_of(["n1", "n2"], Model("tiny", dtype="float32"))
    registry = {"n1": entry_of("n1", topology, giver)}

    def say(bringing: Bringing) -> None:
        if bringing.sources:
            print(bringing.done_bytes, flush=True)

    async with Neighbour("n2", Path(root), topology, registry) as taker:
        await taker.bringer.bring("tiny", say)


if __name__ == "__main__":
    swarm.FIRST_RUN_BYTES = 3 * 4096
    asyncio.run(main(*sys.argv[1:]))
