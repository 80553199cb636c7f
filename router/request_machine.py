"""The life of one request: attempts, two legs, exactly-once relay, failover, one end.

Pure: ``effects = machine.handle(event, now)``; knows no socket, clock or HTTP.

    routing --Routed--> running --finish--> settling --handoff report or timeout--> done
     ^   |                 |
     |   Unroutable        a leg died
     |   v                 v
     +- waiting         salvaging (the decode node says what it kept) --> routing
     +----- Replan ------+

Each attempt from the beginning has its own stream number, so whatever an older attempt still says
is told apart and dropped. When only the decode node of an attempt dies before it spoke, the prefill
leg may go on with another one: that attempt keeps the stream, and ``router.attempt`` says why late
words of the lost node are still told apart. The kept leg is heard while a route is looked for, so
nothing that it says is lost.

Output indices are relayed in order, each exactly once: the decode node's index h may arrive before
the prefill node's last one and then waits (``router.token_relay``). A new attempt after the first
token submits the relayed ids as ``forced_ids`` and nodes answer with higher indices only, so a
failover in mid-stream needs no second mechanism.

Invariants: indices contiguous; ``EmitFinish`` or ``EmitError`` at most once and never both; nothing
but ``Done``/``SendCancel``/``CloseStream`` after it; every submitted leg has ended, or was
cancelled, by ``Done``.
"""

from __future__ import annotations

from typing import Literal, assert_never

from router.api.render import ClientFinish, Usage
from router.attempt import Attempt, begin, hand_on
from router.avoidance import AVOID_ENGINE_S, AVOID_S, Avoidance, NodeStart
from router.patience import Patience
from router.record import RequestRecord
from router.recovery import Broken
from router.request_events import (
    ClientGone,
    CloseLeg,
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
    Tick,
    Tokens,
    Unroutable,
)
from router.token_relay import TokenRelay
from wire.errors import DeadlineError, MeshError, PeerError, TransferError, error_from_code
from wire.messages import Accepted, Detached, Failed, Finished, Refused, StepEntry

SETTLE_S = 5.0
"""How long a complete answer waits for the prefill leg's transfer report before cancelling it."""

MAX_PEER_MESSAGE = 500
"""Characters of a peer's error text that are passed on."""

ANSWER_COMPLETE = "answer_complete"
"""Code with which a prefill node cancels a transfer because its token was the last one."""

Phase = Literal["routing", "running", "salvaging", "waiting", "settling", "done"]


