"""One client of a drill: asks, reads the events, and resumes where its router has died.

The only file here that reads answers. A request whose connection breaks before any event came, or
that a router refuses for now (503, as one does that has just started), is sent again; an answer
that breaks later is resumed with ``Last-Event-ID``. Both go to the other routers first. What any
other typed error says is final: a client cannot know better.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec

from popmesh.drill.faults import Stage
from popmesh.drill.observation import Loss, Observation
from popmesh.drill.workload import Ask
from popmesh.sse import SseParser
from wire.errors import PeerError

CONNECT_TIMEOUT_S = 5.0

RESUME_S = 30.0
"""Routers and nodes remember a lost answer so long."""

RETRY_FIRST_S, RETRY_MAX_S = 0.1, 1.0
"""Pauses between tries to resume: a router that is started again needs seconds."""

UNAVAILABLE = 503

Watch = Callable[[Observation, Stage], None]
"""Called when a stream reaches a stage: the request leaves, its first text came, more came."""


class Caller:
    """Asks at ``urls``, the first one preferred; an async context manager is its session's."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        urls: Sequence[str],
        model: str,
        deadline_s: float,
        now: Callable[[], float],
        watch: Watch,
    ) -> None:
        self._session = session
        self._urls = urls
        self._model = model
        self._deadline_s = deadline_s
        self._now = now
        self._watch = watch

    async def ask(self, ask: Ask, client: int) -> Observation:
        """The whole of one answer, or how it failed."""
        seen = Observation(ask, client, self._now())
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._until_it_ends(seen)
        except TimeoutError:
            seen.timed_out = True
        seen.ended_s = self._now()
        return seen

    async def _until_it_ends(self, seen: Observation) -> None:
        own = self._urls[seen.client % len(self._urls) :]
        doors = itertools.cycle([*own, *self._urls[: len(self._urls) - len(own)]])
        pause_s = RETRY_FIRST_S
        lost_at: float | None = None
        while True:
            seen.url = next(doors)
            before = len(seen.arrivals)
            problem = await self._once(seen)
            if problem is None:
                return
            if lost_at is None or len(seen.arrivals) > before:
                lost_at, pause_s = self._now(), RETRY_FIRST_S
            if self._now() - lost_at >= RESUME_S:
                seen.error = seen.error or ("lost", problem)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _once(self, seen: Observation) -> str | None:
        """One connection; returns why another one is needed, None when the answer is over."""
        headers = {"last-event-id": seen.last_id} if seen.last_id else {}
        body = seen.ask.body(self._model)
        if not seen.arrivals:
            self._watch(seen, "before-first-token")
        try:
            async with self._session.post(
                seen.url + seen.ask.path, json=body, headers=headers
            ) as response:
                if response.status != 200:
                    return self._refused(seen, response.status, await response.read())
                seen.error = seen.status = None
                told = response.headers
                seen.request_id = told.get("x-popmesh-request-id", seen.request_id)
                parts = (told.get("x-popmesh-prefill"), told.get("x-popmesh-decode"))
                seen.nodes = tuple(dict.fromkeys(part for part in parts if part))
                await self._read(seen, response.content)
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as exc:
            return self._lost(seen, exc)
        except (msgspec.DecodeError, PeerError) as exc:
            seen.error = ("protocol_error", str(exc))
        if seen.error is not None and seen.error[0] == "taken_over" and seen.losses:
            return self._lost(seen, ConnectionError(seen.error[1]))  # by our own late question
        if seen.complete or seen.error is not None:
            return None
        return self._lost(seen, ConnectionError("the stream ended without its end"))

    async def _read(self, seen: Observation, content: aiohttp.StreamReader) -> None:
        parser = SseParser()
        async for chunk in content.iter_any():
            before = len(seen.arrivals)
            for event in parser.feed(chunk):
                seen.take(event, self._now())
            if len(seen.arrivals) > before:
                crosses = not before and len(seen.nodes) > 1
                self._watch(seen, "kv-in-flight" if crosses else "mid-stream")

    def _lost(self, seen: Observation, exc: Exception) -> str:
        message = str(exc) or type(exc).__name__
        seen.losses.append(Loss(self._now(), seen.url, message))
        return message

    def _refused(self, seen: Observation, status: int, body: bytes) -> str | None:
        """Why another try is worth it; None where the refusal is final."""
        seen.error, seen.status = _said(status, body), status
        message = ": ".join(seen.error)
        if status == UNAVAILABLE:
            seen.losses.append(Loss(self._now(), seen.url, message, refused=True))
        return message if seen.losses else None


def session(api_key: str | None, connections: int) -> aiohttp.ClientSession:
    """A session for ``connections`` answers at once."""
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=2 * connections),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        headers=headers,
    )


def _said(status: int, body: bytes) -> tuple[str, str]:
    """(code, message) of a refusal's body."""
    try:
        said: dict[str, Any] = msgspec.json.decode(body)
        error = said["error"]
        return str(error.get("code")), str(error.get("message"))
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError):
        return f"http_{status}", body[:200].decode(errors="replace")
