"""One try of a request: its legs, who still owes an end, and what its ``Submit``s say.

Pure data and look-ups; ``router.request.machine`` decides. A node gets a stream number again only
after the end of its earlier leg under that number was heard (or its link was lost), so whatever a
node says about a stream belongs to exactly one leg.

A decode node that has to load the model first cannot take KV yet, and where it will is not known:
the prefill leg is held back until the decode leg has its blocks. A prefill node that has to load it
too is told to at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from router.request.events import (
    CloseStream,
    Effect,
    RequestSpec,
    Routed,
    SendCancel,
    SendRetarget,
    SendSubmit,
    SendWarm,
)
from router.request.record import AttemptRecord, LoadWaited
from router.request.token_relay import TokenRelay
from router.routing.avoidance import NodeStart, Pair
from router.routing.policy import Route
from router.routing.recovery import RunningPrefill
from wire.errors import OverloadError, PeerError
from wire.messages import Finished, Leg, Loading, Retarget, Submit, Transfer, Warm

ANSWER_COMPLETE = "answer_complete"
"""Code with which a prefill node cancels a transfer because its token was the last one."""

MAX_HAND_ONS = 2
"""Decode nodes that one prefill leg is given after its first. While it waits for room there it
holds blocks that others wait for, perhaps those who hold that room: nobody would ever go on."""

HOLD_LOADS = 2
HOLD_MORE_S = 10.0
"""A model that is loaded for a leg which is held back stays for so many of the longer load, as
estimated, and so many seconds more. Guess: no estimate is wrong by more."""


@dataclass(slots=True)
class Attempt:
    """``number`` counts a request's tries from 1, ``stream`` is shared by its legs.

    ``open_legs`` maps nodes to the leg that they still run for us; nodes in ``closing`` were told
    to stop and owe the end of theirs. ``forced`` are the ids that the client had when the prefill
    leg began. ``relayed_before`` counts output tokens relayed when this try began. ``held`` is the
    hand-over of a prefill leg that was not sent yet, ``loading`` since when nodes load the model.
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
    held: Transfer | None = None
    hand_ons: int = 0
    loading: dict[str, float] = field(default_factory=dict)

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

    def loads(self, node: str, said: Loading, deadline: float, now: float) -> OverloadError | None:
        """A leg waits for its model; the error if that would take longer than the request has."""
        since = self.loading.setdefault(node, now)
        self.record.loads[node] = LoadWaited(said.eta_ms, None)
        eta_s = said.eta_ms / 1e3
        if now + eta_s < deadline:
            return None
        waited = f"{now - since:.1f} s so far" if now > since else "not begun"
        return OverloadError(
            f"{node} needs another {eta_s:.1f} s to load the model ({waited}), too long for this "
            "request",
            code="not_loaded",
            retry_after_s=eta_s,
        )

    def accepted(self, node: str, spec: RequestSpec, now: float) -> list[Effect]:
        """A leg holds its blocks: a prefill leg that was held back for it may begin."""
        since = self.loading.pop(node, None)
        if since is not None:
            waited_ms = (now - since) * 1e3
            said = self.record.loads.get(node, LoadWaited(0, None))  # to the attempt before this
            self.record.loads[node] = LoadWaited(said.eta_ms, waited_ms)
        if self.open_legs[node] != "decode":
            self.prefill_accepted = True
            return []
        self.decode_accepted = True
        transfer, self.held = self.held, None
        if transfer is None:
            return []
        self.open_legs[self.route.prefill] = "prefill"
        loaded_s = min(self.route.prefill_load_s, now - self.prefill_started_at)
        self.prefill_s, self.prefill_started_at = self.prefill_s - loaded_s, now
        submit = _submit(spec, self, "prefill", transfer, now)
        return [SendSubmit(self.route.prefill, submit)]

    def spoke(self, node: str) -> None:
        """A leg said tokens."""
        if self.open_legs[node] == "decode":
            self.decode_spoke = True
        else:
            self.prefill_spoke = True

    def cancel(self) -> list[Effect]:
        """Cancel what still runs and forget the stream."""
        legs: list[Effect] = [SendCancel(node, self.stream) for node in self.open_legs]
        return [*legs, CloseStream(self.stream)]

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
        if self.hand_ons >= MAX_HAND_ONS:
            return None
        remaining = 0.0
        if not self.prefill_spoke:
            remaining = max(0.0, self.prefill_s - (now - self.prefill_started_at))
        return RunningPrefill(self.prefill, remaining, frozenset(self.closing))


def begin(
    spec: RequestSpec, routed: Routed, number: int, relayed: list[int], now: float
) -> tuple[Attempt, list[Effect]]:
    """A try from the beginning of the prompt, and what to tell the nodes."""
    route = routed.route
    attempt = Attempt(
        number=number,
        route=route,
        stream=routed.stream,
        prefill_started_at=now,
        forced=tuple(relayed),
        relayed_before=len(relayed),
        record=AttemptRecord(number, route, len(relayed), routed.recovery),
        open_legs={},
        prefill_s=route.prefill_load_s
        + sum(r.seconds for r in route.reasons if r.term in ("queue", "prefill")),
    )
    legs: list[tuple[str, Leg, Transfer | None]]
    effects: list[Effect] = []
    if route.prefill == route.decode:
        legs = [(route.prefill, "both", None)]
    else:
        from_prefill = Transfer(routed.transfer_id, route.prefill, "")
        legs = [(route.decode, "decode", from_prefill)]
        if route.decode_load_s > 0:
            attempt.held = Transfer(routed.transfer_id, route.decode, "")
            effects = _warm_ahead(spec, route, now)
        else:
            to_decode = Transfer(routed.transfer_id, route.decode, routed.kv_address)
            legs.insert(0, (route.prefill, "prefill", to_decode))
    attempt.open_legs = {node: leg for node, leg, _ in legs}
    for node, leg, transfer in legs:
        effects.append(SendSubmit(node, _submit(spec, attempt, leg, transfer, now)))
    return attempt, effects


def _warm_ahead(spec: RequestSpec, route: Route, now: float) -> list[Effect]:
    """What a prefill node hears whose leg is held back."""
    if route.prefill_load_s <= 0:
        return []
    hold_s = HOLD_LOADS * max(route.prefill_load_s, route.decode_load_s) + HOLD_MORE_S
    hold_ms = max(1, int(min(hold_s, spec.deadline - now) * 1e3))
    return [SendWarm(route.prefill, Warm(spec.model, hold_ms))]


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
        hand_ons=old.hand_ons + 1,
        loading={node: at for node, at in old.loading.items() if node == route.prefill},
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
