"""The life of one request: attempts, two legs, exactly-once relay, failover, one end.

Pure: ``effects = machine.handle(event, now)``; knows no socket, clock or HTTP.

    routing --Routed--> running --finish--> settling --handoff report or timeout--> done
       ^                   |
       +----- Replan ------+   (a leg died, attempts and routes are left)

Each attempt has its own stream number, so whatever an older attempt still says is told apart and
dropped. Output indices are relayed in order, each exactly once: the decode node's index h may
arrive before the prefill node's last one and then waits (``router.token_relay``). A new attempt
after the first token submits the relayed ids as ``forced_ids`` and nodes answer with higher
indices only, so a failover in mid-stream needs no second mechanism.

Invariants: indices contiguous; ``EmitFinish`` or ``EmitError`` at most once and never both; nothing
but ``Done``/``SendCancel``/``CloseStream`` after it; every submitted leg has ended, or was
cancelled, by ``Done``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from router.api.render import ClientFinish, Usage
from router.policy import Route
from router.record import AttemptRecord, RequestRecord
from router.request_events import (
    ClientGone,
    CloseStream,
    Done,
    Effect,
    EmitError,
    EmitFinish,
    EmitHeaders,
    EmitText,
    Event,
    LinkLost,
    NodeSaid,
    Replan,
    RequestSpec,
    Routed,
    SendCancel,
    SendSubmit,
    Tick,
    Tokens,
    Unroutable,
)
from router.token_relay import TokenRelay
from wire.errors import DeadlineError, MeshError, PeerError, TransferError, error_from_code
from wire.messages import (
    Accepted,
    Failed,
    Finished,
    Leg,
    Refused,
    StepEntry,
    Submit,
    Transfer,
)

MAX_ATTEMPTS = 4
"""Tries of one request, the first included. Guess: with four sites down there is no fifth."""

SETTLE_S = 5.0
"""How long a complete answer waits for the prefill leg's transfer report before cancelling it."""

MAX_PEER_MESSAGE = 500
"""Characters of a peer's error text that are passed on."""

ANSWER_COMPLETE = "answer_complete"
"""Code with which a prefill node cancels a transfer because its token was the last one."""

Phase = Literal["routing", "running", "settling", "done"]


@dataclass(slots=True)
class _Attempt:
    """The running try. ``open_legs`` maps nodes to the leg they still owe an end for."""

    route: Route
    stream: int
    open_legs: dict[str, Leg]
    record: AttemptRecord
    finish: Finished | None = None
    decode_spoke: bool = False

    def prefill_open(self) -> bool:
        """The prefill leg of a pair may still say something."""
        return self.open_legs.get(self.route.prefill) == "prefill"


