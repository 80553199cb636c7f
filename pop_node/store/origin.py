"""Bundles at a URL: a directory with a manifest, read over http(s) in ranges or from a file system.

Owns the protocols; what arrives is checked by whoever asked for it.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from http.client import HTTPException
from pathlib import Path
from typing import Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from wire.errors import ConfigError

SCHEMES = ("http", "https", "file")

TIMEOUT_S = 15.0
"""Guess: a server that says nothing for so long has lost the connection."""

READ_BYTES = 1024 * 1024

Pieces = Generator[bytes, None, None]

_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed (RFC 9110, RFC 8470, RFC 6585)."""


class InterruptedReadError(Exception):
    """The origin stopped sending; asking again may help."""


class NoRangesError(Exception):
    """The origin sends files only from their beginning."""


class Origin(Protocol):
    """Where the files of one bundle come from."""

    def read(self, name: str, limit: int) -> bytes:
        """A small file. Raises ``ConfigError`` if larger or not there, ``InterruptedReadError``."""

    def stream(self, name: str, start: int, stop: int) -> Pieces:
        """Bytes ``[start, stop)`` of a file in pieces.

        Raises as ``read`` does, and ``NoRangesError`` if it cannot begin at ``start``.
        """


def is_url(source: str) -> bool:
    """Whether a model's source is the URL of a bundle."""
    return source.partition("://")[0] in SCHEMES


def open_origin(url: str) -> Origin:
    """Raises ``ConfigError`` for a URL that cannot be kept in the store as a model's source."""
    parts = urlsplit(url)
    if parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"{parts.scheme}://{parts.hostname or ''}...: a bundle's URL has neither user, query "
            "nor fragment",
            suggestion="the store remembers it in plain text",
        )
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"{url} is on another machine", suggestion="write file:///PATH")
        return FileOrigin(Path(unquote(parts.path)))
    return HttpOrigin(url.rstrip("/"))


class FileOrigin:
    """A directory, e.g. on a network file system or a stick."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def read(self, name: str, limit: int) -> bytes:
        return b"".join(self.stream(name, 0, limit + 1))

    def stream(self, name: str, start: int, stop: int) -> Pieces:
        path = self._directory / name
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while start < stop and (data := file.read(min(READ_BYTES, stop - start))):
                    start += len(data)
                    yield data
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as exc:
            raise ConfigError(f"cannot be read: {exc}", where=str(path)) from exc


class HttpOrigin:
    """A web server; proxies and certificates as the environment says."""

    def __init__(self, url: str) -> None:
        self._url = url

    def read(self, name: str, limit: int) -> bytes:
        return b"".join(self._get(name, None, 0, limit + 1))

    def stream(self, name: str, start: int, stop: int) -> Pieces:
        return self._get(name, f"bytes={start}-{stop - 1}", start, stop)

    def _get(self, name: str, span: str | None, start: int, stop: int) -> Pieces:
        where = f"{self._url}/{quote(name)}"
        headers = {"Accept-Encoding": "identity"} | ({"Range": span} if span else {})
        try:
            with urlopen(Request(where, headers=headers), timeout=TIMEOUT_S) as response:
                if start and response.status != 206:
                    raise NoRangesError
                if response.status == 206:
                    _check_span(response.headers.get("Content-Range", ""), start, where)
                left = stop - start
                while left and (data := response.read(min(READ_BYTES, left))):
                    left -= len(data)
                    yield data
        except HTTPError as exc:
            exc.close()
            if exc.code in _AGAIN:
                raise InterruptedReadError(f"{where}: {exc}") from exc
            raise ConfigError(f"the server says {exc.code} {exc.reason}", where=where) from exc
        except (URLError, HTTPException, OSError) as exc:
            raise InterruptedReadError(f"{where}: {exc}") from exc


def _check_span(header: str, start: int, where: str) -> None:
    if not header.startswith(f"bytes {start}-"):
        raise ConfigError(f"the server sent {header!r}, not what was asked for", where=where)
