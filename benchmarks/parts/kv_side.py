"""A KV endpoint whose engine has everything ready and does nothing else: the end of a benchmark."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.spec import KvSpec, Piece
from pop_node.kv_stream.staging import Staging, StagingLayout
from wire.address import Dialer
from wire.errors import MeshError
from wire.messages import TransferReport


class KvSide:
    """One end, and the shell of its engine (``KvEvents``). Made inside a running loop.

    ``fill`` and ``take_out`` copy a piece into and out of a staging slot; here they copy nothing.
    Pieces have ``chunk`` tokens of one layer and one component. ``transfer`` and ``tokens`` are
    those of the transfer that is offered.
    """

    def __init__(self, name: str, spec: KvSpec, layout: StagingLayout, chunk: int) -> None:
        self.spec = spec
        self.staging = Staging.create(layout)
        self.endpoint = KvEndpoint(
            name, "here", "bench", "1", self.staging, Dialer(), None, None, lambda *_: None, self
        )
        self.ended: asyncio.Future[TransferReport | None]
        self.transfer = b""
        self.tokens = 0
        self._chunk = chunk
        self._free = deque(range(layout.export_slots))
        self._pieces: deque[Piece] = deque()

    def begin(self, number: int, tokens: int) -> bytes:
        """Get ready for transfer ``number``, which ``ended`` tells the end of; its id."""
        self.ended = asyncio.get_running_loop().create_future()
        self.transfer, self.tokens = number.to_bytes(16, "big"), tokens
        return self.transfer

    def fill(self, slot: int, piece: Piece) -> None:
        """Copy a piece into an export slot."""

    def take_out(self, slot: int, piece: Piece) -> None:
        """Copy a piece out of an import slot."""

    def _stage(self) -> None:
        while self._free and self._pieces:
            piece, slot = self._pieces.popleft(), self._free.popleft()
            self.fill(slot, piece)
            self.endpoint.staged(self.transfer, slot, piece, piece.nbytes(self.spec))

    # ---- KvEvents ----

    def on_stage_from(self, transfer: bytes, have_tokens: int, *_: Any) -> None:
        """Everything lies ready."""
        (group,) = self.spec.groups
        for lo in range(0, self.tokens, self._chunk):
            hi = min(lo + self._chunk, self.tokens)
            for layer in group.layers:
                self._pieces += [Piece(0, part, layer, layer + 1, lo, hi) for part in (0, 1)]
        self._stage()

    def on_slot_free(self, slot: int) -> None:
        """The next piece goes there."""
        self._free.append(slot)
        self._stage()

    def on_import(self, transfer: bytes, slot: int, piece: Piece) -> None:
        """Done with it at once."""
        self.take_out(slot, piece)
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
