"""A router's end of the mesh wire, simulated; stands in for ``router.links.node_link``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from router.links.node_connection import RTT_WEIGHT
from router.links.node_link import (
    BACKOFF_MAX_S,
    BACKOFF_MIN_S,
    CONNECT_TIMEOUT_S,
    PATIENCE_RTTS,
    PING_INTERVAL_S,
    PINGS_PER_DETECTION,
)
from router.links.questions import ANSWER_TIMEOUT_S
from tests.sim.clock import Process, cancel
from tests.sim.links import Dial, End, Network
from wire.messages import (
    MAX_VERSION,
    Accepted,
    Attached,
    CacheDelta,
    Cancel,
    Draining,
    Goodbye,
    Hello,
    Load,
    Loading,
    Offers,
    Ping,
    Pong,
    Refused,
    Retarget,
    Step,
    Warm,
)


class StreamListener(Protocol):
    """Who hears about a stream, as ``node_link.StreamListener``."""

    def tokens(self, node: str, entry: Any) -> None: ...

    def said(self, node: str, message: Any) -> None: ...

    def link_lost(self, node: str) -> None: ...


class LinkOwner(Protocol):
    """The router that a link belongs to."""

    process: Process
    network: Network
    detection_s: float

    def hello(self) -> Hello: ...

    def link_up(self, name: str, hello: Hello) -> None: ...

    def link_down(self, name: str) -> None: ...

    def link_rtt(self, name: str, rtt_ms: float) -> None: ...

    def link_said(self, name: str, message: Any) -> None:
        """``Load``, ``CacheDelta``, ``Draining``, ``Offers``."""


class SimNodeLink:
    """One node's link over all its reconnections."""

    __slots__ = (
        "_backoff_s",
        "_dial",
        "_due",
        "_end",
        "_heard_at",
        "_nonce",
        "_owner",
        "_pausing",
        "_pings",
        "_process",
        "_questions",
        "_timer",
        "address",
        "hello",
        "name",
        "rtt_ms",
        "stopped",
        "streams",
        "unknown_stream_messages",
    )

    def __init__(self, owner: LinkOwner, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.streams: dict[int, StreamListener] = {}
        self.unknown_stream_messages = 0
        self.hello: Hello | None = None
        self.rtt_ms: float | None = None
        self.stopped = False
        self._owner = owner
        self._process = owner.process
        self._backoff_s = BACKOFF_MIN_S
        self._dial: Dial | None = None
        self._end: End | None = None
        self._heard_at = 0.0
        self._nonce = 0
        self._pausing = False
        self._questions: dict[int, Callable[[str, Any], None]] = {}
        self._due = 0.0
        self._pings: dict[int, float] = {}
        self._timer: Any = None
        self._connect()

    @property
    def up(self) -> bool:
        return self.hello is not None

    @property
    def version(self) -> int:
        return 0 if self.hello is None else min(MAX_VERSION, self.hello.max_version)

    @property
    def incarnation(self) -> str:
        return "" if self.hello is None else self.hello.incarnation

    def open(self, stream: int, listener: StreamListener) -> None:
        self.streams[stream] = listener

    def close_stream(self, stream: int) -> None:
        self.streams.pop(stream, None)

    def send(self, message: Any, nbytes: int = 100) -> bool:
        if self.hello is None or self._end is None:
            return False
        self._end.send(message, nbytes)
        return True

    def retarget(self, message: Retarget) -> bool:
        return self.send(message)

    def warm(self, message: Warm) -> bool:
        return self.version >= 3 and self.send(message)

    def ask(self, number: int, question: Any, done: Callable[[str, Any], None]) -> None:
        """A question with one answer; None when none comes in time."""
        self._questions[number] = done
        self._process.call_later(ANSWER_TIMEOUT_S, self._answered, number, None)
        self.send(question)

    def _answered(self, number: int, answer: Any) -> bool:
        done = self._questions.pop(number, None)
        if done is not None:
            done(self.name, answer)
        return done is not None

    def reborn(self) -> None:
        """The directory shows a new incarnation: connect to it at once."""
        if self.hello is not None:
            self._down()
        if self._pausing:
            cancel(self._timer)
            self._connect()

    def stop(self) -> None:
        """The directory forgot this node."""
        self.stopped = True
        cancel(self._timer)
        if self._dial is not None:
            self._dial.cancelled = True
        self._drop()

    # ---- life ----------------------------------------------------------------------------------

    def _connect(self) -> None:
        self._pausing = False
        self._timer = self._process.call_later(CONNECT_TIMEOUT_S, self._down)
        self._dial = self._owner.network.connect(self._process, self.address, self._connected)

    def _connected(self, end: End | None) -> None:
        if end is None:
            self._down()
            return
        self._end = end
        end.handler = self
        end.send(self._owner.hello(), 300)

    def _drop(self) -> None:
        end, self._end = self._end, None
        if end is not None:
            end.handler = None
            end.close()
        if self.hello is not None:
            self.hello = self.rtt_ms = None
            self._pings.clear()
            self._owner.link_down(self.name)
            for number in list(self._questions):
                self._answered(number, None)
            streams, self.streams = self.streams, {}
            for listener in streams.values():
                listener.link_lost(self.name)

    def _down(self) -> None:
        """Whatever there was is over; try again after a pause."""
        cancel(self._timer)
        if self._dial is not None:
            self._dial.cancelled = True
        if self.hello is not None:
            self._backoff_s = BACKOFF_MIN_S
        self._drop()
        if self.stopped:
            return
        pause_s = self._backoff_s * self._process.sim.rng.uniform(0.5, 1.0)
        self._backoff_s = min(BACKOFF_MAX_S, 2 * self._backoff_s)
        self._pausing = True
        self._timer = self._process.call_later(pause_s, self._connect)

    def on_lost(self) -> None:
        self._down()

    def _patience_s(self) -> float:
        rtt_s = (self.rtt_ms or 0.0) / 1e3
        return max(self._owner.detection_s, PATIENCE_RTTS * rtt_s)

    def _watch(self) -> None:
        now, interval_s = self._process.time(), self._interval_s()
        overslept_s = now - self._due
        if overslept_s > interval_s:  # this process stood still
            self._heard_at += overslept_s
        elif now - self._heard_at >= self._patience_s():
            self._down()
            return
        self._ping()

    def _interval_s(self) -> float:
        return min(PING_INTERVAL_S, self._owner.detection_s / PINGS_PER_DETECTION)

    def _ping(self) -> None:
        now = self._process.time()
        self._nonce += 1
        self._pings[self._nonce] = now
        assert self._end is not None
        self._end.send(Ping(self._nonce), 40)
        left_s = self._heard_at + self._patience_s() - now
        self._due = now + max(0.0, min(self._interval_s(), left_s))
        self._timer = self._process.call_at(self._due, self._watch)

    # ---- messages ------------------------------------------------------------------------------

    def on_message(self, message: Any) -> None:
        self._heard_at = now = self._process.time()
        match message:
            case Step(entries):
                streams, name = self.streams, self.name
                for entry in entries:
                    listener = streams.get(entry.stream)
                    if listener is not None:
                        listener.tokens(name, entry)
                    else:
                        self.unknown_stream_messages += 1
            case Pong(nonce):
                sent_at = self._pings.pop(nonce, None)
                if sent_at is not None:
                    rtt_ms, held = (now - sent_at) * 1e3, self.rtt_ms
                    self.rtt_ms = rtt_ms if held is None else held + RTT_WEIGHT * (rtt_ms - held)
                    self._owner.link_rtt(self.name, self.rtt_ms)
            case Hello():
                cancel(self._timer)
                self.hello = message
                self._owner.link_up(self.name, message)
                self._ping()
            case Goodbye():
                self._down()
            case Load() | CacheDelta() | Draining() | Offers():
                self._owner.link_said(self.name, message)
            case Attached(stream):
                self._answered(stream, message)
            case _:
                listener = self.streams.get(message.stream)
                if listener is not None:
                    listener.said(self.name, message)
                    return
                if isinstance(message, Refused) and self._answered(message.stream, message):
                    return
                self.unknown_stream_messages += 1
                if isinstance(message, (Accepted, Loading)):
                    self.send(Cancel(message.stream), 40)
