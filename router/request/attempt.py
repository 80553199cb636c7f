"""One try of a request: its legs, who still owes an end, and what its ``Submit``s say.

Pure data and look-ups; ``router.request.machine`` decides. A node gets a stream number again only
after the end of its earlier leg under that number was heard (or its link was lost), so whatever a
node says about a stream belongs to exactly one leg.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from router.request.events import (
    Effect,
    RequestSpec,
    Routed,
    SendCancel,
    SendRetarget,
    SendSubmit,
)
from router.request.record import AttemptRecord
from router.request.token_relay import TokenRelay
from router.routing.avoidance import NodeStart, Pair
from router.routing.policy import Route
from router.routing.recovery import RunningPrefill
from wire.errors import PeerError
from wire.messages import Finished, Leg, Retarget, Submit, Transfer

ANSWER_COMPLETE = "answer_complete"
"""Code with which a prefill node cancels a transfer because its token was the last one."""


@dataclass(slots=True)
class Attempt:
    """``number`` counts a request's tries from 1, ``stream`` is shared by its legs.

    ``open_legs`` maps nodes to the leg that they still run for us; nodes in ``closing`` were told
    to stop and owe the end of theirs. ``forced`` are the ids that the client had when the prefill
    leg began. ``relayed_before`` counts output tokens relayed when this try began.
    """

    number: int
    route: Route
    stream: int
    prefill_started_at: float
    forced: tuple[int, ...]
    relayed_before: int
    record: AttemptRecord
    open_legs: dict[str, Leg]
    closing: dict[str, NodeStart] = field(default_factory=dict)
    finish: Finished | None = None
    prefill_s: float = 0.0
    prefill_spoke: bool = False
    decode_spoke: bool = False
    prefill_accepted: bool = False
    decode_accepted: bool = False

    @property
    def prefill(self) -> NodeStart:
        """Where the prompt is computed."""
        return NodeStart(self.route.prefill, self.route.prefill_incarnation)

    @property
    def decode(self) -> NodeStart:
        """Where the answer is decoded."""
        return NodeStart(self.route.decode, self.route.decode_incarnation)

    @property
    def pair(self) -> Pair:
        """Both."""
        return Pair(self.prefill, self.decode)

    def start_of(self, node: str) -> NodeStart:
        """The start of one of the two nodes that this try runs on."""
        return self.prefill if node == self.route.prefill else self.decode

    def prefill_open(self) -> bool:
        """The prefill leg of a pair may still say something."""
        return self.open_legs.get(self.route.prefill) == "prefill"

    def decode_open(self) -> bool:
        """The decode leg of a pair may still say something."""
        return self.open_legs.get(self.route.decode) == "decode"

    def wrong_end(self, node: str, leg: Leg, end: Finished, relayed: int) -> PeerError | None:
        """Why this is no good end of a leg that was open until now; None: it is one."""
        if end.reason == "cancelled" or (end.reason == "handoff" and leg != "prefill"):
            return PeerError(f"{node} ended the stream without being asked", code="peer_failed")
        if end.reason == "handoff" and relayed < end.completion_tokens:
            return miscounted(end.completion_tokens, relayed)
        return None

    def finish_verdict(self, relay: TokenRelay) -> bool | PeerError:
        """Whether the answer is complete: all tokens that the finish counts are relayed.

        A decode leg may finish before the prefill node's tokens are here. When nobody is left who
        could say a missing one, that is an error.
        """
        finish, prefill, count = self.finish, self.route.prefill, len(relay.ids)
        if finish is None:
            if relay.has_gap and not self.prefill_open():
                return relay.missing(prefill)
            return False if self.open_legs else PeerError(f"{prefill} handed over to nobody")
        if not relay.has_gap and count == finish.completion_tokens:
            return True
        by_decode = self.route.decode not in self.open_legs
        if by_decode and self.prefill_open() and count <= finish.completion_tokens:
            return False
        return miscounted(finish.completion_tokens, count)

    def only_report_lost(self, node: str, relay: TokenRelay) -> bool:
        """``node`` was the prefill node of a hand-over that is complete: decode runs."""
        return (
            node == self.route.prefill
            and self.route.decode in self.open_legs
            and self.decode_spoke
            and not relay.has_gap
        )

    def accepted(self, node: str) -> None:
        """A leg holds its blocks."""
        if self.open_legs[node] == "decode":
            self.decode_accepted = True
        else:
            self.prefill_accepted = True

    def spoke(self, node: str) -> None:
        """A leg said tokens."""
        if self.open_legs[node] == "decode":
            self.decode_spoke = True
        else:
            self.prefill_spoke = True

    def stop(self, node: str) -> list[Effect]:
        """Cancel one leg; its end will be heard."""
        del self.open_legs[node]
        self.closing[node] = self.start_of(node)
        return [SendCancel(node, self.stream)]

    def salvageable(self) -> bool:
        """The decode leg may hold KV that its prefill leg sent."""
        return (
            self.decode_open()
            and not self.decode_spoke
            and self.prefill_accepted
            and self.decode_accepted
        )

    def running_prefill(self, now: float) -> RunningPrefill | None:
        """The prefill leg, if another decode node could still take its KV over."""
        if not self.prefill_open() or self.decode_spoke or self.finish is not None:
            return None
        remaining = 0.0
        if not self.prefill_spoke:
            remaining = max(0.0, self.prefill_s - (now - self.prefill_started_at))
        return RunningPrefill(self.prefill, remaining, frozenset(self.closing))


def begin(
    spec: RequestSpec, routed: Routed, number: int, relayed: list[int], now: float
) -> tuple[Attempt, list[Effect]]:
    """A try from the beginning of the prompt, and what to tell the nodes."""
    route, stream = routed.route, routed.stream
    legs: list[tuple[str, Leg, Transfer | None]]
    if route.prefill == route.decode:
        legs = [(route.prefill, "both", None)]
    else:
        to_decode = Transfer(routed.transfer_id, route.decode, routed.kv_address)
        from_prefill = Transfer(routed.transfer_id, route.prefill, "")
        legs = [(route.prefill, "prefill", to_decode), (route.decode, "decode", from_prefill)]
    attempt = Attempt(
        number=number,
        route=route,
        stream=stream,
        prefill_started_at=now,
        forced=tuple(relayed),
        relayed_before=len(relayed),
        record=AttemptRecord(number, route, len(relayed), routed.recovery),
        open_legs={node: leg for node, leg, _ in legs},
        prefill_s=sum(r.seconds for r in route.reasons if r.term in ("queue", "prefill")),
    )
    return attempt, [
        SendSubmit(node, _submit(spec, attempt, leg, transfer, now)) for node, leg, transfer in legs
    ]


def hand_on(
    spec: RequestSpec, old: Attempt, routed: Routed, number: int, relayed: int, now: float
) -> tuple[Attempt, list[Effect]]:
    """A try that keeps the prefill leg of ``old`` and has another decode node."""
    route, stream = routed.route, old.stream
    assert route.prefill == old.route.prefill, "another prefill leg than the running one was kept"
    assert route.decode not in old.closing, "its old leg could not be told from the new one"
    attempt = Attempt(
        number=number,
        route=route,
        stream=stream,
        prefill_started_at=old.prefill_started_at,
        forced=old.forced,
        relayed_before=relayed,
        record=AttemptRecord(number, route, len(old.forced), routed.recovery),
        open_legs={route.prefill: "prefill", route.decode: "decode"},
        closing=old.closing,
        prefill_s=old.prefill_s,
        prefill_spoke=old.prefill_spoke,
        prefill_accepted=old.prefill_accepted,
    )
    to_decode = Transfer(routed.transfer_id, route.decode, routed.kv_address)
    from_prefill = Transfer(routed.transfer_id, route.prefill, "")
    submit = _submit(spec, attempt, "decode", from_prefill, now)
    return attempt, [
        SendSubmit(route.decode, submit),
        SendRetarget(route.prefill, Retarget(stream, number, to_decode)),
    ]


def _submit(
    spec: RequestSpec, attempt: Attempt, leg: Leg, transfer: Transfer | None, now: float
) -> Submit:
    return Submit(
        stream=attempt.stream,
        request_id=spec.request_id,
        attempt=attempt.number,
        leg=leg,
        model=spec.model,
        tenant=spec.tenant,
        input=spec.input,
        sampling=spec.sampling,
        forced_ids=list(attempt.forced),
        transfer=transfer,
        chain=spec.chain,
        deadline_remaining_ms=max(1, int((spec.deadline - now) * 1e3)),
    )


def miscounted(claimed: int, relayed: int) -> PeerError:
    """The nodes say another number of tokens than came."""
    return PeerError(
        f"the nodes counted {claimed} tokens, {relayed} arrived", code="protocol_error"
    )
