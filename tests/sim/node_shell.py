"""A simulated node: agent, its engine generations and its legs, around the real machines.

Stands in for ``pop_node.agent`` and ``model_host``, with one model; ``pop_node.legs.live_legs`` and
``generation`` are the real ones. A new incarnation is a new ``SimNode``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from pop_node import lifecycle
from pop_node.answers.answer_desk import AnswerDesk
from pop_node.answers.answers import Answer, text_after
from pop_node.engine import messages as em
from pop_node.hosting.generation import Generation
from pop_node.hosting.model_facts import ModelFacts
from pop_node.hosting.model_host import TAKEN_OVER
from pop_node.kv_stream import frames
from pop_node.kv_stream.statistics import statistics
from pop_node.legs import events as lev
from pop_node.legs import leg as legs
from pop_node.legs.admission import problem_with
from pop_node.legs.live_legs import LiveLegs
from pop_node.legs.prompt import prepare
from pop_node.legs.refusal import refusal
from pop_node.text.stream import escape_json
from tests.sim import model as fake
from tests.sim.clock import Process, cancel
from tests.sim.engine_shell import EngineShape, SimEngine, SimStaging
from tests.sim.kv_conn import Mangler
from tests.sim.kv_shell import SimKvEndpoint
from tests.sim.links import End, Network
from tests.sim.node_link_end import SimRouterLink
from tests.sim.registry_shell import SimKeeper
from wire.errors import MeshError, OverloadError, PeerError, RequestError
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Attach,
    Attached,
    Cancel,
    Hello,
    Load,
    ModelOffer,
    Retarget,
    Role,
    Submit,
)

MODEL = "m"
IDENTITY = "1d" * 16
MESH = "sim"
LOAD_PERIOD_S = 1.0
LOAD_MIN_GAP_S = 0.05
CODEC = fake.codec()


@dataclass(frozen=True, slots=True)
class NodeShape:
    """What does not change when a node starts again."""

    name: str
    site: str
    roles: tuple[Role, ...]
    engine: EngineShape
    prepare_s: float

    @property
    def mesh_address(self) -> str:
        return f"{self.name}:1"

    @property
    def kv_address(self) -> str:
        return f"{self.name}:2"


class SimGeneration(Generation):
    """The real generation over a simulated engine and KV endpoint."""

    client: Any
    endpoint: Any
    staging: Any

    def __init__(self, node: SimNode, number: int) -> None:
        shape = node.shape
        facts: Any = SimpleNamespace(model=MODEL, identity=IDENTITY)
        self.settings = facts
        self._on_transfer = node.legs.transfer_event
        self.ready = None
        self.spec = fake.SPEC
        self._is_starving = False
        self.staging = SimStaging(shape.engine.layout)
        hello = frames.Hello(
            frames.MIN_VERSION,
            frames.MAX_VERSION,
            MESH,
            shape.name,
            shape.site,
            node.incarnation,
            shape.engine.layout.slot_bytes,
        )
        self.endpoint = SimKvEndpoint(
            node.process, node.network, hello, self.staging, self, node.mangler
        )
        process = Process(node.process.sim, f"{node.process.name}.e{number}", shape.name)
        self.client = SimEngine(
            process,
            node.process,
            shape.engine,
            self.staging,
            lambda message: node.engine_said(self, message),
            lambda: node.engine_exited(self),
        )

    @property
    def engine(self) -> SimEngine:
        engine: SimEngine = self.client
        return engine


class SimNode:
    """One incarnation of a node's agent."""

    def __init__(
        self, process: Process, network: Network, shape: NodeShape, mangler: Mangler | None
    ) -> None:
        self.process = process
        self.network = network
        self.shape = shape
        self.mangler = mangler
        self.incarnation = process.name
        self.lifecycle = lifecycle.NodeLifecycle((MODEL,))
        self.generation: SimGeneration | None = None
        self.generations = 0
        self.keeper: SimKeeper | None = None
        self.facts = ModelFacts(MODEL, shape.engine.num_blocks * fake.BLOCK_TOKENS)
        self.legs = LiveLegs(self.facts.directory, self._leg_over)
        nobody: Any = None
        self.desk = AnswerDesk(CODEC, nobody)
        self._links: dict[SimRouterLink, None] = {}
        self._next_seq = 1
        self._timer: Any = None
        self._push: Any = None
        self._pushed_at = 0.0
        self._apply(lifecycle.Started())

    # ---- life ----------------------------------------------------------------------------------

    def kill(self) -> None:
        """The agent dies; its engine notices that its socket is gone."""
        self.process.kill()
        if self.generation is not None:
            self.generation.engine.process.kill()

    def _apply(self, event: lifecycle.Event) -> None:
        for effect in self.lifecycle.handle(event, self.process.time()):
            match effect:
                case lifecycle.StartEngine():
                    self.generations += 1
                    self.generation = SimGeneration(self, self.generations)
                    self.legs.generation = self.generation
                case lifecycle.EndEngine():
                    if self.generation is not None:
                        self.generation.client.give_up("late")
                case lifecycle.OpenDoors():
                    self._open_doors()
                case _:
                    raise AssertionError(f"no drain is simulated: {effect}")
        cancel(self._timer)
        at = self.lifecycle.next_deadline()
        self._timer = None if at is None else self.process.call_at(at, self._tick)
        if isinstance(event, lifecycle.EngineReady):
            self._load_changed()

    def _tick(self) -> None:
        self._apply(lifecycle.Tick())

    def _open_doors(self) -> None:
        self.network.listen(self.shape.mesh_address, self.shape.name, self)
        meta = {
            "mesh": MESH,
            "name": self.shape.name,
            "site": self.shape.site,
            "incarnation": self.incarnation,
            "drain": "0",
        }
        self.keeper = SimKeeper(self.process, self.network, self.shape.name, meta)
        self._push = self.process.call_later(LOAD_PERIOD_S, self._push_load)

    def accept(self, end: End) -> None:
        SimRouterLink(self, self.process, end)

    # ---- load ----------------------------------------------------------------------------------

    def _load_changed(self) -> None:
        if self._push is not None:
            cancel(self._push)
            at = max(self.process.time(), self._pushed_at + LOAD_MIN_GAP_S)
            self._push = self.process.call_at(at, self._push_load)

    def _push_load(self) -> None:
        self._push = self.process.call_later(LOAD_PERIOD_S, self._push_load)
        self._pushed_at = self.process.time()
        if not self._links:
            return
        load, delta = self._load(), self.facts.directory.take_delta()
        for link in self._links:
            link.say(load)
            if delta is not None:
                link.say(delta)

    def _load(self) -> Load:
        generation = self.generation
        ready = generation.ready if generation is not None else None
        kv, rates = None, []
        if generation is not None and ready is not None:
            kv = statistics(generation.endpoint.sender, generation.endpoint.receiver, 0)
            rates = generation.endpoint.link_rates()
        return Load([self.facts.load(ready, kv, len(self.legs))], rates, False)

    # ---- routers -------------------------------------------------------------------------------

    def hello(self) -> Hello:
        offers = [] if self.facts.offer is None else [self.facts.offer]
        return Hello(
            MIN_VERSION,
            MAX_VERSION,
            MESH,
            "node",
            self.shape.name,
            self.shape.site,
            self.incarnation,
            sorted(self.shape.roles),
            offers,
        )

    def router_joined(self, link: SimRouterLink) -> None:
        self._links[link] = None
        link.say(self._load())
        link.say(self.facts.directory.whole())

    def router_left(self, link: Any) -> None:
        self._links.pop(link, None)
        self.legs.router_left(link)

    def from_router(self, link: Any, message: Any) -> None:
        match message:
            case Submit():
                self._submit(link, message)
            case Cancel(stream):
                self.legs.cancel(link, stream)
            case Retarget():
                self.legs.retarget(link, message)
            case Attach():
                self._attach(link, message)
            case _:
                raise AssertionError(f"unknown message {message}")

    def _refuse(self, link: Any, submit: Submit) -> MeshError | None:
        if self.generation is None or self.generation.ready is None:
            return OverloadError("the engine is starting", code="not_ready", retry_after_s=1.0)
        return self.legs.refuse(link, submit) or problem_with(submit)

    def _submit(self, link: Any, submit: Submit) -> None:
        error = self._refuse(link, submit)
        if error is not None:
            link.say(refusal(submit.stream, error))
            return
        seq, self._next_seq = self._next_seq, self._next_seq + 1
        leg = legs.Leg(seq, submit, CODEC.eos_ids, escape_json, link.version)
        live = self.legs.add(leg, link)
        self.process.call_later(self.shape.prepare_s, self._prepare, live)

    def _prepare(self, live: Any) -> None:
        """What a worker thread does, all at its end."""
        event: lev.Event
        try:
            event = prepare(CODEC, live.leg.submit, fake.CONTEXT_TOKENS)
        except MeshError as error:
            event = lev.PrepareFailed(error)
        self.legs.advance(live, event)

    def _leg_over(self, leg: legs.Leg) -> None:
        self.desk.keep(leg.answer())

    def _attach(self, link: Any, question: Attach) -> None:
        """``ModelHost.attach`` and ``Agent.attach``."""
        live = self.legs.of_request(question.tenant, question.request_id)
        answer = self.desk.look_up(question, (one.leg.answer() for one in live))
        if answer is None:
            error = RequestError("no such answer is known here", code="stream_unknown")
            link.say(refusal(question.stream, error))
            return
        for one in live:
            self.legs.advance(one, lev.Broken(TAKEN_OVER))
        self.process.call_later(self.shape.prepare_s, self._tell, link, question, answer)

    @staticmethod
    def _tell(link: Any, question: Attach, answer: Answer) -> None:
        link.say(
            Attached(
                question.stream,
                answer.submit,
                answer.ids,
                text_after(CODEC, answer, question.from_index),
                answer.prompt_tokens,
                answer.cached_tokens,
                answer.reason,
            )
        )

    # ---- the engine ----------------------------------------------------------------------------

    def engine_said(self, generation: SimGeneration, message: em.EngineMessage) -> None:
        if generation is not self.generation:
            return
        match message:
            case em.StepDone():
                self.legs.step_done(message)
                generation.step_done(message)
                if self.facts.step_done(message):
                    self._load_changed()
            case em.Allocated() | em.Declined() | em.PrefillDone() | em.Ended():
                self.legs.engine_event(message.seq, message)
            case em.Staged():
                self._staged(generation, message)
            case em.Imported(transfer, slot):
                generation.endpoint.imported(transfer, slot)
            case em.Ready():
                self._engine_ready(generation, message)
            case _:
                raise AssertionError(f"unknown message {message}")

    @staticmethod
    def _staged(generation: SimGeneration, message: em.Staged) -> None:
        generation.endpoint.staged(
            message.transfer, message.slot, message.piece, message.nbytes, message.resume
        )

    def _engine_ready(self, generation: SimGeneration, ready: em.Ready) -> None:
        generation.ready = ready
        generation.endpoint.listen(self.shape.kv_address)
        self.facts.offer = ModelOffer(
            name=MODEL,
            identity=IDENTITY,
            context_tokens=fake.CONTEXT_TOKENS,
            kv_bytes_per_token=fake.SPEC.token_bytes,
            block_tokens=fake.BLOCK_TOKENS,
            total_blocks=ready.total_blocks,
            dtype="float32",
            kv_address=self.shape.kv_address,
        )
        self._apply(lifecycle.EngineReady(MODEL))

    def engine_exited(self, generation: SimGeneration) -> None:
        if generation is not self.generation:
            return
        self.generation = self.legs.generation = None
        self.facts.engine_gone()
        self.legs.break_all(PeerError("the engine died", code="engine_died"))
        generation.engine_died()
        generation.endpoint.close()
        self._apply(lifecycle.EngineExited(MODEL))
        self._load_changed()
