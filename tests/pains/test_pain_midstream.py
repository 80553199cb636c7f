"""A stream breaks after its first tokens, and nobody takes over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_connection import Faults
from tests.fakes.fake_node import FakeNode
from tests.pains.pain_parts import HELLO, events_of, text_of
from tests.router.router_mesh import RouterMesh, make_topology, running_mesh
from wire.messages import Failed, Step, StepEntry


def cut(node: FakeNode) -> None:
    """The connection closes without a last word."""
    node.connections[0].drop()


def stall(node: FakeNode) -> None:
    """The connection stays open, and nothing comes any more: no token, no answer to a ping."""
    node.connections[0].say = lambda message: None  # type: ignore[method-assign]


def garbage(node: FakeNode) -> None:
    """What comes is no frame."""
    transport = node.connections[0]._transport
    assert transport is not None
    transport.write(b"data: {broken json\n\n" * 20)


def half_a_message(node: FakeNode) -> None:
    """A frame of the right length that says nothing of the vocabulary."""
    transport = node.connections[0]._transport
    assert transport is not None
    transport.write(b"\x03\x00\x00\x00\x92\x22\xc1")


def a_token_left_out(node: FakeNode) -> None:
    node.tell(Step([StepEntry(node.submits[0].stream, 5, [1], b"wrong")]))


def another_token_in_its_place(node: FakeNode) -> None:
    node.tell(Step([StepEntry(node.submits[0].stream, 0, [1], b"wrong")]))


def an_error_in_the_stream(node: FakeNode) -> None:
    node.tell(Failed(node.submits[0].stream, "engine_died", "out of memory", True))


SHAPES = [
    cut,
    stall,
    garbage,
    half_a_message,
    a_token_left_out,
    another_token_in_its_place,
    an_error_in_the_stream,
]


@pytest.mark.parametrize("breaks", SHAPES, ids=[shape.__name__ for shape in SHAPES])
async def test_litellm_40404_a_stream_that_breaks_is_continued(
    monkeypatch: pytest.MonkeyPatch, breaks: Callable[[FakeNode], None]
) -> None:
    """BerriAI/litellm 40404: a stream that was cut, fell silent or held one malformed chunk ended
    in an error, and the fallback, though configured and well, was never asked. Here the client
    reads the whole answer, and cannot tell."""
    async with running_mesh(monkeypatch, replace(make_topology(), detection_s=1.0)) as mesh:
        lhr, iad = mesh.nodes["lhr-1"], mesh.nodes["iad-1"]
        lhr.go.clear()
        response = await mesh.chat(stream=True)  # its first token is from fra-1
        await lhr.wait_until(lambda: lhr.active == 1)
        breaks(lhr)
        lhr.go.set()
        async with asyncio.timeout(30):
            events = await events_of(response)
        assert text_of(events) == answer_text(HELLO, 8)
        assert events[-1] == "[DONE]"
        assert not [event for event in events if isinstance(event, dict) and "error" in event]
        assert lhr.submits
        assert iad.submits or len(lhr.submits) > 1
        await mesh.wait_idle()


async def test_litellm_26015_an_error_before_the_first_token_is_a_status(
    mesh: RouterMesh,
) -> None:
    """BerriAI/litellm 26015: the upstream said its error inside a stream of status 200, which came
    out as an empty success after a loop that took a whole core. Here all nodes fail all the time:
    few attempts, then a status that says so, streaming or not."""
    for node in mesh.nodes.values():
        node.faults = Faults(fail_after=0)
    for stream in (True, False):
        for node in mesh.nodes.values():
            node.submits.clear()
        async with asyncio.timeout(30):
            response = await mesh.chat(stream=stream)
        assert response.status >= 500
        assert (await response.json())["error"]["code"] == "engine_died"
        assert sum(len(node.submits) for node in mesh.nodes.values()) <= 8
    await mesh.wait_idle()


async def test_litellm_26015_an_error_in_the_stream_is_no_success(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """BerriAI/litellm 26015, after the first token, and nobody is left to go on: one error event
    that a program can read, and no ``[DONE]`` that would make a success of it."""
    alone = make_topology({"fra-1": ("prefill", "decode")})
    async with running_mesh(monkeypatch, alone) as mesh:
        fra = mesh.nodes["fra-1"]
        fra.go.clear()
        asking = asyncio.ensure_future(mesh.chat(stream=True))
        await fra.wait_until(lambda: fra.active == 1)
        fra.tell(Step([StepEntry(fra.submits[0].stream, 0, [5], b"once")]))
        response = await asking
        fra.faults = Faults(refuse=("internal_error", False))
        fra.tell(Failed(fra.submits[0].stream, "engine_died", "out of memory", True))
        async with asyncio.timeout(30):
            events = await events_of(response)
        assert text_of(events[:-1]) == "once"
        assert events[-1]["error"]["code"] == "internal_error"
        assert len(fra.submits) <= 5
        fra.go.set()  # the leg that said it had failed
        await mesh.wait_idle()
