"""What the nearest peers say they have, asked again and again in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pop_node.peers.client import Dialing, PeerBusyError, PeerLacksError, PeerSource
from pop_node.peers.inventory import Inventory
from pop_node.peers.neighbours import Peer
from pop_node.store.origin import InterruptedReadError

ASKED = 32
"""The nearest so many are asked. Guess: in a mesh where none of them has a model, the origin is as
near as those who do."""

AT_ONCE = 8
"""Asked at the same time; a dead one holds up its place for ``STALL_S``."""

AGAIN_S = 2.0
"""How old an answer may be. Guess: those who began to fetch the same bundle are found this soon."""


class Survey:
    """Inventories by peer. ``refresh`` never blocks; ``close`` waits for answers under way."""

    def __init__(self, dialing: Dialing) -> None:
        self._dialing = dialing
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="survey")
        self._changed = threading.Condition()
        self._found: dict[str, Inventory] = {}
        self._asked_at: dict[str, float] = {}
        self._sources: dict[str, PeerSource] = {}  # being asked now
        self._closed = False

    def refresh(self, peers: Sequence[Peer]) -> None:
        """Ask those again whose answers are old; forget those that are not among ``peers``."""
        nearest = peers[:ASKED]
        now = time.monotonic()
        with self._changed:
            names = {peer.name for peer in nearest}
            for name in self._found.keys() - names:
                del self._found[name]
            for peer in nearest:
                fresh = now < self._asked_at.get(peer.name, float("-inf")) + AGAIN_S
                if fresh or peer.name in self._sources or self._closed:
                    continue
                self._asked_at[peer.name] = now
                self._sources[peer.name] = PeerSource(peer, "", self._dialing)
                self._pool.submit(self._ask, peer.name, self._sources[peer.name])

    def found(self) -> dict[str, Inventory]:
        """The last answers of those who answered."""
        with self._changed:
            return dict(self._found)

    def wait(self, timeout_s: float) -> None:
        """Until all have answered that were asked, or could not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._sources, timeout_s)

    def close(self) -> None:
        """Hang up."""
        with self._changed:
            self._closed = True
            for source in self._sources.values():
                source.abort()
        self._pool.shutdown(cancel_futures=True)

    def _ask(self, name: str, source: PeerSource) -> None:
        inventory = None
        try:
            inventory = source.inventory()
        except (InterruptedReadError, PeerBusyError, PeerLacksError):
            pass  # it will be asked again
        finally:
            source.close()
            with self._changed:
                del self._sources[name]
                if inventory is not None:
                    self._found[name] = inventory
                else:
                    self._found.pop(name, None)
                self._changed.notify_all()
