"""The HTTP connection: aiohttp's handler with a time limit on request heads and our error bodies.

aiohttp bounds the size of a head but not the time it takes, so a client could hold a connection
open with half a request. A connection on which no complete head arrives in time is answered 408.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from router.api.errors import error_body, error_headers, status_of
from wire.errors import MeshError, RequestError


def error_response(error: MeshError) -> web.Response:
    """The HTTP answer for an error."""
    return web.Response(
        status=status_of(error),
        body=error_body(error),
        content_type="application/json",
        headers=error_headers(error),
    )


class GuardedHandler(RequestHandler):
    """One client connection. The application says when a request's head was complete."""

    __slots__ = ("_head_timeout_s", "_head_timer", "_serving")

    def __init__(self, manager: web.Server, head_timeout_s: float, **options: Any) -> None:
        super().__init__(manager, **options)
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._serving = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and not self._serving:
            self._arm()  # the first bytes of another request on a kept connection
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def request_begins(self) -> None:
        """A complete head was parsed and its handler runs."""
        self._serving += 1
        self._disarm()

    def request_ends(self) -> None:
        """Its handler is done."""
        self._serving -= 1

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers for what never reached a handler, or broke in one."""
        if status < 500:
            error: MeshError = RequestError(f"malformed HTTP request: {(message or '')[:200]}")
        else:
            self.log_exception("error handling a request", exc_info=exc)
            error = MeshError("the router failed on this request")
        response = error_response(error)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send an answer; what aiohttp refuses before any handler of ours runs gets our form."""
        if isinstance(resp, web.HTTPException):
            code = "expectation_failed" if resp.status == 417 else "invalid_request"
            resp = error_response(RequestError(f"{resp.reason}: {resp.text}", code=code))
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        """A body that cannot be read was answered already; everything else is our fault."""
        if not isinstance(kwargs.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **kwargs)

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._head_timer = loop.call_later(self._head_timeout_s, self._late)

    def _disarm(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _late(self) -> None:
        self._head_timer = None
        transport = self.transport
        if transport is None or self._serving:
            return
        body = error_body(
            RequestError(
                f"no complete request within {self._head_timeout_s:g} s", code="request_timeout"
            )
        )
        transport.write(
            b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.force_close()
