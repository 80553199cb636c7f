"""Ids of server-sent events: ``<request id>:<output tokens whose text has been sent>``.

Pure. A client that lost its connection sends the last one it saw as ``Last-Event-ID``.
Source of the mechanism: WHATWG HTML, section 9.2.4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from router.api.types import ApiKind
from wire.errors import RequestError

HEADER = "Last-Event-ID"
RESUMED_HEADER = "x-popmesh-resumed"

ID_PREFIX: dict[ApiKind, str] = {"chat": "chatcmpl-", "completion": "cmpl-"}
"""How request ids begin, by endpoint. Source: OpenAI's own ids."""

ID_BYTES = 16
"""Random bytes of a request id: it cannot be guessed."""

_EVENT_ID = re.compile(rf"((?:chatcmpl|cmpl)-[0-9a-f]{{{2 * ID_BYTES}}}):([0-9]{{1,9}})")


@dataclass(frozen=True, slots=True)
class EventId:
    """The text of the answer's output tokens before index ``upto`` has been read."""

    request_id: str
    upto: int


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
    request_id, upto = found.groups()
    if not request_id.startswith(ID_PREFIX[kind]):
        raise RequestError(
            f"{request_id} is not an answer of this endpoint; send it to the path that it came "
            "from",
            code="invalid_value",
            param=HEADER,
        )
    return EventId(request_id, int(upto))
