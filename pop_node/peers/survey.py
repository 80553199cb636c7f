"""What the nearest peers say they have, asked again and again in the background."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

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

ATTEMPTS = 2
"""Failures in a row after which a peer does not count as one that may answer."""


class Survey:
    """Inventories by peer. ``refresh`` never blocks; ``close`` waits for answers under way."""

    def __init__(self, dialing: Dialing) -> None:
        self._dialing = dialing
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="survey")
        self._changed = threading.Condition()
        self._found: dict[str, Inventory] = {}
        self._asked_at: dict[str, float] = {}
        self._sources: dict[str, PeerSource] = {}  # being asked now
        self._failures: dict[str, int] = {}  # in a row, of those who were asked and did not answer
        self._asking: dict[str, Future[None]] = {}
        self._closed = False

    def refresh(self, peers: Sequence[Peer], since: float = -math.inf) -> None:
        """Ask those again whose answers are old, or older than ``since``, a moment of the monotonic
        clock; forget those that are not among ``peers``."""
        nearest = peers[:ASKED]
        now = time.monotonic()
        with self._changed:
            names = {peer.name for peer in nearest}
            for known in (self._found, self._asked_at):
                for name in known.keys() - names:
                    del known[name]
            for peer in nearest:
                asked_at = self._asked_at.get(peer.name, -math.inf)
                fresh = now < asked_at + AGAIN_S and asked_at >= since
                if fresh or peer.name in self._sources or self._closed:
                    continue
                self._asked_at[peer.name] = now
                self._sources[peer.name] = PeerSource(peer, "", self._dialing)
                if peer.name in self._asking:
                    self._asking[peer.name].result()  # a fault of ours is not to go unheard
                asking = self._pool.submit(self._ask, peer.name, self._sources[peer.name])
                self._asking[peer.name] = asking

    def found(self) -> dict[str, Inventory]:
        """The last answers of those who answered."""
        with self._changed:
            return dict(self._found)

    def is_undecided(self) -> bool:
        """Whether one of those asked has not answered yet, but may: busy nodes are slow."""
        with self._changed:
            asked = self._asked_at.keys() - self._found.keys()
            return any(self._failures.get(name, 0) < ATTEMPTS for name in asked)

    def wait(self, timeout_s: float) -> None:
        """Until all have answered that were asked, or could not."""
        with self._changed:
            self._changed.wait_for(lambda: not self._sources, timeout_s)

    def has_heard(self, peers: Sequence[Peer], since: float) -> bool:
        """Whether those of them that are asked have answered a question of ``since`` or later, or
        are not expected to answer."""
        with self._changed:
            return not any(
                self._failures.get(peer.name, 0) < ATTEMPTS
                and (peer.name in self._sources or self._asked_at[peer.name] < since)
                for peer in peers
                if peer.name in self._asked_at
            )

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
                    self._failures[name] = 0
                else:
                    self._found.pop(name, None)
                    self._failures[name] = self._failures.get(name, 0) + 1
                self._changed.notify_all()
