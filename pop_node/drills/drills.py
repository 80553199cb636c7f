"""Harm on purpose: what a node that was started for drills does to itself.

Faults are real signals to real processes, so nothing here can be kinder than an accident. What may
be asked for is decided by ``problem_with``; the rest carries it out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Mapping

from wire.messages import (
    DRILL_FAULTS,
    LOSE_AGENT,
    MAX_AWAY_MS,
    MAX_FREEZE_MS,
    NO_FAULT,
    Drill,
    DrillStarted,
)

log = logging.getLogger(__name__)

ANSWER_LEAVES_S = 0.05
"""Between the answer and a blow to the agent itself: its bytes have to be with the kernel. Guess:
many turns of the event loop."""

Engines = Mapping[str, int | None]
"""Process ids of the engines by model; None while one does not run."""


def problem_with(drill: Drill, enabled: bool, engines: Engines) -> str:
    """Why a drill is refused, or nothing."""
    if not enabled:
        return "this node was not started with --drills"
    if drill.fault not in DRILL_FAULTS:
        return f"no fault is called {drill.fault[:64]!r}; one of {', '.join(DRILL_FAULTS)}"
    if drill.fault.startswith("freeze") and not 0 < drill.duration_ms <= MAX_FREEZE_MS:
        return f"a freeze lasts up to {MAX_FREEZE_MS} ms, not {drill.duration_ms}"
    if drill.fault == LOSE_AGENT and not 0 < drill.duration_ms <= MAX_AWAY_MS:
        return f"a node stays away up to {MAX_AWAY_MS} ms, not {drill.duration_ms}"
    if drill.fault.endswith("agent") or drill.fault == NO_FAULT:
        return ""
    if not drill.model and len(engines) != 1:
        return f"this node has several engines; name a model: {', '.join(engines)}"
    if drill.model and drill.model not in engines:
        return f"this node serves no {drill.model[:64]!r}, but {', '.join(engines)}"
    if engines[drill.model or next(iter(engines))] is None:
        return "the engine does not run now"
    return ""


class Drills:
    """Carries drills out; at most one freeze at a time."""

    def __init__(
        self, enabled: bool, engines: Callable[[], Engines], tasks: asyncio.TaskGroup
    ) -> None:
        self._enabled = enabled
        self._engines = engines
        self._tasks = tasks
        self._freezing = False

    def start(self, drill: Drill, answer: Callable[[DrillStarted], None]) -> None:
        """Begin a drill, or refuse it; ``answer`` is called once, before the blow falls."""
        engines = self._engines()
        problem = problem_with(drill, self._enabled, engines)
        freeze = drill.fault.startswith("freeze")
        if freeze and self._freezing:
            problem = problem or "a freeze is running already"
        if problem or drill.fault == NO_FAULT:
            answer(DrillStarted(drill.number, problem))
            return
        of_agent = drill.fault.endswith("agent")
        pid = os.getpid() if of_agent else engines[drill.model or next(iter(engines))]
        assert pid is not None, "checked above"
        log.warning("drill: %s of process %d", drill.fault, pid)
        if freeze:
            self._freezing = True
            self._tasks.create_task(self._freeze(pid, drill, answer))
            return
        if drill.fault == LOSE_AGENT:
            asyncio.get_running_loop().call_later(ANSWER_LEAVES_S, self._lose, drill.duration_ms)
        elif of_agent:
            asyncio.get_running_loop().call_later(ANSWER_LEAVES_S, os.kill, pid, signal.SIGKILL)
        else:
            _kill(pid)
        answer(DrillStarted(drill.number, ""))

    def _lose(self, duration_ms: int) -> None:
        """Die as by SIGKILL, but keep whoever would start us again waiting (``drills.away``)."""
        for pid in self._engines().values():
            if pid is not None:
                _kill(pid)
        # Sockets are closed by the kernel, without a word, as those of a process that was killed.
        away = (sys.executable, "-m", "pop_node.drills.away", f"{duration_ms / 1e3:g}")
        os.execv(sys.executable, away)

    async def _freeze(self, pid: int, drill: Drill, answer: Callable[[DrillStarted], None]) -> None:
        """Have a process of its own do it, and wait for the end."""
        seconds = f"{drill.duration_ms / 1e3:g}"
        try:
            helper = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "pop_node.drills.freezer", str(pid), seconds),
                stdin=PIPE,
                stdout=PIPE,
                start_new_session=True,  # a Ctrl-C for us must not leave anything frozen
            )
            assert helper.stdin is not None
            assert helper.stdout is not None
            is_ready = bool(await helper.stdout.readline())
            answer(DrillStarted(drill.number, "" if is_ready else "the process is gone already"))
            if is_ready:
                await asyncio.sleep(ANSWER_LEAVES_S)
                helper.stdin.write(b"go\n")
            await helper.wait()
        except OSError as exc:
            answer(DrillStarted(drill.number, f"the helper cannot be started: {exc}"))
        finally:
            self._freezing = False


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has died by itself just now
        os.kill(pid, signal.SIGKILL)
