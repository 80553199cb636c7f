"""Random nodes around one request machine: hand-overs break, legs detach, nodes keep KV, links go,
models have to be loaded first, cancels cross answers, routes are missing. Each check of an effect
is an invariant of the machine."""

from __future__ import annotations

import random
from dataclasses import replace

from router.request.events import (
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
    SendRetarget,
    SendSubmit,
    SendWarm,
    Tick,
    Tokens,
    Unroutable,
)
from router.request.machine import RequestMachine
from router.request.record import RequestRecord
from router.routing.policy import Route
from router.routing.recovery import Broken, Recovery
from tests.router.recovery_legs import ANSWER, PROMPT, REPORT, Leg, entry, wanted
from wire.errors import OverloadError
from wire.messages import Accepted, Detached, Failed, Finished, Loading, Refused, Sampling, Submit

DEADLINE = 100.0
NODES = ("a", "b", "c", "d")
LATE = ("Finished", "Failed", "Refused")


class Simulation:
    """Random nodes around one machine; checks every effect as it comes."""

    def __init__(self, seed: int, answer: int, trouble: float, leave: float) -> None:
        self.rng = random.Random(seed)
        self.answer = answer
        self.trouble, self.leave = trouble, leave
        sampling = Sampling(self.rng.choice([None, answer]), 0.0, 1.0, 7, [], False)
        salvage_s = self.rng.choice([0.0, 0.5])
        spec = RequestSpec(
            "r1", "m", "", PROMPT, sampling, [], deadline=DEADLINE, salvage_s=salvage_s
        )
        self.machine = RequestMachine(spec, RequestRecord("r1", "m", "", "router"), 0.0)
        self.now = 0.0
        self.stream = 0
        self.legs: list[Leg] = []
        self.held: set[int] = set()  # streams whose prefill leg waits for the decode leg
        self.hands: dict[int, int] = {}  # by stream: the index from which decode goes on
        self.kept: dict[str, int] = {}
        self.kinds: set[str] = set()
        self.text = b""
        self.upto = 0
        self.headers = self.ends = self.done = 0
        self.gone = False

    # ---- the machine's effects ----------------------------------------------------------------

    def feed(self, event: Event) -> None:
        queue = [event]
        while queue:
            for effect in self.machine.handle(queue.pop(0), self.now):
                self.check(effect, queue)

    def check(self, effect: Effect, queue: list[Event]) -> None:
        assert not self.done, f"{effect} after Done"
        if self.ends:
            after = SendCancel | CloseLeg | CloseStream | Done
            assert isinstance(effect, after), f"{effect} after the end"
        match effect:
            case SendSubmit(node, message):
                self.submitted(node, message)
            case SendWarm(node, message):
                assert message.model == "m"
                assert self.stream in self.held
                assert not [leg for leg in self.legs if leg.submit.stream == self.stream]
                self.kinds.add("warm")
            case SendRetarget(node, message):
                self.retargeted(node, message.stream, message.attempt, message.transfer.id)
            case SendCancel(node, stream):
                self.cancelled(node, stream)
            case CloseLeg(node, stream):
                assert all(
                    leg.over for leg in self.legs if (leg.node, leg.submit.stream) == (node, stream)
                ), "a leg was closed that may still say something"
            case CloseStream():
                pass
            case Replan(broken):
                queue.append(self.replanned(broken))
            case EmitHeaders():
                self.headers += 1
                assert self.headers == 1
            case EmitText(text, upto):
                assert self.headers
                self.text += text
                assert upto > self.upto
                self.upto = upto
                assert self.text == wanted(upto)
            case EmitFinish(_, usage):
                assert self.headers
                self.ends += 1
                assert usage.completion_tokens == self.answer
                assert self.text == wanted(self.answer)
            case EmitError():
                self.ends += 1
            case Done():
                self.done += 1
                open_legs = [leg for leg in self.legs if not leg.over and not leg.cancelled]
                assert not open_legs, "a leg was left running"

    def replanned(self, broken: Broken) -> Routed | Unroutable:
        assert {start.name: tokens for start, tokens in broken.kept.items()} == self.kept
        dice = self.rng.random()
        if dice < 0.1:
            final = self.rng.random() < 0.1
            return Unroutable(OverloadError("none", code="no_route"), final)
        running = broken.running
        if running is not None:
            ours = running.node.name, self.current_stream()
            (leg,) = [x for x in self.legs if not x.over and (x.node, x.submit.stream) == ours]
            assert (leg.submit.leg, leg.cancelled) == ("prefill", False)
            others = set(NODES) - running.barred - {leg.node}
            if others and dice < 0.7:
                self.kinds.add("retarget")
                routed = self.routed(leg.node, self.rng.choice(sorted(others)), cold=0.0)
                recovery = Recovery("retarget", 0.1)
                return replace(routed, keeps_prefill=True, recovery=recovery)
        return self.any_route()

    def any_route(self) -> Routed:
        prefill = self.rng.choice(NODES)
        return self.routed(prefill, self.rng.choice([prefill, *NODES]))

    def routed(self, prefill: str, decode: str, cold: float = 0.3) -> Routed:
        self.stream += 1
        loads = [2.0 * (self.rng.random() < cold) for _ in ("prefill", "decode")]
        route = Route(prefill, decode, "x", "y", 0.1, (), "1", "1", *loads)
        if loads[1] and prefill != decode:
            self.held.add(self.stream)
        return Routed(route, self.stream, self.rng.randbytes(16), "127.0.0.1:9")

    # ---- simulated nodes ----------------------------------------------------------------------

    def submitted(self, node: str, submit: Submit) -> None:
        """Script what this leg will say."""
        stream, rng, start = submit.stream, self.rng, len(submit.forced_ids)
        assert submit.forced_ids == ANSWER[:start]
        assert not [
            leg
            for leg in self.legs
            if (leg.node, leg.submit.stream) == (node, stream) and not leg.over
        ], "two legs under one number at one node"
        transfer = b"" if submit.transfer is None else submit.transfer.id
        leg = Leg(node, submit, submit.attempt, transfer)
        self.legs.append(leg)
        if submit.leg != "decode":
            assert wanted(start) == self.text  # forced is exactly what the client has
        first, last = start, self.answer
        if submit.leg != "both":
            hand = self.hands.setdefault(stream, min(self.answer, start + rng.randint(1, 2)))
            first, last = (start, hand) if submit.leg == "prefill" else (hand, self.answer)
        if submit.leg == "prefill":
            self.prefill_sent(stream)
        if rng.random() < self.trouble / 3:
            code = rng.choice(["overloaded", "engine_died"])
            leg.said = [NodeSaid(node, Refused(stream, code, "", True, 0))]
            return
        if rng.random() < 0.3:
            leg.said += [NodeSaid(node, Loading(stream, eta_ms)) for eta_ms in self.estimates()]
        leg.said.append(NodeSaid(node, Accepted(stream, 9, 0)))
        at = first
        while at < last:
            count = rng.randint(1, last - at)
            leg.said.append(Tokens(node, entry(stream, at, count)))
            at += count
        if submit.leg == "decode" and first >= self.answer:
            accepted = leg.said if stream in self.held else []
            leg.said = [*accepted, NodeSaid(node, Failed(stream, "answer_complete", "", True))]
        elif submit.leg == "prefill" and last < self.answer:
            leg.handoff = NodeSaid(node, Finished(stream, "handoff", last, 0, 0, REPORT))
        else:
            leg.said.append(NodeSaid(node, Finished(stream, "stop", last, 0, 0, None)))
        if rng.random() < self.trouble:
            self.break_leg(leg)
        if submit.leg == "decode" and stream in self.held:
            events = enumerate(leg.said, 1)
            at = next(
                (
                    at
                    for at, e in events
                    if isinstance(e, NodeSaid) and isinstance(e.message, Accepted)
                ),
                len(leg.said),
            )
            leg.said, leg.later = leg.said[:at], leg.said[at:]

    def estimates(self) -> list[int]:
        """What a node says while it loads the model; sometimes more than the request has."""
        late = self.rng.random() < self.trouble / 3
        return [2000] * self.rng.randint(1, 3) + [200_000] * late

    def prefill_sent(self, stream: int) -> None:
        """A decode leg that waited for it goes on."""
        if stream not in self.held:
            return
        self.held.discard(stream)
        self.kinds.add("held")
        legs = [leg for leg in self.legs if leg.submit.stream == stream]
        (decode,) = [leg for leg in legs if leg.submit.leg == "decode"]
        assert not decode.said, "the prefill leg was sent before its decode leg had blocks"
        decode.said, decode.later = decode.later, []

    def break_leg(self, leg: Leg) -> None:
        """It stops somewhere, in one of many ways."""
        stream, node, rng = leg.submit.stream, leg.node, self.rng
        leg.said = leg.said[: rng.randrange(len(leg.said))]
        leg.handoff = None
        kept = rng.choice([0, 5]) if leg.submit.leg == "decode" else 0
        code = rng.choice(["engine_died", "transfer_failed"])
        end = [LinkLost(node), NodeSaid(node, Failed(stream, code, "", True, kept))]
        leg.said.append(rng.choice(end))

    def partner(self, leg: Leg) -> Leg | None:
        """The live leg at the other end of the same transfer."""
        for other in self.legs:
            if other is not leg and other.transfer == leg.transfer != b"" and not other.over:
                return other
        return None

    def hand_over_broke(self, prefill: Leg) -> None:
        """The prefill leg's transfer is gone: it detaches, and fails if nobody comes for it."""
        if prefill.cancelled or prefill.handoff is None:
            return
        stream, node = prefill.submit.stream, prefill.node
        told = Detached(stream, prefill.attempt, "transfer_failed", "")
        prefill.said.append(NodeSaid(node, told))
        prefill.handoff = None
        if self.rng.random() < 0.2:
            prefill.said.append(NodeSaid(node, Failed(stream, "transfer_timeout", "", True)))
        else:
            prefill.said.append(LinkLost(node))  # in place of waiting for ever

    def retargeted(self, node: str, stream: int, attempt: int, transfer: bytes) -> None:
        (leg,) = [x for x in self.legs if (x.node, x.submit.stream) == (node, stream)][-1:]
        assert leg.submit.leg == "prefill"
        assert attempt > leg.attempt
        assert not leg.cancelled
        assert self.upto <= self.hands[stream], "the old decode leg had spoken"
        if leg.over:
            return
        if any(isinstance(e, NodeSaid) and isinstance(e.message, Failed) for e in leg.said):
            return  # its end is on its way
        leg.attempt, leg.transfer = attempt, transfer
        leg.said = [event for event in leg.said if not isinstance(event, LinkLost)]
        hand = self.hands[stream]
        leg.handoff = NodeSaid(node, Finished(stream, "handoff", hand, 0, 0, REPORT))

    def cancelled(self, node: str, stream: int) -> None:
        for leg in self.legs:
            if (leg.node, leg.submit.stream) != (node, stream) or leg.over or leg.cancelled:
                continue
            leg.cancelled, leg.handoff, leg.later = True, None, []
            late = leg.said[: self.rng.randint(0, len(leg.said))]  # on its way already
            ended = any(
                isinstance(e, LinkLost) or type(e.message).__name__ in LATE
                for e in late
                if not isinstance(e, Tokens)
            )  # type: ignore[union-attr]
            leg.said = late
            if not ended:
                kept = self.rng.choice([0, 7]) if leg.submit.leg == "decode" else 0
                end = Finished(stream, "cancelled", 0, 0, 0, None, kept)
                leg.said.append(NodeSaid(node, end))

    # ---- running ------------------------------------------------------------------------------

    def deliver(self, leg: Leg) -> None:
        """Let ``leg`` say its next message, and follow what that means for other legs."""
        event = leg.said.pop(0)
        if isinstance(event, LinkLost):
            for other in self.legs:
                if other.node == leg.node and not other.over:
                    other.over = True
                    self.broke(other)
                    other.said.clear()
        elif isinstance(event, NodeSaid):
            message = event.message
            if type(message).__name__ in LATE:
                leg.over = True
                ours = leg.submit.stream == self.current_stream()
                if ours and isinstance(message, Failed | Finished) and message.kept_tokens:
                    self.kept[leg.node] = message.kept_tokens
                if isinstance(message, Refused | Failed):
                    self.broke(leg)
        elif leg.submit.leg == "decode":  # it speaks: the hand-over was complete
            prefill = self.partner(leg)
            if prefill is not None and prefill.handoff is not None:
                prefill.said.append(prefill.handoff)
                prefill.handoff = None
        self.feed(event)

    def broke(self, leg: Leg) -> None:
        """A leg is gone: the other end of its hand-over notices, a decode leg by waiting."""
        other = self.partner(leg)
        if other is not None and other.submit.leg == "prefill":
            self.hand_over_broke(other)
        elif other is not None and not other.cancelled and self.rng.random() < 0.5:
            stream = other.submit.stream
            waits = not any(isinstance(e, Tokens) for e in other.said)
            if not waits and leg.handoff is None and leg.submit.leg == "prefill":
                other.said = [NodeSaid(other.node, Failed(stream, "transfer_failed", "", True, 3))]

    def break_a_hand_over(self) -> None:
        """Both ends live, and the link between them is gone; the decode leg waits in vain."""
        for leg in self.legs:
            decode = self.partner(leg)
            if decode is None or decode.submit.leg != "decode" or leg.handoff is None or leg.over:
                continue
            if decode.cancelled or not any(isinstance(e, Tokens) for e in decode.said):
                continue
            self.hand_over_broke(leg)
            late = NodeSaid(decode.node, Failed(decode.submit.stream, "transfer_failed", "", True))
            decode.said = [event for event in decode.said if isinstance(event, NodeSaid)][:1]
            decode.said = [e for e in decode.said if isinstance(e.message, Accepted)] + [late]  # type: ignore[union-attr]
            return

    def current_stream(self) -> int:
        attempt = self.machine._attempt
        return -1 if attempt is None else attempt.stream

    def run(self) -> None:
        self.feed(self.any_route())
        while not self.done:
            self.now += 0.001
            talking = [leg for leg in self.legs if leg.said]
            if talking and self.rng.random() < 0.95:
                self.deliver(self.rng.choice(talking))
            elif not talking or self.machine.next_deadline() < DEADLINE:
                self.now = max(self.now, self.machine.next_deadline())
            self.feed(Tick())
            if self.rng.random() < self.trouble / 5:
                self.break_a_hand_over()
            if self.rng.random() < self.leave and not self.gone:
                self.gone = True
                self.feed(ClientGone())
