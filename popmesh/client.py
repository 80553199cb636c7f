"""A client of a running mesh, for the command line: answers, their routes, the router's state.

The only file here that speaks HTTP; every failure becomes a ``MeshError``. Shapes are those of the
router's own JSON; unknown fields are ignored, so a newer router can be read.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from popmesh.sse import SseParser
from wire.errors import ConfigError, MeshError, PeerError, RequestError, error_from_code
from wire.messages import COLD_START

CONNECT_TIMEOUT_S = 5.0
IDLE_TIMEOUT_S = 120.0
"""Longest silence inside an answer. Guess: a long prompt on a slow core."""

RECORD_TRIES, RECORD_PAUSE_S = 20, 0.1
"""A prefill node reports its transfer a round trip or two after the last token at the earliest."""

T = TypeVar("T")


class Reason(msgspec.Struct, frozen=True):
    """One term of a route's cost."""

    term: str
    seconds: float
    detail: str = ""


class Route(msgspec.Struct, frozen=True):
    """A pair of nodes with its price."""

    prefill: str
    decode: str
    prefill_site: str
    decode_site: str
    cost_s: float
    reasons: list[Reason]


class Rejected(msgspec.Struct, frozen=True):
    """A node that could not take part."""

    node: str
    reason: str


class ClientPlace(msgspec.Struct, frozen=True):
    """Where the router takes the client to be, in degrees, and how it knows."""

    lat: float
    lon: float
    source: str


class Plan(msgspec.Struct, frozen=True):
    """Answer of ``explain``: the chosen route, the next best, and who was out."""

    client: ClientPlace
    prompt_tokens_estimate: int
    route: Route
    fallbacks: list[Route]
    rejected: list[Rejected]


class Transfer(msgspec.Struct, frozen=True):
    """How the KV cache got from the prefill node to the decode node."""

    kv_bytes: int
    wire_bytes: int
    hidden_bytes: int
    compute_ms: float
    transfer_ms: float
    tail_ms: float
    rtt_ms: float


class LoadWaited(msgspec.Struct, frozen=True):
    """A leg waited until its model was in memory; ``waited_ms`` None: it did not come to that."""

    eta_ms: int
    waited_ms: float | None


class Attempt(msgspec.Struct, frozen=True):
    """One try of a request; ``loads`` has the nodes that had to load the model first."""

    number: int
    route: Route
    outcome: str
    loads: dict[str, LoadWaited] = {}


class Record(msgspec.Struct, frozen=True):
    """What happened to a request; times in ms since it was read, None: did not happen."""

    request_id: str
    model: str
    outcome: str
    attempts: list[Attempt]
    ttft_ms: float | None = None
    total_ms: float | None = None
    node_queue_ms: float | None = None
    node_prefill_ms: float | None = None
    transfer: Transfer | None = None


@dataclass(slots=True)
class Answer:
    """A streamed answer; filled in while ``MeshClient.chat`` is iterated.

    ``finish_reason`` None means that the stream ended without saying so.
    """

    request_id: str = ""
    prefill: str = ""
    decode: str = ""
    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


