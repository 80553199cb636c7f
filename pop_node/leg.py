"""One leg of one attempt on this node, decided without IO.

A leg is what a ``Submit`` becomes: prompt ids, a sequence in the engine, possibly one end of a KV
transfer, and the words that go back to the router. This machine owns their order and makes sure
that the router hears exactly one ending and that engine and KV stream are told to let go exactly
once; ``pop_node.model_host`` carries the effects out. It knows no socket, engine or clock.

    preparing --Prepared--> queued --Allocated--> running --token 0 of a prefill leg--> handoff
                                                     \\--finish--> closing --engine let go--> ended
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

from pop_node.engine import messages as engine
from wire.errors import MeshError, TransferError
from wire.messages import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    NodeMessage,
    Refused,
    StepEntry,
    Submit,
    TransferReport,
)

State = Literal["preparing", "queued", "running", "handoff", "closing", "ended"]


class TextDeltas(Protocol):
    """Incremental text of one stream (``pop_node.text.stream.TextStream``)."""

    def push(self, ids: list[int]) -> TextDelta: ...

    def flush(self) -> str: ...


class TextDelta(Protocol):
    """What ``push`` made printable, and whether a stop string was completed."""

    @property
    def text(self) -> str: ...

    @property
    def stopped(self) -> bool: ...


# ---- events ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepared:
    """The prompt is rendered and tokenised; ``max_tokens`` is capped to the context."""

    prompt_ids: list[int]
    max_tokens: int
    text: TextDeltas


@dataclass(frozen=True, slots=True)
class PrepareFailed:
    error: MeshError


@dataclass(frozen=True, slots=True)
class TransferCommitted:
    """Decode side: all KV is here; the answer so far is ``ids``."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class TransferDone:
    """Prefill side: the decode site has everything."""

    report: TransferReport


@dataclass(frozen=True, slots=True)
class TransferFailed:
    error: MeshError


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The router wants no more of it."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The leg cannot go on: deadline passed, engine died, router link lost, node shutting down.

    ``engine_gone`` says that the engine forgot everything already.
    """

    error: MeshError
    engine_gone: bool = False


EngineEvent = engine.Allocated | engine.Declined | engine.Token | engine.PrefillDone | engine.Ended
Event = (
    Prepared
    | PrepareFailed
    | TransferCommitted
    | TransferDone
    | TransferFailed
    | Cancelled
    | Broken
    | EngineEvent
)


# ---- effects -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ToEngine:
    message: engine.Add | engine.Drop | engine.Commit | engine.Release


@dataclass(frozen=True, slots=True)
class Say:
    """Tell the router."""

    message: NodeMessage


@dataclass(frozen=True, slots=True)
class Emit:
    """Put this into the router's next ``Step`` frame, before anything said later."""

    entry: StepEntry


@dataclass(frozen=True, slots=True)
class OpenTransfer:
    """Prefill side: offer the KV of ``ids`` to the decode node."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class ExpectTransfer:
    """Decode side: a transfer for ``ids`` is wanted."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class GrantTransfer:
    """Decode side: blocks are allocated, the first ``have_tokens`` are already here."""

    have_tokens: int


@dataclass(frozen=True, slots=True)
class ComputeStarted:
    """Prefill side: the prompt has its blocks and is being computed."""


@dataclass(frozen=True, slots=True)
class ComputeEnded:
    """Prefill side: the last layer of the prompt is computed."""


@dataclass(frozen=True, slots=True)
class CommitTransfer:
    """Prefill side: the answer so far, [0:h]."""

    ids: list[int]


