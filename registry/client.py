"""The registry client: Consul's HTTP API through py-consul, with our bounds and our errors.

The only file that knows py-consul or speaks HTTP to a registry. It mends the library where it
has to:

- its async transport passes aiohttp arguments that are deprecated, and its total timeout is no
  longer than a default blocking query: ``_Transport`` makes its own session without a total
  timeout, and every call here runs under a timeout of its own;
- it reads answers of any size and follows redirects: ``_Transport`` does neither;
- it trips over answers of an unexpected shape: those become the same error as no answer at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec
from consul import aio, base
from consul.exceptions import (
    ACLDisabled,
    ACLPermissionDenied,
    BadRequest,
    ClientError,
    ConsulException,
    NotFound,
)
from yarl import URL

from registry import answers
from registry.entries import KvEntry, KvSnapshot, Registration, ServiceEntry, Snapshot, Status
from registry.target import parse_url
from wire.errors import ConfigError, PeerError

__all__ = [
    "KvEntry",
    "KvSnapshot",
    "Registration",
    "Registry",
    "ServiceEntry",
    "Snapshot",
    "Status",
]

CALL_TIMEOUT_S = 5.0
"""Longest a call may take. Guess: leader loss heals in 3.3 s (measured on Consul 1.8.7)."""

MAX_WAIT_S = 60.0
"""Longest blocking query. Guess: middleboxes tend to cut silent connections after a minute."""

MAX_ANSWER_BYTES = 16 * 1024 * 1024
"""Largest answer read: 4,096 instances of 2 KiB take half of it."""

MAX_CONNECTIONS = 32
"""Connections per client: each watch holds one, calls share the rest. Consul allows 200 per
client address. Source: Consul documentation, ``http_max_conns_per_client``."""

MAX_NOTE_CHARS = 512
"""Longest heartbeat note sent; it travels in the query string. Guess."""

_REFUSALS = (ACLDisabled, ACLPermissionDenied, BadRequest, ClientError, NotFound)

# What py-consul's decoding raises on JSON that is none, or of another shape than it expects.
_SHAPE_ERRORS = (ValueError, TypeError, AttributeError, LookupError, RecursionError)

# How servers word a heartbeat for a check that they do not have: Consul 1.8, and later versions.
_UNKNOWN_CHECK = ("does not have associated TTL", "Unknown check")


class _Transport(aio.HTTPClient):  # type: ignore[misc]  # py-consul is untyped
    """py-consul's HTTP transport on a session of our own."""

    def __init__(self, host: str, port: int) -> None:
        # Not aio.HTTPClient.__init__: it builds the session that this class replaces.
        base.HTTPClient.__init__(self, host, port, "http")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def _request(
        self,
        callback: Callable[[base.Response], Any],
        method: str,
        uri: str,
        headers: dict[str, str] | None,
        data: str | bytes | None = None,
        connections_timeout: float | None = None,
        raw: bool = False,
    ) -> Any:
        url = URL(uri, encoded=True)  # py-consul has quoted it
        async with self._session.request(
            method, url, headers=headers, data=data, allow_redirects=False
        ) as response:
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > MAX_ANSWER_BYTES:
                    raise ConsulException(f"an answer of more than {MAX_ANSWER_BYTES} bytes")
        if 300 <= response.status < 400:
            raise ClientError(f"{response.status} redirects are not followed")
        try:
            return callback(base.Response(response.status, response.headers, body.decode()))
        except _SHAPE_ERRORS as exc:
            raise ConsulException(f"an answer of an unexpected shape: {exc!r}") from exc


class _Client(aio.Consul):  # type: ignore[misc]  # py-consul is untyped
    """py-consul's client over ``_Transport``."""

    def http_connect(
        self, host: str, port: int, scheme: str, verify: bool | str = True, cert: Any = None
    ) -> _Transport:
        return _Transport(host, port)


