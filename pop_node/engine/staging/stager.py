"""Copies KV between the paged cache and the staging slots, for transfers in both directions.

Owns the books of transfers inside the engine and every copy. Used by two threads: the engine's main
loop opens, binds and closes transfers and reports finished layers; the port's thread grants, copies
and frees slots, so the main loop waits at most for one copy of one slot. One lock covers books and
copies: after ``close`` returns, no copy of that transfer runs or will run, and its blocks may go to
someone else. Where copies run beside the host (``kv_mover``), that holds in the device's order:
what is computed after ``close`` comes after them. A piece is offered once it has arrived. Copies
move integers of the element's size: every bit pattern of every dtype survives.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch

from pop_node.engine.messages import Import, Staged, StageFrom
from pop_node.engine.scheduling.schedule import Side
from pop_node.engine.staging.exports import Export
from pop_node.engine.staging.kv_mover import Arrived, Mark, Mover
from pop_node.kv_stream.spec import DTYPE_BYTES, KvSpec, Piece
from pop_node.kv_stream.staging import Staging
from wire.errors import ConfigError

_INTEGERS = {2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, slots=True)
class _Incoming:
    """One transfer into this engine. Only tokens ``[held_tokens, total_tokens)`` may be written:
    those before are shared with other sequences, and only ``after`` what whoever had the blocks
    was still to compute."""

    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    held_tokens: int
    total_tokens: int
    after: Mark


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A piece on its way into its slot."""

    staged: Staged
    arrived: Arrived


