"""Errors that travel on the KV stream as (code, message), and back."""

from __future__ import annotations

from wire.errors import (
    DeadlineError,
    MeshError,
    OverloadError,
    PeerError,
    TransferError,
    error_from_code,
)

MAX_CODE_CHARS = 64
MAX_TEXT_CHARS = 512
"""As ``frames.Code`` and ``frames.Text`` allow."""


def reported(code: str, message: str, retryable: bool | None = None) -> MeshError:
    """The error that a peer reported; one that would blame our client is the peer's fault."""
    error = error_from_code(code, message, retryable=retryable)
    if isinstance(error, PeerError | OverloadError | DeadlineError):
        return error
    return PeerError(message, code=code, retryable=retryable)


def as_text(error: MeshError) -> tuple[str, str]:
    """(code, message) cut to what a frame can carry."""
    return error.code[:MAX_CODE_CHARS], error.message[:MAX_TEXT_CHARS]


def violation(message: str) -> PeerError:
    """The peer broke the protocol."""
    return PeerError(message, code="protocol_error", retryable=True)


def timed_out(message: str) -> TransferError:
    """A wait ended without progress."""
    return TransferError(message, code="transfer_timeout")


def expired() -> DeadlineError:
    """The request's deadline passed during the transfer."""
    return DeadlineError("the request's deadline passed during the KV transfer")
