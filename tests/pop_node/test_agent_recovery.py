"""Agents with real engines: a hand-over that breaks costs what broke, and nothing else."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from pop_node.engine.config import EngineConfig
from pop_node.hosting import host_maker
from pop_node.hosting.generation import Generation
from pop_node.kv_stream.link import PeerLink
from pop_node.kv_stream.spec import Piece
from pop_node.legs import live_legs
from pop_node.store.store import Store
from tests.pop_node.hand_router import MODEL
from tests.pop_node.node_mesh import TinyMesh, tiny_mesh, write_store
from wire.messages import CacheDelta, Failed, Finished, TextInput
from wire.prefix import SPAN_BYTES, canonical_bytes, prefix_chain

LONG = TextInput("a long prompt that takes many steps to compute, as there are many chunks. " * 6)
BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("tiny-store"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt takes a dozen steps."""
    monkeypatch.setattr(
        host_maker, "EngineConfig", partial(EngineConfig, token_budget=32, max_sequences=8)
    )


def pid_of(mesh: TinyMesh, name: str) -> int:
    pid: int = mesh.nodes[name].engine["pid"]
    return pid


async def test_a_dead_decode_node_costs_no_prefill(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b", "c") as mesh:
        a, b, c = (mesh.routers[name] for name in "abc")
        os.kill(pid_of(mesh, "b"), signal.SIGSTOP)
        stream = mesh.split("a", "b", input=LONG, max_tokens=20)
        await a.until(lambda: a.tokens.get(stream))
        os.kill(pid_of(mesh, "b"), signal.SIGKILL)
        await a.until(lambda: a.detached.get(stream), wait_s=5.0)
        assert (a.detached[stream].attempt, a.detached[stream].code) == (1, "engine_died")
        assert isinstance(await b.ending(stream), Failed)
        mesh.retarget(stream, "a", "c", input=LONG, max_tokens=20)
        assert (await c.ending(stream)).reason == "length"
        handed = await a.ending(stream)
        assert isinstance(handed, Finished)
        assert handed.reason == "handoff"
        assert list(a.tokens[stream]) == [0], "the prefill was done once"
        whole = mesh.whole("a", input=LONG, max_tokens=20, tenant="other")
        await a.ending(whole)
        assert mesh.answer(stream) == mesh.answer(whole)
        await mesh.at_rest()


@pytest.mark.parametrize("state", ["preparing", "queued", "running", "handoff", "detached"])
async def test_a_prefill_leg_is_retargeted_in_any_state(
    tiny_store: Store, tmp_path: Path, state: str
) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        whole = mesh.whole("a", input=LONG, max_tokens=20, tenant="other")
        await a.ending(whole)
        pid, other = pid_of(mesh, "a"), pid_of(mesh, "b")
        if state == "queued":
            os.kill(pid, signal.SIGSTOP)
        if state in ("handoff", "detached"):
            os.kill(other, signal.SIGSTOP)  # the first decode leg gets nowhere
        stream = mesh.split("a", "b", input=LONG, max_tokens=20)
        if state == "queued":
            await a.until(lambda: a.load.engines[0].transfers_out)
        if state == "running":
            await a.until(lambda: a.accepted.get(stream))
        if state in ("handoff", "detached"):
            await a.until(lambda: a.tokens.get(stream))
        mesh.cancel(stream, "b")
        await b.ending(stream)
        if state == "detached":
            await a.until(lambda: a.detached.get(stream))
        del b.endings[stream]
        mesh.retarget(stream, "a", "b", input=LONG, max_tokens=20)
        for frozen in (pid, other):
            os.kill(frozen, signal.SIGCONT)
        assert (await b.ending(stream)).reason == "length"
        assert (await a.ending(stream)).reason == "handoff"
        assert mesh.answer(stream) == mesh.answer(whole)
        await mesh.at_rest()


async def test_a_detached_leg_waits_only_so_long(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_legs, "RETARGET_WAIT_S", 0.2)
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a = mesh.routers["a"]
        os.kill(pid_of(mesh, "b"), signal.SIGSTOP)
        stream = mesh.split("a", "b")
        await a.until(lambda: a.tokens.get(stream))
        mesh.cancel(stream, "b")
        ending = await a.ending(stream)
        assert isinstance(ending, Failed)
        assert (ending.code, ending.retryable) == (a.detached[stream].code, True)
        os.kill(pid_of(mesh, "b"), signal.SIGCONT)
        await mesh.at_rest()


@pytest.mark.parametrize("how", ["prefill dies", "router cancels"])
async def test_what_arrived_of_a_broken_hand_over_is_not_computed_again(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        b, pid = mesh.routers["b"], pid_of(mesh, "a")
        taken_in = Generation.on_import

        def freeze_in_mid_transfer(
            self: Generation, transfer: bytes, slot: int, piece: Piece
        ) -> None:
            taken_in(self, transfer, slot, piece)
            if self.endpoint._receiver.kept_tokens(transfer) >= 4 * BLOCK_TOKENS:
                os.kill(pid, signal.SIGSTOP)

        monkeypatch.setattr(Generation, "on_import", freeze_in_mid_transfer)
        chain = prefix_chain(bytes(32), canonical_bytes(LONG))
        stream = mesh.split("a", "b", input=LONG, max_tokens=20, chain=chain)
        endpoint = mesh.nodes["b"].agent._residents.hosts[MODEL]._generation.endpoint
        await b.until(lambda: b.accepted.get(stream) and endpoint.statistics().received_bytes)
        await b.until(lambda: endpoint._receiver.kept_tokens(stream.to_bytes(16, "big")))
        if how == "prefill dies":
            os.kill(pid, signal.SIGKILL)
        else:
            mesh.cancel(stream, "b")
        ending = await b.ending(stream)
        assert isinstance(ending, Failed if how == "prefill dies" else Finished)
        kept = ending.kept_tokens
        assert kept >= 4 * BLOCK_TOKENS
        assert kept % BLOCK_TOKENS == 0
        rest = mesh.whole("b", input=LONG, max_tokens=20)
        await b.ending(rest)
        fresh = mesh.whole("b", input=LONG, max_tokens=20, tenant="other")
        await b.ending(fresh)
        assert b.accepted[rest].cached_tokens == kept
        assert b.accepted[fresh].cached_tokens == 0
        assert mesh.answer(rest) == mesh.answer(fresh)
        spans = {
            value: tokens for m in b.said if isinstance(m, CacheDelta) for value, tokens in m.added
        }
        assert max(spans.get(value, 0) for value in chain) <= kept
        assert spans.get(chain[0], 0) == (SPAN_BYTES if kept >= SPAN_BYTES else 0)
        if how == "router cancels":
            os.kill(pid, signal.SIGCONT)
        await mesh.at_rest()


async def test_a_node_whose_kv_stream_breaks_begins_again_and_hands_over(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b, pid = mesh.routers["a"], mesh.routers["b"], pid_of(mesh, "a")

        async def dial(self: PeerLink, *_: object) -> None:
            monkeypatch.undo()
            raise LookupError("of all things")

        monkeypatch.setattr(PeerLink, "dial", dial)
        stream = mesh.split("a", "b", input=LONG, max_tokens=20)
        ending = await a.ending(stream)
        assert isinstance(ending, Failed)
        assert (ending.code, ending.retryable) == ("engine_died", True)
        mesh.cancel(stream, "b")
        await b.ending(stream)
        await a.until(
            lambda: mesh.nodes["a"].agent._residents.hosts[MODEL].ready and pid_of(mesh, "a") != pid
        )
        again = mesh.split("a", "b", input=LONG, max_tokens=20)
        assert (await b.ending(again)).reason == "length"
        assert (await a.ending(again)).reason == "handoff"
        await mesh.at_rest()
