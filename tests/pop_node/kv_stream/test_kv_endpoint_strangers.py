"""Endpoints and whoever is not the peer it should be: credentials, identities, garbage, silence."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

import pytest

from pop_node.kv_stream import liveness
from pop_node.kv_stream.endpoint import KvEndpoint
from pop_node.kv_stream.frames import MAX_VERSION, Goodbye, Hello, encode
from tests.pop_node.kv_stream.kv_node import (
    Authority,
    Node,
    Run,
    assert_at_rest,
    cache_of,
    hand_over,
)
from wire.errors import ConfigError, PeerError


@pytest.mark.parametrize("case", ["other name", "other authority", "no certificate", "plain"])
def test_wrong_credentials_are_refused(run: Run, tmp_path: Path, case: str) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path)

    async def main() -> None:
        server, client = authority.contexts("p")
        if case == "other name":
            client = authority.contexts("q")[1]
        elif case == "other authority":
            client.load_cert_chain(other.pem("x"))
        elif case == "no certificate":
            client = type(client)(client.protocol)
            client.load_verify_locations(authority.path)
        dialling = Node("p", server, None if case == "plain" else client)
        async with dialling as p, Node("d", *authority.contexts("d")) as d:
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(64, 1))
            error = await p.ends[transfer]
            assert isinstance(error, PeerError)
            if case == "other name":
                assert error.code == "identity_mismatch", (error, p.seen, d.seen)
            assert not d.caches
            assert_at_rest(p, d)

    other.contexts("x")
    run(main())


def test_identity_mismatch_is_said_on_both_sides(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            transfer = os.urandom(16)
            d.receive(transfer, "p", 64, None)
            p.send(transfer, d, cache_of(64, 1), identity="other")
            codes = {(await p.ends[transfer]).code, (await d.ends[transfer]).code}
            assert codes == {"identity_mismatch"}

    run(main())


def test_other_mesh_is_refused_with_a_reason(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d", mesh="other") as d:
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(64, 1))
            assert (await p.ends[transfer]).code == "identity_mismatch"

    run(main())


@pytest.mark.parametrize("host", ["a..b", "." + "x" * 70, "no\0name"])
def test_a_name_that_cannot_be_looked_up_costs_one_transfer(run: Run, host: str) -> None:
    async def main() -> None:
        async with Node("p", client_ssl=ssl.create_default_context()) as p, Node("d") as d:
            d.address = f"{host}:7"
            for _ in range(2):  # the endpoint dials on
                transfer = os.urandom(16)
                p.send(transfer, d, cache_of(64, 1))
                assert isinstance(await p.ends[transfer], PeerError)
            assert p.endpoint.link_rates() == []
            assert_at_rest(p)

    run(main())


GARBAGE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "huge header": b"\xff" * 64,
    "future version": encode(Hello(MAX_VERSION + 1, MAX_VERSION + 9, "test", "x", "s", "i", 64)),
    "data first": encode(Goodbye("x", "y"), 10),
    "nothing": b"",
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_disturbs_nobody(run: Run, case: str) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            host, port = d.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(GARBAGE[case])
            if case == "nothing":
                writer.write_eof()
            answer = await reader.read()  # to its end: the connection is closed on us
            assert b"test" in answer  # its Hello, and a reason
            writer.close()
            await hand_over(p, d, os.urandom(16), 64)
            assert_at_rest(p, d)

    run(main())


def test_silent_stranger_is_shown_out(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "MIN_WAIT_S", 0.05)
    wakes = 0
    tick = KvEndpoint._on_timer

    def counted(self: KvEndpoint) -> None:
        nonlocal wakes
        wakes += 1
        tick(self)

    monkeypatch.setattr(KvEndpoint, "_on_timer", counted)

    async def main() -> None:
        async with Node("d") as d:
            host, port = d.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            assert b"gone silent" in await reader.read()
            writer.close()
            assert wakes < 10  # one timer, no spinning

    run(main())


def test_listener_off_loopback_needs_tls(run: Run) -> None:
    async def main() -> None:
        node = Node("p")
        with pytest.raises(ConfigError, match="needs TLS"):
            await node.endpoint.start("0.0.0.0", 0)
        node.staging.close()

    run(main())
