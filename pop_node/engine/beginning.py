"""What an engine does while it imports torch: waits for its set-up, then reads its model.

A process that was started ahead has imported everything when the set-up comes; the way is the same.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pop_node.engine.boundary import receive_setup
from pop_node.engine.config import Backend, EngineConfig
from pop_node.engine.port import Port
from pop_node.engine.start_clock import StartClock
from pop_node.kv_stream.staging import Staging
from pop_node.store.host_arena import HostArena
from pop_node.store.manifest import TABLES_FILE
from pop_node.store.reading import READING_THREADS, PlacedBundle, ReadBundle, is_bundle, read_bundle
from pop_node.store.spare_memory import SpareMemory
from pop_node.store.weight_choice import Shape
from wire.errors import PeerError

CUDA_DRIVER = Path("/dev/nvidiactl")
"""Is there once NVIDIA's driver is loaded (its README, "The NVIDIA kernel modules")."""


@dataclass(frozen=True, slots=True)
class SetUp:
    """``bundle()`` waits for the model's bytes, None if it is still to be read: a plain directory,
    or a model that goes to an accelerator, which torch has to find first; raises ``ConfigError``.
    ``placed()`` waits until it is known where they are read to, None if there is no such place.
    ``config`` says which form its weights take, and ``plain`` which shapes of matrices stay as they
    are in any. ``came_at`` is a moment of the monotonic clock."""

    config: EngineConfig
    plain: Collection[Shape]
    staging: Staging
    came_at: float
    placed: Callable[[], PlacedBundle | None]
    bundle: Callable[[], ReadBundle | None]


THREADS = 2 + READING_THREADS
"""One takes the set-up, one reads the model, which takes the others."""


class Beginning:
    """Threads that end by themselves."""

    def __init__(
        self, sock: socket.socket, port: Port, clock: StartClock, spare: SpareMemory | None
    ) -> None:
        """``port`` begins to read ``sock`` after the set-up: a start that takes long can be stopped
        and notices an agent that is gone. The model is read into ``spare``, if there is some: then
        the threads that read wait for it too."""
        self._spare = spare
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="beginning")
        if spare is not None:
            _make_threads(self._pool)
        self._set_up = self._pool.submit(self._take, sock, port, clock)

    def set_up(self) -> SetUp | None:
        """Wait for it; None when the agent is gone or says something else."""
        try:
            return self._set_up.result()
        except PeerError:
            self._pool.shutdown(wait=False)
            return None

    def _take(self, sock: socket.socket, port: Port, clock: StartClock) -> SetUp:
        config, layout, fd = receive_setup(sock)
        came_at = time.monotonic()
        port.start()
        config, plain = _settled(config)
        is_reading = threading.Event()
        placed: Future[PlacedBundle | None] = Future()

        def over(_: Future[ReadBundle | None]) -> None:
            if not placed.done():
                placed.set_result(None)
            self._pool.shutdown(wait=False)

        reading: Future[ReadBundle | None] = self._pool.submit(
            _read, config, plain, self._spare, is_reading, self._pool, placed.set_result
        )
        reading.add_done_callback(over)
        with clock.phase("setup"):
            staging = Staging.attach(fd, layout)
        is_reading.wait()  # what the main thread does next would keep the reads from beginning
        return SetUp(config, plain, staging, came_at, placed.result, reading.result)


def _settled(config: EngineConfig) -> tuple[EngineConfig, Collection[Shape]]:
    """``config`` with a form of weights, where it leaves that open, and shapes that stay plain."""
    if config.weights != "auto":
        return config, ()
    if goes_to_device(config.backend) or not (config.model_dir / TABLES_FILE).exists():
        return replace(config, weights="plain"), ()
    from pop_node.engine.weight_form import settle  # only here: a cold start counts every import

    return settle(config)


def _read(
    config: EngineConfig,
    plain: Collection[Shape],
    spare: SpareMemory | None,
    is_reading: threading.Event,
    pool: Executor,
    on_placed: Callable[[PlacedBundle], None],
) -> ReadBundle | None:
    try:
        if goes_to_device(config.backend) or not is_bundle(config.model_dir):
            return None
        if config.weights == "resident":
            # Only here: a cold start counts every import.
            from pop_node.store.resident_reading import packer_for, read_resident

            packer = packer_for(config.weights, config.dtype)
            if packer is not None:
                return read_resident(config.model_dir, packer, is_reading.set, pool, spare, plain)
        arena = partial(HostArena, spare=spare)
        return read_bundle(config.model_dir, arena, is_reading.set, pool, on_placed)
    finally:
        is_reading.set()


def _make_threads(pool: ThreadPoolExecutor) -> None:
    """All ``THREADS`` of them, before there is something to do."""
    all_there = threading.Barrier(THREADS)
    for _ in range(THREADS):
        pool.submit(all_there.wait)


def goes_to_device(backend: Backend, driver: Path = CUDA_DRIVER) -> bool:
    """Whether a model is likely to end up on a CUDA device, as far as one can tell without torch.

    A wrong guess costs the time that reading takes, or host memory until the model is copied.
    """
    return backend == "triton" or (backend == "auto" and driver.exists())
