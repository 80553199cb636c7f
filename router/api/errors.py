"""The one map from mesh errors to HTTP: status, OpenAI-shaped body, ``Retry-After``.

Pure. Nothing else in the router chooses a status for an error.
"""

from __future__ import annotations

import math

import msgspec

from wire.errors import DeadlineError, MeshError, OverloadError, PeerError, RequestError

_STATUS_BY_CODE = {
    "invalid_api_key": 401,
    "forbidden": 403,
    "model_not_found": 404,
    "not_found": 404,
    "stream_unknown": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "drill_refused": 409,
    "request_too_large": 413,
    "expectation_failed": 417,
    "too_many_requests": 429,
}
_STATUS_BY_CLASS: tuple[tuple[type[MeshError], int], ...] = (
    (RequestError, 400),
    (OverloadError, 503),
    (PeerError, 502),
    (DeadlineError, 504),
)
_TYPE_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    502: "upstream_error",
    503: "overloaded_error",
    504: "timeout_error",
}

DEFAULT_RETRY_AFTER_S = 1.0
"""Pause asked of a client when nothing better is known. Guess: one ``Load`` push."""


def status_of(error: MeshError) -> int:
    """HTTP status of an error; 500 for what should not have happened."""
    by_code = _STATUS_BY_CODE.get(error.code)
    if by_code is not None:
        return by_code
    for cls, status in _STATUS_BY_CLASS:
        if isinstance(error, cls):
            return status
    return 500


def error_body(error: MeshError) -> bytes:
    """``{"error": {message, type, param, code}}`` as JSON."""
    status = status_of(error)
    fallback = "server_error" if status >= 500 else "invalid_request_error"
    return msgspec.json.encode(
        {
            "error": {
                "message": _printable(error.message),
                "type": _TYPE_BY_STATUS.get(status, fallback),
                "param": error.param,
                "code": error.code,
            }
        }
    )


def error_headers(error: MeshError) -> dict[str, str]:
    """Headers besides the content type; ``Retry-After`` in whole seconds, rounded up."""
    if status_of(error) not in (429, 503):
        return {}
    seconds = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


def _printable(text: str) -> str:
    """``text`` without lone surrogates, which JSON in UTF-8 cannot carry."""
    return text.encode("utf-8", "replace").decode()
