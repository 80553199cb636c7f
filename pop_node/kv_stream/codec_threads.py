"""Runs the lossless codec beside the event loop: packs pieces to send, unpacks those received.

It knows neither links nor transfers. Who has work done keeps the memory until it hears of its end,
which comes for each work, whatever happened in between; how much there is at once is bounded by the
callers: a few pieces ahead of each link, and the import slots.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from kernels import codec
from pop_node.kv_stream.frames import CODEC_PACKED, CODEC_RAW
from pop_node.kv_stream.watched_tasks import Spawn

log = logging.getLogger(__name__)

R = TypeVar("R")

THREADS = 2
"""One packs while another unpacks: either alone is faster than a link of 10 Gbit/s. Guess."""


class CodecThreads:
    """The codec's threads of one endpoint. Use from its event loop only.

    ``codecs`` are those that can be sent and received here, the best one first: raw alone until the
    codec in C is loaded, and where there is none. The one in Python would hold the event loop up.
    """

    def __init__(self, spawn: Spawn) -> None:
        """``spawn`` begins the tasks, which its owner waits for."""
        self.codecs: tuple[str, ...] = (CODEC_RAW,)
        self._spawn = spawn
        self._pool = ThreadPoolExecutor(THREADS, "kv-codec")
        self._loading: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Load the codec."""
        self._loading = self._spawn(self._load)

    async def wait_loaded(self) -> None:
        """Wait until ``codecs`` is final."""
        assert self._loading is not None, "it was started"
        await asyncio.wait([self._loading])

    def stop(self) -> None:
        """There will be no more work. What is being done is finished; nobody waits for the codec's
        library, which may have to be compiled."""
        if self._loading is not None:
            self._loading.cancel()
        self._pool.shutdown(wait=False)

    def pack(
        self, payload: memoryview, dtype: str, done: Callable[[bytes | None, float], None]
    ) -> None:
        """``done(block, seconds)`` once ``payload`` is packed and read no more; None when it cannot
        be packed. ``dtype`` is that of its values."""
        self._do(lambda result: done(*result), _packed, payload, dtype)

    def unpack(
        self, slot: memoryview, nbytes: int, kv_bytes: int, done: Callable[[bool], None]
    ) -> None:
        """``done(is_sound)`` once the block in the first ``nbytes`` bytes of ``slot`` is decoded
        into the first ``kv_bytes``, and the slot is touched no more."""
        self._do(done, _unpacked, slot, nbytes, kv_bytes)

    def _do(self, done: Callable[[R], None], work: Callable[..., R], *args: object) -> None:
        doing = asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
        self._spawn(_deliver, doing, done)

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        if await loop.run_in_executor(self._pool, codec.is_native):
            self.codecs = (CODEC_PACKED, CODEC_RAW)


async def _deliver(doing: asyncio.Future[R], done: Callable[[R], None]) -> None:
    done(await doing)


def _packed(payload: memoryview, dtype: str) -> tuple[bytes | None, float]:
    begin = time.perf_counter()
    try:
        block = codec.encode(payload, dtype)
    except MemoryError:  # the piece can go raw
        log.warning("no memory to pack %d bytes of KV", len(payload))
        block = None
    return block, time.perf_counter() - begin


def _unpacked(slot: memoryview, nbytes: int, kv_bytes: int) -> bool:
    # Decoded from a copy, because the codec does not work in place: a copy of one slot a thread.
    block = bytes(slot[:nbytes])
    try:
        codec.decode_into(block, slot[:kv_bytes])
    except (codec.CodecError, MemoryError) as exc:
        log.warning("a packed KV piece cannot be unpacked: %s", exc)
        return False
    return True
