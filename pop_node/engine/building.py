"""From a set-up and a model's bytes to an engine that has produced a token. Needs torch."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

from kernels.ops import Ops
from pop_node.engine.beginning import SetUp
from pop_node.engine.config import Ahead, EngineConfig
from pop_node.engine.loop import EngineLoop
from pop_node.engine.messages import Add, Ready
from pop_node.engine.port import Port
from pop_node.engine.running.cuda_device import CudaDevice
from pop_node.engine.running.cuda_runner import CudaRunner
from pop_node.engine.running.runner import Model, Runner, StepRunner
from pop_node.engine.scheduling.block_pool import BlockPool
from pop_node.engine.scheduling.scheduler import Scheduler
from pop_node.engine.scheduling.speculation import Speculation
from pop_node.engine.scheduling.validate import Limits
from pop_node.engine.staging.kv_mover import DeviceMover, HostMover, Mover
from pop_node.engine.staging.stager import Stager
from pop_node.engine.start_clock import StartClock
from pop_node.kv_stream.staging import Staging
from pop_node.models.binding import bind_ahead
from pop_node.models.registry import load, load_backend, prepare
from pop_node.store.host_memory import prefer_huge
from pop_node.store.spare_memory import touch
from wire.errors import ConfigError


class Kernels:
    """The operations of a process, loaded once."""

    def __init__(self, clock: StartClock) -> None:
        self._clock = clock
        self._loaded: tuple[tuple[str, int, bool], Ops] | None = None

    def load_ahead(self, wanted: Ahead) -> None:
        """What is wrong with them, ``load`` will say."""
        with suppress(ConfigError):
            self.load(wanted)

    def load(self, wanted: Ahead | EngineConfig) -> Ops:
        """Raises ``ConfigError`` as ``load_backend`` does."""
        key = (wanted.backend, wanted.threads, wanted.batch_invariant)
        if self._loaded is None or self._loaded[0] != key:
            with self._clock.phase("kernels"):
                ops = load_backend(
                    wanted.backend, wanted.threads, batch_invariant=wanted.batch_invariant
                )
            self._loaded = key, ops
        return self._loaded[1]


def build(
    port: Port, set_up: SetUp, kernels: Kernels, clock: StartClock
) -> tuple[EngineLoop, Ready]:
    """Load and warm: afterwards a token was produced and nothing is held or cached."""
    config = set_up.config
    ops = kernels.load(config)
    prepare(config.model_dir)
    # While the drive reads: all that looks at none of its bytes.
    placed = set_up.placed() if config.weights == "plain" else None
    bound = None if placed is None else bind_ahead(placed, config.dtype, ops)
    parts = None if bound is None else _assemble(bound.model, ops, config)
    read = set_up.bundle()
    began = time.monotonic()
    # Held as long as the process lives.
    assert config.weights != "auto", "settled while the set-up was taken"
    loaded = load(config.model_dir, config.dtype, ops, read, config.weights, bound, set_up.plain)
    loaded_at = time.monotonic()
    if read is None:
        clock.add("load", began, loaded_at)
    else:
        clock.add("load", read.began, read.ended)
    for name, phase in loaded.phases.items():
        clock.add(name, phase.began, phase.ended, phase.nbytes)
    model = loaded.model
    if parts is None or parts.model is not model:
        parts = _assemble(model, ops, config)
    pool, limits, runner, scheduler = parts.pool, parts.limits, parts.runner, parts.scheduler
    first_token_at = _warm(scheduler, runner, limits)
    pool.forget()
    spec = model.kv_spec()
    stager = Stager(
        spec,
        runner.cache,
        config.block_tokens,
        set_up.staging,
        pool.generations,
        port.wake,
        _mover(ops, set_up.staging),
    )
    port.attach(stager)
    clock.add("first_token", loaded_at, first_token_at)
    clock.add("warm", loaded_at, time.monotonic())
    last_layer = max(layer for group in spec.groups for layer in group.layers)
    ready = Ready(
        pid=os.getpid(),
        block_tokens=config.block_tokens,
        total_blocks=config.num_blocks,
        context_tokens=limits.context_tokens,
        backend=ops.name + ("+resident" if config.weights == "resident" else ""),
        kv_spec=spec.to_dict(),
        phases_ms={
            "import": clock.length_s("imports") * 1000,
            "load": clock.length_s("kernels", "load", "bind") * 1000,
            **{name: phase.wall_s * 1000 for name, phase in loaded.phases.items()},
            "warm": clock.length_s("warm") * 1000,
        },
        phase_bytes={name: phase.nbytes for name, phase in loaded.phases.items()},
        phases=clock.spans(),
    )
    if ops.device.type == "cpu":
        threading.Thread(target=_touch, args=(runner.cache,), name="touch", daemon=True).start()
    return EngineLoop(scheduler, runner, stager, port, last_layer), ready


@dataclass(frozen=True, slots=True)
class _Parts:
    """What an engine is made of around its model; the cache is part of the runner."""

    model: Model
    pool: BlockPool
    limits: Limits
    runner: StepRunner
    scheduler: Scheduler


def _assemble(model: Model, ops: Ops, config: EngineConfig) -> _Parts:
    """Computes nothing on a CPU. Raises as ``_runner``."""
    pool = BlockPool(config.num_blocks, config.block_tokens)
    limits = Limits(
        vocab_size=model.config.vocab_size,
        context_tokens=min(
            model.config.context_tokens,
            config.context_tokens or model.config.context_tokens,
            config.num_blocks * config.block_tokens,
        ),
        block_tokens=config.block_tokens,
        num_blocks=config.num_blocks,
    )
    runner = _runner(model, ops, config, limits)
    scheduler = Scheduler(
        pool,
        limits,
        token_budget=config.token_budget,
        max_sequences=config.max_sequences,
        max_waiting=config.max_waiting,
        speculation=Speculation() if ops.batch_invariant and runner.depth == 1 else None,
    )
    return _Parts(model, pool, limits, runner, scheduler)


def _runner(model: Model, ops: Ops, config: EngineConfig, limits: Limits) -> StepRunner:
    """The one for the device of ``ops``; on an accelerator with the graphs that a start waits for.

    Raises ``ConfigError`` without room for the cache.
    """
    if ops.device.type == "cpu":
        return Runner(model, ops, config.num_blocks, config.block_tokens)
    from pop_node.engine.running.device_sampler import (
        DeviceSampler,  # needs triton, an optional part
    )

    runner = CudaRunner(
        model,
        CudaDevice(ops.device),
        DeviceSampler(),
        config.num_blocks,
        config.block_tokens,
        token_budget=config.token_budget,
        max_sequences=config.max_sequences,
        context_tokens=limits.context_tokens,
    )
    runner.capture_first()
    return runner


def _mover(ops: Ops, staging: Staging) -> Mover:
    """The one for the device of ``ops``. Raises ``ConfigError`` if staging cannot be locked."""
    if ops.device.type == "cpu":
        return HostMover()
    from kernels.triton.kv_pack import kv_move  # needs triton, an optional part

    device = CudaDevice(ops.device)
    device.page_lock(torch.frombuffer(staging.everything(), dtype=torch.uint8))
    return DeviceMover(device, kv_move, staging.layout.slot_bytes)


def _touch(cache: tuple[torch.Tensor, ...]) -> None:
    """Have the cache's memory before it is needed, but not before the engine is ready: it may be
    far more than the model."""
    for component in cache:
        prefer_huge(component.data_ptr(), component.nbytes)
        touch(component.data_ptr(), component.nbytes, threading.Event())


def _warm(scheduler: Scheduler, runner: StepRunner, limits: Limits) -> float:
    """Answer a prompt of a block and a token with two tokens: a prefill and a decode step.

    Returns when the first token was there, on the monotonic clock.
    """
    room = limits.context_tokens
    prompt = [0] * max(1, min(limits.block_tokens + 1, room - 2))
    add = Add(
        seq=0,
        leg="both",
        prompt_ids=prompt,
        forced_ids=[],
        max_tokens=min(2, room - len(prompt)),
        temperature=0.0,
        top_p=1.0,
        seed=0,
        stop_ids=[],
        salt=b"",
        transfer=b"",
    )
    scheduler.handle(add, time.monotonic())
    first_at: float | None = None
    while scheduler.num_sequences:
        schedule, _ = scheduler.schedule(time.monotonic())
        ids = runner.launch(schedule, lambda layer: None)()
        scheduler.complete(schedule, ids, time.monotonic())
        if ids and first_at is None:
            first_at = time.monotonic()
    assert first_at is not None, "the engine could not produce a token"
    return first_at
