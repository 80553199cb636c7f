"""``POST /popmesh/drill``: ask a node to harm itself, see ``pop_node.drills.drills``.

The router only passes the question on; whether to comply is the node's business.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from router.dispatch import Dispatch
from wire.errors import PeerError, RequestError
from wire.messages import DRILL_FAULTS, MAX_FREEZE_MS, Drill, DrillStarted


class DrillBody(msgspec.Struct, forbid_unknown_fields=True):
    """What an operator sends; ``model`` may be left out on nodes with one."""

    node: str
    fault: str
    model: str = ""
    duration_s: Annotated[float, msgspec.Meta(gt=0.0, le=MAX_FREEZE_MS / 1e3)] = 10.0


def parse_drill(data: bytes) -> DrillBody:
    """Raises ``RequestError``."""
    try:
        body = msgspec.json.decode(data, type=DrillBody)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestError(
            f'{exc}; send {{"node": NAME, "fault": FAULT, "model": NAME, "duration_s": SECONDS}}',
            code="invalid_value",
        ) from exc
    if body.fault not in DRILL_FAULTS:
        raise RequestError(
            f"no fault is called {body.fault[:64]!r}; one of {', '.join(DRILL_FAULTS)}",
            code="invalid_value",
            param="fault",
        )
    return body


async def start_drill(dispatch: Dispatch, data: bytes) -> None:
    """Returns once the node says that it begins.

    Raises ``RequestError`` (``not_found``, ``invalid_value``, ``drill_refused``) or ``PeerError``
    when the node cannot be asked.
    """
    body = parse_drill(data)
    name = body.node
    nodes = dispatch.builder.snapshot().nodes
    link = dispatch.pool.get(name)
    if link is None:
        raise RequestError(
            f"this router is linked to no node called {name[:64]!r}; "
            f"known: {', '.join(nodes) or 'none'}",
            code="not_found",
            param="node",
        )
    number = dispatch.next_stream()
    duration_ms = max(1, round(body.duration_s * 1e3))
    answer = await link.ask(number, Drill(number, body.fault, body.model, duration_ms))
    if not isinstance(answer, DrillStarted):
        raise PeerError(f"{name} answers a drill with {answer}", code="protocol_error")
    if answer.error:
        raise RequestError(f"{name}: {answer.error[:500]}", code="drill_refused")
