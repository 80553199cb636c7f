"""What goes into and comes out of the receiver alone; ``events`` has the rest."""

from __future__ import annotations

from dataclasses import dataclass

from pop_node.kv_stream.frames import CODEC_RAW, Data, ToReceiver, ToSender
from pop_node.kv_stream.spec import KvSpec, Piece
from wire.errors import MeshError

# ---- receiver: events --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """A decode leg awaits this transfer; ``Commit`` may carry 1 to ``max_ids`` ids. ``codecs`` are
    those that can be received, the best one first."""

    transfer: bytes
    attempt: int
    peer: str
    model: str
    identity: str
    spec: KvSpec
    prompt_tokens: int
    prompt_digest: bytes
    deadline: float
    max_ids: int = 1
    codecs: tuple[str, ...] = (CODEC_RAW,)


@dataclass(frozen=True, slots=True)
class Allocated:
    """The engine has all blocks; tokens [0, have_tokens) are in its cache already."""

    transfer: bytes
    have_tokens: int


@dataclass(frozen=True, slots=True)
class FrameIn:
    """``peer`` (as authenticated) said something about a transfer on connection ``conn``, which
    belongs to its link number ``link``; 0 when the peer numbers none (version 1)."""

    conn: int
    peer: str
    message: ToReceiver
    link: int = 0


@dataclass(frozen=True, slots=True)
class DataBegins:
    """A ``Data`` header arrived; ``ReceiveInto`` names the payload's slot, no effect skips it."""

    conn: int
    peer: str
    data: Data
    nbytes: int
    link: int = 0


@dataclass(frozen=True, slots=True)
class DataMoved:
    """So far ``nbytes`` of the payload that comes into ``slot`` have arrived: on a link where a
    slot takes seconds, this is all the progress there is to see."""

    slot: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DataEnded:
    """The payload is in ``slot``; ``checksum`` was computed over what arrived."""

    slot: int
    checksum: bytes


@dataclass(frozen=True, slots=True)
class Unpacked:
    """``Unpack`` is done and nothing but the engine touches ``slot`` any more; unless ``is_sound``
    the block was damaged, and the slot holds anything."""

    slot: int
    is_sound: bool


@dataclass(frozen=True, slots=True)
class Imported:
    """The engine is done with an import slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class ConnRtt:
    conn: int
    rtt_s: float


@dataclass(frozen=True, slots=True)
class ConnLost:
    """The connection is gone and writes to no slot any more; ``is_silent`` as in ``LinkDown``."""

    conn: int
    error: MeshError
    is_silent: bool = False


@dataclass(frozen=True, slots=True)
class Starving:
    """Whether the engine computes nothing while sequences wait for blocks."""

    is_starving: bool


# ---- receiver: effects -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """Send a control frame on connection ``conn``, if it still exists."""

    conn: int
    message: ToSender


@dataclass(frozen=True, slots=True)
class ReceiveInto:
    """The payload of the ``Data`` just announced goes into this import slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Unpack:
    """Decode the block of ``nbytes`` bytes in ``slot`` into the ``kv_bytes`` bytes of its piece, in
    the same slot; answer ``Unpacked``, whatever becomes of the transfer or its connection."""

    slot: int
    nbytes: int
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Import:
    """A verified piece lies in ``slot``; the engine scatters it and answers ``Imported``."""

    transfer: bytes
    slot: int
    piece: Piece


@dataclass(frozen=True, slots=True)
class Committed:
    """The transfer ended well: all KV is in the engine's blocks; go on after ``ids``."""

    transfer: bytes
    ids: tuple[int, ...]
