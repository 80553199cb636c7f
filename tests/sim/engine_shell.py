"""A simulated engine process: the real scheduler, block pool and stager around the fake model.

Stands in for ``pop_node.engine.loop``, ``port`` and ``runner``: commands of the main loop wait for
the end of a step, those of the port's thread do not, a step takes time, and the port's thread may
run between any two effects of the main loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pop_node.engine import messages as em
from pop_node.engine.rates import StepRates
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.schedule import (
    Effect,
    Load,
    Schedule,
    TransferBound,
    TransferClosed,
    TransferOpened,
    TransferRenamed,
    TransferUnbound,
)
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.validate import Limits
from pop_node.engine.staging.kv_mover import Arrived, HostMover, Mark
from pop_node.engine.staging.stager import Stager
from pop_node.engine.watch import EngineWatch
from pop_node.kv_stream.spec import Piece
from pop_node.kv_stream.staging import StagingLayout
from tests.sim.clock import Process
from tests.sim.model import (
    BLOCK_TOKENS,
    CONTEXT_TOKENS,
    LAYERS,
    SPEC,
    VOCABULARY,
    WIDTH,
    CacheMemory,
    FakeModel,
)
from topology.model import DETECTION_S

SLOT_BYTES = 128 * 1024
"""Eight tokens of one layer and component."""

LOCAL_S = 50e-6
"""Agent to engine and back."""

PREEMPTED, SHORTEST_PREEMPTION_S = 0.03, 1e-4
"""How often the main loop's thread loses the processor between two effects, and for how long at
least; at most two thousand times that, as on a machine that is far too busy."""


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Sizes and speed of a node's engines. ``measured``: it knows its rates when it is ready."""

    num_blocks: int
    token_budget: int = 16
    max_sequences: int = 6
    max_waiting: int = 16
    start_s: float = 0.4
    step_s: float = 0.004
    token_s: float = 0.001
    measured: bool = False
    export_slots: int = 4
    import_slots: int = 8

    @property
    def layout(self) -> StagingLayout:
        return StagingLayout(SLOT_BYTES, self.export_slots, self.import_slots)


class SimStaging:
    """Staging memory: what lies in a slot is a bytes value."""

    def __init__(self, layout: StagingLayout) -> None:
        self.layout = layout
        self.slots: list[bytes] = [b""] * layout.total_slots


class SimStager(Stager):
    """The real stager; only the copies are of simulated memory."""

    _memory: Any

    def __init__(
        self,
        model: FakeModel,
        staging: SimStaging,
        generations: Sequence[int],
        wake: Callable[[], None],
    ) -> None:
        cache: Any = model.cache
        plain: Any = staging
        super().__init__(SPEC, cache, BLOCK_TOKENS, plain, generations, wake, HostMover())
        self._slots = staging.slots

    def _copy_out(self, piece: Piece, blocks: tuple[int, ...], slot: int) -> Arrived:
        memory: CacheMemory = self._memory[piece.group][piece.component]
        self._slots[slot] = b"".join(
            memory.read(layer, blocks, piece.token_lo, piece.token_hi)
            for layer in range(piece.layer_lo, piece.layer_hi)
        )
        return lambda: True

    def _copy_in(self, message: em.Import, blocks: tuple[int, ...], lo: int, after: Mark) -> None:
        memory: CacheMemory = self._memory[message.group][message.component]
        width = (message.token_hi - message.token_lo) * WIDTH
        skip = (lo - message.token_lo) * WIDTH
        for index, layer in enumerate(range(message.layer_lo, message.layer_hi)):
            data = self._slots[message.slot][index * width : (index + 1) * width]
            memory.write(layer, blocks, lo, data[skip:])

    def at_rest(self) -> str | None:
        """What is still held, in words."""
        if len(self._free_slots) != self._staging.layout.export_slots:
            return f"{len(self._free_slots)} export slots free"
        if self._exports or self._incoming:
            return f"exports {len(self._exports)}, imports {len(self._incoming)}"
        return None


