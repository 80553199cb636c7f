"""A node's end of the mesh wire, simulated; stands in for ``pop_node.router_link``."""

from __future__ import annotations

from typing import Any, Protocol

from pop_node.router_link import HELLO_TIMEOUT_S, SILENCE_S, WATCH_PERIOD_S
from tests.sim.clock import Process, cancel
from tests.sim.links import End
from wire.messages import Goodbye, Hello, NodeMessage, Ping, Pong, Step, StepEntry


class LinkAgent(Protocol):
    """What the link needs of its agent."""

    def hello(self) -> Hello: ...

    def router_joined(self, link: SimRouterLink) -> None: ...

    def router_left(self, link: SimRouterLink) -> None: ...

    def from_router(self, link: SimRouterLink, message: Any) -> None: ...


class SimRouterLink:
    """One accepted connection of a router."""

    __slots__ = (
        "_agent",
        "_end",
        "_entries",
        "_greeted",
        "_heard_at",
        "_process",
        "_timer",
        "router",
        "version",
    )

    def __init__(self, agent: LinkAgent, process: Process, end: End) -> None:
        self.router = ""
        self.version = 0
        self._agent = agent
        self._process = process
        self._end = end
        self._greeted = False
        self._entries: list[StepEntry] = []
        self._heard_at = process.time()
        self._timer = process.call_later(HELLO_TIMEOUT_S, self._watch)
        end.handler = self

    def emit(self, entry: StepEntry) -> None:
        """Add an entry to the next ``Step``."""
        self._entries.append(entry)

    def flush(self) -> None:
        if self._entries:
            entries, self._entries = self._entries, []
            self._end.send(Step(entries), 40 + 40 * len(entries))

    def say(self, message: NodeMessage) -> None:
        self.flush()
        self._end.send(message)

    def close(self) -> None:
        """End it from here: nobody is told more."""
        self._end.close()
        self.on_lost()

    def on_message(self, message: Any) -> None:
        self._heard_at = self._process.time()
        match message:
            case Ping(nonce):
                self._end.send(Pong(nonce), 40)
            case Hello():
                self._greeted = True
                self.router = message.name
                ours = self._agent.hello()
                self.version = min(ours.max_version, message.max_version)
                self._end.send(ours, 300)
                self._agent.router_joined(self)
            case Goodbye():
                self.close()
            case Pong():
                pass
            case _:
                assert self._greeted, f"{message} before Hello"
                self._agent.from_router(self, message)

    def on_lost(self) -> None:
        cancel(self._timer)
        if self._greeted:
            self._greeted = False
            self._agent.router_left(self)

    def _watch(self) -> None:
        if not self._greeted or self._process.time() - self._heard_at >= SILENCE_S:
            self.close()
        else:
            self._timer = self._process.call_later(WATCH_PERIOD_S, self._watch)
