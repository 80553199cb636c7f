"""The life of one request: attempts, two legs, exactly-once relay, failover, one end.

Pure: ``effects = machine.handle(event, now)``; knows no socket, clock or HTTP.

    routing --Routed--> running --finish--> settling --handoff report or timeout--> done
     ^   |                 |
     |   Unroutable        a leg died
     |   v                 v
     +- waiting         salvaging (the decode node says what it kept) --> routing
     +----- Replan ------+

Each attempt from the beginning has its own stream number, so whatever an older one still says is
told apart and dropped. When only the decode node dies before it spoke, the prefill leg may go on
with another one: that attempt keeps the stream, and the leg is heard while a route is looked for;
``router.request.attempt`` says why late words of the lost node are still told apart.

Output indices are relayed in order, each exactly once (``answer``). A new attempt after the
first token submits the relayed ids as ``forced_ids``, and nodes answer with higher indices only: a
failover in mid-stream needs no second mechanism.

Invariants: indices contiguous; ``EmitFinish`` or ``EmitError`` once at most, never both; after it
nothing but ``Done`` and what lets go of legs; by ``Done`` every leg has ended or was told to stop.
"""

from __future__ import annotations

from typing import Literal, assert_never

from router.api.render import ClientFinish
from router.request.answer import Answer
from router.request.attempt import ANSWER_COMPLETE, Attempt, begin, hand_on
from router.request.events import (
    ClientGone,
    CloseLeg,
    Done,
    Effect,
    Event,
    LegMessage,
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
from router.request.record import RequestRecord
from router.request.setbacks import Setbacks, told_error
from wire.errors import DeadlineError, MeshError, PeerError
from wire.messages import Accepted, Detached, Failed, Finished, Loading, Refused, StepEntry

SETTLE_S = 5.0
"""How long a complete answer waits for the prefill leg's transfer report before cancelling it."""

Phase = Literal["routing", "running", "salvaging", "waiting", "settling", "done"]


class RequestMachine:
    """See the module. ``record`` is kept up to date for whoever asks what happened."""

    def __init__(self, spec: RequestSpec, record: RequestRecord, now: float) -> None:
        self.record = record
        self.phase: Phase = "routing"
        self._spec = spec
        self._wake_at = spec.deadline  # of the phases that end by themselves
        self._answer = Answer(spec, record, now)
        self._number = 0
        self._attempt: Attempt | None = None
        self._setbacks = Setbacks()

    @property
    def spec(self) -> RequestSpec:
        """The request as it was given."""
        return self._spec

    @property
    def relayed(self) -> list[int]:
        """Output tokens relayed so far, those of a resumed answer included; not to be changed."""
        return self._answer.relay.ids

    @property
    def accepted(self) -> Accepted | None:
        """What the first prefill leg said of the prompt."""
        return self._answer.prompt

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
        if event.keeps_prefill and old is not None:
            relayed = len(self._answer)
            self._attempt, effects = hand_on(self._spec, old, event, self._number, relayed, now)
        else:
            dropped = self._drop_attempt()
            self._attempt, submits = begin(self._spec, event, self._number, self.relayed, now)
            effects = dropped + submits
        self.record.begin(self._attempt.record)
        self.phase = "running"
        return effects

    def _on_unroutable(self, error: MeshError, final: bool, now: float) -> list[Effect]:
        assert self.phase == "routing", "no route came without being asked for"
        if final:
            return self._end_in_error(error, now)
        pause = self._setbacks.no_route(len(self._answer), now)
        if pause is None:
            return self._end_in_error(self._setbacks.last_error or error, now)
        return self._wait_or_look(pause, now)

    def _wait_or_look(self, pause: float, now: float) -> list[Effect]:
        if pause <= 0.0:
            return [self._replan(now)]
        self.phase, self._wake_at = "waiting", now + pause
        return []

    def _replan(self, now: float) -> Replan:
        """Ask for a route."""
        self.phase = "routing"
        return Replan(self._setbacks.broken(self._attempt, len(self._answer), now))

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
        if node not in attempt.open_legs or self.phase not in ("running", "routing", "waiting"):
            self.record.stale_messages += 1  # said after its end, or while stopping
            return []
        ids = self._answer.relay.ids
        relayed = len(ids)
        try:
            effects = self._answer.add(attempt, node, entry, now)
        except PeerError as error:
            return self._fail(node, error, now)
        attempt.spoke(node)
        if self._setbacks.last_error is not None and len(ids) > relayed:
            self._setbacks.progress()
        if attempt.finish is not None:
            effects += self._finish_if_complete(attempt, now)
        return effects

    # ---- control messages ---------------------------------------------------------------------

    def _on_node(self, node: str, message: LegMessage, now: float) -> list[Effect]:
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
                if self._answer.prompt is None and attempt.open_legs[node] != "decode":
                    self._answer.prompt = message
                return attempt.accepted(node, self._spec, now)
            case Loading():  # it may wait as long as the request does
                late = attempt.loads(node, message, self._spec.deadline, now)
                return self._fail(node, late, now) if late and self.phase == "running" else []
            case Detached():
                return self._on_detached(attempt, node, message, now)
            case Finished():
                return self._on_finished(attempt, node, message, now)
            case Refused() | Failed():
                return self._on_broken(attempt, node, message, now)
            case _:
                assert_never(message)

    def _on_closing(
        self, attempt: Attempt, node: str, message: LegMessage, now: float
    ) -> list[Effect]:
        """A node that was told to stop answers."""
        if isinstance(message, (Accepted, Loading)):  # a long Submit was overtaken by its Cancel
            return [SendCancel(node, attempt.stream)]
        if isinstance(message, Detached):
            return []
        if not isinstance(message, Refused):
            self._setbacks.keep(attempt.closing[node], message.kept_tokens)
        return self._closed(attempt, node, now)

    def _closed(self, attempt: Attempt, node: str, now: float) -> list[Effect]:
        """The end of a leg that was told to stop is known."""
        del attempt.closing[node]
        effects: list[Effect] = [CloseLeg(node, attempt.stream)]
        if self.phase == "salvaging" and attempt.route.decode not in attempt.closing:
            effects += [*self._drop_attempt(), self._replan(now)]
        return effects

    def _on_broken(
        self, attempt: Attempt, node: str, message: Refused | Failed, now: float
    ) -> list[Effect]:
        if isinstance(message, Failed):
            self._setbacks.keep(attempt.start_of(node), message.kept_tokens)
        error = told_error(node, message, self._spec.request_id)
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
            return [] if self._answer.relay.has_gap else attempt.stop(node)
        error = told_error(node, message, self._spec.request_id)
        return self._fail(attempt.route.decode, error, now, blame_pair=True)

    def _on_finished(
        self, attempt: Attempt, node: str, message: Finished, now: float
    ) -> list[Effect]:
        leg = attempt.open_legs.pop(node)
        if leg != "decode":
            self.record.leg_finished(message)
        if self.phase == "settling":
            return self._close()
        wrong = attempt.wrong_end(node, leg, message, len(self._answer))
        if wrong is not None:
            return self._lost_leg(attempt, node, wrong, now)
        if message.reason != "handoff":
            attempt.finish = message
        return self._finish_if_complete(attempt, now)

    def _finish_if_complete(self, attempt: Attempt, now: float) -> list[Effect]:
        """End the request if its answer is complete."""
        verdict = attempt.finish_verdict(self._answer.relay)
        if isinstance(verdict, PeerError):
            return self._fail(attempt.route.prefill, verdict, now)
        finish = attempt.finish
        if not verdict or finish is None:
            return []
        reason: ClientFinish = "length" if finish.reason == "length" else "stop"
        attempt.record.outcome = reason
        effects = self._answer.finish(attempt, reason, now)
        if attempt.prefill_open() and attempt.decode_spoke:  # its report is about to come
            self.phase, self._wake_at = "settling", now + SETTLE_S
            return effects
        return effects + self._close()

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
        self, attempt: Attempt, node: str, error: MeshError, now: float, blame_pair: bool = False
    ) -> list[Effect]:
        """A leg that is already gone from ``open_legs`` ended badly."""
        if self.phase == "settling":
            return self._close()
        if attempt.only_report_lost(node, self._answer.relay):
            return []
        return self._fail(node, error, now, blame_pair)

    def _fail(
        self, node: str, error: MeshError, now: float, blame_pair: bool = False
    ) -> list[Effect]:
        """Give up this attempt because of ``node`` and go on another way, or end in an error."""
        attempt = self._attempt
        assert attempt is not None
        searching = self.phase != "running"  # only the prefill leg was left, now broken as well
        if not searching:
            attempt.record.outcome, attempt.record.message = error.code, error.message
        relayed, limit = len(self._answer), self._spec.sampling.max_tokens
        if limit is not None and relayed >= limit:  # only the finish was lost
            return self._answer.finish(attempt, "length", now) + self._close()
        self._setbacks.last_error = error
        if not error.retryable:
            return self._end_in_error(error, now)
        if searching:
            return self._drop_attempt()
        pause = self._setbacks.attempt_failed(attempt, node, error, blame_pair, relayed, now)
        if pause is None:
            return self._end_in_error(error, now)
        return self._break_up(attempt, node, pause, now)

    def _break_up(self, attempt: Attempt, node: str, pause: float, now: float) -> list[Effect]:
        """Keep the prefill leg if it may go on, else what the decode node got of its KV, else
        nothing; then look for a route in ``pause`` seconds."""
        decode = attempt.route.decode
        effects: list[Effect] = []
        if node == attempt.route.prefill and attempt.prefill_open():
            effects += attempt.stop(node)
        if attempt.running_prefill(now) is not None:
            closed = CloseLeg(decode, attempt.stream)
            effects += attempt.stop(decode) if attempt.decode_open() else [closed]
        elif attempt.salvageable() and self._spec.salvage_s > 0:
            self.phase, self._wake_at = "salvaging", now + self._spec.salvage_s
            return effects + attempt.stop(decode)
        else:
            effects += self._drop_attempt()
        return effects + self._wait_or_look(pause, now)

    # ---- ends ---------------------------------------------------------------------------------

    def _end_in_error(self, error: MeshError, now: float) -> list[Effect]:
        if self._attempt is not None and self.phase == "running":
            self._attempt.record.outcome = error.code
        effects = self._drop_attempt()
        self.phase = "done"
        return [*effects, self._answer.fail(error, now), Done()]

    def _on_client_gone(self, outcome: str, now: float) -> list[Effect]:
        if self.phase != "settling":
            self._answer.ended(outcome, now)
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
        request_id = self._spec.request_id
        error = DeadlineError("the request's deadline passed", request_id=request_id)
        return self._end_in_error(error, now)

    def _close(self) -> list[Effect]:
        self.phase = "done"
        return [*self._drop_attempt(), Done()]

    def _drop_attempt(self) -> list[Effect]:
        """Cancel what still runs of the attempt and forget its stream."""
        attempt = self._attempt
        if attempt is None:
            return []
        self._attempt = None
        self._answer.relay.forget_waiting()
        return attempt.cancel()
