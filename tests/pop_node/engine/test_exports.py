"""Which pieces of a transfer leave, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.engine.staging.exports import PATIENT_PIECE_BYTES, Export
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece

LAYERS = 5
SPEC = KvSpec(
    (
        KvGroup(
            "tokens",
            tuple(range(LAYERS)),
            (KvComponent("k", "bfloat16", (2, 4)), KvComponent("v", "bfloat16", (3,))),
        ),
    )
)
BIG = 1 << 20


def layers_done(export: Export, count: int, tokens: int) -> None:
    for layer in range(count):
        export.ready[0][layer] = tokens


def test_nothing_leaves_before_the_grant_or_without_blocks() -> None:
    export = Export(SPEC, 10)
    assert export.next_piece(BIG) is None
    export.bind((0, 1), 0)
    layers_done(export, LAYERS, 10)
    assert export.next_piece(BIG) is None
    export.grant(0)
    assert export.next_piece(BIG) == Piece(0, 0, 0, LAYERS, 0, 10)
    export.unbind()
    assert export.next_piece(BIG) is None


def test_small_pieces_wait_for_the_layers_behind_them_and_large_ones_do_not() -> None:
    tokens = PATIENT_PIECE_BYTES // 16 // 2
    export = Export(SPEC, tokens)
    export.bind((0,), 0)
    export.grant(0)
    layers_done(export, 1, tokens)
    assert export.next_piece(BIG) is None
    layers_done(export, 2, tokens)
    assert export.next_piece(BIG) == Piece(0, 0, 0, 2, 0, tokens)


def test_tokens_that_the_other_side_has_stay_here() -> None:
    export = Export(SPEC, 10)
    export.bind((0, 1), 0)
    export.grant(10)
    layers_done(export, LAYERS, 10)
    assert export.next_piece(BIG) is None


def test_a_second_grant_counts_only_when_the_transfer_is_resumed_or_goes_elsewhere() -> None:
    export = Export(SPEC, 10)
    export.bind((0, 1), 10)
    export.grant(4)
    everything = [Piece(0, 0, 0, LAYERS, 4, 10), Piece(0, 1, 0, LAYERS, 4, 10)]

    def drained() -> list[Piece]:
        pieces = []
        while (piece := export.next_piece(BIG)) is not None:
            export.mark_staged(piece)
            pieces.append(piece)
        return pieces

    assert drained() == everything
    export.grant(0)
    assert drained() == []
    export.grant(4, [10] * LAYERS + [10, 10, 10, 10, 7], resume=1)
    assert drained() == [Piece(0, 1, 4, 5, 7, 10)]
    export.revoke()
    assert drained() == []
    export.grant(4)
    assert drained() == everything
    with pytest.raises(ValueError, match="3 counts"):
        export.grant(4, [1, 2, 3], resume=1)


def end_of_run(seen: dict[tuple[int, int, int], int], component: int, layer: int, lo: int) -> int:
    while (component, layer, lo) in seen:
        lo += 1
    return lo


@given(data=st.data())
def test_every_byte_leaves_exactly_once_whatever_happens(data: st.DataObject) -> None:
    """Chunks, preemptions, breaks and slot sizes are random; pieces must tile the granted box."""
    total = data.draw(st.integers(1, 40))
    slot_bytes = data.draw(st.sampled_from([16, 50, 160, 1000, BIG]))
    granted = data.draw(st.integers(0, total))
    export = Export(SPEC, total)
    seen: dict[tuple[int, int, int], int] = {}

    def drain() -> None:
        while (piece := export.next_piece(slot_bytes)) is not None:
            assert piece.nbytes(SPEC) <= slot_bytes
            for layer in range(piece.layer_lo, piece.layer_hi):
                assert piece.token_hi <= export.ready[0][layer]
                for token in range(piece.token_lo, piece.token_hi):
                    key = piece.component, layer, token
                    seen[key] = seen.get(key, 0) + 1
            export.mark_staged(piece)

    export.bind((0,), 0)
    computed = 0
    grant_at = data.draw(st.integers(0, 5))
    step = 0
    while computed < total or step <= grant_at:
        if step == grant_at:
            export.grant(granted)
        if computed and data.draw(st.booleans(), label="preempt"):
            export.unbind()
            drain()
            computed = data.draw(st.integers(0, computed), label="still cached")
            export.bind((1,), computed)
        if export.granted >= 0 and data.draw(st.booleans(), label="break"):
            arrived = [
                data.draw(st.integers(granted, end_of_run(seen, c, la, granted)), label="arrived")
                for c in (0, 1)
                for la in range(LAYERS)
            ]
            export.grant(granted, arrived, export.resume + 1)
            places = [(c, la) for c in (0, 1) for la in range(LAYERS)]
            beginnings = dict(zip(places, arrived, strict=True))
            for c, la, token in list(seen):
                if token >= beginnings[c, la]:
                    del seen[c, la, token]
        computed = data.draw(st.integers(computed, total), label="computed")
        if step > 6:
            computed = total
        for layer in range(LAYERS):
            export.ready[0][layer] = computed
            if data.draw(st.booleans(), label="drain"):
                drain()
        step += 1
    drain()
    everything = {(c, la, t) for c in (0, 1) for la in range(LAYERS) for t in range(granted, total)}
    assert seen == dict.fromkeys(everything, 1)
