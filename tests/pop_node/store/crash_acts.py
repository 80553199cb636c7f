"""Processes that are killed in the middle of an act on a store. Run by the crash tests as

    python crash_acts.py add|pack|fetch|peer|arrive|gc|load STORE SOURCE

Each line on standard input is a number of seconds: a child begins the act, does it over and over,
is killed after that time, and a line says by which signal it died (0: it ended by itself). Forking
from a process that has imported everything, and has no threads, makes a kill cost milliseconds.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from kernels.ops import load_ops
from pop_node.models.registry import load
from pop_node.peers import swarm
from pop_node.peers.bringer import Bringer
from pop_node.peers.client import Dialing
from pop_node.store import fetch, layout
from pop_node.store.source import unwatched
from pop_node.store.store import Store
from registry.entries import ServiceEntry
from tests.pop_node.peers.peer_mesh import entry_of, mesh_of
from topology.model import Model
from wire.address import Dialer


def act(kind: str, store: Store, source: str) -> None:
    """Never returns."""
    while True:
        if kind == "load":
            load(store.get("kept").path, "float32", load_ops("reference", 1))
        elif kind == "pack":
            layout.CHUNK_BYTES = 4 * 4096  # the least of which packing saves a page
            store.add(source, "a", "bfloat16", unwatched)
            for codec in ("exponent", "raw"):
                store.pack("a", codec, progress=unwatched)
        elif kind == "gc":
            store.add(source, "a", "float32", unwatched)
            store.gc(0)
        elif kind == "fetch":
            store.add(source, "a", None, unwatched)
            store.gc(0)
        elif kind in ("peer", "arrive"):
            asyncio.run(bring(store, source, and_load=kind == "arrive"))
            store.gc(0)
        else:
            store.add(source, "a", "float32", unwatched)
            store.remove("a")


async def bring(store: Store, giver: str, *, and_load: bool = False) -> None:
    """The model ``a`` from the node that gives it at the address ``giver``; loaded meanwhile."""
    topology = mesh_of(["giver", "taker"], Model("a", dtype="float32"))

    async def entries() -> list[ServiceEntry]:
        return [entry_of("giver", topology, giver)]

    dialing = Dialing("taker", Dialer(), None, lambda name, peer: None)
    bringer = Bringer(store, topology.nodes["taker"], topology, entries, dialing, random.Random(0))
    async with asyncio.TaskGroup() as tasks:
        bringing = tasks.create_task(bringer.bring("a"))
        while and_load and not bringing.done():
            if (bundle := bringer.arriving("a")) is not None:
                ops = load_ops("reference", 1)
                loaded = await asyncio.to_thread(load, bundle.path, "float32", ops)
                assert loaded.hold is not None
                loaded.hold.close()
                break
            await asyncio.sleep(0.002)
    bringer.close()


def main(kind: str, root: str, source: str) -> None:
    layout.CHUNK_BYTES = 4096
    fetch.RUN_BYTES = swarm.RUN_BYTES = swarm.FIRST_RUN_BYTES = 4 * 4096
    store = Store(Path(root))
    for line in sys.stdin:
        begun, begin = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.write(begin, b".")
                act(kind, store, source)
            finally:  # it failed: the child must not go on as this server
                traceback.print_exc()
                os._exit(1)
        os.read(begun, 1)
        time.sleep(float(line))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(begun)
        os.close(begin)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
