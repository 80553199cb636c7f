"""What several pains need: SSE answers, KV hand-overs over real sockets."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from tests.pop_node.kv_stream.kv_node import LAYOUT, Node, cache_of
from tests.pop_node.kv_stream.kv_pair import Pair
from wire.messages import ChatInput, ChatTurn

HELLO = ChatInput([ChatTurn("user", "hello")])
T = bytes(range(16))


async def events_of(response: Any) -> list[Any]:
    """SSE events of a streamed answer: parsed JSON, or the text ``[DONE]``."""
    events: list[Any] = []
    async for line in response.content:
        text = line.decode().strip()
        if text.startswith("data: "):
            data = text.removeprefix("data: ")
            events.append(data if data == "[DONE]" else json.loads(data))
    return events


def text_of(events: list[Any]) -> str:
    """What a client shows of a streamed chat."""
    choices = [c for event in events if isinstance(event, dict) for c in event.get("choices", ())]
    return "".join(choice["delta"].get("content", "") for choice in choices)


async def hand_over(p: Node, d: Node, tokens: int = 100) -> None:
    """One whole transfer, whose bytes arrive as they were."""
    transfer, cache = os.urandom(16), cache_of(tokens, tokens)
    d.receive(transfer, p.name, tokens, None)
    p.send(transfer, d, cache)
    assert await d.ends[transfer] == [42]
    await p.ends[transfer]
    np.testing.assert_array_equal(d.caches[transfer].view(np.uint32), cache.view(np.uint32))


def assert_at_rest(*nodes: Node) -> None:
    """No transfer, parked frame or staging slot is held."""
    for node in nodes:
        s = node.endpoint.statistics()
        assert (s.outgoing_now, s.incoming_now, s.parked_now) == (0, 0, 0)
        assert s.export_slots_held_now == 0
        assert s.import_slots_free_now == LAYOUT.import_slots
        assert sorted(node.free) == list(range(LAYOUT.export_slots))


def let_time_pass(pair: Pair, until: float) -> None:
    """Jump from deadline to deadline, both machines awake, until nothing waits or ``until``."""
    for _ in range(1000):
        pair.run()
        waits = [pair.sender.next_deadline(), pair.receiver.next_deadline()]
        at = min((wait for wait in waits if wait is not None), default=None)
        if at is None or at > until:
            return
        pair.now = max(pair.now, at)
        pair.wait(0.0)
    raise AssertionError("a deadline that never moves")
