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
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
import xxhash

from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.frames import CODEC_PACKED, CODEC_RAW
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.address import Dialer, format_address
from wire.errors import MeshError
from wire.messages import TransferReport

CHUNK = 512
"""Tokens of a piece: what an engine computes at once."""

DEADLINE_S = 120.0


class Side:
    """One endpoint; ``cache`` is sent, or filled."""

    def __init__(self, name: str, cache: np.ndarray) -> None:
        _, layers, self.tokens, values = cache.shape
        self.cache = cache
        self.spec = KvSpec(
            (
                KvGroup(
                    "tokens",
                    tuple(range(layers)),
                    tuple(KvComponent(part, "bfloat16", (values,), 0) for part in ("k", "v")),
                ),
            )
        )
        layout = StagingLayout()
        self.staging = Staging.create(layout)
        self.endpoint = KvEndpoint(
            name, "here", "bench", "1", self.staging, Dialer(), None, None, lambda *_: None, self
        )
        self.digest = prompt_digest(range(self.tokens))
        self.ended: asyncio.Future[TransferReport | None]
        self._free = deque(range(layout.export_slots))
        self._pieces: deque[Piece] = deque()
        self._transfer = b""

    async def hand_over(self, number: int, address: str, codecs: list[str]) -> dict[str, Any]:
        """Send everything, packed or raw: the seconds until the peer had it, and what it cost."""
        self.ended = asyncio.get_running_loop().create_future()
        self._transfer = number.to_bytes(16, "big")
        self.endpoint.codec.codecs = tuple(codecs)
        before, cpu_s, start = self.endpoint.statistics(), time.process_time(), time.monotonic()
        self.endpoint.open(
            self._transfer, 1, "d", address, "m", "i", self.spec, self.tokens, self.digest,
            DEADLINE_S,
        )  # fmt: skip
        self.endpoint.commit(self._transfer, [1])
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
        self.ended = asyncio.get_running_loop().create_future()
        self.cache[:] = 0
        transfer, cpu_s = number.to_bytes(16, "big"), time.process_time()
        self.endpoint.expect(
            transfer, 1, "p", "m", "i", self.spec, self.tokens, self.digest, DEADLINE_S
        )
        self.endpoint.allocated(transfer, 0)
        await self.ended
        return {"decode_cpu_s": time.process_time() - cpu_s, "checksum": self.checksum}

    @property
    def checksum(self) -> str:
        """Of the whole cache."""
        return xxhash.xxh3_64_hexdigest(self.cache.data)

    def _box(self, piece: Piece) -> np.ndarray:
        box: np.ndarray = self.cache[
            piece.component, piece.layer_lo, piece.token_lo : piece.token_hi
        ]
        return box.reshape(-1).view(np.uint8)

    def _stage(self) -> None:
        while self._free and self._pieces:
            piece, slot = self._pieces.popleft(), self._free.popleft()
            nbytes = piece.nbytes(self.spec)
            np.frombuffer(self.staging.slot(slot), np.uint8)[:nbytes] = self._box(piece)
            self.endpoint.staged(self._transfer, slot, piece, nbytes)

    # ---- KvEvents ----

    def on_stage_from(self, transfer: bytes, have_tokens: int, *_: Any) -> None:
        """Everything lies ready."""
        for lo in range(0, self.tokens, CHUNK):
            hi = min(lo + CHUNK, self.tokens)
            for layer in range(self.cache.shape[1]):
                self._pieces += [Piece(0, part, layer, layer + 1, lo, hi) for part in (0, 1)]
        self._stage()

    def on_slot_free(self, slot: int) -> None:
        """The next piece goes there."""
        self._free.append(slot)
        self._stage()

    def on_import(self, transfer: bytes, slot: int, piece: Piece) -> None:
        """Copied as an engine does."""
        nbytes = piece.nbytes(self.spec)
        self._box(piece)[:] = np.frombuffer(self.staging.slot(slot), np.uint8)[:nbytes]
        self.endpoint.imported(transfer, slot)

    def on_committed(self, transfer: bytes, ids: list[int]) -> None:
        """The decode side has everything."""
        self.ended.set_result(None)

    def on_done(self, transfer: bytes, report: TransferReport) -> None:
        """The prefill side knows it."""
        self.ended.set_result(report)

    def on_failed(self, transfer: bytes, error: MeshError, *_: Any) -> None:
        """Nothing may fail here."""
        self.ended.set_exception(error)

    def on_broken(self) -> None:
        """Nor break."""
        self.ended.set_exception(RuntimeError("the KV stream broke"))


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