@dataclass(frozen=True, slots=True)
class CancelTransfer:
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class RecordPrefix:
    """The prompt's KV is in this node's cache now."""

    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing of this leg is left anywhere; forget it."""


TransferEffect = (
    OpenTransfer
    | ExpectTransfer
    | GrantTransfer
    | ComputeStarted
    | ComputeEnded
    | CommitTransfer
    | CancelTransfer
)
Effect = ToEngine | Say | Emit | TransferEffect | RecordPrefix | Over


class Leg:
    """State machine of one leg; ``seq`` is its number in the engine."""

    def __init__(
        self, seq: int, submit: Submit, stop_ids: frozenset[int], escape_json: Escape
    ) -> None:
        self.seq = seq
        self.submit = submit
        self.state: State = "preparing"
        self._stop_ids = stop_ids
        self._escape = escape_json
        self._text: TextDeltas | None = None
        self._prompt_tokens = 0
        self._ids: list[int] = list(submit.forced_ids)
        self._in_engine = False
        self._transfer_open = False
        self._queue_ms = 0.0
        self._prefill_ms = 0.0

    @property
    def transfer_id(self) -> bytes:
        """The 16-byte transfer id, empty when the leg has no transfer."""
        return self.submit.transfer.id if self.submit.transfer is not None else b""

    def handle(self, event: Event) -> list[Effect]:
        """Advance by one event."""
        if self.state == "ended":
            return []
        match event:
            case Prepared():
                return self._prepared(event)
            case PrepareFailed(error):
                return self._prepare_failed(error)
            case engine.Allocated(_, cached_tokens):
                return self._allocated(cached_tokens)
            case engine.Declined(_, code, message):
                return self._declined(code, message)
            case engine.PrefillDone(_, queue_ms, compute_ms):
                return self._prefill_done(queue_ms, compute_ms)
            case engine.Token():
                return self._token(event)
            case engine.Ended():
                self._in_engine = False
                return self._close()
            case TransferCommitted(ids):
                return self._committed(ids)
            case TransferDone(report):
                return self._transfer_done(report)
            case TransferFailed(error):
                self._transfer_open = False
                return self._fail(error)
            case Cancelled():
                return self._finish("cancelled", "cancelled", "the router cancelled the request")
            case Broken(error, engine_gone):
                return self._broken(error, engine_gone)
            case _:
                assert_never(event)

    # ---- start ---------------------------------------------------------------------------------

    def _prepared(self, event: Prepared) -> list[Effect]:
        if self.state == "closing":  # cancelled while the tokeniser ran
            self.state = "ended"
            return [Over()]
        submit, sampling = self.submit, self.submit.sampling
        self._text = event.text
        if submit.forced_ids:
            event.text.push(submit.forced_ids)  # already read by the client
        self._prompt_tokens = len(event.prompt_ids)
        self.state, self._in_engine = "queued", True
        add = engine.Add(
            seq=self.seq,
            leg=submit.leg,
            prompt_ids=event.prompt_ids,
            forced_ids=submit.forced_ids,
            max_tokens=event.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop_ids=[] if sampling.ignore_eos else sorted(self._stop_ids),
            salt=submit.tenant.encode(),
            transfer=self.transfer_id,
        )
        effects: list[Effect] = [ToEngine(add)]
        if submit.leg != "both":
            self._transfer_open = True
            ids = event.prompt_ids + submit.forced_ids
            effects.append(OpenTransfer(ids) if submit.leg == "prefill" else ExpectTransfer(ids))
        return effects

    def _prepare_failed(self, error: MeshError) -> list[Effect]:
        closing = self.state == "closing"
        self.state = "ended"
        return [Over()] if closing else [Say(refusal(self.submit.stream, error)), Over()]

    def _allocated(self, cached_tokens: int) -> list[Effect]:
        if self.state != "queued":
            return []
        self.state = "running"
        effects: list[Effect] = [
            Say(Accepted(self.submit.stream, self._prompt_tokens, cached_tokens))
        ]
        if self.submit.leg == "decode":
            effects.append(GrantTransfer(cached_tokens))
        elif self.submit.leg == "prefill" and self._transfer_open:
            effects.append(ComputeStarted())
        return effects

    def _declined(self, code: str, message: str) -> list[Effect]:
        self._in_engine = False
        if self.state == "closing":
            return self._close()
        retryable = code in ("overloaded", "out_of_blocks")
        effects: list[Effect] = [
            Say(Refused(self.submit.stream, code, message, retryable, 0)),
            *self._cancel_transfer(code, message),
        ]
        self.state = "closing"
        return effects + self._close()

    # ---- tokens --------------------------------------------------------------------------------

    def _prefill_done(self, queue_ms: float, compute_ms: float) -> list[Effect]:
        self._queue_ms, self._prefill_ms = queue_ms, compute_ms
        effects: list[Effect] = [RecordPrefix(self._prompt_tokens)]
        if self.submit.leg == "prefill" and self._transfer_open:
            effects.append(ComputeEnded())
        return effects

    def _token(self, token: engine.Token) -> list[Effect]:
        if self.state != "running":
            return []  # a token that crossed a cancel
        assert self._text is not None
        assert token.index == len(self._ids), "the engine skipped an index"
        self._ids.append(token.id)
        delta = self._text.push([token.id])
        text, finish = delta.text, token.finish
        if delta.stopped:
            finish = "stop"
        elif finish in ("stop", "length"):
            text += self._text.flush()
        entry = StepEntry(self.submit.stream, token.index, [token.id], self._escape(text))
        effects: list[Effect] = [Emit(entry)]
        if finish == "handoff":
            self.state = "handoff"
            effects.append(CommitTransfer(list(self._ids)))
        elif finish in ("stop", "length"):
            reason: FinishReason = "stop" if finish == "stop" else "length"
            message = "the answer ended before the hand-over"
            effects += self._finish(reason, "answer_complete", message, in_engine=token.finish)
        return effects

    # ---- transfer ------------------------------------------------------------------------------

    def _committed(self, ids: list[int]) -> list[Effect]:
        self._transfer_open = False
        if self.state != "running":
            return []
        known = len(self._ids)
        if ids[:known] != self._ids or len(ids) <= known:
            text = "the prefill node's answer so far does not continue ours"
            return self._fail(TransferError(text, code="prompt_mismatch"))
        assert self._text is not None
        self._ids = list(ids)
        self._text.push(ids[known:])  # the prefill node has sent their text
        return [
            ToEngine(engine.Commit(self.transfer_id, ids)),
            RecordPrefix(self._prompt_tokens),
        ]

    def _transfer_done(self, report: TransferReport) -> list[Effect]:
        self._transfer_open = False
        if self.state != "handoff":
            return []
        self.state = "closing"
        return [Say(self._finished("handoff", report)), *self._release()]

    # ---- ends ----------------------------------------------------------------------------------

    def _finish(
        self, reason: FinishReason, code: str, message: str, in_engine: str = ""
    ) -> list[Effect]:
        """End well. ``in_engine`` is the engine's own finish: then it lets go by itself."""
        if self.state == "closing":
            return []
        preparing = self.state == "preparing"
        self.state = "closing"
        effects: list[Effect] = [
            Say(self._finished(reason, None)),
            *self._cancel_transfer(code, message),
        ]
        if in_engine not in ("stop", "length"):
            effects += self._drop()
        return effects if preparing else effects + self._close()

    def _fail(self, error: MeshError) -> list[Effect]:
        if self.state == "closing":
            return []
        preparing = self.state == "preparing"
        self.state = "closing"
        effects: list[Effect] = [
            Say(Failed(self.submit.stream, error.code, error.message, error.retryable)),
            *self._cancel_transfer(error.code, error.message),
            *self._drop(),
        ]
        return effects if preparing else effects + self._close()

    def _broken(self, error: MeshError, engine_gone: bool) -> list[Effect]:
        preparing = self.state == "preparing"
        if engine_gone:
            self._in_engine = False
        effects = self._fail(error)
        if engine_gone and not preparing and self.state == "closing":
            effects += self._close()
        return effects

    def _drop(self) -> list[Effect]:
        return [ToEngine(engine.Drop(self.seq))] if self._in_engine else []

    def _release(self) -> list[Effect]:
        return [ToEngine(engine.Release(self.transfer_id))]

    def _cancel_transfer(self, code: str, message: str) -> list[Effect]:
        if not self._transfer_open:
            return []
        self._transfer_open = False
        return [CancelTransfer(code, message)]

    def _close(self) -> list[Effect]:
        if self.state != "closing" or self._in_engine:
            return []
        self.state = "ended"
        return [Over()]

    def _finished(self, reason: FinishReason, report: TransferReport | None) -> Finished:
        return Finished(
            self.submit.stream, reason, len(self._ids), self._queue_ms, self._prefill_ms, report
        )


class Escape(Protocol):
    """JSON-escape a text, without the quotes."""

    def __call__(self, text: str, /) -> bytes: ...


def refusal(stream: int, error: MeshError) -> Refused:
    """The wire form of an error that stopped a leg before it began."""
    wait_ms = round(1000 * error.retry_after_s) if error.retry_after_s else 0
    return Refused(stream, error.code, error.message, error.retryable, wait_ms)
