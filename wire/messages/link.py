"""What both sides of a link say: greeting, liveness, and slices of long messages."""

from __future__ import annotations

from typing import Literal

from wire.messages.base import Role, WireStruct


class ModelOffer(WireStruct, frozen=True):
    """A model that a node serves.

    ``identity`` is the hex digest of what the model computes (decoded tensors, configuration that
    matters for the math, tokenizer and template); two nodes hand KV over only when it is equal.
    ``kv_bytes_per_token`` is the size of one token's KV over all layers, in bytes. ``kv_address``
    is where this model's engine takes KV streams (``host:port``).
    """

    name: str
    identity: str
    context_tokens: int
    kv_bytes_per_token: int
    block_tokens: int
    total_blocks: int
    dtype: str
    kv_address: str = ""


class Hello(WireStruct, frozen=True, tag=1):
    """First message of each side. ``incarnation`` is new at every process start."""

    min_version: int
    max_version: int
    mesh: str
    kind: Literal["router", "node"]
    name: str
    site: str
    incarnation: str
    roles: list[Role]
    models: list[ModelOffer]


class Goodbye(WireStruct, frozen=True, tag=2):
    """Last message before a side closes the link on purpose (version or identity mismatch)."""

    code: str
    message: str


class Ping(WireStruct, frozen=True, tag=3):
    """Round-trip probe and liveness check; answered at once by ``Pong`` with the same nonce."""

    nonce: int


class Pong(WireStruct, frozen=True, tag=4):
    nonce: int


class Part(WireStruct, frozen=True, tag=5):
    """A slice of one message too large for a frame; see ``wire.framing``."""

    message: int
    last: bool
    data: bytes
