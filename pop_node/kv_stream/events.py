"""What goes into and comes out of the two transfer machines.

Frozen values. ``address`` names the link of a prefill node to one decode node; ``conn`` is a number
that the shell gives to each connection it accepted. Times are seconds of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from pop_node.kv_stream.frames import MIN_VERSION, Data, ToReceiver, ToSender
from pop_node.kv_stream.spec import KvSpec, Piece
from wire.errors import MeshError
from wire.messages import TransferReport

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
    """Start a transfer of the KV of ``prompt_tokens`` tokens to ``peer``."""

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
    """A slot's frame goes to the transport; ``wire_bytes`` includes its header."""

    transfer: bytes
    nbytes: int
    wire_bytes: int


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
    """Send a staged piece on any connection of the link; answer ``Sending``, then ``Written``."""

    address: str
    transfer: bytes
    attempt: int
    slot: int
    piece: Piece
    nbytes: int


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

# ---- receiver: events --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """A decode leg awaits this transfer; ``Commit`` may carry 1 to ``max_ids`` ids."""

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


ReceiverEvent = (
    Expected
    | Allocated
    | FrameIn
    | DataBegins
    | DataMoved
    | DataEnded
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
    Imported,
)
"""Events of the data path. The waits that they begin (5 s and more) end after the next ping of the
live connection that they came over (2 s), so the timer need not be looked at for each of them."""

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


ReceiverEffect = Reply | ReceiveInto | Import | Committed | Failed
