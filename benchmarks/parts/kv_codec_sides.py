"""The two nodes of ``kv_codec.py``: a KV endpoint each, whose engine is an array.

    python benchmarks/parts/kv_codec_sides.py prefill KV.npy | decode KV.npy

Each answers one JSON line on stdout to one on stdin. The file is [component, layer, token, values]
uint16; the decode side takes only its shape from it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
import xxhash
from kv_side import KvSide

from pop_node.kv_stream.frames import CODEC_PACKED, CODEC_RAW
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece
from pop_node.kv_stream.staging import StagingLayout
from wire.address import format_address

CHUNK = 512
"""Tokens of a piece: what an engine computes at once."""

DEADLINE_S = 120.0


class Side(KvSide):
    """One endpoint; ``cache`` is sent, or filled."""

    def __init__(self, name: str, cache: np.ndarray) -> None:
        _, layers, num_tokens, values = cache.shape
        components = tuple(KvComponent(part, "bfloat16", (values,), 0) for part in ("k", "v"))
        spec = KvSpec((KvGroup("tokens", tuple(range(layers)), components),))
        super().__init__(name, spec, StagingLayout(), CHUNK)
        self.cache = cache
        self._all = num_tokens
        self._digest = prompt_digest(range(num_tokens))

    async def hand_over(self, number: int, address: str, codecs: list[str]) -> dict[str, Any]:
        """Send everything, packed or raw: the seconds until the peer had it, and what it cost."""
        transfer = self.begin(number, self._all)
        self.endpoint.codec.codecs = tuple(codecs)
        before, cpu_s, start = self.endpoint.statistics(), time.process_time(), time.monotonic()
        self.endpoint.open(
            transfer, 1, "d", address, "m", "i", self.spec, self._all, self._digest, DEADLINE_S
        )
        self.endpoint.commit(transfer, [1])
        report = await self.ended
        assert report is not None
        now = self.endpoint.statistics()
        return {
            "wall_s": time.monotonic() - start,
            "prefill_cpu_s": time.process_time() - cpu_s,
            "kv_bytes": report.kv_bytes,
            "wire_bytes": report.wire_bytes,
            "packed_pieces": now.packed_pieces - before.packed_pieces,
            "raw_pieces": now.raw_pieces - before.raw_pieces,
        }

    async def take(self, number: int) -> dict[str, Any]:
        """Receive everything: what it cost, and a checksum of it."""
        transfer = self.begin(number, self._all)
        self.cache[:] = 0
        cpu_s = time.process_time()
        self.endpoint.expect(
            transfer, 1, "p", "m", "i", self.spec, self._all, self._digest, DEADLINE_S
        )
        self.endpoint.allocated(transfer, 0)
        await self.ended
        return {"decode_cpu_s": time.process_time() - cpu_s, "checksum": self.checksum}

    @property
    def checksum(self) -> str:
        """Of the whole cache."""
        return xxhash.xxh3_64_hexdigest(self.cache.data)

    def fill(self, slot: int, piece: Piece) -> None:
        """Copied as an engine does."""
        box = self._box(piece)
        np.frombuffer(self.staging.slot(slot), np.uint8)[: box.nbytes] = box

    def take_out(self, slot: int, piece: Piece) -> None:
        """Copied as an engine does."""
        box = self._box(piece)
        box[:] = np.frombuffer(self.staging.slot(slot), np.uint8)[: box.nbytes]

    def _box(self, piece: Piece) -> np.ndarray:
        box: np.ndarray = self.cache[
            piece.component, piece.layer_lo, piece.token_lo : piece.token_hi
        ]
        return box.reshape(-1).view(np.uint8)


async def main(kind: str, kv: Path) -> None:
    """Answer until standard input ends."""
    cache = np.load(kv)
    side = Side(kind[0], cache if kind == "prefill" else np.zeros_like(cache))
    address = format_address(*await side.endpoint.start("127.0.0.1", 0))
    await side.endpoint.codec.wait_loaded()
    if side.endpoint.codec.codecs != (CODEC_PACKED, CODEC_RAW):
        raise SystemExit("there is no codec in C here")
    print(json.dumps({"address": address, "checksum": side.checksum}), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        asked = json.loads(line)
        answer = await (side.hand_over if kind == "prefill" else side.take)(**asked)
        print(json.dumps(answer), flush=True)
    await side.endpoint.close()
    side.staging.close()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], Path(sys.argv[2])))
