"""What one client saw of one answer, filled in while it reads. Knows no socket and no clock."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import msgspec

from popmesh.drill.workload import Ask
from popmesh.sse import SseEvent


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str = ""
    code: str | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """A connection that broke before the answer's end, or (``refused``) a router that answered
    "not now"; ``at_s`` on the drill's clock."""

    at_s: float
    url: str
    message: str
    refused: bool = False


@dataclass(slots=True)
class Observation:
    """One answer. Times are seconds on the drill's clock.

    ``arrivals`` are the moments at which text came, ``ids`` the event ids in order. ``error`` is
    (code, message) of a typed error, ``status`` the HTTP status that refused the request.
    """

    ask: Ask
    client: int
    started_s: float
    request_id: str = ""
    nodes: tuple[str, ...] = ()
    url: str = ""
    arrivals: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    complete: bool = False
    error: tuple[str, str] | None = None
    status: int | None = None
    losses: list[Loss] = field(default_factory=list)
    timed_out: bool = False
    ended_s: float = 0.0
    attempts: int = 0

    @property
    def last_id(self) -> str:
        """What a client says in ``Last-Event-ID``; "" before the first event."""
        return self.ids[-1] if self.ids else ""

    @property
    def upto(self) -> int:
        """Output tokens whose text is here, as far as the ids say."""
        return upto_of(self.last_id) or 0

    def take(self, event: SseEvent, now: float) -> None:
        """One event of the stream; raises ``msgspec.DecodeError`` if it is none of ours."""
        if event.data == b"[DONE]":
            self.complete = True
            return
        said = msgspec.json.decode(event.data, type=_Event)
        if said.error is not None:
            self.error = (said.error.code or "unknown", said.error.message)
            return
        if event.id and event.id != self.last_id:
            self.ids.append(event.id)
        for choice in said.choices:
            text = choice.text or (choice.delta.content if choice.delta else None)
            if text:
                self.text += text
                self.arrivals.append(now)
            self.finish_reason = choice.finish_reason or self.finish_reason
        if said.usage is not None:
            self.completion_tokens = said.usage.completion_tokens

    def gaps(self) -> list[tuple[float, float]]:
        """(start, length) of every wait: for the first text, then between texts."""
        times = [self.started_s, *self.arrivals]
        return [(a, b - a) for a, b in itertools.pairwise(times)]


def upto_of(event_id: str) -> int | None:
    """The token count in an event id (``REQUEST:UPTO~PROOF``); None if it has another form."""
    _, colon, place = event_id.rpartition(":")
    count, _, _ = place.partition("~")
    return int(count) if colon and count.isdecimal() else None