class SimEngine:
    """One engine process; ``tell`` hears its messages, ``exited`` its end, both at the agent."""

    def __init__(
        self,
        process: Process,
        agent: Process,
        shape: EngineShape,
        staging: SimStaging,
        tell: Callable[[em.EngineMessage], None],
        exited: Callable[[], None],
    ) -> None:
        self.process = process
        self._agent = agent
        self._tell_agent = tell
        self._exited = exited
        self._shape = shape
        self.pool = BlockPool(shape.num_blocks, BLOCK_TOKENS)
        limits = Limits(VOCABULARY, CONTEXT_TOKENS, BLOCK_TOKENS, shape.num_blocks)
        self.scheduler = Scheduler(
            self.pool,
            limits,
            token_budget=shape.token_budget,
            max_sequences=shape.max_sequences,
            max_waiting=shape.max_waiting,
            speculation=Speculation(),
        )
        self.model = FakeModel(shape.num_blocks)
        self.stager = SimStager(self.model, staging, self.pool.generations, self._wake)
        self._inbox: deque[Any] = deque()
        self._rates = StepRates()
        self._told: Load | None = None
        self._main = self._run()
        self._idle = True
        self._turned_at: float | None = None
        self._pump_wanted = False
        self._ready = False
        process.call_later(shape.start_s, self._loaded)

    def send(self, message: em.AgentMessage) -> None:
        """From the agent: arrives a moment later, in order."""
        sim = self.process.sim
        sim.at(sim.now + LOCAL_S, self.process, self._receive, message)

    def _look(self, watch: EngineWatch) -> None:
        """The client's timer, in the agent: whether a beat came, and what the watch makes of it."""
        if not self.process.alive:
            return
        if not self.process.frozen:
            now = self.process.time()
            watch.beat(0.0 if self._turned_at is None else now - self._turned_at)
        fault = watch.look()
        if fault is not None:
            self.give_up(fault)
            return
        self._agent.call_later(watch.period_s, self._look, watch)

    def give_up(self, why: str) -> None:
        """It is of no use any more; its process may outlive that."""
        self.process.sim.note(self.process, f"is {why} and given up")
        self.process.kill()
        self._exited()

    def kill(self) -> None:
        """SIGKILL; the agent hears of it after the engine's last words."""
        if self.process.alive:
            self.process.kill()
            sim = self.process.sim
            sim.at(sim.now + 2 * LOCAL_S, self._agent, self._exited)

    # ---- the port's thread ---------------------------------------------------------------------

    def _say(self, message: em.EngineMessage) -> None:
        sim = self.process.sim
        sim.at(sim.now + LOCAL_S, self._agent, self._tell_agent, message)

    def _loaded(self) -> None:
        self._ready = True
        shape = self._shape
        watch = EngineWatch(DETECTION_S, shape.step_s + shape.token_s * shape.token_budget)
        self._agent.call_later(watch.period_s, self._look, watch)
        for tokens in (16,) * 8 + (0,) * 16 if shape.measured else ():
            self._rates.step(tokens, shape.step_s + shape.token_s * tokens)
        self._say(
            em.Ready(1, BLOCK_TOKENS, shape.num_blocks, CONTEXT_TOKENS, "fake", SPEC.to_dict(), {})
        )

    def _receive(self, message: em.AgentMessage) -> None:
        assert self._ready, "a command before Ready"
        watcher = self.process.sim.on_delivery
        if watcher is not None and not watcher(self, message):
            return
        match message:
            case em.Import(transfer, slot):
                self.stager.take_in(message)
                self._say(em.Imported(transfer, slot))
            case em.SlotFree(slot):
                self.stager.free_slot(slot)
                self._pump_wanted = True
            case em.StageFrom():
                if self.stager.grant(message):
                    self._pump_wanted = True
                else:
                    self._inbox.append(message)
            case _:
                self._inbox.append(message)
        if self._idle:
            self._turn()
        self._pump()

    def _wake(self) -> None:
        self._pump_wanted = True

    def _pump(self) -> None:
        if not self._pump_wanted:
            return
        self._pump_wanted = False
        staged = self.stager.stage_one()
        while staged is not None:
            self._say(staged)
            staged = self.stager.stage_one()

    # ---- the main loop -------------------------------------------------------------------------

    def _turn(self) -> None:
        """Let the main loop go on to where it waits next; the port's thread has its turn then."""
        pause = next(self._main)
        self._idle = pause is None
        if pause is not None:
            self.process.call_later(pause, self._turn)
        self._pump()

    def _run(self) -> Iterator[float | None]:
        """``EngineLoop.run``; yields the seconds until it goes on, None to wait for a command."""
        while True:
            while self._inbox:
                command = self._inbox.popleft()
                if isinstance(command, em.StageFrom):
                    self._pump_wanted |= self.stager.grant(command)
                else:
                    effects = self.scheduler.handle(command, self.process.time())
                    yield from self._carry_out(effects)
            schedule, effects = self.scheduler.schedule(self.process.time())
            yield from self._carry_out(effects)
            if schedule.rows:
                yield from self._step(schedule)
                continue
            self._turned_at = None
            self._tell([])
            if not self._inbox:
                yield None

    def _step(self, schedule: Schedule) -> Iterator[float]:
        started = self._turned_at = self.process.time()
        exports = [
            (row.sequence.transfer, row.end)
            for row in schedule.rows
            if row.sequence.leg == "prefill"
        ]
        self.stager.begin_step(exports)
        shape = self._shape
        duration = shape.step_s + shape.token_s * schedule.num_tokens
        good = [True] * len(schedule.rows)
        if not exports:
            yield duration
        for layer in range(LAYERS):
            if exports:
                yield duration / LAYERS
            for at, row in enumerate(schedule.rows):
                good[at] &= self.model.compute(row, layer)
            if exports:
                self.stager.layer_done(layer)
        now = self.process.time()
        for sequence in schedule.completing:
            began = sequence.timings.started_at
            began = now if began is None else began
            queue_ms = (began - sequence.timings.added_at) * 1000
            self._say(em.PrefillDone(sequence.seq, queue_ms, (now - began) * 1000))
        drawn = [self.model.sample(schedule.rows[at], good[at]) for at in schedule.sampled]
        ids = [token for tokens in drawn for token in tokens]
        self._rates.step(schedule.prefill_tokens, now - started)
        effects = self.scheduler.complete(schedule, ids, now)
        self._tell([(e.seq, e.index, e.id, e.finish) for e in effects if isinstance(e, em.Token)])
        yield from self._carry_out(effects)

    def _carry_out(self, effects: list[Effect]) -> Iterator[float]:
        """One by one: the port's thread may have its turn between any two."""
        rng = self.process.sim.rng
        for effect in effects:
            match effect:
                case em.Ended(seq):
                    self.model.forget(seq)
                    self._say(effect)
                case em.Allocated() | em.Declined():
                    self._say(effect)
                case TransferOpened(transfer, total_tokens):
                    self.stager.open_export(transfer, total_tokens)
                case TransferBound(side, transfer, blocks, held_tokens, total_tokens):
                    self.stager.bind(side, transfer, blocks, held_tokens, total_tokens)
                case TransferUnbound(transfer):
                    self.stager.unbind_export(transfer)
                case TransferRenamed(transfer, new_transfer):
                    self.stager.rename_export(transfer, new_transfer)
                case TransferClosed(side, transfer):
                    self.stager.close(side, transfer)
                case em.Token():
                    continue  # left in one StepDone before
            if rng.random() < PREEMPTED:
                yield SHORTEST_PREEMPTION_S * 10 ** rng.uniform(0.0, 3.3)

    def _tell(self, tokens: list[tuple[int, int, int, str]]) -> None:
        load = self.scheduler.load()
        if not tokens and load == self._told:
            return
        self._told = load
        self._say(self._rates.step_done(tokens, load))

    def at_rest(self) -> str | None:
        """What this engine still holds or disagrees on, in words; None when nothing."""
        self.scheduler.check()
        if self.scheduler.num_sequences:
            return f"{self.scheduler.num_sequences} sequences"
        pool = self.pool
        if pool.free + pool.cached != pool.num_blocks:
            return f"{pool.free} free + {pool.cached} cached of {pool.num_blocks} blocks"
        return self.stager.at_rest()
