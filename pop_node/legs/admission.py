"""May this ``Submit`` be taken at all? Pure; what needs the tokenizer is ``prompt``'s.

A router is one of ours, but what it says still must not cost this node more than one request.
"""

from __future__ import annotations

from wire.errors import MeshError, PeerError
from wire.framing import MAX_MESSAGE_BYTES
from wire.messages import Submit, Transfer
from wire.prefix import SPAN_BYTES

TRANSFER_ID_BYTES = 16
CHAIN_VALUE_BYTES = 16

MAX_CHAIN_VALUES = MAX_MESSAGE_BYTES // SPAN_BYTES
"""One per span of the longest request."""

MAX_NAME_CHARS = 256
"""Tenants, nodes and addresses: a DNS name is no longer."""

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
"""Four times what routers take from clients; text that may become a stop string is held back, and
must fit one ``Step`` frame when it is not."""


def problem_with(submit: Submit) -> MeshError | None:
    """Why a submit breaks the protocol, or None."""
    transfer, sampling = submit.transfer, submit.sampling
    if (submit.leg == "both") != (transfer is None):
        return _violation("a split leg, and no other, has a transfer")
    if transfer is not None:
        problem = problem_with_transfer(transfer)
        if problem is not None:
            return problem
    if len(submit.tenant) > MAX_NAME_CHARS:
        return _violation(f"a tenant's name of {len(submit.tenant)} characters")
    if len(submit.chain) > MAX_CHAIN_VALUES:
        return _violation(f"a prefix chain of {len(submit.chain)} values")
    if any(len(value) != CHAIN_VALUE_BYTES for value in submit.chain):
        return _violation(f"a prefix chain whose values are not {CHAIN_VALUE_BYTES} bytes")
    if len(sampling.stop) > MAX_STOPS or any(len(s) > MAX_STOP_CHARS for s in sampling.stop):
        return _violation("too many stop strings, or one that is too long")
    return None


def problem_with_transfer(transfer: Transfer) -> MeshError | None:
    """Why a transfer breaks the protocol, or None."""
    if len(transfer.id) != TRANSFER_ID_BYTES:
        return _violation(f"a transfer id of {len(transfer.id)} bytes")
    if max(len(transfer.peer), len(transfer.address)) > MAX_NAME_CHARS:
        return _violation("the name or address of a transfer's peer is too long")
    return None


def _violation(message: str) -> PeerError:
    return PeerError(message, code="protocol_error", retryable=False)