class MeshClient:
    """An async context manager around one HTTP session."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")  # as OpenAI clients are told
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=IDLE_TIMEOUT_S
        )
        self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def status(self) -> dict[str, Any]:
        """The router's view of the mesh, as its JSON."""
        return await self._json("GET", "/popmesh/status", dict[str, Any])

    async def record(self, request_id: str) -> Record:
        """What happened to a request."""
        return await self._json("GET", f"/popmesh/requests/{request_id}", Record)

    async def finished_record(self, request_id: str) -> Record:
        """The record of a request whose stream has ended, once the router has closed it too."""
        for _ in range(RECORD_TRIES):
            record = await self.record(request_id)
            if record.outcome != "running":
                break
            await asyncio.sleep(RECORD_PAUSE_S)
        return record

    async def models(self) -> list[str]:
        """Names of the models that are served."""
        listing = await self._json("GET", "/v1/models", dict[str, Any])
        return [str(model["id"]) for model in listing.get("data", [])]

    async def pick_model(self, name: str | None) -> str:
        """``name``, or the first model served; raises ``ConfigError`` when there is none."""
        if name is not None:
            return name
        for served in await self.models():
            return served
        raise ConfigError(f"{self.url} serves no model", suggestion="look at 'popmesh status'")

    async def explain(self, prompt: str, model: str, client_geo: str | None) -> dict[str, Any]:
        """Where a prompt would be answered now, and why, as a ``Plan``'s JSON; nothing is run."""
        body = _chat_body(model, [{"role": "user", "content": prompt}], {})
        headers = {"x-popmesh-client-geo": client_geo} if client_geo else {}
        path = "/popmesh/explain"
        return await self._json("POST", path, dict[str, Any], json=body, headers=headers)

    async def complete_pinned(self, model: str, prefill: str, decode: str) -> None:
        """Produce two tokens on a pair of nodes; raises when they do not come."""
        extra: dict[str, object] = {"max_tokens": 2, "ignore_eos": True, "temperature": 0}
        body = _chat_body(model, [{"role": "user", "content": "Hello"}], extra)
        headers = {"x-popmesh-route": f"prefill={prefill},decode={decode}"}
        path = "/v1/chat/completions"
        answer = await self._json("POST", path, dict[str, Any], json=body, headers=headers)
        if answer.get("usage", {}).get("completion_tokens") != 2:
            raise PeerError(f"{prefill} and {decode} did not produce two tokens")

    async def drill(self, node: str, fault: str, model: str, duration_s: float) -> None:
        """Do harm to a node that was started for drills; raises when the router or it refuses.

        ``duration_s`` 0: the fault has none.
        """
        told: dict[str, object] = {"node": node, "fault": fault, "model": model}
        if duration_s:
            told["duration_s"] = duration_s
        async with self._request("POST", "/popmesh/drill", json=told):
            pass

    async def cold_start(
        self, node: str, model: str, options: dict[str, Any], longest_s: float, alone: bool
    ) -> dict[str, Any]:
        """Have a node start a model from cold, and wait for the report, as the router's JSON.

        ``longest_s`` bounds the start; ``alone``: though nobody else can answer meanwhile.
        """
        told: dict[str, object] = {"node": node, "fault": COLD_START, "model": model}
        told |= {"options": options, "duration_s": longest_s, "alone": alone}
        timeout = aiohttp.ClientTimeout(
            total=longest_s + IDLE_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S
        )
        path = "/popmesh/drill"
        return await self._json("POST", path, dict[str, Any], json=told, timeout=timeout)

    async def metrics(self) -> str:
        """The router's metrics, in Prometheus' text format."""
        async with self._request("GET", "/metrics") as response:
            return await response.text()

    async def chat(
        self,
        answer: Answer,
        model: str,
        messages: list[dict[str, str]],
        *,
        client_geo: str | None = None,
        **sampling: object,
    ) -> AsyncIterator[str]:
        """Stream an answer's text, filling in ``answer``; raises ``MeshError`` as it comes."""
        extra = {"stream": True, "stream_options": {"include_usage": True}, **sampling}
        body = _chat_body(model, messages, extra)
        headers = {"x-popmesh-client-geo": client_geo} if client_geo else {}
        path = "/v1/chat/completions"
        async with self._request("POST", path, json=body, headers=headers) as response:
            answer.request_id = response.headers.get("x-popmesh-request-id", "")
            answer.prefill = response.headers.get("x-popmesh-prefill", "")
            answer.decode = response.headers.get("x-popmesh-decode", "")
            async for event in _events(response.content):
                for choice in event.get("choices", []):
                    answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
                    text = choice.get("delta", {}).get("content") or ""
                    if text:
                        answer.text += text
                        yield text
                answer.usage = event.get("usage") or answer.usage

    async def _json(self, method: str, path: str, kind: type[T], **options: Any) -> T:
        async with self._request(method, path, **options) as response:
            body = await response.read()
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as exc:
            raise PeerError(f"{self.url}{path} answered something else: {exc}") from exc

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, **options: Any
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        assert self._session is not None, "use 'async with MeshClient(...)'"
        try:
            async with self._session.request(method, self.url + path, **options) as response:
                if not 200 <= response.status < 300:
                    raise _refusal(response.status, await response.read())
                yield response
        except aiohttp.ClientSSLError as exc:
            raise ConfigError(
                f"no trusted router at {self.url}: {exc}",
                suggestion="SSL_CERT_FILE names another authority than this machine's",
            ) from exc
        except aiohttp.ClientConnectorError as exc:
            raise ConfigError(
                f"no router answers at {self.url}",
                suggestion="start a mesh with 'popmesh up', or name its router with --mesh URL",
            ) from exc
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as exc:
            raise ConfigError(
                f"{self.url!r} is no URL", suggestion="write http://HOST:PORT"
            ) from exc
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise PeerError(f"{self.url} broke off: {str(exc) or type(exc).__name__}") from exc


def _chat_body(
    model: str, messages: list[dict[str, str]], extra: dict[str, object]
) -> dict[str, object]:
    return {"model": model, "messages": messages, **extra}


async def _events(stream: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream; an error event is raised."""
    parser = SseParser()
    async for chunk in stream.iter_any():
        for event in parser.feed(chunk):
            if event.data == b"[DONE]":
                return
            parsed = json.loads(event.data)
            if "error" in parsed:
                raise _error(parsed["error"])
            yield parsed


def _refusal(status: int, body: bytes) -> MeshError:
    if status == 401:
        return RequestError(
            "the router wants an API key: set POPMESH_API_KEY or pass --api-key",
            code="invalid_api_key",
        )
    try:
        return _error(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return PeerError(f"HTTP {status}: {body[:200].decode(errors='replace')}")


def _error(error: dict[str, Any]) -> MeshError:
    message = str(error.get("message", "unknown error"))
    code = error.get("code")
    return error_from_code(code, message) if isinstance(code, str) else RequestError(message)
