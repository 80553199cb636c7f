"""What a node says of its bundles: the vocabulary between givers and takers.

    GET /bundles                  Inventory
    GET /bundles/DIGEST/arrived   a byte per chunk: 1 there, 0 not yet
    GET /bundles/DIGEST/FILE      manifest.json, a text file, or a range of the data file

Whoever asks names itself in the header ``NAME_HEADER``; where there are certificates, its own must
carry that name.
"""

from __future__ import annotations

import msgspec

NAME_HEADER = "X-Popmesh-Node"

MAX_INVENTORY_BYTES = 1024 * 1024
"""Largest inventory read: 1,000 bundles of five names each take half of it."""

MAX_CHUNKS = 4 * 1024 * 1024
"""Most chunks of a bundle: 16 TB in chunks of 4 MiB. Bounds what is read of a peer's marks."""


class Stocked(msgspec.Struct, frozen=True):
    """A bundle: its digest, its model, the names it has there; ``arrived`` of ``chunks`` are there.

    ``nbytes`` of its data file.
    """

    bundle: str
    identity: str
    dtype: str
    names: list[str]
    nbytes: int
    chunks: int
    arrived: int


class Inventory(msgspec.Struct, frozen=True):
    """``wanting``: models that this node brings; ``bringing``: those of them that it fetches from
    their origin right now."""

    node: str
    bundles: list[Stocked]
    wanting: list[str]
    bringing: list[str]
