"""Clients that read streamed answers event by event and come back with the last id they saw."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import dataclass

import aiohttp

from tests.fakes.fake_answer import answer_text
from tests.router.router_mesh import MODEL
from topology.model import Tenant
from wire.messages import ChatInput, ChatTurn, TextInput

HELLO = ChatInput([ChatTurn("user", "hello")])
TOKENS = 12
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
BODIES = {
    "chat": {"messages": [{"role": "user", "content": "hello"}]},
    "completion": {"prompt": "hello"},
}
TENANTS = tuple(
    Tenant(name, (hashlib.sha256(name.encode()).hexdigest(),), frozenset(), operator=name == "ops")
    for name in ("ops", "ann", "bob")
)


class Tickets:
    """Stands in for a fake node's ``go``: every token takes a ticket."""

    def __init__(self, count):
        self._semaphore = asyncio.Semaphore(count)

    async def wait(self):
        await self._semaphore.acquire()

    def add(self, count):
        for _ in range(count):
            self._semaphore.release()


def hand_out(mesh, count):
    """All nodes together may produce so many tokens."""
    tickets = Tickets(count)
    for node in mesh.nodes.values():
        node.go = tickets
        node.answer_tokens = TOKENS
    return tickets


@dataclass
class Reader:
    """One streamed answer as a client reads it; ``last_id`` is what it would come back with."""

    response: aiohttp.ClientResponse
    last_id: str = ""
    text: str = ""
    finish: str | None = None
    usage: dict | None = None
    error: dict | None = None
    done: bool = False
    num_events: int = 0

    async def event(self):
        """Read one event; False at the end of the body."""
        lines = []
        while line := (await self.response.content.readline()).decode():
            if line == "\n":
                break
            lines.append(line.removesuffix("\n"))
        else:
            return False
        for line in lines:
            if line.startswith("id: "):
                self.last_id = line.removeprefix("id: ")
        (data,) = (line.removeprefix("data: ") for line in lines if line.startswith("data: "))
        self._take(data)
        return True

    def _take(self, data):
        assert not self.done, "an event after [DONE]"
        if data == "[DONE]":
            self.done = True
            return
        chunk = json.loads(data)
        self.error = chunk.get("error")
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
            assert not (text and self.finish), "text after the finish"
            self.text += text
            self.num_events += bool(text)
            self.finish = choice["finish_reason"]

    async def texts(self, count):
        """Read until so many events had text."""
        while self.num_events < count:
            assert await self.event(), "the stream ended"
        return self

    async def rest(self):
        while await self.event():
            pass
        return self


async def ask(http, kind="chat", last_id=None, key=None, **body):
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    body = {"model": MODEL, "max_tokens": TOKENS, "stream": True, **BODIES[kind], **body}
    body = {"stream_options": {"include_usage": True}, **body} if body["stream"] else body
    return await http.post(PATHS[kind], json=body, headers=headers)


async def start(http, kind="chat", **body):
    response = await ask(http, kind, **body)
    assert response.status == 200, await response.text()
    return Reader(response)


async def refused(http, kind="chat", **body):
    async with await ask(http, kind, **body) as response:
        error = (await response.json())["error"]
        return response.status, error["code"], error


async def cut_off(mesh, count, kind="chat", **body):
    """A client that lost its connection after ``count`` events; what nodes may still say."""
    tickets = hand_out(mesh, count)
    first = await (await start(mesh.http, kind, **body)).texts(count)
    first.response.close()
    await mesh.wait_idle()
    return first, tickets


async def forgotten(mesh, count, kind="chat", **body):
    """The same, and no node knows of the answer any more."""
    first, tickets = await cut_off(mesh, count, kind, **body)
    for node in mesh.nodes.values():
        node.answers.clear()
    return first, tickets


def whole(kind="chat", count=TOKENS):
    return answer_text(HELLO if kind == "chat" else TextInput("hello"), count)


def check_rest(first, second, kind="chat"):
    """Two connections together hold the undisturbed answer, its end once."""
    assert first.text + second.text == whole(kind)
    assert (second.finish, second.done, second.error) == ("length", True, None)
    assert second.usage["completion_tokens"] == TOKENS
    assert second.response.headers["x-popmesh-resumed"] == "true"
    ids = {one.response.headers["x-popmesh-request-id"] for one in (first, second)}
    assert len(ids) == 1
    assert first.last_id.rpartition(":")[0] in ids


async def until_status(mesh, condition):
    """Ask the router how it is until that is as wanted."""
    while True:
        if condition(await mesh.get_json("/popmesh/status")):
            return
        await asyncio.sleep(0.01)
