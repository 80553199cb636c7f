"""What of a prefill leg's KV is computed, granted and staged, and which piece leaves next.

Pure bookkeeping for one transfer; ``stager`` owns the memory and the locks. Positions are tokens of
the sequence; layers are indices within a group of the ``KvSpec``.
"""

from __future__ import annotations

from collections.abc import Sequence

from pop_node.kv_stream.spec import KvSpec, Piece

PATIENT_PIECE_BYTES = 64 * 1024
"""A piece smaller than this waits while the layers after it are being computed, so that a short
prompt leaves in a few pieces instead of one per layer. Guess: 0.5 ms of a 1 Gbit/s link."""


class Export:
    """One transfer out of this engine, from the queueing of its prefill leg to its release.

    ``ready[group][layer]``: tokens whose KV is in the blocks. ``staged[group][component][layer]``:
    tokens that went into slots; a preemption does not shrink it, so nothing is repeated, and only a
    transfer that is resumed sets it back. ``blocks`` is None while the sequence waits.
    """

    def __init__(self, spec: KvSpec, total_tokens: int) -> None:
        self.total_tokens = total_tokens
        self.blocks: tuple[int, ...] | None = None
        self.granted = -1
        self.resume = 0
        self._spec = spec
        self.ready = [[0] * len(group.layers) for group in spec.groups]
        self._staged: list[list[list[int]]] = []

    def bind(self, blocks: tuple[int, ...], held_tokens: int) -> None:
        """The sequence got blocks, ``held_tokens`` of which are computed in all layers."""
        self.blocks = blocks
        self._set_ready(held_tokens)

    def unbind(self) -> None:
        """The sequence was preempted: nothing is in blocks any more."""
        self.blocks = None
        self._set_ready(0)

    def _set_ready(self, tokens: int) -> None:
        for layers in self.ready:
            layers[:] = [tokens] * len(layers)

    def grant(self, have_tokens: int, arrived: Sequence[int] = (), resume: int = 0) -> None:
        """Tokens from ``have_tokens`` on may leave, or of each group, component and layer those
        from ``arrived`` on; without a newer ``resume`` a second grant changes nothing.

        Raises ``ValueError`` when ``arrived`` is not of the spec's shape.
        """
        if self.granted >= 0 and resume <= self.resume:
            return
        places = sum(len(group.layers) * len(group.components) for group in self._spec.groups)
        if len(arrived) not in (0, places):
            raise ValueError(f"{len(arrived)} counts of tokens for {places} places")
        self.granted, self.resume = self._within(have_tokens), resume
        counts = iter(arrived or [have_tokens] * places)
        self._staged = [
            [[self._within(next(counts)) for _ in group.layers] for _ in group.components]
            for group in self._spec.groups
        ]

    def revoke(self) -> None:
        """The transfer begins anew elsewhere: nothing may leave before the next ``grant``."""
        self.granted, self.resume = -1, 0

    def _within(self, tokens: int) -> int:
        return max(0, min(tokens, self.total_tokens))

    def next_piece(self, slot_bytes: int) -> Piece | None:
        """The largest useful piece that fits a slot, oldest tokens first; None if there is none
        now."""
        if self.blocks is None or self.granted < 0:
            return None
        best: tuple[int, Piece] | None = None
        for group, components in enumerate(self._staged):
            for component, staged in enumerate(components):
                piece = self._piece_of(group, component, staged, slot_bytes)
                if piece is not None and (best is None or piece.token_lo < best[0]):
                    best = piece.token_lo, piece
        return None if best is None else best[1]

    def _piece_of(
        self, group: int, component: int, staged: list[int], slot_bytes: int
    ) -> Piece | None:
        ready = self.ready[group]
        first = -1
        for layer, (done, have) in enumerate(zip(ready, staged, strict=True)):
            if have < done and (first < 0 or have < staged[first]):
                first = layer
        if first < 0:
            return None
        token_bytes = self._spec.groups[group].components[component].token_bytes
        lo = staged[first]
        hi = min(ready[first], lo + slot_bytes // token_bytes)
        layer_bytes = (hi - lo) * token_bytes
        end = first
        while end < len(staged) and staged[end] == lo and ready[end] >= hi:
            if (end + 1 - first) * layer_bytes > slot_bytes:
                break
            end += 1
        behind = end < len(staged) and staged[end] == lo and ready[end] < hi
        if behind and (end - first) * layer_bytes < PATIENT_PIECE_BYTES:
            return None
        return Piece(group, component, first, end, lo, hi)

    def mark_staged(self, piece: Piece) -> None:
        """``piece`` came from ``next_piece`` and is in a slot."""
        layers = self._staged[piece.group][piece.component]
        for layer in range(piece.layer_lo, piece.layer_hi):
            layers[layer] = piece.token_hi
