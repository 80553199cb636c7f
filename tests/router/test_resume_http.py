"""Clients that lose their connection and come back to the same router."""

from __future__ import annotations

import asyncio
import zlib

import msgspec
import pytest

from router.http import resume
from router.request import resume_book
from tests.fakes.fake_node import idle_engine
from tests.router.resume_clients import (
    TENANTS,
    TOKENS,
    ask,
    check_rest,
    cut_off,
    hand_out,
    refused,
    start,
    until_status,
    whole,
)
from tests.router.router_mesh import MODEL, make_topology, running_mesh
from wire.messages import Failed, Load


@pytest.fixture
async def mesh(monkeypatch):
    async with running_mesh(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("kind", ["chat", "completion"])
async def test_every_event_says_how_far_it_brings_the_client(mesh, kind):
    hand_out(mesh, TOKENS)
    reader = await start(mesh.http, kind)
    request_id = reader.response.headers["x-popmesh-request-id"]
    seen = []
    while await reader.event():
        place, _, proof = reader.last_id.partition("~")
        escaped = msgspec.json.encode(reader.text)[1:-1]
        assert proof == f"{len(escaped)}.{zlib.crc32(escaped):08x}"
        seen.append(place)
    numbers = list(range(kind == "completion", TOKENS + 1))
    assert seen == [f"{request_id}:{n}" for n in [*numbers, TOKENS, TOKENS, TOKENS]]
    assert reader.text == whole(kind)
    assert "x-popmesh-resumed" not in reader.response.headers


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("read", [1, 2, 5, TOKENS - 1])
async def test_a_cut_connection_goes_on_at_the_same_router(mesh, kind, read):
    first, tickets = await cut_off(mesh, read, kind)
    tickets.add(TOKENS)
    second = await (await start(mesh.http, kind, last_id=first.last_id)).rest()
    check_rest(first, second, kind)
    await mesh.wait_idle()
    hand_out(mesh, TOKENS)
    undisturbed = await (await start(mesh.http, kind)).rest()
    assert second.usage == undisturbed.usage
    status = await mesh.get_json("/popmesh/status")
    assert status["resumable"]["records"] == 2
    assert status["resumable"]["bytes"] > 0
    assert status["streams_open"] == 0


async def test_only_what_the_client_had_not_read_is_computed_again(mesh):
    first, tickets = await cut_off(mesh, 5)
    before = {name: len(node.submits) for name, node in mesh.nodes.items()}
    tickets.add(TOKENS)
    await (await start(mesh.http, last_id=first.last_id)).rest()
    again = [s for name, node in mesh.nodes.items() for s in node.submits[before[name] :]]
    assert again
    assert {len(submit.forced_ids) for submit in again} == {5}
    record = await mesh.get_json(
        f"/popmesh/requests/{first.response.headers['x-popmesh-request-id']}"
    )
    assert record["resumed_from"] == 5
    assert record["outcome"] == "length"


@pytest.mark.parametrize("lost", range(TOKENS + 1))
async def test_a_complete_answer_can_be_read_again_from_any_event(mesh, lost):
    hand_out(mesh, TOKENS)
    first = await (await start(mesh.http)).rest()
    await mesh.wait_idle()
    before = sum(len(node.submits) for node in mesh.nodes.values())
    request_id = first.response.headers["x-popmesh-request-id"]
    second = await (await start(mesh.http, last_id=f"{request_id}:{lost}")).rest()
    assert second.text == whole()[len(whole(count=lost)) :]
    assert (second.finish, second.done, second.usage) == ("length", True, first.usage)
    assert sum(len(node.submits) for node in mesh.nodes.values()) == before
    for name in ("x-popmesh-prefill", "x-popmesh-decode"):
        assert second.response.headers[name] == first.response.headers[name]


async def test_events_that_were_sent_but_not_received_are_sent_again(mesh):
    tickets = hand_out(mesh, 6)
    first = await (await start(mesh.http)).texts(2)
    early, text = first.last_id, first.text
    await first.texts(6)  # the router has sent six; the client will have lost four
    first.response.close()
    await mesh.wait_idle()
    tickets.add(TOKENS)
    second = await (await start(mesh.http, last_id=early)).rest()
    assert text + second.text == whole()


async def test_a_client_may_lose_its_connection_again_and_again(mesh):
    tickets = hand_out(mesh, 0)
    text, last_id = "", None
    for _ in range(TOKENS - 1):
        tickets.add(1)
        reader = await (await start(mesh.http, last_id=last_id)).texts(1)
        text, last_id = text + reader.text, reader.last_id
        reader.response.close()
        await mesh.wait_idle()
    tickets.add(1)
    reader = await (await start(mesh.http, last_id=last_id)).rest()
    assert text + reader.text == whole()
    assert reader.done


async def test_a_connection_that_only_seems_alive_is_taken_over(mesh):
    tickets = hand_out(mesh, 4)
    first = await (await start(mesh.http)).texts(4)
    resuming = asyncio.ensure_future(start(mesh.http, last_id=first.last_id))
    await first.rest()  # it ends before the new one begins
    assert first.error["code"] == "taken_over"
    assert not first.done
    tickets.add(TOKENS)
    check_rest(first, await (await resuming).rest())
    await mesh.wait_idle()
    metrics = await (await mesh.http.get("/metrics")).text()
    assert 'popmesh_requests_total{outcome="taken_over"} 1' in metrics
    assert 'popmesh_resumed_total{found="here"} 1' in metrics
    status = await mesh.get_json("/popmesh/status")
    assert status["in_flight"] == 0


async def test_of_two_that_come_back_the_later_gets_the_rest(mesh):
    first, tickets = await cut_off(mesh, 4)
    second = asyncio.ensure_future(ask(mesh.http, last_id=first.last_id))
    for node in mesh.nodes.values():
        await node.wait_until(lambda: any(node.active for node in mesh.nodes.values()))
    third = asyncio.ensure_future(start(mesh.http, last_id=first.last_id))
    async with await second as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "taken_over"
    tickets.add(TOKENS)
    check_rest(first, await (await third).rest())


async def test_an_answer_that_failed_can_be_tried_again(mesh):
    """The client had one error event; what it has is still good for half a minute."""
    tickets = hand_out(mesh, 3)
    first = await (await start(mesh.http)).texts(3)
    for node in mesh.nodes.values():
        for connection in node.connections:
            for stream in list(connection.legs):
                connection.legs[stream].cancel()
                connection.say(Failed(stream, "protocol_error", "told to fail", False))
    await first.rest()
    assert first.error["code"] == "protocol_error"
    tickets.add(TOKENS)
    check_rest(first, await (await start(mesh.http, last_id=first.last_id)).rest())


async def test_bad_ids_are_refused_with_advice(mesh):
    hand_out(mesh, TOKENS)
    first = await (await start(mesh.http)).rest()
    request_id = first.response.headers["x-popmesh-request-id"]
    for last_id, kind in (
        ("12", "chat"),
        (request_id, "chat"),
        (f"{request_id}:x", "chat"),
        (f"{request_id}:{TOKENS + 1}", "chat"),
        (f"{request_id}:3", "completion"),
    ):
        status, code, error = await refused(mesh.http, kind, last_id=last_id)
        assert (status, code, error["param"]) == (400, "invalid_value", "Last-Event-ID"), last_id
    status, code, error = await refused(mesh.http, last_id=f"{request_id}:3", stream=False)
    assert (status, code) == (400, "invalid_value")
    assert "stream" in error["message"]
    status, code, _ = await refused(mesh.http, last_id=f"{request_id}:3", messages=7)
    assert (status, code) == (400, "invalid_type")


async def test_unknown_expired_and_foreign_answers_look_the_same(monkeypatch):
    topology = make_topology(tenants=TENANTS)
    async with running_mesh(monkeypatch, topology) as mesh:
        tickets = hand_out(mesh, 4)
        first = await (await start(mesh.http, key="ann")).texts(4)
        last_id, _, _ = first.last_id.partition("~")  # with a proof it would be computed again
        errors = [await refused(mesh.http, last_id=last_id, key="bob")]
        unknown = f"chatcmpl-{'f' * 32}:4"
        errors.append(await refused(mesh.http, last_id=unknown, key="ann"))
        status, code, _ = await refused(mesh.http, last_id=last_id)
        assert (status, code) == (401, "invalid_api_key")

        monkeypatch.setattr(resume_book, "KEEP_S", 0.0)
        first.response.close()
        await mesh.wait_idle()
        for node in mesh.nodes.values():
            node.answers.clear()
        tickets.add(TOKENS)
        errors.append(await refused(mesh.http, last_id=last_id, key="ann"))
        assert [error[:2] for error in errors] == [(404, "stream_unknown")] * 3
        assert len({error[2]["message"] for error in errors}) == 1


async def test_an_answer_that_comes_back_waits_for_a_route(mesh):
    first, tickets = await cut_off(mesh, 4)
    not_ready = Load([idle_engine(MODEL, ready=False)], [], False)
    for node in mesh.nodes.values():
        node.tell(not_ready)
    await until_status(mesh, lambda status: not status["routable"])
    resuming = asyncio.ensure_future(start(mesh.http, last_id=first.last_id))
    await until_status(mesh, lambda status: status["running"])
    for node in mesh.nodes.values():
        node.tell(node.load_message())
    tickets.add(TOKENS)
    check_rest(first, await (await resuming).rest())


async def test_searches_among_the_nodes_are_bounded(monkeypatch):
    monkeypatch.setattr(resume, "MAX_SEARCHES", 0)
    monkeypatch.setattr(resume, "SEARCH_WAIT_S", 0.05)
    async with running_mesh(monkeypatch) as mesh:
        async with await ask(mesh.http, last_id=f"chatcmpl-{'f' * 32}:4") as response:
            assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert not any(node.attaches for node in mesh.nodes.values())


async def test_clients_that_come_back_at_once_wait_for_each_other(monkeypatch):
    """As those of a router that died; none is sent away."""
    monkeypatch.setattr(resume, "MAX_SEARCHES", 2)
    async with running_mesh(monkeypatch) as mesh:
        unknown = [refused(mesh.http, last_id=f"chatcmpl-{n:032x}:4") for n in range(20)]
        for status, code, _ in await asyncio.gather(*unknown):
            assert (status, code) == (404, "stream_unknown")
        assert {len(node.attaches) for node in mesh.nodes.values()} == {20}
