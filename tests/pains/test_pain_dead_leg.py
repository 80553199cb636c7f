"""One leg fails, and the other hangs for minutes."""

from __future__ import annotations

import asyncio
import os

import pytest

from pop_node.kv_stream.liveness import MIN_WAIT_S, Keepalive
from pop_node.kv_stream.parking import PARK_S
from pop_node.kv_stream.prompt import prompt_digest
from pop_node.kv_stream.spec import KvComponent, KvGroup, KvSpec
from tests.fakes.fake_answer import answer_text
from tests.fakes.fake_connection import Faults
from tests.pains.pain_parts import (
    HELLO,
    T,
    events_of,
    hand_over,
    let_time_pass,
    text_of,
)
from tests.pop_node.kv_stream.kv_content import Plan
from tests.pop_node.kv_stream.kv_node import Node, assert_at_rest
from tests.pop_node.kv_stream.kv_pair import Pair
from tests.router.router_mesh import RouterMesh
from wire.messages import Finished

TEN_MINUTES = 600.0


async def test_sglang_9726_a_refused_prefill_frees_the_decode_leg(mesh: RouterMesh) -> None:
    """sgl-project/sglang 9726: the router sent the request to both nodes and then waited for the
    decode node alone, so a prefill node that had said no left the client and the decode slot
    waiting for KV that could never come."""
    fra, lhr = mesh.nodes["fra-1"], mesh.nodes["lhr-1"]
    fra.faults = Faults(leg="prefill", refuse=("context_length_exceeded", False))
    async with asyncio.timeout(20):
        response = await mesh.chat()
    assert response.status == 400
    assert (await response.json())["error"]["code"] == "context_length_exceeded"
    await lhr.wait_until(lambda: bool(lhr.cancels) and lhr.active == 0)
    assert set(lhr.cancels) == {lhr.submits[0].stream}
    await mesh.wait_idle()


async def test_sglang_9726_a_dead_prefill_frees_the_decode_leg(mesh: RouterMesh) -> None:
    """sgl-project/sglang 9726, when the prefill node dies instead of refusing: the decode leg that
    waits for it is let go at once, and the client gets its answer from elsewhere."""
    lhr = mesh.nodes["lhr-1"]
    mesh.nodes["fra-1"].faults = Faults(leg="prefill", drop_after=0, times=1)
    async with asyncio.timeout(20):
        body = await (await mesh.chat()).json()
    assert body["choices"][0]["message"]["content"] == answer_text(HELLO, 8)
    await lhr.wait_until(lambda: lhr.submits[0].stream in lhr.cancels)
    await mesh.wait_idle()


def test_sglang_10110_a_prefill_whose_peer_does_not_answer_gives_up_by_itself() -> None:
    """sgl-project/sglang 10110: prefill requests sat in the handshake with the decode node for
    300 s each and the whole system stood still. Here the dial ends after five seconds, however
    long the request itself may take."""
    pair, plan = Pair(can_dial=False), Plan(T, deadline=TEN_MINUTES)
    pair.open(plan)
    pair.commit(plan)
    let_time_pass(pair, TEN_MINUTES)
    assert pair.ended_p == {T: 1}
    assert pair.errors_p[T].retryable
    assert pair.now <= MIN_WAIT_S
    pair.check_at_rest()


def test_sglang_10110_a_decode_node_without_the_request_says_so() -> None:
    """sgl-project/sglang 10110, other cause: the decode node is there, but its half of the request
    never came. It does not keep the prefill node waiting."""
    pair, plan = Pair(), Plan(T, deadline=TEN_MINUTES)
    pair.open(plan)
    pair.commit(plan)
    let_time_pass(pair, TEN_MINUTES)
    assert pair.ended_p == {T: 1}
    assert pair.now <= PARK_S
    pair.check_at_rest()


