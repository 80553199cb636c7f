"""What a model's KV cache is made of, independent of block sizes and tensor-parallel degree.

A ``KvSpec`` is declared by the model and compared by digest before anything is streamed. Pure data:
imports no torch, so the agent and the engine share it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

GroupKind = Literal["tokens", "window", "state"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvComponent:
    """One tensor per token, e.g. ``("k", "bfloat16", (3, 64), 0)``: K of 3 heads of 64, after
    RoPE.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard_axis: int | None = None

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Layers that keep their KV alike. ``layers`` are the model's layer numbers."""

    kind: GroupKind
    layers: tuple[int, ...]
    components: tuple[KvComponent, ...]
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KvSpec:
    """All groups of a model's KV cache."""

    groups: tuple[KvGroup, ...]

    @property
    def places(self) -> int:
        """Number of (group, component, layer) triples."""
        return sum(len(g.layers) * len(g.components) for g in self.groups)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token over all layers and components."""
        return sum(len(g.layers) * c.token_bytes for g in self.groups for c in g.components)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, for the engine's ``Ready`` message."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> KvSpec:
        """Inverse of ``to_dict``."""
        return cls(
            tuple(
                KvGroup(
                    kind=group["kind"],
                    layers=tuple(group["layers"]),
                    components=tuple(
                        KvComponent(c["name"], c["dtype"], tuple(c["shape"]), c["shard_axis"])
                        for c in group["components"]
                    ),
                    window=group["window"],
                )
                for group in data["groups"]
            )
        )

    def digest(self) -> bytes:
        """16 bytes that two nodes compare before streaming."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the KV cache: one component of layers ``[layer_lo, layer_hi)`` (indices within the
    group) for tokens ``[token_lo, token_hi)``, laid out ``[layer, token, *component.shape]``."""

    group: int
    component: int
    layer_lo: int
    layer_hi: int
    token_lo: int
    token_hi: int

    @property
    def numbers(self) -> tuple[int, int, int, int, int, int]:
        """All of it, in the order above: for messages that name a piece."""
        return (
            self.group,
            self.component,
            self.layer_lo,
            self.layer_hi,
            self.token_lo,
            self.token_hi,
        )

    def overlaps(self, other: Piece) -> bool:
        """Do the two boxes share a token of a layer?"""
        return (
            (self.group, self.component) == (other.group, other.component)
            and self.layer_lo < other.layer_hi
            and other.layer_lo < self.layer_hi
            and self.token_lo < other.token_hi
            and other.token_lo < self.token_hi
        )

    def nbytes(self, spec: KvSpec) -> int:
        """Raw payload size in bytes."""
        per_token = spec.groups[self.group].components[self.component].token_bytes
        return (self.layer_hi - self.layer_lo) * (self.token_hi - self.token_lo) * per_token
