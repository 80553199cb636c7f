"""Server-sent events: bytes in, events out. Source: WHATWG HTML, section 9.2.6.

Only what a stream of answers uses: ``id`` and ``data`` fields; comments, other fields and a byte
order mark are skipped, lines may end with LF or CRLF.
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.errors import PeerError

MAX_EVENT_BYTES = 1024 * 1024
"""Largest event; a router's are a few hundred bytes."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One event; ``id`` is its own, "" if it has none."""

    id: str
    data: bytes


class SseParser:
    """Cuts a stream into events, whatever the cuts between chunks."""

    def __init__(self) -> None:
        self._buffer = b""
        self._id = ""
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """Events that are complete now; raises ``PeerError`` when one is too large."""
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        events: list[SseEvent] = []
        for line in lines:
            self._line(line.removesuffix(b"\r"), events)
        if self._size + len(self._buffer) > MAX_EVENT_BYTES:
            raise PeerError("an event of the answer is too large", code="protocol_error")
        return events

    def _line(self, line: bytes, events: list[SseEvent]) -> None:
        if not line:
            if self._data:
                events.append(SseEvent(self._id, b"\n".join(self._data)))
            self._id, self._data, self._size = "", [], 0
            return
        self._size += len(line)
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"id":
            self._id = value.decode(errors="replace")
