"""A router that is spoken by hand: its end of a mesh link, and what it asks for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from typing import Any

from wire.framing import FrameWriter, router_side_reader
from wire.messages import (
    Accepted,
    Detached,
    Failed,
    Finished,
    Goodbye,
    Hello,
    Leg,
    Load,
    Ping,
    Refused,
    RouterMessage,
    Sampling,
    Step,
    Submit,
    TextInput,
)

MODEL = "tiny-llama"
WAIT_S = 60.0

Ending = Finished | Failed | Refused


class HandRouter:
    """The router's end of one mesh link; keeps what the node said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._frames, self._parts = router_side_reader(), FrameWriter()
        self._news = asyncio.Event()
        self.said: list[Any] = []
        self.tokens: dict[int, dict[int, int]] = {}
        self.text: dict[int, bytes] = {}
        self.endings: dict[int, list[Ending]] = {}
        self.accepted: dict[int, Accepted] = {}
        self.detached: dict[int, Detached] = {}
        self.hello: Hello | None = None
        self.load: Load | None = None
        self.closed = False

    async def read(self) -> None:
        """Take in what comes until the link ends."""
        while data := await self._reader.read(65536):
            for message in self._frames.feed(data):
                self._take(message)
            self._news.set()
        self.closed = True
        self._news.set()

    async def ping(self) -> None:
        for nonce in itertools.count():
            self.send(Ping(nonce))
            await asyncio.sleep(1.0)

    def _take(self, message: Any) -> None:
        self.said.append(message)
        match message:
            case Hello():
                self.hello = message
            case Load():
                self.load = message
            case Accepted(stream):
                self.accepted[stream] = message
            case Detached(stream):
                self.detached[stream] = message
            case Finished(stream) | Failed(stream) | Refused(stream):
                self.endings.setdefault(stream, []).append(message)
            case Step(entries):
                for entry in entries:
                    assert entry.stream not in self.endings, "a token after the ending"
                    got = self.tokens.setdefault(entry.stream, {})
                    for index, token in enumerate(entry.ids, start=entry.index):
                        assert index not in got, f"token {index} came twice"
                        got[index] = token
                    self.text[entry.stream] = self.text.get(entry.stream, b"") + entry.text
            case Goodbye():
                raise AssertionError(f"the node says {message}")

    def send(self, message: RouterMessage) -> None:
        if self._writer.is_closing():
            return
        frame = self._parts.push(message)
        while frame or (frame := self._parts.next_bulk()):
            self._writer.write(frame)
            frame = b""

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def until(self, condition: Callable[[], Any], wait_s: float = WAIT_S) -> Any:
        """Wait until ``condition()`` is truthy, looked at after whatever the node says."""
        async with asyncio.timeout(wait_s):
            while not (result := condition()):
                assert not self.closed, "the node closed the link"
                self._news.clear()
                await self._news.wait()
        return result

    async def ending(self, stream: int, wait_s: float = WAIT_S) -> Ending:
        endings: list[Ending] = await self.until(lambda: self.endings.get(stream), wait_s)
        return endings[0]

    async def at_rest(self) -> None:
        """Wait until a load says that nothing is held, and the blocks are all there."""

        def rested() -> bool:
            assert self.load is not None
            engine = self.load.engines[0]
            busy = engine.running + engine.waiting + engine.streams
            busy += engine.transfers_in + engine.transfers_out + engine.queued_prefill_tokens
            blocks = engine.free_blocks + engine.cached_blocks
            return engine.ready and not busy and blocks == engine.total_blocks > 0

        self.load = None
        await self.until(lambda: self.load is not None)
        await self.until(rested)


def a_submit(stream: int, leg: Leg | str, **changes: Any) -> Submit:
    """A greedy request for eight tokens; ``changes`` are fields of ``Submit`` or ``Sampling``."""
    sampling = {
        name: changes.pop(name, value)
        for name, value in {
            "max_tokens": 8,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 7,
            "stop": [],
            "ignore_eos": True,
        }.items()
    }
    fields: dict[str, Any] = {
        "request_id": f"r{stream}",
        "attempt": 1,
        "model": MODEL,
        "tenant": "",
        "input": TextInput("a prompt that is a little longer than one block of tokens"),
        "forced_ids": [],
        "transfer": None,
        "chain": [],
        "deadline_remaining_ms": 60_000,
    } | changes
    return Submit(stream=stream, leg=leg, sampling=Sampling(**sampling), **fields)
