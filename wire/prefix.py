"""Prefix identity across the mesh: which requests begin alike, told without tokenising.

The router cuts the canonical form of a request into 256-byte spans and chains a keyed BLAKE2b-128
over them; equal chain values mean equal beginnings under the same tenant, model and template.
Nodes map chain values to the tokens they hold and publish only the values. Pure; knows no node and
no router.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import assert_never

from wire.messages import ChatInput, Input, TextInput, TokensInput

SPAN_BYTES = 256
CHAIN_BYTES = 16


def canonical_bytes(prompt: Input) -> bytes:
    """A byte string that grows at its end when the request grows at its end.

    Lengths come after contents so that a longer last turn does not change earlier bytes.
    """
    match prompt:
        case ChatInput(turns):
            out = bytearray(b"chat\x00")
            for turn in turns:
                out += turn.role.encode() + b"\x00" + turn.content.encode() + b"\x00\x01"
            return bytes(out)
        case TextInput(text):
            return b"text\x00" + text.encode()
        case TokensInput(ids):
            return b"ids\x00" + b"".join(i.to_bytes(4, "little") for i in ids)
        case _:
            assert_never(prompt)


def chain_root(cache_key: bytes, tenant: str, model_identity: str) -> bytes:
    """The chain's root: 16 bytes that separate tenants, models and meshes."""
    mac = hmac.new(cache_key, tenant.encode(), hashlib.blake2b).digest()[:32]
    return hashlib.blake2b(model_identity.encode(), key=mac, digest_size=CHAIN_BYTES).digest()


def prefix_chain(root: bytes, data: bytes) -> list[bytes]:
    """Chain values of every full 256-byte span of ``data``, in order."""
    chain: list[bytes] = []
    value = root
    for at in range(0, len(data) - SPAN_BYTES + 1, SPAN_BYTES):
        span = data[at : at + SPAN_BYTES]
        value = hashlib.blake2b(span, key=value, digest_size=CHAIN_BYTES).digest()
        chain.append(value)
    return chain
