"""Messages of the mesh wire (router <-> node).

Owns what is said; ``wire.framing`` owns how it is cut into frames. Every message is a msgspec
struct encoded as a msgpack array ``[tag, field, field, ...]``, so a newer peer may append fields
with defaults and an older one ignores them. Durations travel, wall-clock times never do: a field
that ends in ``_ms`` or ``_s`` is a length of time.

A *stream* is a number minted by one router for one (attempt, choice); it is never reused while that
router process lives. Both legs of an attempt carry the same stream number.
"""

from __future__ import annotations

from typing import Literal

import msgspec

MIN_VERSION = 1
MAX_VERSION = 2
"""Version 2 adds ``Retarget``, ``Attach``, ``Drill`` and their answers, and ``kept_tokens``.

They are said only on links where both sides know version 2."""

Leg = Literal["prefill", "decode", "both"]
FinishReason = Literal["stop", "length", "handoff", "cancelled"]
Role = Literal["prefill", "decode"]

DRILL_FAULTS = ("kill-agent", "kill-engine", "freeze-agent", "freeze-engine")
"""What a node can be asked to do to itself, see ``Drill``."""

MAX_FREEZE_MS = 60_000
"""Longest freeze of a drill: far beyond every detection time, and an operator sees its end."""


class _Message(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Shared struct options; tags are given by the subclasses."""


# ---- inputs ------------------------------------------------------------------------------------


class ChatTurn(_Message, frozen=True):
    """One message of a conversation; ``role``: system, user, assistant, tool or developer."""

    role: str
    content: str


class ChatInput(_Message, frozen=True, tag=1):
    """A conversation: the node renders the model's own chat template."""

    turns: list[ChatTurn]


class TextInput(_Message, frozen=True, tag=2):
    """A plain text: the node tokenises it as it is."""

    text: str


class TokensInput(_Message, frozen=True, tag=3):
    """Token ids: used as they are."""

    ids: list[int]


Input = ChatInput | TextInput | TokensInput


class Sampling(_Message, frozen=True):
    """How to choose tokens. ``temperature`` 0 is greedy; ``max_tokens`` None: up to the context."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int  # unsigned 64-bit; the router draws one when the client gave none
    stop: list[str]
    ignore_eos: bool


class Transfer(_Message, frozen=True):
    """The KV hand-over of one attempt.

    ``id`` is 16 unguessable bytes. ``peer`` names the node at the other end; ``address`` is where
    the decode node listens for KV streams (``host:port``), empty in the decode leg.
    """

    id: bytes
    peer: str
    address: str


# ---- both directions ---------------------------------------------------------------------------


class ModelOffer(_Message, frozen=True):
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


class Hello(_Message, frozen=True, tag=1):
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


class Goodbye(_Message, frozen=True, tag=2):
    """Last message before a side closes the link on purpose (version or identity mismatch)."""

    code: str
    message: str


class Ping(_Message, frozen=True, tag=3):
    """Round-trip probe and liveness check; answered at once by ``Pong`` with the same nonce."""

    nonce: int


class Pong(_Message, frozen=True, tag=4):
    nonce: int


class Part(_Message, frozen=True, tag=5):
    """A slice of one message too large for a frame; see ``wire.framing``."""

    message: int
    last: bool
    data: bytes


# ---- router -> node ----------------------------------------------------------------------------


class Submit(_Message, frozen=True, tag=16):
    """Start one leg of one attempt of a request.

    ``attempt`` counts one request's tries from 1. ``forced_ids`` are tokens the client has already
    read: they are part of the answer and are never sampled again. ``chain`` is the prefix chain of
    the canonical request (``wire.prefix``), 16 bytes per 256-byte span, for cache digests.
    """

    stream: int
    request_id: str
    attempt: int
    leg: Leg
    model: str
    tenant: str
    input: Input
    sampling: Sampling
    forced_ids: list[int]
    transfer: Transfer | None
    chain: list[bytes]
    deadline_remaining_ms: int


class Cancel(_Message, frozen=True, tag=17):
    """Stop a stream and free what it holds; answered by ``Finished(reason="cancelled")``."""

    stream: int


class Retarget(_Message, frozen=True, tag=18):
    """Hand the KV of a running prefill leg to another decode node (version 2).

    ``attempt`` and ``transfer`` are those of the new decode leg, which got its ``Submit`` with the
    same stream number; the old transfer is over. A leg that has ended answers nothing: its end is
    on its way.
    """

    stream: int
    attempt: int
    transfer: Transfer


class Attach(_Message, frozen=True, tag=19):
    """Take over an answer that another router, or another connection, has lost (version 2).

    The node that knows the newest stream of ``request_id`` of this tenant stops it, if it still
    runs, and answers ``Attached`` under ``stream``, else ``Refused`` with code "stream_unknown".
    ``from_index`` is the number of output tokens whose text the client has read.
    """

    stream: int
    request_id: str
    tenant: str
    from_index: int


class Drill(_Message, frozen=True, tag=20):
    """Do this node harm on purpose; answered by ``DrillStarted`` (version 2).

    ``fault`` is one of ``DRILL_FAULTS``; ``model`` names the engine (empty: the only one) and
    ``duration_ms`` is for the freezes. Nodes that were not started for drills refuse.
    """

    number: int
    fault: str
    model: str
    duration_ms: int


# ---- node -> router ----------------------------------------------------------------------------


class Accepted(_Message, frozen=True, tag=32):
    """The leg holds its blocks in the engine; ``cached_tokens`` came from the prefix cache."""

    stream: int
    prompt_tokens: int
    cached_tokens: int


class Refused(_Message, frozen=True, tag=33):
    """The leg was never started. ``retry_after_ms`` 0 means unknown."""

    stream: int
    code: str
    message: str
    retryable: bool
    retry_after_ms: int


class StepEntry(_Message, frozen=True):
    """New tokens of one stream: ``ids[0]`` has output index ``index``.

    ``text`` is what became printable by these ids, JSON-escaped without the quotes (UTF-8); it may
    be empty while a character or a possible stop string is incomplete.
    """

    stream: int
    index: int
    ids: list[int]
    text: bytes


class Step(_Message, frozen=True, tag=34):
    """Everything one engine step produced for one router: one frame, not one per stream."""

    entries: list[StepEntry]


class TransferReport(_Message, frozen=True):
    """What a KV transfer did, measured on the prefill node's clock.

    ``compute_ms``: start of prefill to last layer computed. ``transfer_ms``: first byte sent to
    last byte known received. ``tail_ms``: last layer computed to last byte known received (a byte
    counts as received at the time its acknowledgement came back, less half a round trip).
    ``hidden_bytes``: KV bytes received before the last layer was computed.
    """

    kv_bytes: int
    wire_bytes: int
    hidden_bytes: int
    compute_ms: float
    transfer_ms: float
    tail_ms: float
    rtt_ms: float


class Finished(_Message, frozen=True, tag=35):
    """The leg ended well. A prefill leg ends with "handoff" once its transfer is committed.

    ``completion_tokens`` counts all output tokens up to here, forced ones included. ``kept_tokens``
    is for a decode leg that was cancelled while its KV came in; see ``Failed`` (version 2).
    """

    stream: int
    reason: FinishReason
    completion_tokens: int
    queue_ms: float
    prefill_ms: float
    transfer: TransferReport | None
    kept_tokens: int = 0


class Failed(_Message, frozen=True, tag=36):
    """The leg was started and broke.

    ``kept_tokens``: so many tokens at the beginning of prompt and forced ids have their KV in this
    node's cache now, for whoever asks next (version 2).
    """

    stream: int
    code: str
    message: str
    retryable: bool
    kept_tokens: int = 0


class EngineLoad(_Message, frozen=True):
    """State of one engine. Rates are measured over recent steps; 0 means not measured yet."""

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


class LinkRate(_Message, frozen=True):
    """Measured KV link from the sending node to a peer; 0 means not measured yet."""

    peer: str
    rtt_ms: float
    bytes_per_s: float


class Load(_Message, frozen=True, tag=37):
    """Pushed once a second and whenever a threshold is crossed."""

    engines: list[EngineLoad]
    links: list[LinkRate]
    draining: bool


class CacheDelta(_Message, frozen=True, tag=38):
    """Prefix chain values that entered (with the tokens they stand for) or left a node's cache."""

    model: str
    reset: bool
    added: list[tuple[bytes, int]]
    removed: list[bytes]


class Draining(_Message, frozen=True, tag=39):
    """The node accepts no new work and will go; running streams end normally."""

    remaining_streams: int


class Detached(_Message, frozen=True, tag=40):
    """The transfer of a prefill leg broke, the leg goes on (version 2).

    It keeps its KV and waits, a bounded time, for ``Retarget`` or ``Cancel``; then it fails with
    this code. ``attempt`` is the one whose transfer broke.
    """

    stream: int
    attempt: int
    code: str
    message: str


class Attached(_Message, frozen=True, tag=41):
    """What is known of an answer that was taken over (version 2).

    ``submit`` is the newest one that this node got for it; ``ids`` are all output tokens so far,
    and ``text`` is what became printable by ``ids[from_index:]``, JSON-escaped without the quotes.
    ``reason`` is "stop" or "length" when the answer is complete, "" when it can go on.
    """

    stream: int
    submit: Submit
    ids: list[int]
    text: bytes
    prompt_tokens: int
    cached_tokens: int
    reason: str


class DrillStarted(_Message, frozen=True, tag=42):
    """A drill's fault is on its way, or ``error`` says why not (version 2)."""

    number: int
    error: str


RouterMessage = Hello | Goodbye | Ping | Pong | Part | Submit | Cancel | Retarget | Attach | Drill
NodeMessage = (
    Hello
    | Goodbye
    | Ping
    | Pong
    | Part
    | Accepted
    | Refused
    | Step
    | Finished
    | Failed
    | Load
    | CacheDelta
    | Draining
    | Detached
    | Attached
    | DrillStarted
)
Message = RouterMessage | NodeMessage
