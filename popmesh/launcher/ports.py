"""Free loopback ports for a mesh on this machine."""

from __future__ import annotations

import random
import socket

from wire.errors import ConfigError

FIRST, LAST = 20_000, 32_000
"""Below Linux's default ephemeral range (32768..60999), where an outgoing connection could take a
port between the moment it was found free and the moment its process listens."""


class FreePorts:
    """Hands out ports of 127.0.0.1 that nobody listens on, each at most once.

    ``rng`` chooses where the search begins, so that two launchers seldom meet.
    """

    def __init__(self, rng: random.Random) -> None:
        self._next = rng.randrange(FIRST, LAST - 1000)
        self._taken: set[int] = set()

    def reserve(self, port: int) -> None:
        """Never hand out ``port``: somebody asked for it by number."""
        self._taken.add(port)

    def take(self, count: int = 1) -> int:
        """The first of ``count`` consecutive free ports; ``ConfigError`` if there are none."""
        tried = 0
        while tried < LAST - FIRST:
            first = self._next
            if first + count > LAST:
                self._next, tried = FIRST, tried + 1
                continue
            wanted = range(first, first + count)
            busy = next((p for p in wanted if p in self._taken or not is_free(p)), None)
            self._next = first + count if busy is None else busy + 1
            tried += self._next - first
            if busy is None:
                self._taken.update(range(first, first + count))
                return first
        raise ConfigError(f"no {count} free ports between {FIRST} and {LAST} on 127.0.0.1")


def is_free(port: int) -> bool:
    """Nobody listens on this port of 127.0.0.1 right now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
