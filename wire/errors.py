"""Typed errors of the mesh.

Owns the hierarchy and the list of codes; must not know HTTP (the router maps classes to statuses
in one place, ``router.api.errors``) and must not know who catches what.
"""

from __future__ import annotations


class MeshError(Exception):
    """Base of every error that popmesh raises on purpose.

    Attributes:
        code: stable machine-readable word, e.g. ``"context_length_exceeded"``.
        retryable: the same request may succeed on another node or later.
        site: where it happened, when known.
        request_id: the request it belongs to, when known.
        param: the request parameter at fault, when one is.
        retry_after_s: seconds after which a retry makes sense, when known.
    """

    default_code = "internal_error"
    default_retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retryable: bool | None = None,
        site: str | None = None,
        request_id: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.retryable = self.default_retryable if retryable is None else retryable
        self.site = site
        self.request_id = request_id
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(MeshError):
    """The client's fault: a request that no node would accept as it stands."""

    default_code = "invalid_request"


class OverloadError(MeshError):
    """Nobody's fault: try elsewhere or later."""

    default_code = "overloaded"
    default_retryable = True


class PeerError(MeshError):
    """Another process of the mesh misbehaved, died or broke the protocol."""

    default_code = "peer_failed"
    default_retryable = True


class TransferError(PeerError):
    """The KV stream between two nodes broke."""

    default_code = "transfer_failed"


class DeadlineError(MeshError):
    """The request's own deadline passed."""

    default_code = "deadline_exceeded"


class ConfigError(MeshError):
    """Refuse to start: a file or flag holds something impossible.

    ``where`` is ``file:line`` (or the flag), ``suggestion`` says what to do about it.
    """

    default_code = "bad_config"

    def __init__(
        self, message: str, *, where: str | None = None, suggestion: str | None = None
    ) -> None:
        text = f"{where}: {message}" if where else message
        super().__init__(f"{text} ({suggestion})" if suggestion else text)
        self.where = where
        self.suggestion = suggestion


_BY_CODE: dict[str, type[MeshError]] = {
    "invalid_request": RequestError,
    "invalid_type": RequestError,
    "invalid_value": RequestError,
    "unsupported_parameter": RequestError,
    "model_not_found": RequestError,
    "context_length_exceeded": RequestError,
    "empty_prompt": RequestError,
    "template_error": RequestError,
    "request_too_large": RequestError,
    "request_timeout": RequestError,
    "stream_unknown": RequestError,
    "invalid_api_key": RequestError,
    "forbidden": RequestError,
    "not_found": RequestError,
    "method_not_allowed": RequestError,
    "expectation_failed": RequestError,
    "drill_refused": RequestError,
    "too_many_requests": OverloadError,
    "no_route": OverloadError,
    "overloaded": OverloadError,
    "out_of_blocks": OverloadError,
    "draining": OverloadError,
    "not_ready": OverloadError,
    "not_loaded": OverloadError,
    "peer_failed": PeerError,
    "drill_failed": PeerError,
    "link_lost": PeerError,
    "taken_over": PeerError,
    "engine_died": PeerError,
    "protocol_error": PeerError,
    "version_mismatch": PeerError,
    "identity_mismatch": PeerError,
    "registry_unavailable": PeerError,
    "transfer_failed": TransferError,
    "transfer_timeout": TransferError,
    "checksum_mismatch": TransferError,
    "spec_mismatch": TransferError,
    "prompt_mismatch": TransferError,
    "deadline_exceeded": DeadlineError,
    "bad_config": ConfigError,
    "internal_error": MeshError,
}


def error_from_code(
    code: str,
    message: str,
    *,
    retryable: bool | None = None,
    site: str | None = None,
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> MeshError:
    """Rebuild an error that travelled as (code, message); an unknown code is a ``PeerError``."""
    cls = _BY_CODE.get(code, PeerError)
    if cls is ConfigError:  # a peer's configuration is that peer's fault here
        cls = PeerError
    return cls(
        message,
        code=code,
        retryable=retryable,
        site=site,
        request_id=request_id,
        retry_after_s=retry_after_s,
    )