class Registry:
    """A connection to one registry, Consul or embedded; an async context manager.

    Every method raises ``PeerError`` with code ``registry_unavailable``: retryable when there was
    no proper answer in time, not retryable when the registry refused the request as such. Names,
    ids and keys that no URL path can carry raise ``ConfigError``.
    """

    def __init__(self, client: _Client, where: str, timeout_s: float) -> None:
        self._client = client
        self._where = where
        self._timeout_s = timeout_s

    @classmethod
    def connect(cls, url: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Registry:
        """A client for ``consul://HOST[:PORT][?dc=..&token=..]`` (``http://`` means the same).

        Sends nothing yet: a process may start while its registry is away. Reads go to datacenter
        ``dc``. Without a token in the URL, CONSUL_HTTP_TOKEN of the environment counts. Must be
        called in a running loop. Raises ``ConfigError`` on a malformed URL.
        """
        target = parse_url(url)
        client = _Client(host=target.host, port=target.port, scheme="http", dc=target.dc)
        if target.token is not None:
            client.token = target.token
        return cls(client, f"{target.host}:{target.port}", timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; calls still running fail."""
        await self._client.close()

    # ---- services ------------------------------------------------------------------------------

    async def register(self, registration: Registration, status: Status = "critical") -> None:
        """Register or replace one instance, with its health as of now."""
        check = {
            "TTL": _duration(registration.ttl_s),
            "DeregisterCriticalServiceAfter": _duration(registration.deregister_after_s),
            "Status": status,
        }
        name, service_id = _path(registration.service), _path(registration.service_id)
        async with self._call("register"):
            await self._client.agent.service.register(
                name,
                service_id=service_id,
                address=registration.address,
                port=registration.port,
                meta=dict(registration.meta),
                check=check,
                extra_checks=[],
            )

    async def heartbeat(self, service_id: str, status: Status, note: str = "") -> bool:
        """Report an instance's health; False when the registry does not know the instance."""
        checks = self._client.agent.check
        report: dict[Status, Callable[..., Awaitable[bool]]] = {
            "passing": checks.ttl_pass,
            "warning": checks.ttl_warn,
            "critical": checks.ttl_fail,
        }
        check_id = f"service:{_path(service_id)}"  # the id that servers give a service's one check
        async with self._call("heartbeat"):
            try:
                return await report[status](check_id, notes=note[:MAX_NOTE_CHARS])
            except ConsulException as exc:
                if any(words in str(exc) for words in _UNKNOWN_CHECK):
                    return False
                raise

    async def deregister(self, service_id: str) -> None:
        """Forget one instance; an unknown one is no error."""
        _path(service_id)
        async with self._call("deregister"):
            await self._client.agent.service.deregister(service_id)

    async def services(self, service: str, *, wait_index: int = 0, wait_s: float = 0.0) -> Snapshot:
        """All instances of a service, whatever their health.

        With ``wait_index`` > 0 the registry answers once its index exceeds it, at the latest after
        ``wait_s`` seconds (at most ``MAX_WAIT_S``) with what it has then.
        """
        _path(service)
        async with self._blocking_call("services", wait_index, wait_s) as waiting:
            index, body = await self._client.health.service(service, **waiting)
            return Snapshot(_index(index), answers.service_entries(body))

    # ---- keys and values -----------------------------------------------------------------------

    async def kv_get(self, key: str) -> KvEntry | None:
        """One key, or None when it does not exist."""
        _path(key)
        async with self._call("kv_get"):
            _, body = await self._client.kv.get(key)
            return answers.kv_entry(body)

    async def kv_put(self, key: str, value: bytes) -> None:
        """Create or replace a key. Registries refuse values over 512 KiB."""
        _path(key)
        async with self._call("kv_put"):
            await self._client.kv.put(key, value)

    async def kv_delete(self, key: str) -> None:
        """Delete a key; a missing one is no error."""
        _path(key)
        async with self._call("kv_delete"):
            await self._client.kv.delete(key)

    async def kv_list(self, prefix: str, *, wait_index: int = 0, wait_s: float = 0.0) -> KvSnapshot:
        """All keys that start with ``prefix`` (an empty one: all). Waits as ``services`` does."""
        if prefix:
            _path(prefix.removesuffix("/"))
        async with self._blocking_call("kv_list", wait_index, wait_s) as waiting:
            index, body = await self._client.kv.get(prefix, recurse=True, **waiting)
            return KvSnapshot(_index(index), answers.kv_entries(body))

    # ---- the registry itself -------------------------------------------------------------------

    async def leader(self) -> str:
        """Address of the registry's leader, empty while it has none."""
        async with self._call("leader"):
            return msgspec.convert(await self._client.status.leader(), str)

    async def datacenter(self) -> str:
        """Name of the datacenter whose agent answers here."""
        async with self._call("datacenter"):
            return answers.datacenter(await self._client.agent.self())

    # ---- bounds and errors ---------------------------------------------------------------------

    @asynccontextmanager
    async def _blocking_call(
        self, what: str, wait_index: int, wait_s: float
    ) -> AsyncIterator[dict[str, Any]]:
        """A call that may wait; yields py-consul's arguments for it."""
        if wait_index <= 0:
            async with self._call(what):
                yield {}
            return
        wait_s = min(wait_s, MAX_WAIT_S)
        # Servers add up to wait/16 so that clients spread; the rest is for the answer to travel.
        async with self._call(what, timeout_s=wait_s * 1.1 + 2.0):
            yield {"index": wait_index, "wait": _duration(wait_s)}

    @asynccontextmanager
    async def _call(self, what: str, *, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Bound one call (by default with this client's timeout) and map what can go wrong."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except TimeoutError as exc:
            message = f"no answer within {timeout_s:.1f} s"
            raise self._error(what, message, retryable=True) from exc
        except _REFUSALS as exc:
            raise self._error(what, f"refused: {exc}", retryable=False) from exc
        except (ConsulException, aiohttp.ClientError, OSError, msgspec.ValidationError) as exc:
            raise self._error(what, str(exc) or repr(exc), retryable=True) from exc

    def _error(self, what: str, message: str, *, retryable: bool) -> PeerError:
        return PeerError(
            f"registry {self._where}, {what}: {message[:300]}",
            code="registry_unavailable",
            retryable=retryable,
        )


def _path(text: str) -> str:
    """``text`` if servers take it literally as the tail of a path, else ``ConfigError``."""
    if any(segment in ("", ".", "..") for segment in text.split("/")):
        raise ConfigError(
            f"{text!r} cannot be a name in the registry",
            suggestion="no empty, '.' or '..' parts between slashes",
        )
    return text


def _duration(seconds: float) -> str:
    return f"{max(1, round(seconds * 1000))}ms"


def _index(text: str) -> int:
    """The index header; never below 1, which would turn a wait into a busy loop."""
    try:
        return max(1, int(text))
    except ValueError as exc:
        raise ConsulException(f"an index of {text!r}") from exc