class Stager:
    """Staging side of one engine.

    ``generations`` is the block pool's live list. ``wake`` is called from the main loop when a
    piece may have become ready; it must be cheap and may be called from inside a forward pass.
    """

    def __init__(
        self,
        spec: KvSpec,
        cache: tuple[torch.Tensor, ...],
        block_tokens: int,
        staging: Staging,
        generations: Sequence[int],
        wake: Callable[[], None],
        mover: Mover,
    ) -> None:
        self._spec = spec
        self._mover = mover
        self._under_way: deque[_Outgoing] = deque()
        self._block_tokens = block_tokens
        self._staging = staging
        self._generations = generations
        self._wake = wake
        self._lock = Lock()
        self._free_slots = deque(range(staging.layout.export_slots))
        self._exports: dict[bytes, Export] = {}
        self._incoming: dict[bytes, _Incoming] = {}
        self._step: list[tuple[Export, int]] = []
        self._place_of_layer = {
            number: (group, index)
            for group, layers in enumerate(spec.groups)
            for index, number in enumerate(layers.layers)
        }
        # Per group and component, as integers: [layers, all slots of the cache, token elements].
        tensors = iter(cache)
        self._memory = [
            [_as_integers(next(tensors), DTYPE_BYTES[c.dtype]) for c in group.components]
            for group in spec.groups
        ]
        widest = max(c.token_bytes for group in spec.groups for c in group.components)
        if widest > staging.layout.slot_bytes:
            raise ConfigError(
                f"a staging slot of {staging.layout.slot_bytes} bytes cannot hold one token of "
                f"{widest} bytes"
            )

    # ---- called by the main loop ---------------------------------------------------------------

    def open_export(self, transfer: bytes, total_tokens: int) -> None:
        """A prefill leg was queued."""
        with self._lock:
            self._exports[transfer] = Export(self._spec, total_tokens)

    def bind(
        self,
        side: Side,
        transfer: bytes,
        blocks: tuple[int, ...],
        held_tokens: int,
        total_tokens: int,
    ) -> None:
        """Blocks now stand behind a transfer."""
        with self._lock:
            if side == "export":
                self._mover.queued()
                self._exports[transfer].bind(blocks, held_tokens)
            else:
                generations = tuple(self._generations[block] for block in blocks)
                self._incoming[transfer] = _Incoming(
                    blocks, generations, held_tokens, total_tokens, self._mover.mark()
                )
        if side == "export":
            self._wake()

    def unbind_export(self, transfer: bytes) -> None:
        """A prefill leg was preempted and its blocks are about to be used by others."""
        with self._lock:
            self._exports[transfer].unbind()
            self._mover.release()

    def rename_export(self, transfer: bytes, new_transfer: bytes) -> None:
        """The KV goes elsewhere under a new name; nothing is granted there yet."""
        with self._lock:
            export = self._exports[new_transfer] = self._exports.pop(transfer)
            export.revoke()

    def close(self, side: Side, transfer: bytes) -> None:
        """The transfer is over on this engine; waits for a copy that is running."""
        with self._lock:
            if side == "export":
                self._exports.pop(transfer, None)
                self._mover.release()
            else:
                self._incoming.pop(transfer, None)

    def begin_step(self, ends: list[tuple[bytes, int]]) -> None:
        """The next forward pass computes these exports up to these tokens."""
        if not ends:
            self._step = []
            return
        with self._lock:
            self._step = [(self._exports[transfer], end) for transfer, end in ends]

    def layer_done(self, layer: int) -> None:
        """KV of model layer ``layer`` is computed for the rows of the current step, or queued.

        Takes no lock: each store is atomic, and a reader that misses it sees it at the next wake.
        """
        if not self._step:
            return
        self._mover.queued()
        group, index = self._place_of_layer[layer]
        granted = False
        for export, end in self._step:
            export.ready[group][index] = end
            granted |= export.granted >= 0
        if granted:
            self._wake()

    # ---- called by the port's thread -----------------------------------------------------------

    def grant(self, message: StageFrom) -> bool:
        """The decode site wants what it does not hold yet; False for an unknown transfer."""
        with self._lock:
            export = self._exports.get(message.transfer)
            if export is None:
                return False
            export.grant(message.have_tokens, message.arrived, message.resume)
            return True

    def free_slot(self, slot: int) -> None:
        """An export slot may be filled again; anything but a slot in use is ignored."""
        with self._lock:
            if 0 <= slot < self._staging.layout.export_slots and slot not in self._free_slots:
                self._free_slots.append(slot)

    @property
    def under_way(self) -> bool:
        """Are there pieces that have not arrived, for which nobody is woken?"""
        return bool(self._under_way)

    def stage_one(self) -> Staged | None:
        """A piece that has arrived in its slot. Begins to copy what is ready, as far as there are
        free slots, one piece at a time; None when nothing has arrived then."""
        while True:
            with self._lock:
                began = self._begin()
                if self._under_way and self._under_way[0].arrived():
                    return self._under_way.popleft().staged
                if not began:
                    return None

    def _begin(self) -> bool:
        """Begin to copy one ready piece; False when there is no piece or no slot."""
        if not self._free_slots:
            return False
        slot_bytes = self._staging.layout.slot_bytes
        for transfer, export in self._exports.items():
            piece = export.next_piece(slot_bytes)
            if piece is None:
                continue
            slot = self._free_slots.popleft()
            assert export.blocks is not None
            arrived = self._copy_out(piece, export.blocks, slot)
            export.mark_staged(piece)
            # The next piece comes from another transfer, if one has any.
            self._exports[transfer] = self._exports.pop(transfer)
            staged = Staged(
                transfer,
                slot,
                *piece.numbers,
                piece.nbytes(self._spec),
                export.resume,
            )
            self._under_way.append(_Outgoing(staged, arrived))
            return True
        return False

    def take_in(self, message: Import) -> None:
        """Scatter a slot into the blocks of its transfer.

        Nothing is written when the transfer is over, when a block has changed hands, or when the
        piece does not lie within the transfer.
        """
        with self._lock:
            incoming = self._incoming.get(message.transfer)
            if incoming is None or not self._lies_within(message, incoming):
                return
            lo = max(message.token_lo, incoming.held_tokens)
            if lo >= message.token_hi:
                return
            touched = range(lo // self._block_tokens, -(-message.token_hi // self._block_tokens))
            if any(
                self._generations[incoming.blocks[i]] != incoming.generations[i] for i in touched
            ):
                return
            self._copy_in(message, incoming.blocks, lo, incoming.after)

    # ---- copies --------------------------------------------------------------------------------

    def _lies_within(self, message: Import, incoming: _Incoming) -> bool:
        if not 0 <= message.group < len(self._spec.groups):
            return False
        group = self._spec.groups[message.group]
        layout = self._staging.layout
        return (
            0 <= message.component < len(group.components)
            and 0 <= message.layer_lo < message.layer_hi <= len(group.layers)
            and 0 <= message.token_lo < message.token_hi <= incoming.total_tokens
            and layout.export_slots <= message.slot < layout.total_slots
            and message.piece.nbytes(self._spec) <= layout.slot_bytes
        )

    def _copy_out(self, piece: Piece, blocks: tuple[int, ...], slot: int) -> Arrived:
        memory = self._memory[piece.group][piece.component]
        where = self._slots_of(blocks, piece.token_lo, piece.token_hi)
        target = self._view(slot, piece, memory.dtype, memory.shape[-1])
        return self._mover.copy_out(memory, where, piece.layer_lo, target)

    def _copy_in(self, message: Import, blocks: tuple[int, ...], lo: int, after: Mark) -> None:
        memory = self._memory[message.group][message.component]
        where = self._slots_of(blocks, lo, message.token_hi)
        source = self._view(message.slot, message.piece, memory.dtype, memory.shape[-1])
        source = source[:, lo - message.token_lo :]
        self._mover.copy_in(source, memory, where, message.layer_lo, after)

    def _view(self, slot: int, piece: Piece, dtype: torch.dtype, width: int) -> torch.Tensor:
        """A staging slot as ``[layers, tokens, width]``; the bytes are the slot's own."""
        shape = piece.layer_hi - piece.layer_lo, piece.token_hi - piece.token_lo, width
        count = shape[0] * shape[1] * shape[2]
        return torch.frombuffer(self._staging.slot(slot), dtype=dtype, count=count).view(shape)

    def _slots_of(self, blocks: tuple[int, ...], lo: int, hi: int) -> torch.Tensor:
        """Places of tokens ``[lo, hi)`` in the cache, ``[hi - lo]`` int64, on the host."""
        size = self._block_tokens
        first = lo // size
        table = torch.tensor(blocks[first : -(-hi // size)], dtype=torch.int64)
        positions = torch.arange(lo, hi)
        return table[positions // size - first] * size + positions % size


def _as_integers(tensor: torch.Tensor, element_bytes: int) -> torch.Tensor:
    """``[layers, blocks, block_tokens, *shape]`` as ``[layers, slots, elements]``, same memory."""
    layers, blocks, tokens = tensor.shape[:3]
    return tensor.view(_INTEGERS[element_bytes]).view(layers, blocks * tokens, -1)
