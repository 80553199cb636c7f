"""One model on this node: its engine process, its KV endpoint, its legs.

The shell that carries out what the legs decide. Engine, staging memory and KV endpoint live and
die together as one *generation*: when the engine exits, its transfers, slots and connections go
with it, so nothing of the old engine can reach the new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import assert_never

from pop_node import leg as legs
from pop_node import leg_events as ev
from pop_node.admission import problem_with
from pop_node.answer_desk import AnswerDesk
from pop_node.engine import messages as engine
from pop_node.generation import Generation, HostSettings
from pop_node.kv_stream.spec import Piece
from pop_node.model_facts import ModelFacts
from pop_node.prompt import prepare
from pop_node.router_link import RouterLink
from pop_node.text.stream import escape_json
from pop_node.text.tokenizer import TextCodec
from wire.errors import ConfigError, DeadlineError, MeshError, OverloadError, PeerError
from wire.messages import (
    Attach,
    EngineLoad,
    LinkRate,
    ModelOffer,
    NodeMessage,
    Submit,
)
from wire.prefix import canonical_bytes

log = logging.getLogger(__name__)

MAX_LEGS = 1024
"""Legs of one model at once, whatever their stage; more are refused. Guess: 64 full batches of 16.
"""

TAKEN_OVER = PeerError(
    "another connection goes on with this answer", code="taken_over", retryable=False
)

STOP_S = 5.0
"""Between asking an engine to stop and telling it by signal. Guess: it ends after its step."""

LET_GO_S = 30.0
"""An engine that was told to drop a sequence and does not is hung, and is ended. Guess: several of
the longest steps of a slow CPU."""


@dataclass(slots=True)
class _Live:
    """A leg with what its effects need; ``timer`` is its deadline, then that of the engine."""

    leg: legs.Leg
    link: RouterLink
    timer: asyncio.TimerHandle | None = None


class ModelHost:
    """Runs one model; created by the agent, restarted through ``start``."""

    def __init__(
        self,
        settings: HostSettings,
        codec: TextCodec,
        executor: Executor,
        *,
        on_ready: Callable[[str], None],
        on_exited: Callable[[str], None],
        on_load_changed: Callable[[], None],
        on_legs: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.facts = ModelFacts(settings.model, settings.engine.kv_tokens)
        self._codec = codec
        self._executor = executor
        self._on_ready = on_ready
        self._on_exited = on_exited
        self._on_load_changed = on_load_changed
        self._on_legs = on_legs
        self._generation: Generation | None = None
        self._tasks = asyncio.TaskGroup()
        self._next_seq = 1
        self._by_seq: dict[int, _Live] = {}
        self._by_stream: dict[tuple[RouterLink, int], _Live] = {}
        self._by_transfer: dict[bytes, _Live] = {}
        self._deferred: list[tuple[RouterLink, NodeMessage]] | None = None
        self._answers = AnswerDesk(codec, executor)
        self._kv_port = settings.kv_port
        self._starting = asyncio.Lock()
        self._is_stopping = False

    # ---- life ----------------------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start a new generation; ``on_ready`` follows once a token was produced, ``on_exited``
        when that fails."""
        self._tasks = tasks
        async with self._starting:
            if self._is_stopping:
                return
            try:
                generation = Generation(self.settings, self._transfer_event)
            except OSError as exc:
                self._cannot_start(exc)
                return
            self._generation = generation
            try:
                await generation.client.start(
                    self.settings.engine,
                    generation.staging,
                    lambda message: self._engine_said(generation, message),
                    lambda code: self._engine_exited(generation, code),
                )
            except OSError as exc:
                self._generation = None
                await generation.close()
                self._cannot_start(exc)

    def _cannot_start(self, error: OSError) -> None:
        log.error("engine of %s cannot be started: %s", self.settings.model, error)
        self._on_exited(self.settings.model)

    async def stop(self) -> None:
        """End legs, engine and endpoint; nothing is left afterwards, and nothing starts again."""
        self._is_stopping = True
        self._break_all(PeerError("the node is shutting down", code="draining"))
        self._answers.close()
        async with self._starting:
            generation, self._generation = self._generation, None
            if generation is not None:
                await generation.client.stop(timeout_s=STOP_S)
                await generation.close()

    @property
    def ready(self) -> bool:
        """Has the current engine produced a token?"""
        return self._generation is not None and self._generation.ready is not None

    @property
    def engine_pid(self) -> int | None:
        """Process id of the engine, if one runs."""
        return self._generation.client.pid if self._generation is not None else None

    @property
    def kv_address(self) -> str:
        """Where this model takes KV streams; empty until ready."""
        return self._generation.kv_address if self._generation is not None else ""

    @property
    def num_legs(self) -> int:
        """Legs in any stage."""
        return len(self._by_seq)

    def load(self) -> EngineLoad:
        """The engine's load after its last step."""
        generation = self._generation
        ready = generation.ready if generation is not None else None
        statistics = generation.endpoint.statistics() if generation and ready else None
        return self.facts.load(ready, statistics, self.num_legs)

    def link_rates(self) -> list[LinkRate]:
        """Measured KV links to peers."""
        return self._generation.endpoint.link_rates() if self._generation else []

    # ---- from routers --------------------------------------------------------------------------

    def submit(self, link: RouterLink, submit: Submit) -> None:
        """Start a leg, or refuse it."""
        error = self._refuse(link, submit)
        if error is not None:
            link.say(legs.refusal(submit.stream, error))
            return
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        leg = legs.Leg(seq, submit, self._codec.eos_ids, escape_json)
        live = _Live(leg, link)
        loop = asyncio.get_running_loop()
        live.timer = loop.call_later(
            submit.deadline_remaining_ms / 1000, self._deadline_passed, live
        )
        self._by_seq[seq] = live
        self._by_stream[link, submit.stream] = live
        if submit.transfer is not None:
            self._by_transfer[submit.transfer.id] = live
        self._tasks.create_task(self._prepare(live))

    def cancel(self, link: RouterLink, stream: int) -> None:
        """Stop a leg; unknown streams have ended already."""
        live = self._by_stream.get((link, stream))
        if live is not None:
            self._advance(live, ev.Cancelled())

    def attach(self, link: RouterLink, question: Attach) -> bool:
        """Stop an answer and tell all of it; False when not so much of it is known here."""
        key = question.tenant, question.request_id
        live = [
            one
            for one in self._by_seq.values()
            if (one.leg.submit.tenant, one.leg.submit.request_id) == key
        ]
        answer = self._answers.look_up(question, (one.leg.answer() for one in live))
        if answer is None:
            return False
        for one in live:
            self._advance(one, ev.Broken(TAKEN_OVER))
        self._answers.tell(self._tasks, link, question, answer)
        return True

    def router_left(self, link: RouterLink) -> None:
        """A router's connection is gone: nobody reads its streams any more."""
        for (owner, _), live in list(self._by_stream.items()):
            if owner is link:
                self._advance(live, ev.Cancelled())

    def _refuse(self, link: RouterLink, submit: Submit) -> MeshError | None:
        if not self.ready:
            return OverloadError("the engine is starting", code="not_ready", retry_after_s=1.0)
        if len(self._by_seq) >= MAX_LEGS:
            return OverloadError("too many requests on this node", retry_after_s=1.0)
        if (link, submit.stream) in self._by_stream:
            return PeerError("stream number used twice", code="protocol_error", retryable=False)
        if submit.transfer is not None and submit.transfer.id in self._by_transfer:
            return PeerError("transfer id used twice", code="protocol_error", retryable=False)
        return problem_with(submit)

    async def _prepare(self, live: _Live) -> None:
        """Render and tokenise off the event loop; one leg's trouble stays its own."""
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(
                self._executor, prepare, self._codec, live.leg.submit, self._context_tokens()
            )
            if self._generation is not None and self._generation.client.is_congested:
                raise OverloadError("the engine does not take commands", retry_after_s=1.0)
            self._advance(live, prepared)
        except asyncio.CancelledError:
            raise
        except MeshError as exc:
            self._advance(live, ev.PrepareFailed(exc))
        except BaseException:  # supervisor of one leg; a panic in the tokenizer is no Exception
            log.exception("request %s cannot be prepared", live.leg.submit.request_id[:64])
            self._advance(live, ev.PrepareFailed(MeshError("the prompt cannot be prepared")))

    def _context_tokens(self) -> int:
        ready = self._generation.ready if self._generation is not None else None
        return ready.context_tokens if ready is not None else self._codec.context_tokens

    def _deadline_passed(self, live: _Live) -> None:
        live.timer = None
        self._advance(live, ev.Broken(DeadlineError("the request's deadline passed")))

    # ---- from the engine -----------------------------------------------------------------------

    def _engine_said(self, generation: Generation, message: engine.EngineMessage) -> None:
        if generation is not self._generation:
            return  # last words of an engine that was replaced
        try:
            self._take(generation, message)
        except Exception:  # supervisor of the engine: one that makes no sense is replaced
            log.exception("engine of %s said what cannot be", self.settings.model)
            generation.client.kill()

    def _take(self, generation: Generation, message: engine.EngineMessage) -> None:
        match message:
            case engine.StepDone():
                self._step_done(message)
            case engine.Allocated() | engine.Declined() | engine.PrefillDone() | engine.Ended():
                live = self._by_seq.get(message.seq)
                if live is not None:
                    self._advance(live, message)
            case engine.Staged():
                piece = Piece(
                    message.group,
                    message.component,
                    message.layer_lo,
                    message.layer_hi,
                    message.token_lo,
                    message.token_hi,
                )
                generation.endpoint.staged(message.transfer, message.slot, piece, message.nbytes)
            case engine.Imported(transfer, slot):
                generation.endpoint.imported(transfer, slot)
            case engine.Ready():
                self._tasks.create_task(self._engine_ready(generation, message))
            case engine.Crashed(text):
                log.error("engine of %s crashed: %s", self.settings.model, text)
            case _:
                assert_never(message)

    async def _engine_ready(self, generation: Generation, ready: engine.Ready) -> None:
        try:
            port = await generation.open_doors(ready, self._kv_port)
        except ConfigError as exc:
            if self.facts.offer is None:
                raise  # never worked: the operator has to know
            log.error("engine of %s cannot take KV streams: %s", self.settings.model, exc)
            generation.client.kill()
            return
        if generation is not self._generation or generation.spec is None or port is None:
            return
        self._kv_port = port  # routers were told this address
        self.facts.offer = ModelOffer(
            name=self.settings.model,
            identity=self.settings.identity,
            context_tokens=ready.context_tokens,
            kv_bytes_per_token=generation.spec.token_bytes,
            block_tokens=ready.block_tokens,
            total_blocks=ready.total_blocks,
            dtype=self.settings.engine.dtype,
            kv_address=generation.kv_address,
        )
        phases = ", ".join(f"{name} {ms:.0f} ms" for name, ms in ready.phases_ms.items())
        log.info("engine of %s ready: %s backend, %s", self.settings.model, ready.backend, phases)
        self._on_ready(self.settings.model)

    def _engine_exited(self, generation: Generation, code: int) -> None:
        if generation is not self._generation:
            return
        log.error("engine of %s exited with code %d", self.settings.model, code)
        self._generation = None
        self.facts.engine_gone()
        error = PeerError(f"the engine of {self.settings.model} died", code="engine_died")
        self._break_all(error)
        generation.engine_died()
        self._tasks.create_task(generation.close())
        self._on_exited(self.settings.model)
        self._on_load_changed()

    def _step_done(self, step: engine.StepDone) -> None:
        """One engine step: all its tokens leave as one frame per router, endings after them."""
        deferred: list[tuple[RouterLink, NodeMessage]] = []
        self._deferred = deferred
        touched: dict[RouterLink, None] = {}
        try:
            for seq, index, token, finish in step.tokens:
                live = self._by_seq.get(seq)
                if live is not None:
                    touched[live.link] = None
                    self._advance(live, engine.Token(seq, index, token, finish))
        finally:
            self._deferred = None
            for link in touched:
                link.flush()
            for link, message in deferred:
                link.say(message)
        if self.facts.step_done(step):
            self._on_load_changed()

    def _transfer_event(self, transfer: bytes, event: ev.Event) -> None:
        live = self._by_transfer.get(transfer)
        if live is not None:
            self._advance(live, event)

    # ---- effects -------------------------------------------------------------------------------

    def _advance(self, live: _Live, event: ev.Event) -> None:
        for effect in live.leg.handle(event):
            self._carry_out(live, effect)

    def _carry_out(self, live: _Live, effect: ev.Effect) -> None:
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
            case ev.RecordPrefix(prompt_tokens):
                size = len(canonical_bytes(leg.submit.input))
                self.facts.directory.record(leg.submit.chain, size, prompt_tokens)
            case ev.Over():
                self._forget(live)
            case _:
                if self._generation is not None:  # else its transfers went with the engine
                    self._generation.transfer_effect(leg, effect)

    def _to_engine(self, live: _Live, message: engine.AgentMessage) -> None:
        generation = self._generation
        if generation is None:
            return
        generation.client.send(message)
        if isinstance(message, engine.Drop | engine.Release):
            self._stop_timer(live)
            loop = asyncio.get_running_loop()
            live.timer = loop.call_later(LET_GO_S, self._hung, generation)

    def _hung(self, generation: Generation) -> None:
        log.error("engine of %s does not answer and is ended", self.settings.model)
        generation.client.kill()

    @staticmethod
    def _stop_timer(live: _Live) -> None:
        if live.timer is not None:
            live.timer.cancel()
            live.timer = None

    def _forget(self, live: _Live) -> None:
        submit = live.leg.submit
        self._stop_timer(live)
        del self._by_seq[live.leg.seq]
        del self._by_stream[live.link, submit.stream]
        if submit.transfer is not None:
            del self._by_transfer[submit.transfer.id]
        self._answers.keep(live.leg.answer())
        self._on_legs()

    def _break_all(self, error: MeshError) -> None:
        for live in list(self._by_seq.values()):
            self._advance(live, ev.Broken(error, engine_gone=True))
