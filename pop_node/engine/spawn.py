"""Starts engine processes, ahead of time where asked. Asyncio only; never imports torch.

A process that was started imports what it needs and waits for its set-up on its socket. Most of an
engine's start is importing (1.3 to 7 s of two cores, by what else they do), so a node whose models
come and go keeps one process waiting: 145 to 160 MB (PSS; 135 to 155 of them private), measured,
beside the memory for a model that it has ``Ahead``.
Where all models are in memory only a crash would use it, and none waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable

from pop_node.engine.config import Ahead

log = logging.getLogger(__name__)

_STDERR = 2

END_WAIT_S = 2.0
"""For a killed process that never had a model to be gone; guess."""


class EngineProcess(asyncio.SubprocessProtocol):
    """A process that waits for its set-up on ``sock``; ``on_end`` hears of its end.

    Its standard output and error go to our standard error. Whoever sends the set-up owns it then.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.on_end: Callable[[], None] | None = None
        self.gone = asyncio.Event()
        self.transport: asyncio.SubprocessTransport | None = None

    def process_exited(self) -> None:
        self.gone.set()
        if self.on_end is not None:
            self.on_end()

    @property
    def pid(self) -> int | None:
        """Process id."""
        return self.transport.get_pid() if self.transport is not None else None

    def send_signal(self, number: int) -> None:
        """Nothing happens when it is gone already."""
        if self.transport is not None:
            with contextlib.suppress(ProcessLookupError):
                self.transport.send_signal(number)

    async def end(self) -> None:
        """Kill one that was given no set-up; returns when it is gone, or cannot be killed."""
        self.sock.close()
        self.send_signal(signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_WAIT_S):
                await self.gone.wait()
        if self.transport is not None:
            self.transport.close()


Launch = Callable[[], Awaitable[EngineProcess]]
"""Gets a process that was given no set-up yet. Raises ``OSError``."""


async def launch_engine(ahead: Ahead | None = None) -> EngineProcess:
    """A new engine process, with ``ahead`` ready when it gets its set-up. Raises ``OSError`` when
    none can be started."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    process = EngineProcess(ours)
    with theirs:
        try:
            process.transport, _ = await loop.subprocess_exec(
                lambda: process,
                *(sys.executable, "-m", "pop_node.engine", str(theirs.fileno())),
                *([ahead.to_argument()] if ahead is not None else []),
                stdin=subprocess.DEVNULL,
                stdout=_STDERR,
                stderr=None,
                pass_fds=(theirs.fileno(),),
            )
        except OSError:
            ours.close()
            raise
    return process


class Standby:
    """At most one process that waits for the next load."""

    def __init__(self) -> None:
        self._waiting: EngineProcess | None = None
        self._changing = asyncio.Lock()
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """Process id of the one that waits, if there is one."""
        return self._waiting.pid if self._waiting is not None else None

    async def take(self) -> EngineProcess:
        """The one that waits, or a new one. Raises ``OSError`` when none can be started."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.gone.is_set():
            return waiting
        if waiting is not None:
            await waiting.end()
        return await launch_engine()

    async def fill(self, ahead: Ahead | None = None) -> None:
        """Have one wait from now on, unless one does already. A node that cannot start one does
        without."""
        async with self._changing:
            waiting = self._waiting
            if self._is_closed or (waiting is not None and not waiting.gone.is_set()):
                return
            try:
                self._waiting = await launch_engine(ahead)
            except OSError as exc:
                self._waiting = None
                log.warning("no engine process can be started ahead: %s", exc)
        if waiting is not None:
            await waiting.end()

    async def empty(self) -> None:
        """End the one that waits."""
        async with self._changing:
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            await waiting.end()

    async def close(self) -> None:
        """None waits any more, and none will."""
        self._is_closed = True
        await self.empty()
