"""Coverage, slot sharing, liveness, rates and the transfer report."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.kv_stream.coverage import Coverage, IntervalSet, required_tokens, validate_piece
from pop_node.kv_stream.credit import SlotPool
from pop_node.kv_stream.liveness import MIN_WAIT_S, PING_INTERVAL_S, Keepalive, wait_limit_s
from pop_node.kv_stream.rates import MEMORY_S, MIN_SAMPLE_BYTES, RateMeter
from pop_node.kv_stream.report import TransferMeter
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec, Piece

K = KvComponent("k", "bfloat16", (2, 4))
SPEC = KvSpec(
    (
        KvGroup("tokens", (0, 2, 4), (K, K)),
        KvGroup("window", (1,), (K,), window=4),
        KvGroup("state", (3,), (K,)),
    )
)
T, U = b"t" * 16, b"u" * 16

SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=30)


@given(SPANS)
def test_interval_set_is_a_set_of_integers(spans: list[tuple[int, int]]) -> None:
    intervals, model = IntervalSet(), set()
    for lo, size in spans:
        span = set(range(lo, lo + size))
        assert intervals.overlaps(lo, lo + size) == bool(model & span)
        if not model & span:
            intervals.add(lo, lo + size)
            model |= span
    edges = list(zip(intervals.starts, intervals.ends, strict=True))
    assert {n for lo, hi in edges for n in range(lo, hi)} == model
    assert all(a[1] < b[0] for a, b in pairwise(edges))
    gaps = intervals.gaps(5, 30)
    assert {n for lo, hi in gaps for n in range(lo, hi)} == set(range(5, 30)) - model


@pytest.mark.parametrize(
    ("group", "have", "total", "want"),
    [
        (0, 0, 10, (0, 10)),
        (0, 7, 10, (7, 10)),
        (1, 0, 10, (6, 10)),
        (1, 8, 10, (8, 10)),
        (1, 0, 3, (0, 3)),
        (2, 0, 10, (9, 10)),
        (2, 10, 10, (10, 10)),
    ],
)
def test_required_tokens(group: int, have: int, total: int, want: tuple[int, int]) -> None:
    assert required_tokens(SPEC.groups[group], have, total) == want


def test_coverage_names_what_is_missing() -> None:
    coverage = Coverage(SPEC)
    for piece in (
        Piece(0, 0, 0, 3, 0, 10),
        Piece(0, 1, 0, 2, 0, 10),
        Piece(0, 1, 2, 3, 0, 4),
        Piece(1, 0, 0, 1, 7, 10),
        Piece(2, 0, 0, 1, 9, 10),
    ):
        assert not coverage.overlaps(piece)
        coverage.add(piece)
        assert coverage.overlaps(piece)
    assert coverage.missing(0, 10) == [Piece(0, 1, 2, 3, 4, 10), Piece(1, 0, 0, 1, 6, 7)]
    assert not coverage.complete(0, 10)
    assert coverage.complete(9, 10) is False
    coverage.add(Piece(0, 1, 2, 3, 4, 10))
    assert coverage.complete(7, 10)


@pytest.mark.parametrize(
    ("piece", "word"),
    [
        (Piece(3, 0, 0, 1, 0, 1), "group"),
        (Piece(0, 2, 0, 1, 0, 1), "component"),
        (Piece(0, 0, 0, 4, 0, 1), "layers"),
        (Piece(0, 0, 1, 1, 0, 1), "layers"),
        (Piece(0, 0, 0, 1, 1, 1), "tokens"),
    ],
)
def test_improper_pieces(piece: Piece, word: str) -> None:
    assert word in (validate_piece(SPEC, piece) or "")
    assert validate_piece(SPEC, Piece(0, 1, 0, 3, 0, 1)) is None


# ---- slots ----


def test_first_transfer_leaves_room_for_the_next() -> None:
    pool = SlotPool(64, 128)
    held = {T: pool.admit(T)}
    held[T] += pool.top_up([T])[T]
    assert held[T] == 86  # two thirds
    held[U] = pool.admit(U)
    held[U] += pool.top_up([T, U])[U]
    assert held[U] == 28
    assert pool.free == 128 - 86 - 28


def test_returned_slots_even_the_shares_out() -> None:
    pool = SlotPool(0, 60)
    pool.admit(T)
    pool.top_up([T])
    pool.admit(U)
    pool.top_up([T, U])
    for _ in range(200):  # both use and return all the time
        for transfer in (T, U):
            slot = pool.use(transfer)
            if slot is not None:
                pool.release(slot)
                pool.top_up([T, U])
    shares = [sum(pool.use(t) is not None for _ in range(60)) for t in (T, U)]
    assert abs(shares[0] - shares[1]) <= 2
    assert sum(shares) == pytest.approx(60 * 4 / 5, abs=2)


OPS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=200)


@given(OPS, st.integers(1, 9))
def test_slots_are_conserved(ops: list[tuple[int, int]], count: int) -> None:
    pool = SlotPool(10, count)
    names = [bytes([n]) for n in range(6)]
    admitted: dict[bytes, int] = {}
    used: list[int] = []
    for op, arg in ops:
        name = names[arg]
        if op == 0 and name not in admitted:
            credit = pool.admit(name)
            if credit:
                admitted[name] = credit
        elif op == 1:
            for given_to, credit in pool.top_up(list(admitted)).items():
                admitted[given_to] += credit
        elif op == 2:
            slot = pool.use(name)
            assert (slot is not None) == (admitted.get(name, 0) > 0)
            if slot is not None:
                admitted[name] -= 1
                assert slot not in used
                assert 10 <= slot < 10 + count
                used.append(slot)
        elif op == 3 and used:
            pool.release(used.pop(arg % len(used)))
        elif op == 4:
            pool.forget(name)
            admitted.pop(name, None)
        assert pool.used == len(used)
        assert pool.promised == sum(admitted.values())
        assert pool.free == count - pool.used - pool.promised >= 0


def test_nobody_starves_while_slots_return() -> None:
    pool = SlotPool(0, 1)
    assert pool.admit(T) == 1
    slot = pool.use(T)
    assert slot is not None
    assert pool.admit(U) == 0
    pool.release(slot)
    assert pool.top_up([T]) == {T: 1}


# ---- liveness ----


def test_keepalive_pings_measures_and_gives_up() -> None:
    alive = Keepalive(100.0)
    assert alive.due(100.0) is None  # nobody there yet
    assert alive.next_deadline() == 100.0 + MIN_WAIT_S
    alive.begin(100.0)
    ping = alive.due(100.0)
    assert ping is not None
    assert alive.due(100.1) is None
    assert not alive.has_rtt
    assert alive.pong(ping.nonce, 100.08)
    assert alive.rtt_s == pytest.approx(0.08)
    assert not alive.pong(ping.nonce, 100.2)  # counted once
    alive.heard(100.08)
    assert alive.next_deadline() == 100.0 + PING_INTERVAL_S
    assert not alive.is_dead(105.0)
    assert alive.is_dead(100.08 + MIN_WAIT_S)


def test_far_links_wait_longer() -> None:
    assert (wait_limit_s(0.0), wait_limit_s(0.25), wait_limit_s(0.6)) == (5.0, 5.0, 12.0)


# ---- measuring ----


def burst(meter: RateMeter, start: float, rate: float, *, waited: bool, pieces: int = 8) -> None:
    size = MIN_SAMPLE_BYTES // 4
    meter.sent(T, size * pieces)
    if waited:
        meter.waited()
    for n in range(pieces):
        meter.acked(T, size * (n + 1), start + n * size / rate)
    meter.ended(T)


def test_rate_is_measured_when_the_link_sets_the_pace() -> None:
    meter = RateMeter()
    burst(meter, 0.0, 8e6, waited=True)
    assert meter.bytes_per_s == pytest.approx(8e6)
    burst(meter, 9.0, 1e6, waited=False)  # a slow prefill is not a slow link
    assert meter.bytes_per_s == pytest.approx(8e6)
    for n in range(8):
        burst(meter, 10.0 * (n + 2), 2e6, waited=True)
    assert meter.bytes_per_s == pytest.approx(2e6, rel=0.05)
    burst(meter, 200.0, 5e6, waited=False, pieces=3)  # too short
    assert meter.bytes_per_s == pytest.approx(2e6, rel=0.05)


def test_a_rate_of_long_ago_is_unknown_again() -> None:
    meter = RateMeter()
    burst(meter, 0.0, 1e6, waited=True)
    seen = 2 * MIN_SAMPLE_BYTES / 1e6
    assert meter.current(seen + MEMORY_S - 1) == pytest.approx(1e6)
    assert meter.current(seen + MEMORY_S + 1) == 0.0
    burst(meter, 100.0, 8e6, waited=True)  # what was forgotten has no weight
    assert meter.current(101.0) == pytest.approx(8e6)


def test_hidden_bytes_arrived_before_the_compute_ended() -> None:
    meter = TransferMeter()
    meter.compute_started(1.0)
    meter.sent(110, 1.2)
    meter.acked(100, 0.2, 1.4)
    meter.compute_ended(2.0)
    meter.acked(250, 0.2, 2.05)  # arrived at 1.95
    meter.acked(400, 0.2, 2.5)
    report = meter.report(0.2)
    assert (report.kv_bytes, report.wire_bytes, report.hidden_bytes) == (400, 110, 250)
    assert report.compute_ms == pytest.approx(1000)
    assert report.transfer_ms == pytest.approx(1200)
    assert report.tail_ms == pytest.approx(400)
    assert report.rtt_ms == pytest.approx(200)