def test_sglang_11648_a_decode_leg_does_not_wait_ten_minutes_for_kv() -> None:
    """sgl-project/sglang 11648: with a waiting time of 600 s, decode requests whose prefill never
    sent anything held their memory for all of it. Here nobody dialled, so five seconds are
    enough."""
    pair, plan = Pair(), Plan(T, deadline=TEN_MINUTES)
    pair.expect(plan)
    pair.allocate(plan)
    let_time_pass(pair, TEN_MINUTES)
    assert pair.ended_d == {T: 1}
    assert pair.errors_d[T].retryable
    assert pair.now <= MIN_WAIT_S
    pair.check_at_rest()


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_sglang_11648_a_prefill_that_falls_silent_is_not_waited_for(pieces: int) -> None:
    """sgl-project/sglang 11648, when the prefill node is gone after some of the KV: its connection
    answers no ping, is given up, and the decode leg ends soon after, not at its deadline."""
    pair, plan = Pair(), Plan(T, prompt_tokens=40, deadline=TEN_MINUTES)
    pair.expect(plan)
    pair.open(plan)
    pair.allocate(plan)
    pair.deliver_up()
    pair.deliver_down()
    for _ in range(pieces):
        assert pair.stage_one()
        assert pair.write_one()
        assert pair.deliver_up()
        assert pair.finish_one()
    keepalive = Keepalive(pair.now)
    keepalive.begin(pair.now)
    while not keepalive.is_dead(pair.now):
        keepalive.due(pair.now)
        pair.now = keepalive.next_deadline()
    silent_for = pair.now
    assert silent_for <= MIN_WAIT_S
    pair.can_dial = False  # whoever dials that node again gets no answer
    pair.break_link()
    let_time_pass(pair, TEN_MINUTES)
    assert (pair.ended_p, pair.ended_d) == ({T: 1}, {T: 1})
    assert pair.committed == {}
    assert pair.now <= silent_for + MIN_WAIT_S
    pair.check_at_rest()


async def test_llm_d_2433_layouts_that_do_not_fit_are_an_error_on_both_sides() -> None:
    """llm-d/llm-d 2433: prefill and decode ran with different tensor parallelism, the transfer
    failed in the prefill node's worker thread, only a log knew, and the client hung."""
    other = KvSpec((KvGroup("tokens", (0, 1), (KvComponent("k", "float32", (6, 16), 0),)),))
    digest = prompt_digest(range(64))
    async with asyncio.timeout(20), Node("p") as p, Node("d") as d:
        transfer = os.urandom(16)
        d.receive(transfer, "p", 64, None)
        p.ends[transfer] = asyncio.get_running_loop().create_future()
        p.endpoint.open(transfer, 1, "d", d.address, "m", "ident", other, 64, digest, TEN_MINUTES)
        assert (await p.ends[transfer]).code == "spec_mismatch"
        assert (await d.ends[transfer]).code == "spec_mismatch"
        assert_at_rest(p, d)
        await hand_over(p, d)


async def test_llm_d_2433_the_client_hears_of_it_too(one_pair: RouterMesh) -> None:
    """llm-d/llm-d 2433, seen by the client: where the only pair of nodes is one that does not fit,
    it gets an error that it can read, and soon."""
    one_pair.nodes["lhr-1"].faults = Faults(leg="decode", refuse=("spec_mismatch", False))
    async with asyncio.timeout(30):
        response = await one_pair.chat()
    assert response.status >= 500
    error = (await response.json())["error"]
    assert error["code"] == "spec_mismatch"
    assert "lhr-1" in error["message"]
    await one_pair.wait_idle()


async def test_dynamo_5884_a_leg_that_ends_without_a_word_is_no_end_of_the_answer(
    mesh: RouterMesh,
) -> None:
    """ai-dynamo/dynamo 5884: the hand-over failed, the decode worker did not know the sequence, its
    stream ended early, and the front end fell over it. Here a decode node that says "over" without
    being asked is replaced in mid-answer."""
    lhr = mesh.nodes["lhr-1"]
    lhr.go.clear()
    response = await mesh.chat(stream=True)  # the first token is here
    await lhr.wait_until(lambda: lhr.active == 1)
    lhr.tell(Finished(lhr.submits[0].stream, "cancelled", 0, 0.0, 0.0, None))
    async with asyncio.timeout(20):
        events = await events_of(response)
    assert text_of(events) == answer_text(HELLO, 8)
    assert events[-1] == "[DONE]"
    lhr.go.set()
    assert (await mesh.chat()).status == 200
