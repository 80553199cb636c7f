"""The wire form of an error that stopped a leg before it began."""

from __future__ import annotations

from wire.errors import MeshError
from wire.messages import Refused


def refusal(stream: int, error: MeshError) -> Refused:
    """What the router of ``stream`` hears; it waits as long as the error says."""
    wait_ms = round(1000 * error.retry_after_s) if error.retry_after_s else 0
    return Refused(stream, error.code, error.message, error.retryable, wait_ms)
