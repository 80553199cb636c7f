"""The asyncio shell around ``supervisor``: starts, watches and ends one child process.

Each child leads its own session, so a signal to its group reaches the engines of a node too, and
Ctrl-C in the terminal reaches only the launcher, which ends its children in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from popmesh.launcher import supervisor
from popmesh.launcher.orphan import LAUNCHER_PID
from popmesh.launcher.plan import Child

log = logging.getLogger("popmesh.launcher")

COMMAND = (sys.executable, "-m", "popmesh")
"""What a child's arguments are given to."""

MAX_EVENTS = 16
"""Waiting events of one child: at most one each of start, exit and stop, and a few of health."""

REAP_TRIES, REAP_PAUSE_S = 20, 0.02
"""A killed group is gone within milliseconds, unless nobody reaps orphans here: then 0.4 s are lost
once per child."""

LOG_TAIL_BYTES = 2000
"""What is shown of a log when its process is given up: some twenty lines."""


class ChildProcess:
    """One supervised child. ``pid`` is that of the running process, None between runs.

    ``on_gave_up`` is called once if it can never be started.
    """

    def __init__(
        self,
        child: Child,
        log_path: Path,
        on_gave_up: Callable[[ChildProcess, supervisor.GaveUp], None],
    ) -> None:
        self.child = child
        self.log_path = log_path
        self.pid: int | None = None
        self._machine = supervisor.ChildMachine()
        self._events: asyncio.Queue[supervisor.Event] = asyncio.Queue(MAX_EVENTS)
        self._on_gave_up = on_gave_up
        self._gone = asyncio.Event()

    def healthy(self) -> None:
        """It proved that it works; from now on it is restarted for ever."""
        if not self._gone.is_set():
            self._events.put_nowait(supervisor.Healthy())

    async def stop(self) -> None:
        """End it for good; returns when it is gone."""
        if not self._gone.is_set():
            self._events.put_nowait(supervisor.StopRequested())
            await self._gone.wait()

    async def run(self) -> None:
        """Keep the child running until it is stopped or given up.

        When this is cancelled the child's group is killed: nothing is left behind.
        """
        loop = asyncio.get_running_loop()
        self._events.put_nowait(supervisor.Start())
        try:
            async with asyncio.TaskGroup() as tasks:
                while self._machine.state != "gone":
                    event = await self._next_event()
                    for effect in self._machine.handle(event, loop.time()):
                        await self._carry_out(effect, tasks)
        finally:
            self._signal_group(signal.SIGKILL)
            self._gone.set()

    def log_tail(self) -> str:
        """The end of its log."""
        with contextlib.suppress(OSError):
            return self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace").strip()
        return ""

    async def _next_event(self) -> supervisor.Event:
        try:
            async with asyncio.timeout_at(self._machine.next_deadline()):
                return await self._events.get()
        except TimeoutError:
            return supervisor.Tick()

    async def _carry_out(self, effect: supervisor.Effect, tasks: asyncio.TaskGroup) -> None:
        match effect:
            case supervisor.Spawn():
                await self._spawn(tasks)
            case supervisor.Terminate():
                if self.pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self.pid, signal.SIGTERM)
            case supervisor.Kill():
                self._signal_group(signal.SIGKILL)
            case supervisor.Restarting(code, delay_s):
                log.warning(
                    "%s ended with %d; starting it again in %.1f s", self.child.name, code, delay_s
                )
            case supervisor.GaveUp():
                self._on_gave_up(self, effect)
            case _:
                assert_never(effect)

    async def _spawn(self, tasks: asyncio.TaskGroup) -> None:
        with self.log_path.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *self.child.arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, LAUNCHER_PID: str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            )
        self.pid = process.pid
        tasks.create_task(self._watch(process))

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        for _ in range(REAP_TRIES):  # whatever the child left in its group
            if not self._signal_group(signal.SIGKILL):
                break
            await asyncio.sleep(REAP_PAUSE_S)
        self.pid = None
        await self._events.put(supervisor.Exited(code))

    def _signal_group(self, number: signal.Signals) -> bool:
        """Whether there was anybody to hear it."""
        if self.pid is None:
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True
