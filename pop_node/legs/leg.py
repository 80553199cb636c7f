"""One leg of one attempt on this node, decided without IO.

A leg is what a ``Submit`` becomes: prompt ids, a sequence in the engine, possibly one end of a KV
transfer, and the words that go back to the router. This machine owns their order and makes sure
that the router hears exactly one ending and that engine and KV stream are told to let go exactly
once; ``pop_node.hosting.model_host`` carries the effects out. It knows no socket, engine or clock.

    preparing --Prepared--> queued --Allocated--> running --token 0 of a prefill leg--> handoff
                                                     \\--finish--> closing --engine let go--> ended

A prefill leg whose transfer breaks is *detached*: it computes on and keeps its blocks, says so, and
waits a bounded time for another decode node (``Retargeted``) in whatever state it is. A decode leg
that ends while its KV comes in says how much of it stays in this node's cache.
"""

from __future__ import annotations

from typing import Literal, assert_never

import msgspec

from pop_node.answers.answers import Answer
from pop_node.engine import messages as engine
from pop_node.legs import events as ev
from pop_node.legs.refusal import refusal
from pop_node.legs.sequence import sequence_of
from wire.errors import MeshError, PeerError
from wire.messages import (
    MIN_VERSION,
    Accepted,
    Detached,
    Failed,
    Finished,
    FinishReason,
    Refused,
    StepEntry,
    Submit,
    Transfer,
    TransferReport,
)

State = Literal["preparing", "queued", "running", "handoff", "closing", "ended"]

DETACHED_VERSION = 2
"""First version of the mesh wire that knows ``Detached`` and ``Retarget``."""

INCURABLE = frozenset({"prompt_mismatch", "spec_mismatch"})
"""Both sides were told different things: another decode node would say the same."""


