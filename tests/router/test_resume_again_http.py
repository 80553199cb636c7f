"""Answers that nobody knows any more are computed again, proven, and sent from where the client
was."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.api.event_id import EventId, TextProof
from router.api.render import Usage
from router.http.again import UnheardSink
from router.http.resume import Resumer
from router.metrics import Counter
from router.request.events import RequestSpec
from router.request.resume_book import Resumable
from tests.fakes.fake_node import idle_engine
from tests.router.resume_clients import (
    TOKENS,
    ask,
    check_rest,
    forgotten,
    hand_out,
    refused,
    start,
    until_status,
    whole,
)
from tests.router.router_mesh import MODEL, running_mesh
from wire.messages import Load, Sampling, TextInput

USAGE = Usage(3, 0, 9)


class Heard:
    """What an ``SseSink`` would send, in the order in which it was told."""

    def __init__(self) -> None:
        self.calls = []

    def headers(self, prefill, decode):
        self.calls.append(("headers", prefill, decode))

    def text(self, escaped, upto):
        self.calls.append(("text", escaped, upto))

    def finish(self, reason, usage):
        self.calls.append(("finish", reason))

    def error(self, error):
        self.calls.append(("error", error.code))


def unheard(read: bytes):
    """A sink for a client that has read so much; what it sends, keeps and counts."""
    sampling = Sampling(9, 0.0, 1.0, 1, [], False)
    answer = Resumable(RequestSpec("r", "m", "t", TextInput("x"), sampling, [], 5.0), 1, 10)
    heard, counts = Heard(), Counter("resumed", "", ("found",))
    return UnheardSink(heard, answer, TextProof().after(read), counts), heard, answer, counts


def say(sink, pieces):
    sink.headers("p", "d")
    for number, piece in enumerate(pieces):
        sink.text(piece, number + 1)
    sink.finish("length", USAGE)


PIECES = st.lists(st.binary(min_size=1, max_size=6), max_size=20)


@given(pieces=PIECES, cut=st.integers(0, 130))
def test_the_rest_is_sent_however_the_text_is_cut_this_time(pieces, cut):
    text = b"".join(pieces)
    sink, heard, answer, counts = unheard(text[:cut])
    say(sink, pieces)
    assert heard.calls[0] == ("headers", "p", "d")
    assert heard.calls[-1] == ("finish", "length")
    sent = b"".join(call[1] for call in heard.calls if call[0] == "text")
    assert sent == text[cut:]
    kept = b"".join(piece for piece, _ in answer.after(EventId("r", 0)))
    assert kept + sent == text, "what is sent is kept by the sink that sends it"
    assert counts.value("recomputed") == 1


@given(pieces=PIECES, read=st.binary(min_size=1, max_size=60))
def test_another_text_is_one_error_and_nothing_else(pieces, read):
    text = b"".join(pieces)
    if text.startswith(read):
        read += b"\x00" * (len(text) + 1)
    sink, heard, answer, counts = unheard(read)
    say(sink, pieces)
    assert heard.calls == [("error", "stream_unknown")]
    assert counts.value("recomputed") == 0
    assert answer.is_dropped, "nobody goes on with it"


@pytest.fixture
async def mesh(monkeypatch):
    async with running_mesh(monkeypatch) as running:
        yield running


def forget(monkeypatch):
    """The router has forgotten all answers, as after a new start."""
    monkeypatch.setattr(Resumer, "_here", lambda self, key: None)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("read", [1, 4, TOKENS - 1])
async def test_the_rest_follows_and_the_seed_is_the_same(mesh, monkeypatch, kind, read):
    first, tickets = await forgotten(mesh, read, kind)
    forget(monkeypatch)
    tickets.add(2 * TOKENS)
    check_rest(first, await (await start(mesh.http, kind, last_id=first.last_id)).rest(), kind)
    seeds = [s.sampling.seed for node in mesh.nodes.values() for s in node.submits]
    assert len(seeds) >= 2
    assert len(set(seeds)) == 1
    record = await mesh.get_json(f"/popmesh/requests/{first.last_id.rpartition(':')[0]}")
    assert (record["resumed_from"], record["outcome"]) == (read, "length")


async def test_another_body_is_unknown_and_leaves_nothing(mesh, monkeypatch):
    first, tickets = await forgotten(mesh, 4)
    forget(monkeypatch)
    tickets.add(2 * TOKENS)
    other = [{"role": "user", "content": "something else"}]
    status, code, error = await refused(mesh.http, last_id=first.last_id, messages=other)
    assert (status, code) == (404, "stream_unknown")
    assert "begins otherwise" in error["message"]
    await mesh.wait_idle()
    status = await mesh.get_json("/popmesh/status")
    assert (status["in_flight"], status["streams_open"]) == (0, 0)
    assert status["resumable"]["records"] == 0
    metrics = await (await mesh.http.get("/metrics")).text()
    assert 'popmesh_resumed_total{found="unknown"} 1' in metrics


async def test_of_two_that_come_back_meanwhile_the_later_gets_the_rest(mesh, monkeypatch):
    first, tickets = await forgotten(mesh, 4)
    monkeypatch.setattr("router.request.resume_book.KEEP_S", 0.0)
    second = asyncio.ensure_future(ask(mesh.http, last_id=first.last_id))
    await until_status(mesh, lambda status: status["running"])
    third = asyncio.ensure_future(start(mesh.http, last_id=first.last_id))
    async with await second as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "taken_over"
    tickets.add(2 * TOKENS)
    check_rest(first, await (await third).rest())
    await mesh.wait_idle()


async def test_without_a_route_it_is_worth_another_try(mesh, monkeypatch):
    first, tickets = await forgotten(mesh, 4)
    forget(monkeypatch)
    for node in mesh.nodes.values():
        node.tell(Load([idle_engine(MODEL, ready=False)], [], False))
    await until_status(mesh, lambda status: not status["routable"])
    status, _, _ = await refused(mesh.http, last_id=first.last_id)
    assert status == 503
    for node in mesh.nodes.values():
        node.tell(node.load_message())
    await mesh.wait_ready()
    tickets.add(2 * TOKENS)
    check_rest(first, await (await start(mesh.http, last_id=first.last_id)).rest())


async def test_a_client_that_lost_only_the_end_gets_it(mesh, monkeypatch):
    hand_out(mesh, 3 * TOKENS)
    first = await (await start(mesh.http)).rest()
    await mesh.wait_idle()
    for node in mesh.nodes.values():
        node.answers.clear()
    forget(monkeypatch)
    second = await (await start(mesh.http, last_id=first.last_id)).rest()
    assert (first.text, second.text) == (whole(), "")
    assert (second.finish, second.done) == ("length", True)
    assert second.last_id == first.last_id
    assert msgspec.json.encode(second.usage) == msgspec.json.encode(first.usage)
