"""What tests let happen to a ``Pair``, event by event."""

from __future__ import annotations

from tests.pop_node.kv_stream.kv_content import SPEC, Plan
from tests.pop_node.kv_stream.kv_pair import Pair

T = bytes(range(16))


def start(pair: Pair, *plans: Plan) -> None:
    """All that both agents and engines say of a transfer, before any of it has moved."""
    for plan in plans:
        pair.expect(plan)
        pair.open(plan)
        pair.allocate(plan)
        pair.commit(plan)


def step(pair: Pair, *, but: str = "") -> bool:
    """One event, in the order of ``Pair.run``; ``but`` names one that must wait."""
    moves = [
        pair.stage_one,
        pair.hear_staged,
        pair.write_one,
        pair.deliver_up,
        pair.finish_one,
        pair.unpack_one,
        pair.import_one,
        pair.deliver_down,
    ]
    return any(move() for move in moves if move.__name__ != but)


def in_flight(tokens: int = 40, **changes) -> tuple[Pair, Plan]:
    """A transfer in whose middle some pieces have been imported and others are on their way."""
    pair, plan = Pair(), Plan(T, prompt_tokens=tokens, **changes)
    start(pair, plan)
    for _ in range(30):
        step(pair)
    assert 0 < pair.receiver.counts.received_bytes < (tokens - 1) * SPEC.token_bytes
    return pair, plan
