"""Drills do real harm to real processes, and only where they were allowed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from pop_node.drills.drills import Drills, problem_with
from wire.messages import Drill, DrillStarted

SLEEPER = (sys.executable, "-c", "print('up', flush=True); import signal; signal.pause()")

AGENT = """
import asyncio, sys
from pop_node.drills.drills import Drills
from wire.messages import Drill

async def main():
    async with asyncio.TaskGroup() as tasks:
        said = lambda answer: print(repr(answer.error), flush=True)
        drills = Drills(True, dict, tasks)
        drills.start(Drill(1, sys.argv[1], "", 50), said)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def victim():
    process = subprocess.Popen(SLEEPER, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    yield process
    process.kill()
    process.wait(10)
    process.stdout.close()


@pytest.mark.parametrize(
    ("drill", "enabled", "engines", "words"),
    [
        (Drill(1, "kill-agent", "", 0), False, {"m": 1}, "--drills"),
        (Drill(1, "explode", "", 0), True, {"m": 1}, "freeze-engine"),
        (Drill(1, "freeze-agent", "", 0), True, {"m": 1}, "60000 ms"),
        (Drill(1, "freeze-agent", "", 60_001), True, {"m": 1}, "60000 ms"),
        (Drill(1, "kill-engine", "", 0), True, {"m": 1, "n": 2}, "m, n"),
        (Drill(1, "kill-engine", "x", 0), True, {"m": 1}, "'x'"),
        (Drill(1, "kill-engine", "m", 0), True, {"m": None}, "does not run"),
        (Drill(1, "kill-engine", "", 0), True, {"m": 1}, None),
        (Drill(1, "kill-engine", "n", 0), True, {"m": None, "n": 1}, None),
        (Drill(1, "kill-agent", "", 0), True, {"m": None}, None),
        (Drill(1, "freeze-agent", "", 60_000), True, {}, None),
        (Drill(1, "none", "", 0), False, {"m": 1}, "--drills"),
        (Drill(1, "none", "", 0), True, {"m": None, "n": 2}, None),
        (Drill(1, "lose-agent", "", 0), True, {"m": 1}, "stays away up to"),
        (Drill(1, "lose-agent", "", 3_600_001), True, {"m": 1}, "stays away up to"),
        (Drill(1, "lose-agent", "", 3_600_000), True, {"m": None}, None),
    ],
)
def test_what_is_refused(drill, enabled, engines, words):
    problem = problem_with(drill, enabled, engines)
    assert (words in problem) if words else not problem


async def test_a_refused_drill_touches_nothing(victim):
    said: list[DrillStarted] = []
    async with asyncio.TaskGroup() as tasks:
        drills = Drills(False, lambda: {"m": victim.pid}, tasks)
        drills.start(Drill(7, "kill-engine", "", 0), said.append)
    assert [answer.number for answer in said] == [7]
    assert said[0].error
    assert victim.poll() is None


async def test_to_be_asked_harms_nobody(victim):
    said: list[DrillStarted] = []
    async with asyncio.TaskGroup() as tasks:
        Drills(True, lambda: {"m": victim.pid}, tasks).start(Drill(7, "none", "m", 0), said.append)
    assert said == [DrillStarted(7, "")]
    assert victim.poll() is None


async def test_an_engine_is_killed(victim):
    said: list[DrillStarted] = []
    async with asyncio.TaskGroup() as tasks:
        Drills(True, lambda: {"m": victim.pid}, tasks).start(
            Drill(7, "kill-engine", "m", 0), said.append
        )
    assert said == [DrillStarted(7, "")]
    assert await asyncio.to_thread(victim.wait, 10) == -signal.SIGKILL


def next_change(pid: int) -> str:
    """Wait until a child is stopped, goes on or ends; a word for which."""
    _, status = os.waitpid(pid, os.WUNTRACED | os.WCONTINUED)
    if os.WIFSTOPPED(status):
        return "stopped"
    return "goes on" if os.WIFCONTINUED(status) else f"ended by {os.WTERMSIG(status)}"


async def test_an_engine_is_frozen_for_a_while_and_only_once_at_a_time(victim):
    answers: asyncio.Queue[DrillStarted] = asyncio.Queue()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = Drills(True, lambda: {"m": victim.pid}, tasks)
        drills.start(Drill(1, "freeze-engine", "", 300), answers.put_nowait)
        drills.start(Drill(2, "freeze-engine", "", 300), answers.put_nowait)
        assert await answers.get() == DrillStarted(2, "a freeze is running already")
        assert await answers.get() == DrillStarted(1, "")
        assert await asyncio.to_thread(next_change, victim.pid) == "stopped"
        assert await asyncio.to_thread(next_change, victim.pid) == "goes on"
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:  # and again
        drills = Drills(True, lambda: {"m": victim.pid}, tasks)
        drills.start(Drill(3, "freeze-engine", "", 1), answers.put_nowait)
        assert await answers.get() == DrillStarted(3, "")
        assert await asyncio.to_thread(next_change, victim.pid) == "stopped"
        assert await asyncio.to_thread(next_change, victim.pid) == "goes on"


async def test_the_helper_ends_with_the_process_that_it_froze(victim):
    answers: asyncio.Queue[DrillStarted] = asyncio.Queue()
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = Drills(True, lambda: {"m": victim.pid}, tasks)
        drills.start(Drill(1, "freeze-engine", "", 60_000), answers.put_nowait)
        assert not (await answers.get()).error
        assert await asyncio.to_thread(next_change, victim.pid) == "stopped"
        victim.kill()  # the task group waits for the helper, in vain if it did not notice


async def test_a_process_that_has_gone_cannot_be_frozen(victim):
    victim.kill()
    victim.wait(10)
    answers: list[DrillStarted] = []
    async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
        drills = Drills(True, lambda: {"m": victim.pid}, tasks)
        drills.start(Drill(1, "freeze-engine", "", 100), answers.append)
    assert answers == [DrillStarted(1, "the process is gone already")]


@pytest.mark.parametrize(
    ("fault", "changes"),
    [("kill-agent", ["ended by 9"]), ("freeze-agent", ["stopped", "goes on"])],
)
def test_an_agent_answers_before_the_blow(fault, changes):
    agent = subprocess.Popen((sys.executable, "-c", AGENT, fault), stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        assert [next_change(agent.pid) for _ in changes] == changes
        assert agent.stdout.readline() == b"''\n"
    finally:
        agent.kill()
        agent.wait(10)
        agent.stdout.close()


LOST = """
import asyncio, socket, subprocess, sys
from pop_node.drills.drills import Drills
from wire.messages import Drill

async def main():
    engine = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    door = socket.create_server(("127.0.0.1", 0))
    async with asyncio.TaskGroup() as tasks:
        said = lambda answer: print(engine.pid, door.getsockname()[1], answer.error, flush=True)
        drills = Drills(True, lambda: {"m": engine.pid}, tasks)
        drills.start(Drill(1, "lose-agent", "", int(sys.argv[1])), said)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def lost_agent(duration_ms: int) -> tuple[subprocess.Popen[bytes], int, int]:
    """A process that loses itself; its engine's process id and its door."""
    agent = subprocess.Popen((sys.executable, "-c", LOST, str(duration_ms)), stdout=subprocess.PIPE)
    assert agent.stdout is not None
    engine, port, *error = agent.stdout.readline().split()
    assert not error
    return agent, int(engine), int(port)


def test_a_lost_agent_is_gone_for_everybody_but_who_would_start_it_again():
    agent, engine, port = lost_agent(600_000)
    try:
        until = time.monotonic() + 30
        refused = False
        while not refused and time.monotonic() < until:
            with contextlib.suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                continue
            refused = True
        assert refused, "its door is closed"
        assert not psutil.pid_exists(engine) or (
            psutil.Process(engine).status() == psutil.STATUS_ZOMBIE
        )
        assert agent.poll() is None, "but it has not ended"
        agent.terminate()
        assert agent.wait(10) == -signal.SIGTERM
    finally:
        agent.kill()
        agent.wait(10)
        assert agent.stdout is not None
        agent.stdout.close()


def test_a_lost_agent_ends_as_by_a_crash_when_its_time_is_over():
    agent, _, _ = lost_agent(1)
    try:
        assert agent.wait(30) == 1
    finally:
        agent.kill()
        assert agent.stdout is not None
        agent.stdout.close()
