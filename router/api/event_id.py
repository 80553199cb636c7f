"""Ids of server-sent events: ``<request id>:<output tokens sent>~<bytes of text sent>.<CRC-32>``.

Pure. A client that lost its connection sends the last one it saw as ``Last-Event-ID``. When nobody
knows the answer any more it can be computed again: the request id decides the seed that the client
did not give, the rest of the id proves that the text is the one that the client has begun to read.
Bytes are counted for that because one event may hold several tokens, and others the next time.
Source of the mechanism: WHATWG HTML, section 9.2.4.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from dataclasses import dataclass

from router.api.types import ApiKind
from wire.errors import RequestError

HEADER = "Last-Event-ID"
RESUMED_HEADER = "x-popmesh-resumed"

ID_PREFIX: dict[ApiKind, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}
"""How request ids begin, by endpoint. Source: OpenAI's own ids."""

ID_BYTES = 16
"""Random bytes of a request id: it cannot be guessed."""

_EVENT_ID = re.compile(
    rf"((?:chatcmpl|cmpl)-[0-9a-f]{{{2 * ID_BYTES}}}):([0-9]{{1,9}})"
    r"(?:~([0-9]{1,10})\.([0-9a-f]{8}))?"
)


@dataclass(frozen=True, slots=True)
class TextProof:
    """Which text was sent so far: how many bytes, JSON-escaped, and their CRC-32.

    It guards against accidents, such as another body or another model; a client that forges it
    deceives itself.
    """

    num_bytes: int = 0
    crc: int = 0

    def after(self, escaped: bytes) -> TextProof:
        """With more text."""
        return TextProof(self.num_bytes + len(escaped), zlib.crc32(escaped, self.crc))

    def end_in(self, text: bytes | bytearray, begin: TextProof) -> int | None:
        """Where this ends in a text that begins after ``begin``; None: it is of another text."""
        end = self.num_bytes - begin.num_bytes
        if not 0 <= end <= len(text) or begin.after(bytes(text[:end])) != self:
            return None
        return end


@dataclass(frozen=True, slots=True)
class EventId:
    """The text of the answer's output tokens before index ``upto`` has been read.

    ``proof`` None: from a router of an earlier release, which sent none.
    """

    request_id: str
    upto: int
    proof: TextProof | None = None


def place_of(upto: int, proof: TextProof | None) -> bytes:
    """An event's id without the request's."""
    if proof is None:
        return b"%d" % upto
    return b"%d~%d.%08x" % (upto, proof.num_bytes, proof.crc)


def drawn_seed(request_id: str) -> int:
    """The seed, 64 bits, of a request whose client gave none; as random as the id."""
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest())


def parse_event_id(header: str, kind: ApiKind) -> EventId:
    """The header's value -> an id of an answer of this endpoint; raises ``RequestError``."""
    found = _EVENT_ID.fullmatch(header.strip())
    if found is None:
        raise RequestError(
            f"{HEADER} must be the id of the last event received, such as "
            f"{ID_PREFIX[kind]}{'0' * 4}...:12; got {header[:80]!r}. Leave it out to start anew",
            code="invalid_value",
            param=HEADER,
        )
    request_id, upto, num_bytes, crc = found.groups()
    if not request_id.startswith(ID_PREFIX[kind]):
        raise RequestError(
            f"{request_id} is not an answer of this endpoint; send it to the path that it came "
            "from",
            code="invalid_value",
            param=HEADER,
        )
    proof = None if crc is None else TextProof(int(num_bytes), int(crc, 16))
    return EventId(request_id, int(upto), proof)