class Leg:
    """State machine of one leg.

    ``seq`` is its number in the engine, ``version`` that of the mesh wire to its router. ``submit``
    is what the router wants by now: a ``Retargeted`` changes its attempt and transfer.
    """

    def __init__(
        self,
        seq: int,
        submit: Submit,
        stop_ids: frozenset[int],
        escape_json: ev.Escape,
        version: int = MIN_VERSION,
    ) -> None:
        self.seq = seq
        self.submit = submit
        self.state: State = "preparing"
        self._stop_ids = stop_ids
        self._escape = escape_json
        self._version = version
        self._text: ev.TextDeltas | None = None
        self._prompt_tokens = 0
        self._cached_tokens = 0
        self._reason = ""
        self._ids: list[int] = list(submit.forced_ids)
        self._in_engine = False
        self._transfer_open = False
        self._detached_by: MeshError | None = None
        self._given: list[int] = []  # what a prefill leg computes and hands over
        self._is_computed = False
        self._queue_ms = 0.0
        self._prefill_ms = 0.0

    @property
    def transfer_id(self) -> bytes:
        """The 16-byte transfer id, empty when the leg has no transfer."""
        return self.submit.transfer.id if self.submit.transfer is not None else b""

    def answer(self) -> Answer | None:
        """What there is of the answer; None before the first token of it is known."""
        if self._text is None or not self._ids:
            return None
        return Answer(
            self.submit, list(self._ids), self._prompt_tokens, self._cached_tokens, self._reason
        )

    def handle(self, event: ev.Event) -> list[ev.Effect]:
        """Advance by one event."""
        if self.state == "ended":
            return []
        match event:
            case ev.Prepared():
                return self._prepared(event)
            case ev.PrepareFailed(error):
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
            case ev.TransferCommitted(ids):
                return self._committed(ids)
            case ev.TransferDone(report):
                return self._transfer_done(report)
            case ev.TransferFailed(error, kept_tokens):
                return self._transfer_failed(error, kept_tokens)
            case ev.Retargeted(attempt, transfer):
                return self._retargeted(attempt, transfer)
            case ev.WaitedEnough():
                waited_for, self._detached_by = self._detached_by, None
                return [] if waited_for is None else self._fail(waited_for)
            case ev.Cancelled(kept_tokens):
                message = "the router cancelled the request"
                return self._finish("cancelled", "cancelled", message, kept_tokens=kept_tokens)
            case ev.Broken():
                return self._broken(event)
            case _:
                assert_never(event)

    # ---- start ---------------------------------------------------------------------------------

    def _prepared(self, event: ev.Prepared) -> list[ev.Effect]:
        if self.state == "closing":  # cancelled while the tokeniser ran
            self.state = "ended"
            return [ev.Over()]
        submit = self.submit
        self._text = event.text
        self._prompt_tokens = len(event.prompt_ids)
        if submit.forced_ids:
            stopped = event.text.push(submit.forced_ids).stopped  # already read by the client
            at_end = submit.forced_ids[-1] in self._stop_ids
            if stopped or (at_end and not submit.sampling.ignore_eos):
                return self._complete_already()
        self.state, self._in_engine = "queued", True
        add = sequence_of(self.seq, submit, event, self._stop_ids)
        effects: list[ev.Effect] = [ev.ToEngine(add)]
        if submit.leg != "both":
            self._transfer_open = True
            self._given = event.prompt_ids + submit.forced_ids
            effects.append(
                ev.OpenTransfer(self._given)
                if submit.leg == "prefill"
                else ev.ExpectTransfer(self._given)
            )
        return effects

    def _complete_already(self) -> list[ev.Effect]:
        """The forced ids are the whole answer: an earlier attempt lost only its finish."""
        self.state, self._reason = "ended", "stop"
        accepted = Accepted(self.submit.stream, self._prompt_tokens, 0)
        said = [ev.Say(accepted), ev.Say(self._finished("stop", None))]
        return [*self._stop_waiting(), *said, ev.Over()]

    def _prepare_failed(self, error: MeshError) -> list[ev.Effect]:
        if self.state not in ("preparing", "closing"):
            return self._fail(error)  # it broke on the way into the engine
        closing = self.state == "closing"
        self.state = "ended"
        return [ev.Over()] if closing else [ev.Say(refusal(self.submit.stream, error)), ev.Over()]

    def _allocated(self, cached_tokens: int) -> list[ev.Effect]:
        if self.state != "queued":
            return []
        self.state, self._cached_tokens = "running", cached_tokens
        effects: list[ev.Effect] = [
            ev.Say(Accepted(self.submit.stream, self._prompt_tokens, cached_tokens))
        ]
        if self.submit.leg == "decode":
            effects.append(ev.GrantTransfer(cached_tokens))
        elif self.submit.leg == "prefill" and self._transfer_open:
            effects.append(ev.ComputeStarted())
        return effects

    def _declined(self, code: str, message: str) -> list[ev.Effect]:
        self._in_engine = False
        if self.state == "closing":
            return self._close()
        if self.state != "queued":
            # It ran: its commit made no sense, or no token could be drawn for it.
            return self._fail(PeerError(message, code=code))
        retryable = code in ("overloaded", "out_of_blocks")
        effects: list[ev.Effect] = [
            ev.Say(Refused(self.submit.stream, code, message, retryable, 0)),
            *self._stop_waiting(),
            *self._cancel_transfer(code, message),
        ]
        self.state = "closing"
        return effects + self._close()

    # ---- tokens --------------------------------------------------------------------------------

    def _prefill_done(self, queue_ms: float, compute_ms: float) -> list[ev.Effect]:
        self._queue_ms, self._prefill_ms = queue_ms, compute_ms
        self._is_computed = True
        effects: list[ev.Effect] = [ev.RecordPrefix(self._prompt_tokens, self._prompt_tokens)]
        if self.submit.leg == "prefill" and self._transfer_open:
            effects.append(ev.ComputeEnded())
        return effects

    def _token(self, token: engine.Token) -> list[ev.Effect]:
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
        effects: list[ev.Effect] = [ev.Emit(entry)]
        if finish == "handoff":
            self.state = "handoff"
            if self._transfer_open:
                effects.append(self._commit_transfer())
        elif finish in ("stop", "length"):
            reason: FinishReason = "stop" if finish == "stop" else "length"
            self._reason = reason
            message = "the answer ended before the hand-over"
            effects += self._finish(reason, "answer_complete", message, in_engine=token.finish)
        return effects

    # ---- transfer ------------------------------------------------------------------------------

    def _committed(self, ids: list[int]) -> list[ev.Effect]:
        self._transfer_open = False
        if self.state != "running":
            return []
        assert self._text is not None
        self._ids += ids
        self._text.push(ids)  # the prefill node has sent their text
        return [
            ev.ToEngine(engine.Commit(self.transfer_id, list(self._ids))),
            ev.RecordPrefix(self._prompt_tokens, self._prompt_tokens),
        ]

    def _transfer_done(self, report: TransferReport) -> list[ev.Effect]:
        self._transfer_open = False
        if self.state != "handoff":
            return []
        self.state = "closing"
        return [ev.Say(self._finished("handoff", report)), *self._release()]

    def _transfer_failed(self, error: MeshError, kept_tokens: int) -> list[ev.Effect]:
        kept_tokens = self._keepable(kept_tokens)
        self._transfer_open = False
        lasting = self.state in ("queued", "running", "handoff") and self.submit.leg == "prefill"
        curable = error.retryable and error.code not in INCURABLE
        if not (lasting and curable and self._version >= DETACHED_VERSION):
            return self._fail(error, kept_tokens)
        self._detached_by = error
        submit = self.submit
        said = Detached(submit.stream, submit.attempt, error.code, error.message)
        return [ev.Say(said), ev.AwaitRetarget()]

    def _retargeted(self, attempt: int, transfer: Transfer) -> list[ev.Effect]:
        """Hand the same KV to another decode node; what is computed stays as it is."""
        if self.submit.leg != "prefill" or self.state == "closing":
            return []
        old = self.transfer_id
        effects: list[ev.Effect] = [
            *self._stop_waiting(),
            *self._cancel_transfer("transfer_failed", "the KV goes to another decode node"),
        ]
        self.submit = msgspec.structs.replace(self.submit, attempt=attempt, transfer=transfer)
        if self.state == "preparing":
            return effects
        self._transfer_open = True
        effects.append(ev.ToEngine(engine.Retarget(old, self.transfer_id)))
        effects.append(ev.OpenTransfer(self._given))
        if self.state != "queued":
            effects.append(ev.ComputeStarted())
        if self._is_computed:
            effects.append(ev.ComputeEnded())
        if self.state == "handoff":
            effects.append(self._commit_transfer())
        return effects

    def _commit_transfer(self) -> ev.CommitTransfer:
        return ev.CommitTransfer(self._ids[len(self.submit.forced_ids) :])

    # ---- ends ----------------------------------------------------------------------------------

    def _finish(
        self,
        reason: FinishReason,
        code: str,
        message: str,
        in_engine: str = "",
        kept_tokens: int = 0,
    ) -> list[ev.Effect]:
        """End well. ``in_engine`` is the engine's own finish: then it lets go by itself."""
        kept = self._keepable(kept_tokens)
        said = self._finished(reason, None, kept)
        return self._end(said, code, message, kept, drop=in_engine not in ("stop", "length"))

    def _fail(self, error: MeshError, kept_tokens: int = 0) -> list[ev.Effect]:
        said = Failed(self.submit.stream, error.code, error.message, error.retryable, kept_tokens)
        return self._end(said, error.code, error.message, kept_tokens, drop=True)

    def _broken(self, event: ev.Broken) -> list[ev.Effect]:
        preparing = self.state == "preparing"
        if event.engine_gone:
            self._in_engine = False
        effects = self._fail(event.error, self._keepable(event.kept_tokens))
        if event.engine_gone and not preparing and self.state == "closing":
            effects += self._close()
        return effects

    def _end(
        self, said: Finished | Failed, code: str, message: str, kept_tokens: int, *, drop: bool
    ) -> list[ev.Effect]:
        """Say the ending, unless one was said, and let go of everything."""
        if self.state == "closing":
            return []
        preparing = self.state == "preparing"
        self.state = "closing"
        effects: list[ev.Effect] = [
            ev.Say(said),
            *self._stop_waiting(),
            *self._cancel_transfer(code, message),
        ]
        if drop and self._in_engine:
            effects.append(ev.ToEngine(engine.Drop(self.seq, kept_tokens)))
        if kept_tokens:
            held = min(kept_tokens, self._prompt_tokens)
            effects.append(ev.RecordPrefix(self._prompt_tokens, held))
        return effects if preparing else effects + self._close()

    def _keepable(self, kept_tokens: int) -> int:
        """Tokens whose KV a broken hand-over leaves here; only a leg that receives has any."""
        receiving = self.submit.leg == "decode" and self.state == "running" and self._transfer_open
        return kept_tokens if receiving and self._in_engine else 0

    def _stop_waiting(self) -> list[ev.Effect]:
        if self._detached_by is None:
            return []
        self._detached_by = None
        return [ev.StopWaiting()]

    def _release(self) -> list[ev.Effect]:
        return [ev.ToEngine(engine.Release(self.transfer_id))]

    def _cancel_transfer(self, code: str, message: str) -> list[ev.Effect]:
        if not self._transfer_open:
            return []
        self._transfer_open = False
        return [ev.CancelTransfer(code, message, self.transfer_id)]

    def _close(self) -> list[ev.Effect]:
        if self.state != "closing" or self._in_engine:
            return []
        self.state = "ended"
        return [ev.Over()]

    def _finished(
        self, reason: FinishReason, report: TransferReport | None, kept_tokens: int = 0
    ) -> Finished:
        return Finished(
            self.submit.stream,
            reason,
            len(self._ids),
            self._queue_ms,
            self._prefill_ms,
            report,
            kept_tokens,
        )
