"""What a decode node keeps of a transfer that broke for good."""

from __future__ import annotations

import pytest

from pop_node.kv_stream import events as ev
from pop_node.kv_stream.frames import Data, Open
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece
from tests.pop_node.kv_stream.kv_content import SPEC
from tests.pop_node.kv_stream.kv_moves import T

TOKENS_ONLY = KvSpec(
    (
        KvGroup("tokens", (0, 1), (KvComponent("k", "float32", (2,)),)),
        KvGroup("tokens", (2,), (KvComponent("c", "float32", (2,)),)),
    )
)


def kept_of(receiver: Receiver, effects: list) -> int:
    (failed,) = [effect for effect in effects if isinstance(effect, ev.Failed)]
    return failed.kept_tokens


@pytest.mark.parametrize("spec", [TOKENS_ONLY, SPEC])
def test_kept_tokens_are_complete_everywhere_and_given_to_the_engine(spec: KvSpec) -> None:
    receiver = Receiver(0, 16, 1024)
    expected = ev.Expected(T, 1, "p", "m", "i", spec, 32, bytes(16), 60.0)
    receiver.handle(expected, 0.0)
    receiver.handle(ev.Allocated(T, 4), 0.0)
    opened = Open(T, 1, "m", "i", spec.digest(), 32, bytes(16), ["raw"])
    receiver.handle(ev.FrameIn(1, "p", opened, 1), 0.0)
    assert receiver.kept_tokens(T) == 4 * (spec is TOKENS_ONLY)

    def receive(piece: Piece, *, end: bool = True) -> None:
        fields = (piece.group, piece.component, piece.layer_lo, piece.layer_hi)
        data = Data(T, 1, *fields, piece.token_lo, piece.token_hi, "raw", bytes(8))
        begin = ev.DataBegins(1, "p", data, piece.nbytes(spec), 1)
        (into,) = receiver.handle(begin, 0.0)
        if end:
            imports = receiver.handle(ev.DataEnded(into.slot, bytes(8)), 0.0)
            assert isinstance(imports[0], ev.Import)

    if spec is TOKENS_ONLY:
        receive(Piece(0, 0, 0, 2, 4, 20))
        assert receiver.kept_tokens(T) == 4
        receive(Piece(1, 0, 0, 1, 4, 12))
        receive(Piece(1, 0, 0, 1, 16, 20))  # behind a hole
        receive(Piece(1, 0, 0, 1, 12, 16), end=False)  # still on its way
    want = 12 * (spec is TOKENS_ONLY)
    assert receiver.kept_tokens(T) == want
    effects = receiver.handle(ev.Cancelled(T, "cancelled", ""), 0.0)
    assert kept_of(receiver, effects) == want
    assert receiver.kept_tokens(T) == 0
