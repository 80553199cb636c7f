"""The engine's main loop: commands in, one step, results out.

A thin shell: the scheduler decides, the runner computes, the stager copies. Knows the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

from pop_node.engine.messages import (
    Add,
    Allocated,
    Commit,
    Declined,
    Drop,
    Ended,
    PrefillDone,
    Release,
    Retarget,
    StageFrom,
    Stop,
    Token,
)
from pop_node.engine.port import Inbox, Port
from pop_node.engine.rates import StepRates
from pop_node.engine.running.runner import StepRunner
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
from pop_node.engine.staging.stager import Stager

_Fields = tuple[int, int, int, str]
"""Of a ``Token``."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that was begun; ``collect`` waits for it and gives the tokens drawn."""

    schedule: Schedule
    started: float
    tells_prefills: bool  # while its layers are computed; else they are told when it ends
    collect: Callable[[], list[int]]


class EngineLoop:
    """Runs steps until told to stop, with as many under way as the runner has depth: one, which
    ends before the next is scheduled, or two. One that is awaited ends at once in either case.
    ``last_layer``: number of the model's last layer."""

    def __init__(
        self, scheduler: Scheduler, runner: StepRunner, stager: Stager, port: Port, last_layer: int
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._stager = stager
        self._port = port
        self._last_layer = last_layer
        self._rates = StepRates()
        self._told: Load | None = None
        self._under_way: _Step | None = None
        self._ended_at = 0.0
        self._schedule = Schedule((), (), (), 0)

    def run(self) -> None:
        """Work until ``Stop``."""
        idle = False
        while self._take_commands(idle):
            idle = not self.step() and not self._runner.prepare()

    def step(self) -> bool:
        """Begin a step, if there is something to compute, and end the oldest that has to end now;
        False when there was neither."""
        before = self._under_way
        if before is not None:
            self._scheduler.ahead(before.schedule)
        schedule, effects = self._scheduler.schedule(time.monotonic())
        self._carry_out(effects)
        begun = self._begin(schedule) if schedule.rows else None
        self._under_way = begun
        if before is not None:
            self._end(before)
        if begun is not None and (self._runner.depth == 1 or begun.schedule.awaited):
            self._under_way = None
            self._end(begun)
        if before is None and begun is None:
            self._tell([])
            return False
        return True

    def _begin(self, schedule: Schedule) -> _Step:
        self._schedule = schedule
        exported = [
            (row.sequence.transfer, row.end)
            for row in schedule.rows
            if row.sequence.leg == "prefill"
        ]
        self._stager.begin_step(exported)
        # Layer by layer a step takes 1 to 2 % longer: only where their KV is waited for.
        listener = self._layer_done if exported else None
        tells_prefills = bool(exported) and self._runner.depth == 1
        started = time.monotonic()
        return _Step(schedule, started, tells_prefills, self._runner.launch(schedule, listener))

    def _end(self, step: _Step) -> None:
        ids = step.collect()
        now = time.monotonic()
        # With two under way, a step has the device to itself from the end of the one before.
        self._rates.step(step.schedule.prefill_tokens, now - max(step.started, self._ended_at))
        self._ended_at = now
        if not step.tells_prefills:
            self._prefills_done(step.schedule, now)
        effects = self._scheduler.complete(step.schedule, ids, now)
        tokens: list[_Fields] = [effect for effect in effects if isinstance(effect, Token)]
        self._tell(tokens)
        if len(tokens) < len(effects):
            self._carry_out(effects)

    # ---- commands ------------------------------------------------------------------------------

    def _take_commands(self, idle: bool) -> bool:
        """Handle all commands that are here, waiting for one when idle; False after ``Stop``."""
        command = self._port.take(wait=idle)
        while command is not None:
            if isinstance(command, Stop):
                return False
            self._handle(command)
            command = self._port.take(wait=False)
        return True

    def _handle(self, command: Inbox) -> None:
        match command:
            case Add() | Drop() | Retarget() | Release() | Commit():
                self._carry_out(self._scheduler.handle(command, time.monotonic()))
            case StageFrom():
                if self._stager.grant(command):
                    self._port.wake()
            case Stop():
                raise AssertionError("the caller ends the loop")
            case _:
                assert_never(command)

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Allocated() | Declined() | Ended():
                    self._port.send(effect)
                case TransferOpened(transfer, total_tokens):
                    self._stager.open_export(transfer, total_tokens)
                case TransferBound(side, transfer, blocks, held_tokens, total_tokens):
                    self._stager.bind(side, transfer, blocks, held_tokens, total_tokens)
                case TransferUnbound(transfer):
                    self._stager.unbind_export(transfer)
                case TransferRenamed(transfer, new_transfer):
                    self._stager.rename_export(transfer, new_transfer)
                case TransferClosed(side, transfer):
                    self._stager.close(side, transfer)
                case Token():
                    pass  # left in one StepDone before
                case _:
                    assert_never(effect)

    # ---- during and after a step ---------------------------------------------------------------

    def _layer_done(self, layer: int) -> None:
        self._stager.layer_done(layer)
        # A runner that goes on at once has only queued it.
        if layer == self._last_layer and self._runner.depth == 1:
            self._prefills_done(self._schedule, time.monotonic())

    def _prefills_done(self, schedule: Schedule, now: float) -> None:
        for sequence in schedule.completing:
            if sequence.phase == "ended":
                continue
            timings = sequence.timings
            started = now if timings.started_at is None else timings.started_at
            queue_ms = (started - timings.added_at) * 1000
            self._port.send(PrefillDone(sequence.seq, queue_ms, (now - started) * 1000))

    def _tell(self, tokens: list[_Fields]) -> None:
        """Send tokens and load; nothing when neither is new."""
        load = self._scheduler.load()
        if not tokens and load == self._told:
            return
        self._told = load
        self._port.send(self._rates.step_done(tokens, load))
