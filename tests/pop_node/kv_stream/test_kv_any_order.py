"""Sender and receiver back to back, with anything at any time: moves and faults in any order."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pop_node.kv_stream import events as ev
from tests.pop_node.kv_stream.kv_content import Plan, altered
from tests.pop_node.kv_stream.kv_moves import start
from tests.pop_node.kv_stream.kv_pair import Pair

MOVES = st.tuples(st.integers(0, 19), st.integers(0, 2**16))
PACKS = st.booleans()


def run_move(pair: Pair, plans: list[Plan], move: int, arg: int, *, faults: bool) -> None:
    plan = plans[arg % len(plans)]
    match move:
        case 0 | 1:
            pair.stage_one()
        case 2 | 3:
            pair.write_one()
        case 4 | 5:
            pair.deliver_up(0 if not faults else arg if arg % 4 == 0 else 0)
        case 6 | 7:
            pair.finish_one(arg)
        case 8 | 9:
            if not (arg % 3 and pair.unpack_one(arg)):
                pair.import_one(arg)
        case 10 | 11:
            pair.deliver_down()
        case 12 if plan.transfer not in pair.plans:
            pair.expect(plan)
            pair.open(plan)
        case 13 if plan.transfer in pair.plans and plan.transfer not in pair.memory:
            pair.allocate(plan)
        case 14 if plan.transfer in pair.plans:
            pair.commit(plan)
        case 15 if faults and pair.up:
            pair.up.pop(arg % len(pair.up))
        case 16 if faults and pair.up:
            pair.up.insert(arg % 7, pair.up[arg % len(pair.up)])
        case 17 if faults and pair.up:
            pair.up[arg % len(pair.up)] = altered(pair.up[arg % len(pair.up)], arg)
        case 18 if faults and pair.down:
            if arg % 2:
                pair.down.pop(arg % len(pair.down))
            else:
                pair.down.append(pair.down[arg % len(pair.down)])
        case 19 if faults:
            match arg % 6:
                case 0:
                    pair.p(ev.Cancelled(plan.transfer, "cancelled", ""))
                case 1:
                    pair.d(ev.Cancelled(plan.transfer, "cancelled", ""))
                case 2:
                    pair.break_link(d_notices=arg % 4 < 2)
                case 3:
                    pair.wait(arg % 40 / 10)
                case 4:
                    pair.p(ev.EngineLost("m"))
                case 5:
                    pair.d(ev.EngineLost("m"))
                    for item in pair.to_import:
                        del pair.slots[item.slot]
                    pair.to_import.clear()


@settings(max_examples=150, deadline=None)
@given(st.lists(MOVES, max_size=120), st.lists(st.integers(1, 20), min_size=1, max_size=4), PACKS)
def test_any_order_delivers_every_byte(
    moves: list[tuple[int, int]], sizes: list[int], packs: bool
) -> None:
    pair = Pair()
    plans = [
        Plan(bytes([n]) * 16, size, size * n // 5, packs=packs and n < 3)
        for n, size in enumerate(sizes)
    ]
    for move, arg in moves:
        run_move(pair, plans, move, arg, faults=False)
    for plan in plans:
        if plan.transfer not in pair.plans:
            pair.expect(plan)
            pair.open(plan)
        if plan.transfer not in pair.memory:
            pair.allocate(plan)
        pair.commit(plan)
    pair.run()
    assert set(pair.committed) == set(pair.reports) == {plan.transfer for plan in plans}
    assert not pair.errors_p
    assert not pair.errors_d
    pair.check_at_rest()


@settings(max_examples=300, deadline=None)
@given(st.lists(MOVES, max_size=150), st.lists(st.integers(1, 20), min_size=1, max_size=3), PACKS)
def test_faults_leak_nothing_and_end_once(
    moves: list[tuple[int, int]], sizes: list[int], packs: bool
) -> None:
    pair = Pair()
    plans = [Plan(bytes([n]) * 16, size, packs=packs and n < 2) for n, size in enumerate(sizes)]
    for move, arg in moves:
        run_move(pair, plans, move, arg, faults=True)
    pair.check_at_rest()  # bytes were compared at each commit
    assert set(pair.ended_p) == set(pair.ended_d) == set(pair.plans)
    assert set(pair.reports) <= set(pair.committed)


@pytest.mark.parametrize("kind", ["lost", "link of version 1", "cancel_p", "cancel_d"])
def test_fault_sweep(kind: str) -> None:
    """Fail the Nth effect for N = 1, 2, ... until a run meets no fault."""
    for n in range(1000):
        pair = Pair(version=1)
        plans = [Plan(bytes([k]) * 16, 6 + k, packs=k == 1) for k in range(2)]

        def strike(pair: Pair = pair) -> None:
            match kind:
                case "link of version 1":
                    pair.break_link()
                case "cancel_p":
                    pair.p(ev.Cancelled(bytes(16), "cancelled", ""))
                case "cancel_d":
                    pair.d(ev.Cancelled(bytes(16), "cancelled", ""))

        pair.is_lost = kind == "lost"
        pair.strike = strike
        pair.effects_left = n
        for plan in plans:
            start(pair, plan)
        pair.run()
        met = pair.effects_left < 0
        pair.check_at_rest()
        assert set(pair.ended_p) == set(pair.ended_d) == set(pair.plans)
        if not met:
            assert n > 50
            assert not pair.errors_p
            return
    raise AssertionError("the sweep did not end")
