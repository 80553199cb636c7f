"""What a node says about streams and drills."""

from __future__ import annotations

from wire.messages.base import FinishReason, WireStruct
from wire.messages.from_router import Submit


class Accepted(WireStruct, frozen=True, tag=32):
    """The leg holds its blocks in the engine; ``cached_tokens`` came from the prefix cache."""

    stream: int
    prompt_tokens: int
    cached_tokens: int


class Loading(WireStruct, frozen=True, tag=44):
    """The leg waits until its model is in memory (version 3).

    ``eta_ms`` from now on, an estimate; ``Accepted``, ``Refused`` or ``Failed`` follows. May be
    said again when the estimate changes.
    """

    stream: int
    eta_ms: int


class Refused(WireStruct, frozen=True, tag=33):
    """The leg was never started. ``retry_after_ms`` 0 means unknown."""

    stream: int
    code: str
    message: str
    retryable: bool
    retry_after_ms: int


class StepEntry(WireStruct, frozen=True):
    """New tokens of one stream: ``ids[0]`` has output index ``index``.

    ``text`` is what became printable by these ids, JSON-escaped without the quotes (UTF-8); it may
    be empty while a character or a possible stop string is incomplete.
    """

    stream: int
    index: int
    ids: list[int]
    text: bytes


class Step(WireStruct, frozen=True, tag=34):
    """Everything one engine step produced for one router: one frame, not one per stream."""

    entries: list[StepEntry]


class TransferReport(WireStruct, frozen=True):
    """What a KV transfer did, measured on the prefill node's clock.

    ``compute_ms``: start of prefill to last layer computed. ``transfer_ms``: first byte sent to
    last byte known received. ``tail_ms``: last layer computed to last byte known received (a byte
    counts as received at the time its acknowledgement came back, less half a round trip).
    ``hidden_bytes``: KV bytes received before the last layer was computed. ``wire_bytes``: data
    frames that carried ``kv_bytes``; below it where pieces were packed.
    """

    kv_bytes: int
    wire_bytes: int
    hidden_bytes: int
    compute_ms: float
    transfer_ms: float
    tail_ms: float
    rtt_ms: float


class Finished(WireStruct, frozen=True, tag=35):
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


class Failed(WireStruct, frozen=True, tag=36):
    """The leg was started and broke.

    ``kept_tokens``: so many tokens at the beginning of prompt and forced ids have their KV in this
    node's cache now, for whoever asks next (version 2).
    """

    stream: int
    code: str
    message: str
    retryable: bool
    kept_tokens: int = 0


class Detached(WireStruct, frozen=True, tag=40):
    """The transfer of a prefill leg broke, the leg goes on (version 2).

    It keeps its KV and waits, a bounded time, for ``Retarget`` or ``Cancel``; then it fails with
    this code. ``attempt`` is the one whose transfer broke.
    """

    stream: int
    attempt: int
    code: str
    message: str


class Attached(WireStruct, frozen=True, tag=41):
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


class DrillStarted(WireStruct, frozen=True, tag=42):
    """A drill's fault is on its way, or ``error`` says why not (version 2)."""

    number: int
    error: str


class DrillReport(WireStruct, frozen=True, tag=45):
    """How a drill went that reports: ``report`` is JSON, or ``error`` says why there is none
    (version 3)."""

    number: int
    report: bytes
    error: str
