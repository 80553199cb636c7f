"""One model on this node: its engine process and its KV endpoint, and how legs come to them.

What legs decide is carried out by ``pop_node.legs.live_legs``. Engine, staging memory and KV
endpoint live and die together as one *generation*: when the engine exits, its transfers, slots and
connections go with it, so nothing of the old engine can reach the new one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import assert_never

from pop_node.answers.answer_desk import AnswerDesk
from pop_node.engine import messages as engine
from pop_node.hosting.generation import Generation, HostSettings
from pop_node.hosting.model_facts import ModelFacts
from pop_node.legs import events as ev
from pop_node.legs import leg as legs
from pop_node.legs.admission import problem_with
from pop_node.legs.live_legs import Live, LiveLegs
from pop_node.legs.prompt import prepare
from pop_node.legs.refusal import refusal
from pop_node.router_link import RouterLink
from pop_node.text.stream import escape_json
from pop_node.text.tokenizer import TextCodec
from wire.errors import ConfigError, MeshError, OverloadError, PeerError
from wire.messages import (
    Attach,
    EngineLoad,
    LinkRate,
    ModelOffer,
    Retarget,
    Submit,
)

log = logging.getLogger(__name__)

MAX_LEGS = 1024
"""Legs of one model at once, whatever their stage; more are refused. Guess: 64 full batches of 16.
"""

MAX_LAST_WORDS = 500
"""Characters of what an engine said before it ended, for people and drills: an error, a path and
what to do. Routers pass on so much of a refused drill."""

TAKEN_OVER = PeerError(
    "another connection goes on with this answer", code="taken_over", retryable=False
)

STOP_S = 5.0
"""Between asking an engine to stop and telling it by signal. Guess: it ends after its step."""


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
        on_legs: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.facts = ModelFacts(settings.model, settings.engine.kv_tokens)
        self.phases: list[tuple[str, float, float, int]] = []
        self.last_words = ""  # of an engine that crashed, until another is ready
        self._codec = codec
        self._executor = executor
        self._on_ready = on_ready
        self._on_exited = on_exited
        self._on_load_changed = on_load_changed
        self._on_legs = on_legs
        self._legs = LiveLegs(self.facts.directory, self._leg_over, lambda: on_legs(settings.model))
        self._generation: Generation | None = None
        self._tasks = asyncio.TaskGroup()
        self._next_seq = 1
        self._answers = AnswerDesk(codec, executor)
        self._kv_port = settings.kv_port
        self._starting = asyncio.Lock()
        self._is_stopping = False
        self._was_ready = False
        self.why_ended = ""
        """Why the last engine did; empty while it is not known."""

    # ---- life ----------------------------------------------------------------------------------

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Start a new generation, unless there is one; ``on_ready`` follows once a token was
        produced, ``on_exited`` when that fails."""
        self._tasks = tasks
        async with self._starting:
            if self._is_stopping or self._generation is not None:
                return
            try:
                generation = Generation(self.settings, self._legs.transfer_event)
            except OSError as exc:
                self._cannot_start(exc)
                return
            self._generation = self._legs.generation = generation
            self.why_ended = ""
            try:
                await generation.client.start(
                    self.settings.engine,
                    generation.staging,
                    lambda message: self._engine_said(generation, message),
                    lambda code: self._engine_exited(generation, code),
                    self.settings.launch,
                )
            except OSError as exc:
                self._generation = self._legs.generation = None
                await generation.close()
                self._cannot_start(exc)

    def _cannot_start(self, error: OSError) -> None:
        log.error("engine of %s cannot be started: %s", self.settings.model, error)
        self.why_ended = str(error)
        self._on_exited(self.settings.model)

    async def stop(self) -> None:
        """End legs, engine and endpoint; nothing is left afterwards, and nothing starts again."""
        self._is_stopping = True
        self._legs.break_all(PeerError("the node is shutting down", code="draining"))
        self._answers.close()
        async with self._starting:
            generation = self._generation
            self._generation = self._legs.generation = None
            if generation is not None:
                await generation.client.stop(timeout_s=STOP_S)
                await generation.close()

    async def unload(self) -> None:
        """End the engine cleanly, with the legs that are left; ``start`` brings a new one."""
        self._legs.break_all(
            OverloadError(f"{self.settings.model} leaves memory", code="not_ready")
        )
        async with self._starting:
            generation = self._generation
            self._generation = self._legs.generation = None
            self.facts.engine_gone()
            if generation is not None:
                await generation.client.stop(timeout_s=STOP_S)
                await generation.close()
        self._on_load_changed()

    def lies_in(self, model_dir: Path) -> None:
        """Where the model's bundle is from now on; the next engine reads it there."""
        engine = replace(self.settings.engine, model_dir=model_dir)
        self.settings = replace(self.settings, engine=engine)

    def end_engine(self) -> None:
        """The engine took too long to be ready: end it; ``on_exited`` follows."""
        if self._generation is not None:
            self._generation.client.give_up("does not become ready")

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
        return len(self._legs)

    @property
    def num_open_legs(self) -> int:
        """Legs whose ending was not said yet: the others only wait for the engine to let go."""
        return self._legs.num_open

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
            link.say(refusal(submit.stream, error))
            return
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        leg = legs.Leg(seq, submit, self._codec.eos_ids, escape_json, link.version)
        self._tasks.create_task(self._prepare(self._legs.add(leg, link)))
        self._on_legs(self.settings.model)

    def cancel(self, link: RouterLink, stream: int) -> None:
        """Stop a leg; unknown streams have ended already."""
        self._legs.cancel(link, stream)

    def retarget(self, link: RouterLink, message: Retarget) -> None:
        """Hand a prefill leg's KV to another node; unknown streams have ended already."""
        self._legs.retarget(link, message)

    def attach(self, link: RouterLink, question: Attach) -> bool:
        """Stop an answer and tell all of it; False when not so much of it is known here."""
        live = self._legs.of_request(question.tenant, question.request_id)
        answer = self._answers.look_up(question, (one.leg.answer() for one in live))
        if answer is None:
            return False
        for one in live:
            self._legs.advance(one, ev.Broken(TAKEN_OVER))
        self._answers.tell(self._tasks, link, question, answer)
        return True

    def router_left(self, link: RouterLink) -> None:
        """A router's connection is gone: nobody reads its streams any more."""
        self._legs.router_left(link)

    def _refuse(self, link: RouterLink, submit: Submit) -> MeshError | None:
        if not self.ready:
            return OverloadError("the engine is starting", code="not_ready", retry_after_s=1.0)
        if len(self._legs) >= MAX_LEGS:
            return OverloadError("too many requests on this node", retry_after_s=1.0)
        return self._legs.refuse(link, submit) or problem_with(submit)

    async def _prepare(self, live: Live) -> None:
        """Render and tokenise off the event loop; one leg's trouble stays its own."""
        self._legs.advance(live, await self._prepared(live.leg.submit))

    async def _prepared(self, submit: Submit) -> ev.Prepared | ev.PrepareFailed:
        loop = asyncio.get_running_loop()
        try:
            prepared = await loop.run_in_executor(
                self._executor, prepare, self._codec, submit, self._context_tokens()
            )
        except asyncio.CancelledError:
            raise
        except MeshError as exc:
            return ev.PrepareFailed(exc)
        except BaseException:  # supervisor of one leg; a panic in the tokenizer is no Exception
            log.exception("request %s cannot be prepared", submit.request_id[:64])
            # Perhaps only this node's trouble; the router's count of attempts ends it if not.
            return ev.PrepareFailed(MeshError("the prompt cannot be prepared", retryable=True))
        if self._generation is not None and self._generation.client.is_congested:
            error = OverloadError("the engine does not take commands", retry_after_s=1.0)
            return ev.PrepareFailed(error)
        return prepared

    def _context_tokens(self) -> int:
        ready = self._generation.ready if self._generation is not None else None
        return ready.context_tokens if ready is not None else self._codec.context_tokens

    def _leg_over(self, leg: legs.Leg) -> None:
        self._answers.keep(leg.answer())
        self._on_legs(self.settings.model)

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
                self._legs.step_done(message)
                generation.step_done(message)
                if self.facts.step_done(message):
                    self._on_load_changed()
            case engine.Allocated() | engine.Declined() | engine.PrefillDone() | engine.Ended():
                self._legs.engine_event(message.seq, message)
            case engine.Staged():
                generation.endpoint.staged(
                    message.transfer, message.slot, message.piece, message.nbytes, message.resume
                )
            case engine.Imported(transfer, slot):
                generation.endpoint.imported(transfer, slot)
            case engine.Ready():
                self._tasks.create_task(self._engine_ready(generation, message))
            case engine.Crashed(text):
                self.last_words = text
                log.error("engine of %s crashed: %s", self.settings.model, text)
                self.why_ended = text[:MAX_LAST_WORDS]
            case _:
                assert_never(message)

    async def _engine_ready(self, generation: Generation, ready: engine.Ready) -> None:
        try:
            port = await generation.open_doors(ready, self._kv_port)
        except ConfigError as exc:
            if not self._was_ready and self.settings.must_work():
                raise  # never worked: the operator has to know
            log.error("engine of %s cannot take KV streams: %s", self.settings.model, exc)
            generation.client.kill()
            return
        if generation is not self._generation or generation.spec is None or port is None:
            return
        self._kv_port, self._was_ready = port, True  # routers were told this address
        self.phases, self.last_words = ready.phases, ""
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
        self.why_ended = self.why_ended or f"it exited with code {code}"
        self._generation = self._legs.generation = None
        self.facts.engine_gone()
        error = PeerError(f"the engine of {self.settings.model} died", code="engine_died")
        self._legs.break_all(error)
        generation.engine_died()
        self._tasks.create_task(generation.close())
        self._on_exited(self.settings.model)
        self._on_load_changed()
