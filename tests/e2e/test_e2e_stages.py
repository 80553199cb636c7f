"""Somebody goes away at each stage of an answer: a process, or the client itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, nullcontext, suppress

import pytest
import pytest_asyncio

from popmesh.links.control import disturb, heal
from tests.e2e.mesh import Mesh
from tests.e2e.streams import (
    KV_SLOW,
    MODEL,
    Answer,
    ask,
    at,
    plan_of,
    undisturbed,
    wait_planned,
    wait_whole,
    whole_text,
    words,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

PATIENCE_S = 20.0
"""Longest pause of an answer whose node died: found out within a second, then another prefill, on
a machine that others use."""

NODES = {"prefill": "ams-1", "decode": "lhr-1"}


@pytest_asyncio.fixture
async def mesh(fault_mesh: Mesh) -> AsyncIterator[Mesh]:
    """The mesh, healed and at rest after each test."""
    yield fault_mesh
    heal(plan_of(fault_mesh))
    await wait_whole(fault_mesh, 3)
    await wait_planned(fault_mesh, "ams-1", "lhr-1")


@contextmanager
def held(pid: int) -> Iterator[None]:
    """The process does not run inside; it may be killed there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def wait_legs(mesh: Mesh, *names: str) -> None:
    """Until each of the nodes has a leg."""
    async with asyncio.timeout(30):
        while True:
            nodes = mesh.status()["nodes"]
            have = {n["name"] for n in nodes if any(e["streams"] for e in n["engines"])}
            if have >= set(names):
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("victim", ["agent", "engine"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_process_is_killed_before_the_first_token(mesh, role, victim):
    """Both legs are there and the prefill engine has computed nothing when it happens."""
    name = NODES[role]
    agent, engine = mesh.pids(name)
    prompt = words(100 + 2 * (role == "decode") + (victim == "engine"), 60)
    with held(mesh.pids("ams-1")[1]):
        task = asyncio.create_task(ask(mesh, prompt, 20))
        await wait_legs(mesh, "ams-1", "lhr-1")
        os.kill(agent if victim == "agent" else engine, signal.SIGKILL)
    await end_well(mesh, await task, prompt)
    await mesh.wait_reborn(name, engine)


@pytest.mark.parametrize("victim", ["agent", "engine"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_process_is_killed_with_kv_in_flight(mesh, role, victim):
    name = NODES[role]
    agent, engine = mesh.pids(name)
    prompt = words(110 + 2 * (role == "decode") + (victim == "engine"), 60)

    def kill(_: Answer) -> None:
        os.kill(agent if victim == "agent" else engine, signal.SIGKILL)

    disturb(plan_of(mesh), KV_SLOW)
    answer = await ask(mesh, prompt, 20, on_event=at(1, kill))
    await end_well(mesh, answer, prompt)
    await mesh.wait_reborn(name, engine)


async def end_well(mesh: Mesh, answer: Answer, prompt: str) -> None:
    """The text is whole, the pause was bounded, and the answer had begun where it should."""
    await whole_text(mesh, answer, prompt, 20)
    assert answer.longest_gap_s <= PATIENCE_S
    first = mesh.request_record(answer.request_id)["attempts"][0]["route"]
    assert (first["prefill"], first["decode"]) == ("ams-1", "lhr-1")


async def test_a_prefill_node_that_has_handed_over_may_die(mesh):
    prompt = words(130, 30)
    agent, engine = mesh.pids("ams-1")
    answer = await ask(mesh, prompt, 40, on_event=at(10, lambda _: os.kill(agent, signal.SIGKILL)))
    await whole_text(mesh, answer, prompt)
    assert len(mesh.request_record(answer.request_id)["attempts"]) == 1
    await mesh.wait_reborn("ams-1", engine)


@pytest.mark.parametrize("stage", ["prompt", "kv", "answer"])
async def test_a_client_that_vanishes_leaves_nothing_behind(mesh, stage):
    """The answer would take minutes, so rest within ``REST_S`` means that it was stopped."""
    begun: list[Answer] = []
    reached = asyncio.Event()

    def arrive(answer: Answer) -> None:
        begun.append(answer)
        reached.set()

    if stage == "kv":
        disturb(plan_of(mesh), KV_SLOW)
    prompt = words(140 + len(stage), 60)
    route = "prefill=ams-1,decode=lhr-1"
    on_event = at(1 if stage == "kv" else 10, arrive)
    with held(mesh.pids("ams-1")[1]) if stage == "prompt" else nullcontext():
        task = asyncio.create_task(ask(mesh, prompt, 4000, route, on_event))
        if stage == "prompt":
            await wait_legs(mesh, "ams-1", "lhr-1")
        else:
            await asyncio.wait_for(reached.wait(), 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await wait_whole(mesh, 3)
    for answer in begun:
        assert mesh.request_record(answer.request_id)["outcome"] == "client_gone"


async def test_a_client_that_reads_a_byte_a_second_disturbs_nobody(mesh):
    """Its answer waits for it, whole; another client's runs past it."""
    prompt, tokens, loop = words(150, 30), 100, asyncio.get_running_loop()
    ask_for = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    payload = json.dumps(ask_for | {"stream": True, "ignore_eos": True}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(payload)}\r\n\r\n"
    host, port = mesh.url.removeprefix("http://").split(":")
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # the kernel's least is near it
        slow.setblocking(False)
        await loop.sock_connect(slow, (host, int(port)))
        await loop.sock_sendall(slow, head.encode() + payload)
        raw = b""
        other = asyncio.create_task(ask(mesh, words(151, 30), 40))
        for _ in range(4):
            raw += await asyncio.wait_for(loop.sock_recv(slow, 1), 30)
            await asyncio.sleep(1)
        assert (await other).finish == "length"
        while data := await asyncio.wait_for(loop.sock_recv(slow, 65536), 60):
            raw += data
    lines = raw.decode().split("\r\n\r\n", 1)[1].splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    text = "".join(c["text"] for event in events[:-1] for c in json.loads(event)["choices"])
    assert text == await undisturbed(mesh, prompt, tokens)
