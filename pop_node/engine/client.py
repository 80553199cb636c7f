"""The agent's handle on one engine process. Asyncio only; never imports torch.

Callbacks run on the event loop: ``on_message`` for everything the engine says, in order, then
``on_exit`` exactly once. After ``on_exit`` the client is finished; a new engine gets a new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Literal

from pop_node.engine.boundary import MessageReader, encode, send_setup
from pop_node.engine.config import EngineConfig
from pop_node.engine.messages import AgentMessage, EngineMessage, Stop
from pop_node.kv_stream.staging import Staging
from wire.errors import PeerError

log = logging.getLogger(__name__)

MAX_UNSENT_BYTES = 32 * 1024 * 1024
"""Commands that the engine has not read, beyond which it gets no new sequences. Guess: its full
queue of long prompts."""

_STDERR = 2

TERMINATE_WAIT_S = 2.0
"""Between asking by signal and killing. Guess: an engine has nothing to save."""


class EngineClient:
    """Starts, talks to and ends one engine process."""

    def __init__(self) -> None:
        self._on_message: Callable[[EngineMessage], None] | None = None
        self._on_exit: Callable[[int], None] | None = None
        self._process: asyncio.SubprocessTransport | None = None
        self._socket: asyncio.Transport | None = None
        self._reader = MessageReader()
        self._missing = {"process", "socket"}
        self._exited = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id, from ``start`` on."""
        return self._process.get_pid() if self._process is not None else None

    async def start(
        self,
        config: EngineConfig,
        staging: Staging,
        on_message: Callable[[EngineMessage], None],
        on_exit: Callable[[int], None],
    ) -> None:
        """Start the process; ``Ready`` or ``Crashed`` is the first thing it says.

        Its standard output and error go to our standard error. Raises ``OSError`` when no process
        can be started.
        """
        self._on_message, self._on_exit = on_message, on_exit
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                send_setup(ours, config, staging.layout, staging.fd)
                ours.setblocking(False)
                self._process, _ = await loop.subprocess_exec(
                    lambda: _Process(lambda: self._ended("process")),
                    *(sys.executable, "-m", "pop_node.engine", str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    stdout=_STDERR,
                    stderr=None,
                    pass_fds=(theirs.fileno(),),
                )
            except OSError:
                ours.close()
                raise
        try:
            self._socket, _ = await loop.create_unix_connection(
                lambda: _Socket(self._received, lambda: self._ended("socket")), sock=ours
            )
        except OSError:
            ours.close()
            self.kill()
            raise

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
        """End the process: ask, after ``timeout_s`` ask by signal, then kill; returns when it is
        gone.

        ``on_exit`` is called as for any other end.
        """
        if self._process is None:
            return
        if self._socket is not None and not self._socket.is_closing():
            self._socket.write(encode(Stop()))
        for wait_s, force in (
            (timeout_s, self._terminate),
            (TERMINATE_WAIT_S, self.kill),
        ):
            try:
                async with asyncio.timeout(wait_s):
                    await self._exited.wait()
                break
            except TimeoutError:
                force()
        await self._exited.wait()

    def kill(self) -> None:
        """End the process at once; ``on_exit`` follows."""
        self._signal(signal.SIGKILL)

    def _terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def _signal(self, number: int) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it is gone already
                self._process.send_signal(number)

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
            self._on_message(message)

    def _ended(self, what: Literal["process", "socket"]) -> None:
        """Tell the exit once both are gone, so that last words come before it."""
        self._missing.discard(what)
        if self._missing or self._exited.is_set():
            return
        assert self._process is not None
        assert self._on_exit is not None
        self._exited.set()
        code = self._process.get_returncode()
        self._process.close()
        self._on_exit(-1 if code is None else code)


class _Process(asyncio.SubprocessProtocol):
    """Hears of the end of the process."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end

    def process_exited(self) -> None:
        self._on_end()


class _Socket(asyncio.Protocol):
    """Hears of bytes and of the end of the socket."""

    def __init__(self, on_data: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._on_data = on_data
        self._on_end = on_end

    def data_received(self, data: bytes) -> None:
        self._on_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_end()
