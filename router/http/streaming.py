"""Sends one streamed answer over one HTTP connection, from its headers to the end of its body."""

from __future__ import annotations

from collections.abc import Iterable

from aiohttp import HttpVersion11, web

from router.api.event_id import RESUMED_HEADER
from router.http.resume import Resumer, Sender
from router.request.resume_book import Served
from router.routing.policy import Plan
from wire.errors import MeshError


async def send_stream(
    request: web.Request,
    resumer: Resumer,
    sender: Sender,
    plan: Plan | None = None,
    replay: Iterable[bytes] | None = None,
) -> web.StreamResponse:
    """Start the sender's exchange and relay until it ends.

    A new answer comes with its ``plan``, a resumed one with ``replay``: the events that it begins
    with. Raises ``MeshError`` while no header is out.
    """
    transport, sink, exchange = request.transport, sender.sink, sender.exchange
    if transport is None:
        raise ConnectionResetError("the client left before its answer began")
    resumer.hold(sender)
    try:
        if plan is not None and exchange is not None:
            exchange.start(plan)
        elif exchange is not None:
            exchange.resume()
        begun = await sink.begun
        if isinstance(begun, MeshError):
            raise begun
        sender.answer.served = begun
        headers = route_headers(sender.answer.spec.request_id, begun)
        if replay is not None:
            headers[RESUMED_HEADER] = "true"
        response = web.StreamResponse(headers=headers)
        response.content_type = "text/event-stream"
        response.headers["Cache-Control"] = "no-cache"
        chunked = request.version >= HttpVersion11
        if not chunked:  # HTTP/1.0: there the body ends with the connection
            response.force_close()
        await response.prepare(request)
        for event in replay or ():
            await response.write(event)
        sink.attach(transport, chunked)
        await response.write_eof(await sink.ended)
        return response
    finally:
        if exchange is not None:
            exchange.client_gone()
        resumer.let_go(sender)


def route_headers(request_id: str, served: Served) -> dict[str, str]:
    """Which request this is and who served it."""
    return {
        "x-popmesh-request-id": request_id,
        "x-popmesh-prefill": served.prefill,
        "x-popmesh-decode": served.decode,
    }
