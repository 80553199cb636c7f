"""What several pains need: SSE answers, KV hand-overs over real sockets."""

from __future__ import annotations

import json
import os
from typing import Any

from tests.pop_node.kv_stream import kv_node
from tests.pop_node.kv_stream.kv_node import Node
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
    await kv_node.hand_over(p, d, os.urandom(16), tokens)


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
