"""Engines that hang, and cancels: what is given up is given up at once, and comes back."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from pop_node import lifecycle
from pop_node.engine import messages as engine
from pop_node.engine.config import EngineConfig
from pop_node.hosting import host_maker
from pop_node.hosting.model_host import ModelHost
from pop_node.legs.live_legs import LiveLegs
from pop_node.store.store import Store
from tests.pop_node.hand_router import WAIT_S
from tests.pop_node.node_mesh import tiny_mesh, write_store
from wire.messages import Failed, TextInput

LONG = TextInput("a long prompt that takes hundreds of steps when each computes a token " * 6)


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("tiny-store"))


class Starts:
    """Hears of every engine that a model host starts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._pids: asyncio.Queue[int | None] = asyncio.Queue()
        start = ModelHost.start

        async def tell(host: ModelHost, tasks: asyncio.TaskGroup) -> None:
            await start(host, tasks)
            self._pids.put_nowait(host.engine_pid)

        monkeypatch.setattr(ModelHost, "start", tell)

    async def next(self) -> int:
        """Process id of the next one."""
        async with asyncio.timeout(WAIT_S):
            pid = await self._pids.get()
        assert pid is not None
        return pid


async def test_an_engine_that_sleeps_for_ever_is_replaced(
    tiny_store: Store, tmp_path: Path
) -> None:
    """The pain: one leg hangs and the other waits for minutes."""
    async with tiny_mesh(tiny_store, tmp_path, "a", "b", detection_s=1.0) as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        pid = mesh.nodes["b"].engine["pid"]
        os.kill(pid, signal.SIGSTOP)
        stream = mesh.split("a", "b")
        for router in (b, a):
            if router is a:
                await a.until(lambda: a.detached.get(stream))
                mesh.cancel(stream, "a")
                await a.ending(stream)
            else:
                ending = await b.ending(stream)
                assert isinstance(ending, Failed)
                assert (ending.code, ending.retryable) == ("engine_died", True)
        await b.until(lambda: b.load.engines[0].ready)
        assert mesh.nodes["b"].engine["pid"] != pid
        await b.ending(mesh.split("a", "b"))
        await mesh.at_rest()


async def test_an_engine_that_never_becomes_ready_is_started_again(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = Starts(monkeypatch)
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a = mesh.routers["a"]
        first = await starts.next()
        monkeypatch.setattr(lifecycle, "READY_WITHIN_S", 1.0)
        os.kill(first, signal.SIGKILL)
        second = await starts.next()
        os.kill(second, signal.SIGSTOP)
        monkeypatch.setattr(lifecycle, "READY_WITHIN_S", WAIT_S)
        await starts.next()
        a.load = None
        await a.until(lambda: a.load is not None and a.load.engines[0].ready)
        assert (await a.ending(mesh.whole("a"))).reason == "length"
        await mesh.at_rest()


@pytest.mark.parametrize(
    ("leg", "stage"),
    [
        ("both", "accepted"),
        ("both", "computing"),
        ("both", "decoding"),
        ("prefill", "accepted"),
        ("prefill", "computing"),
    ],
)
async def test_a_cancel_reaches_the_engine_within_a_step(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leg: str, stage: str
) -> None:
    """Pain: a cancel before the first token does not reach the engine, the next request waits."""
    monkeypatch.setattr(
        host_maker, "EngineConfig", partial(EngineConfig, token_budget=1, max_sequences=1)
    )
    steps: list[engine.StepDone] = []
    in_the_middle = asyncio.Event()
    took = LiveLegs.step_done

    def count(self: LiveLegs, step: engine.StepDone) -> None:
        steps.append(step)
        if len(steps) >= 20:
            in_the_middle.set()
        took(self, step)

    monkeypatch.setattr(LiveLegs, "step_done", count)
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a = mesh.routers["a"]
        prompt, answer = (TextInput("short"), 450) if stage == "decoding" else (LONG, 8)
        if leg == "prefill":
            stream = mesh.split("a", "b", input=prompt)
        else:
            stream = mesh.whole("a", input=prompt, max_tokens=answer)
        await a.until(lambda: a.accepted.get(stream))
        if stage == "computing":
            async with asyncio.timeout(WAIT_S):
                await in_the_middle.wait()
        if stage == "decoding":
            await a.until(lambda: a.tokens.get(stream))
        done = len(steps)
        mesh.cancel(stream, "a", "b")
        assert (await a.ending(stream)).reason == "cancelled"
        await mesh.at_rest()
        # The step under way, those that ran before a busy machine read it, and the one at rest.
        left = a.accepted[stream].prompt_tokens + answer - done
        assert left > 300
        assert len(steps) - done < left / 4
