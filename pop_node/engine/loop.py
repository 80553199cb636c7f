"""The engine's main loop: commands in, one step, results out.

A thin shell: the scheduler decides, the runner computes, the stager copies. Knows the clock.
"""

from __future__ import annotations

import time
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
    StepDone,
    Stop,
    Token,
)
from pop_node.engine.port import Inbox, Port
from pop_node.engine.rates import StepRates
from pop_node.engine.runner import StepRunner
from pop_node.engine.schedule import (
    Effect,
    Load,
    Schedule,
    TransferBound,
    TransferClosed,
    TransferOpened,
    TransferRenamed,
    TransferUnbound,
)
from pop_node.engine.scheduler import Scheduler
from pop_node.engine.stager import Stager


class EngineLoop:
    """Runs steps until told to stop. ``last_layer`` is the number of the model's last layer."""

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
        self._schedule = Schedule((), (), (), 0)

    def run(self) -> None:
        """Work until ``Stop``."""
        idle = False
        while self._take_commands(idle):
            idle = not self.step() and not self._runner.prepare()

    def step(self) -> bool:
        """One engine step; False when there was nothing to compute."""
        schedule, effects = self._scheduler.schedule(time.monotonic())
        self._carry_out(effects)
        if not schedule.rows:
            self._tell([])
            return False
        self._schedule = schedule
        exported = [
            (row.sequence.transfer, row.end)
            for row in schedule.rows
            if row.sequence.leg == "prefill"
        ]
        self._stager.begin_step(exported)
        listener = self._layer_done if exported or schedule.completing else None
        started = time.monotonic()
        ids = self._runner.launch(schedule, listener)()
        now = time.monotonic()
        self._rates.step(schedule.prefill_tokens, now - started)
        effects = self._scheduler.complete(schedule, ids, now)
        tokens = [(e.seq, e.index, e.id, e.finish) for e in effects if isinstance(e, Token)]
        self._tell(tokens)
        self._carry_out(effects)
        return True

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
        if layer == self._last_layer and self._schedule.completing:
            now = time.monotonic()
            for sequence in self._schedule.completing:
                timings = sequence.timings
                started = now if timings.started_at is None else timings.started_at
                queue_ms = (started - timings.added_at) * 1000
                self._port.send(PrefillDone(sequence.seq, queue_ms, (now - started) * 1000))

    def _tell(self, tokens: list[tuple[int, int, int, str]]) -> None:
        """Send tokens and load; nothing when neither is new."""
        load = self._scheduler.load()
        if not tokens and load == self._told:
            return
        self._told = load
        self._port.send(
            StepDone(
                tokens=tokens,
                queued_prefill_tokens=load.queued_prefill_tokens,
                running=load.running,
                waiting=load.waiting,
                free_blocks=load.free_blocks,
                cached_blocks=load.cached_blocks,
                prefill_tokens_per_s=self._rates.prefill_tokens_per_s,
                decode_step_ms=self._rates.decode_step_ms,
                pinned=load.pinned,
                drafted=load.drafted,
                accepted=load.accepted,
            )
        )