class RequestMachine:
    """See the module. ``record`` is kept up to date for whoever asks what happened."""

    def __init__(self, spec: RequestSpec, record: RequestRecord, now: float) -> None:
        self.record = record
        self.phase: Phase = "routing"
        self._spec = spec
        self._started_at = now
        self._settle_at = spec.deadline
        self._relay = TokenRelay(spec.relayed)
        self._headers_sent = False
        self._attempt: _Attempt | None = None
        self._prompt: Accepted | None = spec.accepted
        self._last_error: MeshError | None = None
        self._avoid_nodes: frozenset[str] = frozenset()
        self._avoid_pairs: frozenset[tuple[str, str]] = frozenset()

    @property
    def spec(self) -> RequestSpec:
        """The request as it was given."""
        return self._spec

    @property
    def relayed(self) -> list[int]:
        """Output tokens relayed so far, those of a resumed answer included; not to be changed."""
        return self._relay.ids

    @property
    def accepted(self) -> Accepted | None:
        """What the first prefill leg said of the prompt."""
        return self._prompt

    def next_deadline(self) -> float:
        """When the machine wants a ``Tick``, on the router's clock in seconds."""
        return self._settle_at if self.phase == "settling" else self._spec.deadline

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Effects to carry out, in order."""
        if self.phase == "done":
            self.record.stale_messages += 1
            return []
        match event:
            case Tokens(node, entry):
                return self._on_tokens(node, entry, now)
            case NodeSaid(node, message):
                return self._on_node(node, message, now)
            case LinkLost(node):
                return self._on_link_lost(node, now)
            case Routed():
                return self._on_routed(event, now)
            case Unroutable(error):
                return self._end_in_error(self._last_error or error, now)
            case ClientGone(outcome):
                return self._on_client_gone(outcome, now)
            case Tick():
                return self._on_tick(now)
            case _:
                assert_never(event)

    # ---- attempts -----------------------------------------------------------------------------

    def _on_routed(self, event: Routed, now: float) -> list[Effect]:
        assert self.phase == "routing", "a route came without being asked for"
        route, stream = event.route, event.stream
        number = len(self.record.attempts) + 1
        record = AttemptRecord(number, route, forced_tokens=len(self._relay.ids))
        self.record.attempts.append(record)
        legs: list[tuple[str, Leg, Transfer | None]]
        if route.prefill == route.decode:
            legs = [(route.prefill, "both", None)]
        else:
            to_decode = Transfer(event.transfer_id, route.decode, event.kv_address)
            from_prefill = Transfer(event.transfer_id, route.prefill, "")
            legs = [(route.prefill, "prefill", to_decode), (route.decode, "decode", from_prefill)]
        self._attempt = _Attempt(route, stream, {node: leg for node, leg, _ in legs}, record)
        self.phase = "running"
        return [
            SendSubmit(node, self._submit(stream, number, leg, transfer, now))
            for node, leg, transfer in legs
        ]

    def _submit(
        self, stream: int, number: int, leg: Leg, transfer: Transfer | None, now: float
    ) -> Submit:
        spec = self._spec
        return Submit(
            stream=stream,
            request_id=spec.request_id,
            attempt=number,
            leg=leg,
            model=spec.model,
            tenant=spec.tenant,
            input=spec.input,
            sampling=spec.sampling,
            forced_ids=list(self._relay.ids),
            transfer=transfer,
            chain=spec.chain,
            deadline_remaining_ms=max(1, int((spec.deadline - now) * 1e3)),
        )

    def _current(self, stream: int) -> _Attempt | None:
        """The running attempt if ``stream`` is its own; anything else is stale and counted."""
        attempt = self._attempt
        if attempt is None or attempt.stream != stream:
            self.record.stale_messages += 1
            return None
        return attempt

    # ---- tokens -------------------------------------------------------------------------------

    def _on_tokens(self, node: str, entry: StepEntry, now: float) -> list[Effect]:
        attempt = self._current(entry.stream)
        if attempt is None or self.phase != "running":
            return []
        leg = attempt.open_legs.get(node)
        if leg is None:  # said after its end
            self.record.stale_messages += 1
            return []
        if leg == "decode":
            attempt.decode_spoke = True
        try:
            ready = self._relay.add(node, entry, may_wait=attempt.prefill_open())
        except PeerError as error:
            return self._fail(node, error, now)
        effects: list[Effect] = []
        if ready and not self._headers_sent:
            self.record.ttft_ms = (now - self._started_at) * 1e3
            effects.append(self._headers(attempt))
        effects += [EmitText(item.text, item.index + len(item.ids)) for item in ready if item.text]
        if attempt.finish is not None:
            effects += self._finish_if_complete(attempt, now)
        return effects

    def _headers(self, attempt: _Attempt) -> Effect:
        self._headers_sent = True
        return EmitHeaders(attempt.route.prefill, attempt.route.decode)

    # ---- control messages ---------------------------------------------------------------------

    def _on_node(
        self, node: str, message: Accepted | Refused | Finished | Failed, now: float
    ) -> list[Effect]:
        attempt = self._current(message.stream)
        if attempt is None or node not in attempt.open_legs:
            return []
        match message:
            case Accepted():
                if self._prompt is None and attempt.open_legs[node] != "decode":
                    self._prompt = message
                return []
            case Finished():
                return self._on_finished(attempt, node, message, now)
            case Refused() | Failed():
                error = error_from_code(
                    message.code,
                    f"{node}: {message.message[:MAX_PEER_MESSAGE]}",
                    retryable=message.retryable,
                    request_id=self._spec.request_id,
                    retry_after_s=(
                        message.retry_after_ms / 1e3 or None
                        if isinstance(message, Refused)
                        else None
                    ),
                )
                leg = attempt.open_legs.pop(node)
                if leg == "decode" and message.code == ANSWER_COMPLETE:
                    return []  # the prefill node's own finish is on its way
                if leg == "decode" and isinstance(message, Failed) and not attempt.decode_spoke:
                    # It may only repeat what went wrong at the other end of the transfer.
                    return self._lost_leg(attempt, node, error, now, blame_pair=True)
                return self._lost_leg(attempt, node, error, now)
            case _:
                assert_never(message)

    def _on_finished(
        self, attempt: _Attempt, node: str, message: Finished, now: float
    ) -> list[Effect]:
        leg = attempt.open_legs.pop(node)
        if leg != "decode":
            self.record.node_queue_ms = message.queue_ms
            self.record.node_prefill_ms = message.prefill_ms
            self.record.transfer = message.transfer
        if self.phase == "settling":
            return self._close()
        if message.reason == "cancelled" or (message.reason == "handoff" and leg != "prefill"):
            error = PeerError(f"{node} ended the stream without being asked", code="peer_failed")
            return self._lost_leg(attempt, node, error, now)
        if message.reason != "handoff":
            attempt.finish = message
        elif len(self._relay.ids) < message.completion_tokens:
            wrong = _miscounted(message.completion_tokens, len(self._relay.ids))
            return self._fail(node, wrong, now)
        return self._finish_if_complete(attempt, now)

    def _finish_if_complete(self, attempt: _Attempt, now: float) -> list[Effect]:
        """End the request once all tokens that the finish counts are relayed.

        A decode leg may finish before the prefill node's tokens are here. When nobody is left who
        could say a missing one, the attempt has failed.
        """
        finish, prefill = attempt.finish, attempt.route.prefill
        if finish is None:
            if self._relay.has_gap and not attempt.prefill_open():
                return self._fail(prefill, self._relay.missing(prefill), now)
            return []
        count = len(self._relay.ids)
        if self._relay.has_gap or count != finish.completion_tokens:
            by_decode = attempt.route.decode not in attempt.open_legs
            if by_decode and attempt.prefill_open() and count <= finish.completion_tokens:
                return []
            return self._fail(prefill, _miscounted(finish.completion_tokens, count), now)
        effects: list[Effect] = [] if self._headers_sent else [self._headers(attempt)]
        reason: ClientFinish = "length" if finish.reason == "length" else "stop"
        attempt.record.outcome = reason
        effects += self._emit_finish(reason, now)
        if attempt.prefill_open() and attempt.decode_spoke:  # its report is about to come
            self.phase = "settling"
            self._settle_at = now + SETTLE_S
            return effects
        return effects + self._close()

    def _emit_finish(self, reason: ClientFinish, now: float) -> list[Effect]:
        self.record.usage = usage = self._usage(len(self._relay.ids))
        self.record.outcome = reason
        self.record.total_ms = (now - self._started_at) * 1e3
        return [EmitFinish(reason, usage)]

    def _usage(self, completion_tokens: int) -> Usage:
        prompt = self._prompt
        if prompt is None:
            return Usage(0, 0, completion_tokens)
        return Usage(prompt.prompt_tokens, prompt.cached_tokens, completion_tokens)

    # ---- failures -----------------------------------------------------------------------------

    def _on_link_lost(self, node: str, now: float) -> list[Effect]:
        attempt = self._attempt
        if attempt is None or attempt.open_legs.pop(node, None) is None:
            return []
        error = PeerError(f"the link to {node} was lost", code="link_lost")
        return self._lost_leg(attempt, node, error, now)

    def _lost_leg(
        self,
        attempt: _Attempt,
        node: str,
        error: MeshError,
        now: float,
        blame_pair: bool = False,
    ) -> list[Effect]:
        """A leg that is already gone from ``open_legs`` ended badly."""
        if self.phase == "settling":
            return self._close()
        only_report_lost = (
            node == attempt.route.prefill
            and attempt.route.decode in attempt.open_legs
            and attempt.decode_spoke
            and not self._relay.has_gap
        )
        if only_report_lost:  # decode runs, so the hand-over was complete
            return []
        return self._fail(node, error, now, blame_pair)

    def _fail(
        self, node: str, error: MeshError, now: float, blame_pair: bool = False
    ) -> list[Effect]:
        """Give up this attempt because of ``node`` and try another route, or end in an error."""
        attempt = self._attempt
        assert attempt is not None
        attempt.record.outcome, attempt.record.message = error.code, error.message
        limit = self._spec.sampling.max_tokens
        if limit is not None and len(self._relay.ids) >= limit:  # only the finish was lost
            return self._emit_finish("length", now) + self._close()
        effects = self._drop_attempt()
        self._last_error = error
        if not error.retryable or len(self.record.attempts) >= MAX_ATTEMPTS:
            return effects + self._end_in_error(error, now)
        if blame_pair or isinstance(error, TransferError):  # either end may be at fault
            pair = (attempt.route.prefill, attempt.route.decode)
            self._avoid_pairs = self._avoid_pairs | {pair}
        else:
            self._avoid_nodes = self._avoid_nodes | {node}
        self.phase = "routing"
        effects.append(Replan(self._avoid_nodes, self._avoid_pairs))
        return effects

    def _end_in_error(self, error: MeshError, now: float) -> list[Effect]:
        effects = self._drop_attempt()
        self.record.outcome = error.code
        self.record.total_ms = (now - self._started_at) * 1e3
        self.phase = "done"
        return [*effects, EmitError(error), Done()]

    def _on_client_gone(self, outcome: str, now: float) -> list[Effect]:
        if self.phase != "settling":
            self.record.outcome = outcome
            self.record.total_ms = (now - self._started_at) * 1e3
            if self._attempt is not None:
                self._attempt.record.outcome = outcome
        return self._close()

    def _on_tick(self, now: float) -> list[Effect]:
        if now < self.next_deadline():
            return []
        if self.phase == "settling":
            return self._close()
        return self._end_in_error(
            DeadlineError(
                "the request's deadline passed", request_id=self._spec.request_id, retryable=False
            ),
            now,
        )

    def _close(self) -> list[Effect]:
        effects = self._drop_attempt()
        self.phase = "done"
        effects.append(Done())
        return effects

    def _drop_attempt(self) -> list[Effect]:
        """Cancel what still runs of the attempt and forget its stream."""
        attempt = self._attempt
        if attempt is None:
            return []
        self._attempt = None
        self._relay.forget_waiting()
        effects: list[Effect] = [SendCancel(node, attempt.stream) for node in attempt.open_legs]
        effects.append(CloseStream(attempt.stream))
        return effects


def _miscounted(claimed: int, relayed: int) -> PeerError:
    return PeerError(
        f"the nodes counted {claimed} tokens, {relayed} arrived", code="protocol_error"
    )
