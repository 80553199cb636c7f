"""An endpoint in which something happened that nobody expected says so, and can still be closed."""

from __future__ import annotations

import asyncio
import os

import pytest

from pop_node.kv_stream.link import PeerLink
from pop_node.kv_stream.packing import PackingRule
from pop_node.kv_stream.receiver import Receiver
from pop_node.kv_stream.sender import Sender
from tests.pop_node.kv_stream.kv_node import Node, Run, assert_at_rest, cache_of
from wire.errors import MeshError

TOKENS = 640


class OfAllThingsError(Exception):
    """What nobody expects."""


def fails(*_: object) -> None:
    raise OfAllThingsError


async def broken(node: Node) -> None:
    """Wait until the node's agent was told."""
    while not node.broken:  # noqa: ASYNC110  (bounded by the loop of the tests)
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("where", ["dial", "encode", "decode_into", "timer"])
def test_what_a_task_raises_breaks_the_endpoint_and_not_its_end(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    async def main() -> None:
        async with Node("p", dtype="float16") as p, Node("d", dtype="float16") as d:
            await asyncio.gather(*(n.endpoint.codec.wait_loaded() for n in (p, d)))
            monkeypatch.setattr(PackingRule, "wants", lambda *_: True)
            victim = d if where == "decode_into" else p
            if where == "dial":
                monkeypatch.setattr(PeerLink, "dial", fails)
            elif where == "timer":
                monkeypatch.setattr(victim.endpoint._intake, "report_progress", fails)
                victim.endpoint._loop.call_soon(victim.endpoint._on_timer)
            else:
                monkeypatch.setattr(f"kernels.codec.{where}", fails)
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(TOKENS, 1).astype("float16"))
            d.receive(transfer, "p", TOKENS, None)
            await broken(victim)
            await p.endpoint.close()
            await d.endpoint.close()
            assert (p.broken, d.broken) == (int(victim is p), int(victim is d)), "said once"
            for node in (p, d):
                assert node.ends[transfer].done(), "the leg knows that its transfer is over"

    run(main())
    assert "OfAllThingsError" in caplog.text


@pytest.mark.parametrize("machine", [Sender, Receiver])
def test_a_machine_that_raises_at_everything_is_closed_all_the_same(
    run: Run, monkeypatch: pytest.MonkeyPatch, machine: type
) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(TOKENS, 1))
            d.imports_held = True
            d.receive(transfer, "p", TOKENS, None)
            await d.first_import.wait()
            monkeypatch.setattr(machine, "handle", fails)
            victim = p if machine is Sender else d
            victim.endpoint._on_timer()
            assert victim.broken == 1
            d.imports_held = False
            d.import_held()

    run(main())


def test_an_endpoint_without_trouble_says_nothing(run: Run) -> None:
    async def main() -> None:
        async with Node("p") as p, Node("d") as d:
            transfer = os.urandom(16)
            p.send(transfer, d, cache_of(TOKENS, 1), identity="another")
            d.receive(transfer, "p", TOKENS, None)
            assert isinstance(await p.ends[transfer], MeshError)
            d.endpoint.cancel(transfer, "cancelled", "")
            assert_at_rest(p, d)
        assert p.broken == d.broken == 0

    run(main())
