"""Start of an engine process: set-up, load, warm-up, then the loop.

Everything that fails before the loop is told to the agent as ``Crashed`` like a failure in it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import time

from pop_node.engine.block_pool import BlockPool
from pop_node.engine.boundary import receive_setup
from pop_node.engine.config import EngineConfig
from pop_node.engine.loop import EngineLoop
from pop_node.engine.messages import Add, Ready
from pop_node.engine.port import EXIT_PARENT_GONE, EXIT_STOPPED, Port
from pop_node.engine.runner import Runner
from pop_node.engine.scheduler import Scheduler
from pop_node.engine.stager import Stager
from pop_node.engine.validate import Limits
from pop_node.kv_stream.staging import Staging
from pop_node.models.registry import load, load_backend
from wire.errors import PeerError


def serve(sock: socket.socket, started_at: float) -> int:
    """Be the engine at the other end of ``sock``; returns the exit code.

    ``started_at`` is when the process began to import, on the monotonic clock.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the group; the agent decides
    imported_at = time.monotonic()
    port = Port(sock)
    try:
        config, layout, fd = receive_setup(sock)
    except PeerError:
        return EXIT_PARENT_GONE
    port.start()
    try:
        import_ms = (imported_at - started_at) * 1000
        loop, ready = _build(port, config, Staging.attach(fd, layout), import_ms)
        gc.freeze()  # the model lives as long as the process: do not walk it again
        port.ready(ready)
        loop.run()
    except Exception as exc:  # noqa: BLE001 - supervisor: tell the agent and exit
        port.crash(exc)
    return EXIT_STOPPED


def _build(
    port: Port, config: EngineConfig, staging: Staging, import_ms: float
) -> tuple[EngineLoop, Ready]:
    """Load and warm: afterwards a token was produced and nothing is held or cached."""
    load_started = time.monotonic()
    ops = load_backend(config.backend, config.threads, batch_invariant=config.batch_invariant)
    loaded = load(config.model_dir, config.dtype, ops)  # its hold lasts as long as the process
    model = loaded.model
    loaded_at = time.monotonic()
    runner = Runner(model, ops, config.num_blocks, config.block_tokens)
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
    scheduler = Scheduler(
        pool,
        limits,
        token_budget=config.token_budget,
        max_sequences=config.max_sequences,
        max_waiting=config.max_waiting,
    )
    _warm(scheduler, runner, limits)
    pool.forget()
    spec = model.kv_spec()
    stager = Stager(spec, runner.cache, config.block_tokens, staging, pool.generations, port.wake)
    port.attach(stager)
    last_layer = max(layer for group in spec.groups for layer in group.layers)
    ready = Ready(
        pid=os.getpid(),
        block_tokens=config.block_tokens,
        total_blocks=config.num_blocks,
        context_tokens=limits.context_tokens,
        backend=ops.name,
        kv_spec=spec.to_dict(),
        phases_ms={
            "import": import_ms,
            "load": (loaded_at - load_started) * 1000,
            **{name: phase.wall_s * 1000 for name, phase in loaded.phases.items()},
            "warm": (time.monotonic() - loaded_at) * 1000,
        },
        phase_bytes={name: phase.nbytes for name, phase in loaded.phases.items()},
    )
    return EngineLoop(scheduler, runner, stager, port, last_layer), ready


def _warm(scheduler: Scheduler, runner: Runner, limits: Limits) -> None:
    """Answer a prompt of a block and a token with two tokens: a prefill and a decode step."""
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
    produced = 0
    while scheduler.num_sequences:
        schedule, _ = scheduler.schedule(time.monotonic())
        ids = runner.run(schedule, lambda layer: None)
        scheduler.complete(schedule, ids, time.monotonic())
        produced += len(ids)
    assert produced > 0, "the engine could not produce a token"
