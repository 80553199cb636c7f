"""The legs of one model on this node: who they belong to, and what becomes of their decisions.

A thin shell: finds the leg that an event is for, by its number in the engine, by the router's
stream or by its transfer, and carries out its effects on engine, KV endpoint and router link. It
arms the timers of legs and decides nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from pop_node.engine import messages as engine
from pop_node.hosting.generation import Generation
from pop_node.hosting.prefix_directory import PrefixDirectory
from pop_node.kv_stream.liveness import MIN_WAIT_S
from pop_node.legs import events as ev
from pop_node.legs import leg as legs
from pop_node.legs.admission import problem_with_transfer
from pop_node.router_link import RouterLink
from wire.errors import DeadlineError, MeshError, PeerError
from wire.messages import NodeMessage, Retarget, Submit
from wire.prefix import canonical_bytes

LET_GO_S = 30.0
"""An engine that was told to drop a sequence and does not is hung, and is ended. Guess: several of
the longest steps of a slow CPU."""

RETARGET_WAIT_S = MIN_WAIT_S
"""How long a detached leg keeps its blocks for a ``Retarget``: a router that has another decode
node says so within a round trip and its own thinking."""


@dataclass(slots=True)
class Live:
    """A leg with what its effects need.

    ``timer`` is its deadline, then that of the engine; ``patience`` the end of its being detached.
    """

    leg: legs.Leg
    link: RouterLink
    timer: asyncio.TimerHandle | None = None
    patience: asyncio.TimerHandle | None = None


class LiveLegs:
    """All legs of one model, in any stage; ``generation`` is where their effects go, if any."""

    def __init__(
        self,
        directory: PrefixDirectory,
        on_over: Callable[[legs.Leg], None],
        on_said: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_over`` gets each leg when nothing of it is left, ``on_said`` is called when the
        ending of one is said."""
        self.generation: Generation | None = None
        self._directory = directory
        self._on_over = on_over
        self._on_said = on_said
        self._by_seq: dict[int, Live] = {}
        self._by_stream: dict[tuple[RouterLink, int], Live] = {}
        self._by_transfer: dict[bytes, Live] = {}
        self._deferred: list[tuple[RouterLink, NodeMessage]] | None = None

    def __len__(self) -> int:
        return len(self._by_seq)

    @property
    def num_open(self) -> int:
        """Legs whose ending was not said yet."""
        return len(self._by_stream)

    def of_request(self, tenant: str, request_id: str) -> list[Live]:
        """Legs of all attempts of one request."""
        key = tenant, request_id
        everybody = self._by_seq.values()
        return [v for v in everybody if (v.leg.submit.tenant, v.leg.submit.request_id) == key]

    # ---- from routers --------------------------------------------------------------------------

    def refuse(self, link: RouterLink, submit: Submit) -> MeshError | None:
        """Why these numbers cannot be a new leg; None when they can."""
        if (link, submit.stream) in self._by_stream:
            return PeerError("stream number used twice", code="protocol_error", retryable=False)
        if submit.transfer is not None and submit.transfer.id in self._by_transfer:
            return PeerError("transfer id used twice", code="protocol_error", retryable=False)
        return None

    def add(self, leg: legs.Leg, link: RouterLink) -> Live:
        """A leg begins, and its deadline runs."""
        live = Live(leg, link)
        delay_s = leg.submit.deadline_remaining_ms / 1000
        live.timer = asyncio.get_running_loop().call_later(delay_s, self._deadline_passed, live)
        self._by_seq[leg.seq] = live
        self._by_stream[link, leg.submit.stream] = live
        if leg.transfer_id:
            self._by_transfer[leg.transfer_id] = live
        return live

    def cancel(self, link: RouterLink, stream: int) -> None:
        """The router wants no more of a stream; unknown ones have ended already."""
        live = self._by_stream.get((link, stream))
        if live is not None:
            self.advance(live, ev.Cancelled(self._kept_tokens(live)))

    def retarget(self, link: RouterLink, message: Retarget) -> None:
        """The KV of a prefill leg goes elsewhere; unknown streams have ended already."""
        live = self._by_stream.get((link, message.stream))
        if live is None or live.leg.submit.leg != "prefill":
            return
        error = problem_with_transfer(message.transfer)
        if error is None and message.transfer.id in self._by_transfer:
            error = PeerError("transfer id used twice", code="protocol_error", retryable=False)
        if error is not None:
            self.advance(live, ev.Broken(error))
            return
        del self._by_transfer[live.leg.transfer_id]  # what the old one says is for nobody now
        self._by_transfer[message.transfer.id] = live
        self.advance(live, ev.Retargeted(message.attempt, message.transfer))

    def router_left(self, link: RouterLink) -> None:
        """A router's connection is gone: nobody reads its streams any more."""
        for owner, stream in list(self._by_stream):
            if owner is link:
                self.cancel(link, stream)

    # ---- from engine and KV stream -------------------------------------------------------------

    def engine_event(self, seq: int, event: ev.EngineEvent) -> None:
        """The engine said something about a leg, which may be gone."""
        live = self._by_seq.get(seq)
        if live is not None:
            self.advance(live, event)

    def transfer_event(self, transfer: bytes, event: ev.Event) -> None:
        """The KV stream said something about a transfer, whose leg may be gone."""
        live = self._by_transfer.get(transfer)
        if live is not None:
            self.advance(live, event)

    def step_done(self, step: engine.StepDone) -> None:
        """One engine step: all its tokens leave as one frame per router, endings after them."""
        deferred: list[tuple[RouterLink, NodeMessage]] = []
        self._deferred = deferred
        touched: dict[RouterLink, None] = {}
        try:
            for seq, index, token, finish in step.tokens:
                live = self._by_seq.get(seq)
                if live is not None:
                    touched[live.link] = None
                    self.advance(live, engine.Token(seq, index, token, finish))
        finally:
            self._deferred = None
            for link in touched:
                link.flush()
            for link, message in deferred:
                link.say(message)

    def break_all(self, error: MeshError) -> None:
        """The engine is gone, and everything with it."""
        for live in list(self._by_seq.values()):
            self.advance(live, ev.Broken(error, engine_gone=True))

    # ---- effects -------------------------------------------------------------------------------

    def advance(self, live: Live, event: ev.Event) -> None:
        """Give a leg an event and carry out what it decides."""
        for effect in live.leg.handle(event):
            self._carry_out(live, effect)
        if live.leg.state in ("closing", "ended"):
            # Its ending is said: the router may use the number for the request's next attempt
            # here, while the engine still lets go of this one.
            key = live.link, live.leg.submit.stream
            if self._by_stream.get(key) is live:
                del self._by_stream[key]
                self._on_said()

    def _carry_out(self, live: Live, effect: ev.Effect) -> None:
        leg = live.leg
        match effect:
            case ev.Emit(entry):
                live.link.emit(entry)
            case ev.Say(message):
                if self._deferred is not None:
                    self._deferred.append((live.link, message))
                else:
                    live.link.say(message)
            case ev.ToEngine(message):
                self._to_engine(live, message)
            case ev.RecordPrefix(prompt_tokens, held_tokens):
                size = len(canonical_bytes(leg.submit.input))
                self._directory.record(leg.submit.chain, size, prompt_tokens, held_tokens)
            case ev.AwaitRetarget():
                loop = asyncio.get_running_loop()
                live.patience = loop.call_later(RETARGET_WAIT_S, self._waited_enough, live)
            case ev.StopWaiting():
                self._stop_waiting(live)
            case ev.Over():
                self._forget(live)
            case _:
                if self.generation is not None:  # else its transfers went with the engine
                    self.generation.transfer_effect(leg, effect)

    def _to_engine(self, live: Live, message: engine.AgentMessage) -> None:
        generation = self.generation
        if generation is None:
            return
        generation.client.send(message)
        if isinstance(message, engine.Drop | engine.Release):
            self._stop_timer(live)
            loop = asyncio.get_running_loop()
            live.timer = loop.call_later(LET_GO_S, generation.hung)

    def _kept_tokens(self, live: Live) -> int:
        if self.generation is None or live.leg.submit.leg != "decode":
            return 0
        return self.generation.kept_tokens(live.leg.transfer_id)

    def _deadline_passed(self, live: Live) -> None:
        live.timer = None
        error = DeadlineError("the request's deadline passed")
        self.advance(live, ev.Broken(error, kept_tokens=self._kept_tokens(live)))

    def _waited_enough(self, live: Live) -> None:
        live.patience = None
        self.advance(live, ev.WaitedEnough())

    @staticmethod
    def _stop_timer(live: Live) -> None:
        if live.timer is not None:
            live.timer.cancel()
            live.timer = None

    @staticmethod
    def _stop_waiting(live: Live) -> None:
        if live.patience is not None:
            live.patience.cancel()
            live.patience = None

    def _forget(self, live: Live) -> None:
        leg = live.leg
        self._stop_timer(live)
        self._stop_waiting(live)
        del self._by_seq[leg.seq]
        if leg.transfer_id:
            del self._by_transfer[leg.transfer_id]
        self._on_over(leg)