class RequestMachine:
    """See the module. ``record`` is kept up to date for whoever asks what happened."""

    def __init__(self, spec: RequestSpec, record: RequestRecord, now: float) -> None:
        self.record = record
        self.phase: Phase = "routing"
        self._spec = spec
        self._started_at = now
        self._wake_at = spec.deadline  # of the phases that end by themselves
        self._relay = TokenRelay(spec.relayed)
        self._headers_sent = False
        self._number = 0
        self._attempt: Attempt | None = None
        self._prompt: Accepted | None = spec.accepted
        self._last_error: MeshError | None = None
        self._patience = Patience()
        self._avoid = Avoidance()
        self._kept: dict[NodeStart, int] = {}

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
        if self.phase in ("salvaging", "waiting"):
            return min(self._wake_at, self._spec.deadline)
        return self._wake_at if self.phase == "settling" else self._spec.deadline

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
            case Unroutable(error, final):
                return self._on_unroutable(error, final, now)
            case ClientGone(outcome):
                return self._on_client_gone(outcome, now)
            case Tick():
                return self._on_tick(now)
            case _:
                assert_never(event)

    # ---- attempts -----------------------------------------------------------------------------

    def _on_routed(self, event: Routed, now: float) -> list[Effect]:
        assert self.phase == "routing", "a route came without being asked for"
        old = self._attempt
        if event.keeps_prefill and (old is None or old.running_prefill(now) is None):
            return [self._replan(now)]  # the leg ended while the route was looked for
        self._number += 1
        effects: list[Effect] = []
        if event.keeps_prefill and old is not None:
            relayed = len(self._relay.ids)
            self._attempt, sends = hand_on(self._spec, old, event, self._number, relayed, now)
            effects += sends
        else:
            effects += self._drop_attempt()
            self._attempt, submits = begin(self._spec, event, self._number, self._relay.ids, now)
            effects += submits
        self.record.begin(self._attempt.record)
        self.phase = "running"
        return effects

    def _on_unroutable(self, error: MeshError, final: bool, now: float) -> list[Effect]:
        assert self.phase == "routing", "no route came without being asked for"
        pause = None if final else self._patience.no_route(now, bool(self._relay.ids))
        if pause is None:
            return self._end_in_error(error if final else self._last_error or error, now)
        self.phase, self._wake_at = "waiting", now + pause
        return []

    def _replan(self, now: float) -> Replan:
        """Ask for a route."""
        self.phase = "routing"
        running = None if self._attempt is None else self._attempt.running_prefill(now)
        return Replan(
            Broken(
                self._avoid.nodes(now),
                self._avoid.pairs(now),
                dict(self._kept),
                running,
                len(self._relay.ids),
            )
        )

    def _current(self, stream: int) -> Attempt | None:
        """The running attempt if ``stream`` is its own; anything else is stale and counted."""
        attempt = self._attempt
        if attempt is None or attempt.stream != stream:
            self.record.stale_messages += 1
            return None
        return attempt

    # ---- tokens -------------------------------------------------------------------------------

    def _on_tokens(self, node: str, entry: StepEntry, now: float) -> list[Effect]:
        attempt = self._current(entry.stream)
        if attempt is None:
            return []
        leg = attempt.open_legs.get(node)
        if leg is None or self.phase not in ("running", "routing", "waiting"):
            self.record.stale_messages += 1  # said after its end, or while stopping
            return []
        try:
            ready = self._relay.add(node, entry, may_wait=attempt.prefill_open())
        except PeerError as error:
            return self._fail(node, error, now)
        if leg == "decode":
            attempt.decode_spoke = True
        else:
            attempt.prefill_spoke = True
        effects: list[Effect] = []
        if ready:
            self._patience.progress()
            if not self._headers_sent:
                self.record.ttft_ms = (now - self._started_at) * 1e3
                effects.append(self._headers(attempt))
        effects += [EmitText(item.text, item.index + len(item.ids)) for item in ready if item.text]
        if attempt.finish is not None:
            effects += self._finish_if_complete(attempt, now)
        return effects

    def _headers(self, attempt: Attempt) -> Effect:
        self._headers_sent = True
        return EmitHeaders(attempt.route.prefill, attempt.route.decode)

    # ---- control messages ---------------------------------------------------------------------

    def _on_node(
        self, node: str, message: Accepted | Refused | Finished | Failed | Detached, now: float
    ) -> list[Effect]:
        attempt = self._current(message.stream)
        if attempt is None:
            return []
        if node in attempt.closing:
            return self._on_closing(attempt, node, message, now)
        if node not in attempt.open_legs:
            self.record.stale_messages += 1
            return []
        match message:
            case Accepted():
                return self._on_accepted(attempt, node, message)
            case Detached():
                return self._on_detached(attempt, node, message, now)
            case Finished():
                return self._on_finished(attempt, node, message, now)
            case Refused() | Failed():
                return self._on_broken(attempt, node, message, now)
            case _:
                assert_never(message)

    def _on_accepted(self, attempt: Attempt, node: str, message: Accepted) -> list[Effect]:
        if attempt.open_legs[node] == "decode":
            attempt.decode_accepted = True
            return []
        attempt.prefill_accepted = True
        if self._prompt is None:
            self._prompt = message
        return []

    def _on_closing(
        self,
        attempt: Attempt,
        node: str,
        message: Accepted | Refused | Finished | Failed | Detached,
        now: float,
    ) -> list[Effect]:
        """A node that was told to stop answers."""
        if isinstance(message, Accepted):  # a long Submit was overtaken by its Cancel
            return [SendCancel(node, attempt.stream)]
        if isinstance(message, Detached):
            return []
        if not isinstance(message, Refused):
            self._keep(attempt.closing[node], message.kept_tokens)
        return self._closed(attempt, node, now)

    def _closed(self, attempt: Attempt, node: str, now: float) -> list[Effect]:
        """The end of a leg that was told to stop is known."""
        del attempt.closing[node]
        effects: list[Effect] = [CloseLeg(node, attempt.stream)]
        if self.phase == "salvaging" and attempt.route.decode not in attempt.closing:
            effects += [*self._drop_attempt(), self._replan(now)]
        return effects

    def _keep(self, node: NodeStart, tokens: int) -> None:
        if tokens > 0:
            self._kept[node] = tokens

    def _on_broken(
        self, attempt: Attempt, node: str, message: Refused | Failed, now: float
    ) -> list[Effect]:
        retry_after_s = None
        if isinstance(message, Refused):
            retry_after_s = message.retry_after_ms / 1e3 or None
        else:
            self._keep(attempt.start_of(node), message.kept_tokens)
        error = error_from_code(
            message.code,
            f"{node}: {message.message[:MAX_PEER_MESSAGE]}",
            retryable=message.retryable,
            request_id=self._spec.request_id,
            retry_after_s=retry_after_s,
        )
        leg = attempt.open_legs.pop(node)
        if leg == "decode" and message.code == ANSWER_COMPLETE:
            return []  # the prefill node's own finish is on its way
        # Before it spoke, a decode leg may only repeat what went wrong at the transfer's other end.
        repeats = leg == "decode" and isinstance(message, Failed) and not attempt.decode_spoke
        return self._lost_leg(attempt, node, error, now, blame_pair=repeats)

    def _on_detached(
        self, attempt: Attempt, node: str, message: Detached, now: float
    ) -> list[Effect]:
        """The prefill leg lost its transfer, waits for another one and keeps its KV meanwhile."""
        if self.phase == "settling":
            return self._close()
        if message.attempt != attempt.number or not attempt.prefill_open():
            self.record.stale_messages += 1  # of the transfer before the present one
            return []
        if self.phase != "running":
            return []  # its decode node is known to be lost
        if attempt.decode_spoke:  # the hand-over was complete, only its report is lost
            return [] if self._relay.has_gap else self._stop(attempt, node)
        error = error_from_code(
            message.code,
            f"{node}: {message.message[:MAX_PEER_MESSAGE]}",
            retryable=True,
            request_id=self._spec.request_id,
        )
        return self._fail(attempt.route.decode, error, now, blame_pair=True)

    def _on_finished(
        self, attempt: Attempt, node: str, message: Finished, now: float
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

    def _finish_if_complete(self, attempt: Attempt, now: float) -> list[Effect]:
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
            self.phase, self._wake_at = "settling", now + SETTLE_S
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
        if attempt is None:
            return []
        if node in attempt.closing:
            return self._closed(attempt, node, now)
        if attempt.open_legs.pop(node, None) is None:
            return []
        error = PeerError(f"the link to {node} was lost", code="link_lost")
        return self._lost_leg(attempt, node, error, now)

    def _lost_leg(
        self,
        attempt: Attempt,
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
        """Give up this attempt because of ``node`` and go on another way, or end in an error."""
        attempt = self._attempt
        assert attempt is not None
        searching = self.phase != "running"  # only the prefill leg was left, and now broke as well
        if not searching:
            attempt.record.outcome, attempt.record.message = error.code, error.message
        relayed, limit = len(self._relay.ids), self._spec.sampling.max_tokens
        if limit is not None and relayed >= limit:  # only the finish was lost
            return self._emit_finish("length", now) + self._close()
        self._last_error = error
        if not error.retryable:
            return self._end_in_error(error, now)
        if searching:
            return self._drop_attempt()
        fruitful = relayed > attempt.relayed_before
        pause = self._patience.attempt_failed(error, fruitful, bool(relayed), now)
        if pause is None:
            return self._end_in_error(error, now)
        self._blame(attempt, node, error, now, blame_pair)
        return self._break_up(attempt, node, pause, now)

    def _blame(self, attempt: Attempt, node: str, error: MeshError, now: float, pair: bool) -> None:
        """Remember whom to avoid; of a hand-over either end may be at fault."""
        if pair or isinstance(error, TransferError):
            self._avoid.add_pair(attempt.pair, now + AVOID_S)
        else:
            for_s = AVOID_ENGINE_S if error.code == "engine_died" else AVOID_S
            self._avoid.add_node(attempt.start_of(node), now + for_s)

    def _break_up(self, attempt: Attempt, node: str, pause: float, now: float) -> list[Effect]:
        """Keep the prefill leg if it may go on, else what the decode node got of its KV, else
        nothing; then look for a route in ``pause`` seconds."""
        stream, decode = attempt.stream, attempt.route.decode
        effects: list[Effect] = []
        if node == attempt.route.prefill and attempt.prefill_open():
            effects += self._stop(attempt, node)
        if attempt.running_prefill(now) is not None:
            if attempt.decode_open():
                effects += self._stop(attempt, decode)
            else:
                effects.append(CloseLeg(decode, stream))
        elif attempt.salvageable() and self._spec.salvage_s > 0:
            self.phase, self._wake_at = "salvaging", now + self._spec.salvage_s
            return effects + self._stop(attempt, decode)
        else:
            effects += self._drop_attempt()
        if pause <= 0.0:
            return [*effects, self._replan(now)]
        self.phase, self._wake_at = "waiting", now + pause
        return effects

    def _stop(self, attempt: Attempt, node: str) -> list[Effect]:
        """Cancel one leg; its end will be heard."""
        del attempt.open_legs[node]
        attempt.closing[node] = attempt.start_of(node)
        return [SendCancel(node, attempt.stream)]

    # ---- ends ---------------------------------------------------------------------------------

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
            if self._attempt is not None and self.phase == "running":
                self._attempt.record.outcome = outcome
        return self._close()

    def _on_tick(self, now: float) -> list[Effect]:
        if now < self.next_deadline():
            return []
        if self.phase == "settling":
            return self._close()
        if now < self._spec.deadline:
            if self.phase == "salvaging":
                return [*self._drop_attempt(), self._replan(now)]
            return [self._replan(now)]
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
