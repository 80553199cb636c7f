"""What a node says of itself: its models, how busy it is, what its caches hold."""

from __future__ import annotations

from typing import Literal

from wire.messages.base import WireStruct
from wire.messages.link import ModelOffer

Warmth = Literal["", "warm", "loading", "disk", "fetching", "absent"]
"""Where a node has a model: in memory and answering, on its way there, on its disk, on its way
there, or nowhere yet. "": the node speaks version 2; ``EngineLoad.ready`` says all it knows."""


class EngineLoad(WireStruct, frozen=True):
    """State of one model on a node. Rates are measured over recent steps; 0 means not measured yet.

    From ``warmth`` on version 3: ``eta_ms`` is the estimated time until it could answer if it were
    wanted now (0: it can, or nobody knows), ``memory_bytes`` what it takes in memory while it is
    warm, ``warm_refused`` why it cannot be loaded at the moment (empty: it can), ``last_load_ms``
    how long its last load took until the first token (0: never). ``drafted_tokens`` were
    guessed ahead since its engine began, ``accepted_tokens`` of them rightly; in the same time
    ``kv_sent_bytes`` of KV left in frames of ``kv_wire_bytes``, as ``kv_packed_pieces`` that were
    packed and ``kv_raw_pieces`` that were not (version 4).
    """

    model: str
    ready: bool
    queued_prefill_tokens: int
    running: int
    waiting: int
    free_blocks: int
    cached_blocks: int
    total_blocks: int
    prefill_tokens_per_s: float
    decode_step_ms: float
    transfers_in: int
    transfers_out: int
    streams: int
    warmth: Warmth = ""
    eta_ms: int = 0
    memory_bytes: int = 0
    warm_refused: str = ""
    last_load_ms: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kv_sent_bytes: int = 0
    kv_wire_bytes: int = 0
    kv_packed_pieces: int = 0
    kv_raw_pieces: int = 0


class LinkRate(WireStruct, frozen=True):
    """Measured KV link from the sending node to a peer; 0 means not measured yet.

    ``bytes_per_s`` is of KV: a link over which it travels packed is so much faster.
    """

    peer: str
    rtt_ms: float
    bytes_per_s: float


class Giving(WireStruct, frozen=True):
    """What a node gives of its bundles to nodes that lack them.

    ``given_bytes`` of data and ``turned_away`` requests since it started, ``takers`` (nodes) now,
    and the rate of the last seconds.
    """

    given_bytes: int = 0
    turned_away: int = 0
    takers: int = 0
    bytes_per_s: float = 0.0


class Load(WireStruct, frozen=True, tag=37):
    """Pushed once a second and whenever a threshold is crossed.

    ``memory_bytes`` is the node's budget for models, 0 when it has none, and ``memory_used_bytes``
    what models take of it (version 3), ``giving`` since version 4.
    """

    engines: list[EngineLoad]
    links: list[LinkRate]
    draining: bool
    memory_bytes: int = 0
    memory_used_bytes: int = 0
    giving: Giving = Giving()


class CacheDelta(WireStruct, frozen=True, tag=38):
    """Prefix chain values that entered (with the tokens they stand for) or left a node's cache."""

    model: str
    reset: bool
    added: list[tuple[bytes, int]]
    removed: list[bytes]


class Draining(WireStruct, frozen=True, tag=39):
    """The node accepts no new work and will go; running streams end normally.

    ``remaining_streams`` is how many there were at that moment, for traces of the wire; how many
    are left later, ``EngineLoad.streams`` says.
    """

    remaining_streams: int


class Offers(WireStruct, frozen=True, tag=43):
    """All models this node serves, as in its ``Hello``: said again when one changes (version 3)."""

    models: list[ModelOffer]
