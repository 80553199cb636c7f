"""What goes into and comes out of the two transfer machines.

Frozen values. ``address`` names the link of a prefill node to one decode node; ``conn`` is a number
that the shell gives to each connection it accepted. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from pop_node.kv_stream.frames import CODEC_RAW, MIN_VERSION, ToReceiver, ToSender
from pop_node.kv_stream.receiver_events import (
    Allocated,
    Committed,
    ConnLost,
    ConnRtt,
    DataBegins,
    DataEnded,
    DataMoved,
    Expected,
    FrameIn,
    Import,
    Imported,
    ReceiveInto,
    Reply,
    Starving,
    Unpack,
    Unpacked,
)
from pop_node.kv_stream.spec import KvSpec, Piece
from wire.errors import MeshError
from wire.messages import TransferReport

__all__ = [
    "HOT_EVENTS",
    "Allocated",
    "Cancelled",
    "CommitReady",
    "Committed",
    "ComputeEnded",
    "ComputeStarted",
    "ConnLost",
    "ConnRtt",
    "Connect",
    "DataBegins",
    "DataEnded",
    "DataMoved",
    "Delivered",
    "EngineLost",
    "Expected",
    "Failed",
    "FrameIn",
    "FromPeer",
    "Import",
    "Imported",
    "LinkDown",
    "LinkRtt",
    "LinkUp",
    "Opened",
    "ReceiveInto",
    "ReceiverEffect",
    "ReceiverEvent",
    "Reply",
    "SendPiece",
    "SenderEffect",
    "SenderEvent",
    "Sending",
    "SlotFree",
    "StageFrom",
    "Staged",
    "Starving",
    "Tell",
    "Tick",
    "Unpack",
    "Unpacked",
    "Written",
]

# ---- both machines: events ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The agent gives the transfer up; the peer is told ``code`` and ``message``."""

    transfer: bytes
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class EngineLost:
    """The engine of ``model`` died: its transfers fail, the slots that it was reading are free."""

    model: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed; sent when ``next_deadline()`` is reached."""


# ---- sender: events ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opened:
    """Start a transfer of the KV of ``prompt_tokens`` tokens to ``peer``; ``codecs`` are those that
    can be sent."""

    transfer: bytes
    attempt: int
    peer: str
    address: str
    model: str
    identity: str
    spec: KvSpec
    prompt_tokens: int
    prompt_digest: bytes
    deadline: float
    codecs: tuple[str, ...] = (CODEC_RAW,)


@dataclass(frozen=True, slots=True)
class LinkUp:
    """The link is ready; the peer takes payloads of at most ``slot_bytes``.

    ``incarnation`` is the peer's; ``version`` the one spoken on the link.
    """

    address: str
    slot_bytes: int
    version: int = MIN_VERSION
    incarnation: str = ""


@dataclass(frozen=True, slots=True)
class LinkDown:
    """The link broke or could not be made. Slots it was writing come back as ``Written``.

    ``is_silent``: it was given up because nothing was heard for as long as one waits for progress.
    """

    address: str
    error: MeshError
    is_silent: bool = False


@dataclass(frozen=True, slots=True)
class LinkRtt:
    address: str
    rtt_s: float


@dataclass(frozen=True, slots=True)
class FromPeer:
    """A decode node said something about a transfer."""

    address: str
    message: ToSender


@dataclass(frozen=True, slots=True)
class Staged:
    """The engine filled export slot ``slot`` with ``nbytes`` bytes of a piece, for the
    ``StageFrom`` of this ``resume``."""

    transfer: bytes
    slot: int
    piece: Piece
    nbytes: int
    resume: int = 0


@dataclass(frozen=True, slots=True)
class Sending:
    """A slot's frame goes to the transport: ``nbytes`` bytes of KV in ``wire_bytes``, which include
    its header."""

    transfer: bytes
    nbytes: int
    wire_bytes: int
    codec: str = CODEC_RAW


@dataclass(frozen=True, slots=True)
class Written:
    """Nothing reads the slot any more: its bytes are out, or its connection is gone."""

    slot: int


@dataclass(frozen=True, slots=True)
class CommitReady:
    """The output tokens before the hand-off are known."""

    transfer: bytes
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ComputeStarted:
    transfer: bytes


@dataclass(frozen=True, slots=True)
class ComputeEnded:
    """The last layer of the last prompt token is computed."""

    transfer: bytes


SenderEvent = (
    Opened
    | LinkUp
    | LinkDown
    | LinkRtt
    | FromPeer
    | Staged
    | Sending
    | Written
    | CommitReady
    | ComputeStarted
    | ComputeEnded
    | Cancelled
    | EngineLost
    | Tick
)

# ---- sender: effects ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Connect:
    """Make (or reuse) the link; answer with ``LinkUp`` or ``LinkDown``."""

    address: str
    peer: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Send a control frame on the link's first connection."""

    address: str
    message: ToReceiver


@dataclass(frozen=True, slots=True)
class SendPiece:
    """Send a staged piece on any connection of the link; answer ``Sending``, then ``Written``.

    ``dtype``: it may be packed, as values of this type.
    """

    address: str
    transfer: bytes
    attempt: int
    slot: int
    piece: Piece
    nbytes: int
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class StageFrom:
    """The engine shall stage everything but tokens [0, have_tokens).

    With each newer ``resume`` it starts again, at ``arrived`` tokens per group, component and layer
    if they are given.
    """

    transfer: bytes
    have_tokens: int
    arrived: tuple[int, ...] = ()
    resume: int = 0


@dataclass(frozen=True, slots=True)
class SlotFree:
    """The engine may overwrite this export slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The transfer ended well."""

    transfer: bytes
    report: TransferReport


@dataclass(frozen=True, slots=True)
class Failed:
    """The transfer ended badly (either machine).

    ``kept_tokens``, of the receiver: so many tokens at the beginning are in the engine's blocks in
    all layers, once it has done all ``Import`` effects before this one.
    """

    transfer: bytes
    error: MeshError
    kept_tokens: int = 0


SenderEffect = Connect | Tell | SendPiece | StageFrom | SlotFree | Delivered | Failed

# ---- receiver ------------------------------------------------------------------------------------

ReceiverEvent = (
    Expected
    | Allocated
    | FrameIn
    | DataBegins
    | DataMoved
    | DataEnded
    | Unpacked
    | Imported
    | ConnRtt
    | ConnLost
    | Cancelled
    | EngineLost
    | Starving
    | Tick
)

HOT_EVENTS = (
    Staged,
    Sending,
    Written,
    FromPeer,
    DataBegins,
    DataEnded,
    Unpacked,
    Imported,
)
"""Events of the data path. The waits that they begin (5 s and more) end after the next ping of the
live connection that they came over (2 s), so the timer need not be looked at for each of them."""

ReceiverEffect = Reply | ReceiveInto | Unpack | Import | Committed | Failed
