"""Brings models into a node's store without holding up its event loop."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Literal

from pop_node.peers.bring import Bring, Bringing
from pop_node.peers.client import Dialing
from pop_node.peers.neighbours import Peer, peers_of
from pop_node.store.manifest import Manifest
from pop_node.store.store import Bundle, Store
from registry.entries import ServiceEntry
from topology.model import Node, Topology
from wire.errors import PeerError

AT_ONCE = 2
"""Models brought at the same time, the others queue: each takes the port's whole rate anyway."""

LOOK_S = 2.0
"""How often the registry is asked for nodes while a model is brought."""

TELL_S = 0.1
"""Progress is told so often at most, and when a phase begins."""

Via = Literal["any", "peer", "origin"]

Entries = Callable[[], Awaitable[Iterable[ServiceEntry]]]
"""Asks the registry for all nodes of the mesh; raises ``PeerError``."""


class Bringer:
    """One per node; used in its event loop."""

    def __init__(
        self,
        store: Store,
        node: Node,
        topology: Topology,
        entries: Entries,
        dialing: Dialing,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._node = node
        self._topology = topology
        self._ask_entries = entries
        self._entries: tuple[ServiceEntry, ...] = ()
        self._dialing = dialing
        self._rng = rng or random.Random()
        self._running: dict[str, Bring] = {}
        self._rates: dict[str, float] = {}
        self._executor = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="bring")

    def wanted(self) -> list[str]:
        """Models that are being brought: for the node's ``Giver`` to say."""
        return list(self._running)

    def from_origin(self) -> list[str]:
        """Models that this node brings from their origin now: as ``wanted``."""
        return [name for name, bring in self._running.items() if bring.from_origin]

    def arriving(self, name: str) -> Bundle | None:
        """What an engine can begin to load of a model that is being brought; looks at the disk."""
        wanted = self._topology.models[name].digest or name
        return self._store.open_partial(wanted) if name in self._running else None

    async def bring(
        self,
        name: str,
        on_progress: Callable[[Bringing], None] = lambda bringing: None,
        via: Via = "any",
    ) -> Manifest:
        """Have the topology's model ``name`` in the store; returns when it is there, verified.

        ``via``: from peers alone, from its origin alone, or as is best.
        ``on_progress`` is called in the event loop. Cancelling ends it within seconds; what has
        arrived stays. Raises ``ConfigError`` if it cannot be had; a later attempt may succeed.
        """
        loop = asyncio.get_running_loop()
        tell = _Teller(loop, on_progress)
        await self._look()
        model = self._topology.models[name]
        work = Bring(
            self._store,
            replace(model, source=None) if via == "peer" else model,
            self._node,
            self._topology,
            self._peers if via != "origin" else list,
            self._dialing,
            random.Random(self._rng.random()),
            tell,
        )
        assert name not in self._running, name
        self._running[name] = work
        future = self._executor.submit(work.run)
        running = asyncio.wrap_future(future)
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=LOOK_S)
                if not running.done():
                    await self._look()
            return running.result()
        finally:
            work.stop()
            if not future.cancel():  # it is past waiting for its turn
                await asyncio.wait({running})
                running.exception()  # nobody else will ask for it
            del self._running[name]
            self._rates.update(work.rates)

    def close(self) -> None:
        """No model is brought any more; call when every ``bring`` has ended."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> None:
        """Renew the view of the mesh; without a registry the last one goes on to count."""
        try:
            self._entries = tuple(await self._ask_entries())
        except PeerError:
            return

    def _peers(self) -> list[Peer]:
        return peers_of(self._entries, self._topology, self._node, self._rates)


class _Teller:
    """Progress from threads into the event loop, now and then."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, on_progress: Callable[[Bringing], None]
    ) -> None:
        self._loop = loop
        self._on_progress = on_progress
        self._phase = ""
        self._told_at = float("-inf")

    def __call__(self, bringing: Bringing) -> None:
        now = self._loop.time()
        if bringing.phase == self._phase and now < self._told_at + TELL_S:
            return
        self._phase, self._told_at = bringing.phase, now
        self._loop.call_soon_threadsafe(partial(self._on_progress, bringing))
