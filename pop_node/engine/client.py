"""The agent's handle on one engine process. Asyncio only; never imports torch.

Callbacks run on the event loop: ``on_message`` for everything the engine says but its signs of
life, in order, then ``on_exit`` exactly once. After ``on_exit`` the client is finished; a new
engine gets a new one.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Literal

from pop_node.engine.boundary import MessageReader, encode, send_setup
from pop_node.engine.config import EngineConfig
from pop_node.engine.messages import AgentMessage, Beat, EngineMessage, Ready, Stop
from pop_node.engine.spawn import EngineProcess, Launch, launch_engine
from pop_node.engine.watch import EngineWatch
from pop_node.kv_stream.staging import Staging
from wire.errors import PeerError

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""Commands that the engine has not read, beyond which it gets no new sequences. Guess: its full
queue of long prompts."""

KILL_WAIT_S = 2.0
"""For a killed process to be gone. Guess: unmapping tens of gigabytes; one that sleeps in a driver
is left behind."""


class EngineClient:
    """Starts, talks to, looks after and ends one engine process."""

    def __init__(self, detection_s: float) -> None:
        """An engine that is ready and then says nothing for ``detection_s`` is given up."""
        self._detection_s = detection_s
        self._warm_ups_per_step = 1.0
        self._watch: EngineWatch | None = None
        self._look: asyncio.TimerHandle | None = None
        self._on_message: Callable[[EngineMessage], None] | None = None
        self._on_exit: Callable[[int], None] | None = None
        self._process: EngineProcess | None = None
        self._socket: asyncio.Transport | None = None
        self._reader = MessageReader()
        self._missing = {"process", "socket"}
        self._is_over = False
        self._gone = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id, from ``start`` on."""
        return self._process.pid if self._process is not None else None

    async def start(
        self,
        config: EngineConfig,
        staging: Staging,
        on_message: Callable[[EngineMessage], None],
        on_exit: Callable[[int], None],
        launch: Launch = launch_engine,
    ) -> None:
        """Start the process; ``Ready`` or ``Crashed`` is the first thing it says.

        ``launch`` may know of one that waits already. Raises ``OSError`` when no process can be
        started, or none that takes its set-up.
        """
        self._on_message, self._on_exit = on_message, on_exit
        self._warm_ups_per_step = config.token_budget / config.block_tokens
        loop = asyncio.get_running_loop()
        self._process = process = await launch()
        process.on_end = lambda: self._ended("process")
        try:
            send_setup(process.sock, config, staging.layout, staging.fd)
            process.sock.setblocking(False)
            self._socket, _ = await loop.create_unix_connection(
                lambda: _Socket(self._received, lambda: self._ended("socket")), sock=process.sock
            )
        except OSError:
            self._process = process.on_end = None
            await process.end()
            raise
        if process.gone.is_set() and "process" in self._missing:
            self._ended("process")

    @property
    def is_congested(self) -> bool:
        """More waits for the engine than it should: send no ``Add`` now."""
        return self._socket is not None and (
            self._socket.get_write_buffer_size() > MAX_UNSENT_BYTES
        )

    def send(self, message: AgentMessage) -> None:
        """Say something to the engine, without waiting; nothing happens once it has exited.

        What follows an ``Add`` is small and never refused: it gives back what the engine holds.
        """
        if self._socket is not None and not self._socket.is_closing():
            self._socket.write(encode(message))

    async def stop(self, timeout_s: float) -> None:
        """End the process: ask, after ``timeout_s`` kill; returns when it is gone, or cannot be
        killed.

        ``on_exit`` is called as for any other end.
        """
        if self._process is None:
            return
        if self._socket is not None and not self._socket.is_closing():
            self._socket.write(encode(Stop()))
        for wait_s, force in (
            (timeout_s, self.kill),
            (KILL_WAIT_S, lambda: self.give_up("cannot be killed")),
        ):
            try:
                async with asyncio.timeout(wait_s):
                    await self._gone.wait()
                return
            except TimeoutError:
                force()
        assert self._process.transport is not None
        self._process.transport.close()

    def kill(self) -> None:
        """End the process at once; ``on_exit`` follows."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)

    def give_up(self, why: str) -> None:
        """It is of no use any more: kill it, and call ``on_exit`` without waiting for its end, as a
        process that waits for a device cannot even be killed."""
        if self._process is None or self._is_over:
            return
        log.error("engine %s %s and is given up", self.pid, why)
        self.kill()
        if self._socket is not None:
            self._socket.abort()
        self._exit(-signal.SIGKILL)

    # ---- callbacks -----------------------------------------------------------------------------

    def _received(self, data: bytes) -> None:
        assert self._on_message is not None
        try:
            messages = self._reader.feed(data)
        except PeerError as exc:
            log.error("engine %s speaks nonsense and is ended: %s", self.pid, exc)
            self.kill()
            return
        for message in messages:
            if isinstance(message, Beat):
                if self._watch is not None:
                    self._watch.beat(message.busy_s)
                continue
            if isinstance(message, Ready):
                # The warm-up computes a block: longer prompts take less time per token.
                step_s = message.phases_ms["warm"] / 1000 * self._warm_ups_per_step
                self._watch = EngineWatch(self._detection_s, step_s)
                self._look_at(self._watch)
            self._on_message(message)

    def _look_at(self, watch: EngineWatch) -> None:
        fault = watch.look()
        if fault is not None:
            self.give_up(f"is {fault}")
            return
        loop = asyncio.get_running_loop()
        self._look = loop.call_later(watch.period_s, self._look_at, watch)

    def _ended(self, what: Literal["process", "socket"]) -> None:
        """Tell the exit once both are gone, so that last words come before it."""
        self._missing.discard(what)
        if self._missing:
            return
        assert self._process is not None
        assert self._process.transport is not None
        code = self._process.transport.get_returncode()
        self._process.transport.close()
        self._gone.set()
        self._exit(-1 if code is None else code)

    def _exit(self, code: int) -> None:
        if self._is_over:
            return
        assert self._on_exit is not None
        self._is_over = True
        if self._look is not None:
            self._look.cancel()
        self._on_exit(code)


class _Socket(asyncio.Protocol):
    """Hears of bytes and of the end of the socket."""

    def __init__(self, on_data: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_data = on_data
        self._on_end = on_end

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()
