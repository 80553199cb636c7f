"""Idle for hours, then broken."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from pop_node.kv_stream import liveness
from pop_node.kv_stream.liveness import MIN_WAIT_S, Keepalive
from registry.entries import Registration, Snapshot
from registry.keep import Done, Heartbeat, Keep
from registry.keep import Start as StartKeep
from registry.keep import Tick as TickKeep
from registry.watch import Answered, Effect, Query, Start, Tick, Watch
from tests.pains.pain_parts import hand_over
from tests.pop_node.kv_stream.kv_content import Plan
from tests.pop_node.kv_stream.kv_node import Node, assert_at_rest
from tests.pop_node.kv_stream.kv_pair import Pair

HOURS = 6 * 3600.0
ONE_WAY_S = 0.04


def test_sglang_9926_an_idle_connection_is_kept_alive_for_hours() -> None:
    """sgl-project/sglang 9926: after some hours without requests the first ones failed, and the
    prefill and decode nodes waited ten minutes for each other. Two ends of an idle connection ask
    each other all the time, so neither forgets it (nor does a NAT between them)."""
    ends = [Keepalive(0.0), Keepalive(0.0)]
    for end in ends:
        end.begin(0.0)
    wire: deque[tuple[float, int, bool, int]] = deque()  # (arrival, to, is an answer, nonce)
    pings, now = 0, 0.0
    while now < HOURS:
        for number, end in enumerate(ends):
            assert not end.is_dead(now)
            ping = end.due(now)
            if ping is not None:
                pings += 1
                wire.append((now + ONE_WAY_S, 1 - number, False, ping.nonce))
        while wire and wire[0][0] <= now:
            _, to, is_answer, nonce = wire.popleft()
            ends[to].heard(now)
            if is_answer:
                assert ends[to].pong(nonce, now)
            else:
                wire.append((now + ONE_WAY_S, 1 - to, True, nonce))
        arrivals = [wire[0][0]] if wire else []
        now = min([*(end.next_deadline() for end in ends), *arrivals])
    assert pings == pytest.approx(2 * HOURS / liveness.PING_INTERVAL_S, rel=0.01)
    assert all(end.rtt_s == pytest.approx(2 * ONE_WAY_S) for end in ends)


def test_sglang_9926_a_connection_that_dies_in_its_sleep_is_noticed_asleep() -> None:
    """sgl-project/sglang 9926: not the first request after the pause is the one to find out."""
    end, now = Keepalive(0.0), 0.0
    end.begin(0.0)
    while now < HOURS:
        ping = end.due(now)
        if ping is not None:
            end.heard(now)
            end.pong(ping.nonce, now)
        now = end.next_deadline()
    last_heard = now
    while not end.is_dead(now):  # from here on the network swallows everything
        end.due(now)
        now = end.next_deadline()
    assert now <= last_heard + MIN_WAIT_S


def test_sglang_9926_the_first_transfer_after_hours_is_like_any_other() -> None:
    """sgl-project/sglang 9926, in the transfer machines: nothing waits, expires or piles up while
    nobody asks."""
    pair = Pair()
    for number in range(3):
        plan = Plan(bytes([number]) * 16, deadline=pair.now + 60.0)
        pair.expect(plan)
        pair.open(plan)
        pair.allocate(plan)
        pair.commit(plan)
        pair.run()
        assert pair.committed[plan.transfer] == plan.ids
        assert pair.sender.next_deadline() is None
        assert pair.receiver.next_deadline() is None
        pair.wait(HOURS)
    pair.check_at_rest()


async def test_sglang_9926_sockets_that_idled_for_a_hundred_pings_carry_the_next_transfer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sgl-project/sglang 9926 over real connections, with time run fast: many times the silence
    that would end a connection passes without a request."""
    monkeypatch.setattr(liveness, "PING_INTERVAL_S", 0.01)
    answered = 0
    enough = asyncio.Event()
    pong = Keepalive.pong

    def counted(keepalive: Keepalive, nonce: int, now: float) -> bool:
        nonlocal answered
        answered += 1
        if answered >= 100:
            enough.set()
        return pong(keepalive, nonce, now)

    async with asyncio.timeout(60), Node("p") as p, Node("d") as d:
        await hand_over(p, d)
        before = {id(conn) for conn in p.endpoint._connections()}
        monkeypatch.setattr(Keepalive, "pong", counted)
        await enough.wait()
        await hand_over(p, d)
        assert {id(conn) for conn in p.endpoint._connections()} == before
        assert_at_rest(p, d)


def test_sglang_9926_a_registration_outlives_an_idle_night() -> None:
    """sgl-project/sglang 9926: the node is still in the directory in the morning."""
    registration = Registration("a", "s", "192.0.2.1", 1, {}, ttl_s=10.0, deregister_after_s=60.0)
    keep, now = Keep(registration), 0.0
    call = keep.handle(StartKeep(), now)
    beats, last = 0, 0.0
    while now < HOURS:
        while call is not None:
            beats += isinstance(call, Heartbeat)
            assert now - last < registration.ttl_s
            last = now
            call = keep.handle(Done(), now)
        deadline = keep.next_deadline()
        assert deadline is not None
        now = deadline
        call = keep.handle(TickKeep(), now)
    assert beats >= HOURS / registration.ttl_s


def test_sglang_9926_a_directory_without_news_is_still_read() -> None:
    """sgl-project/sglang 9926: a router hears of the node that comes after an idle night."""
    watch, now = Watch(), 0.0
    effects: list[Effect] = watch.handle(Start(), now)
    asked = 0
    while now < HOURS:
        (query,) = [effect for effect in effects if isinstance(effect, Query)]
        asked += 1
        now += query.wait_s if query.index else 0.0
        effects = watch.handle(Answered(Snapshot(7, ())), now)
        if not any(isinstance(effect, Query) for effect in effects):
            deadline = watch.next_deadline()
            assert deadline is not None
            now = max(now, deadline)
            effects = watch.handle(Tick(), now)
        age = watch.age_s(now)
        assert age is not None
        assert age <= query.wait_s
    assert asked > HOURS / 60.0
