"""Whole nodes under load and under attack: whatever happens, a node answers and comes to rest."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import psutil
import pytest

from pop_node import agent as agent_module
from pop_node.legs import live_legs
from pop_node.store.store import Store
from registry.client import Registry
from tests.pop_node.hand_router import MODEL, WAIT_S, HandRouter, a_submit
from tests.pop_node.node_mesh import lonely_node, tiny_mesh, write_store
from wire.messages import (
    ChatInput,
    ChatTurn,
    Draining,
    Failed,
    Finished,
    Refused,
    TextInput,
    TokensInput,
    Transfer,
)

ANY_TIMES = (ANY, ANY)


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return write_store(tmp_path_factory.mktemp("tiny-store"))


async def test_a_split_answer_is_the_whole_answer(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        whole = mesh.whole("a")
        assert (await a.ending(whole)).reason == "length"
        answer = mesh.answer(whole)
        assert len(answer) == 8

        split = mesh.split("a", "b")
        handed_over = await a.ending(split)
        assert isinstance(handed_over, Finished)
        assert handed_over.reason == "handoff"
        assert (await b.ending(split)).reason == "length"
        assert mesh.answer(split) == answer
        assert sorted(a.tokens[split]) == [0]

        # The request goes on elsewhere after three tokens that the client has read.
        again = mesh.split("b", "a", forced_ids=answer[:3], attempt=2)
        ends = [await mesh.routers["b"].ending(again, 20.0), await a.ending(again, 20.0)]
        assert [end.reason for end in ends] == ["handoff", "length"]
        assert mesh.answer(again) == answer[3:]
        await mesh.at_rest()
        assert a.load.engines[0].model == MODEL


async def test_short_prompts_are_measured(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a = mesh.routers["a"]
        for number in range(8):  # 160 tokens, all different from the first on
            await a.ending(mesh.whole("a", input=TextInput(f"{number}wenty tokens, a few")))
        await mesh.at_rest()
        engine = a.load.engines[0]
        assert engine.prefill_tokens_per_s > 0
        assert engine.decode_step_ms > 0


async def ended_in_vain(router: HandRouter, stream: int) -> bool:
    """The decode leg of an answer that its prefill node finished hears of it from the router or,
    if a link to it was made already, from that node."""
    ending = await router.ending(stream)
    assert stream not in router.tokens
    if isinstance(ending, Finished):
        return ending.reason == "cancelled"
    return ending.code == "answer_complete"


async def test_an_answer_that_ends_at_its_first_token(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        stream = mesh.split("a", "b", max_tokens=1)
        assert await a.ending(stream) == Finished(stream, "length", 1, *ANY_TIMES, None)
        mesh.cancel(stream, "b")
        assert await ended_in_vain(b, stream)
        first = mesh.answer(stream)
        # The stop string is the text of the first token.
        text = a.text[stream].decode()
        stream = mesh.split("a", "b", stop=[text])
        assert (await a.ending(stream)).reason == "stop"
        assert a.text.get(stream, b"") == b""
        assert mesh.answer(stream) == first
        mesh.cancel(stream, "b")
        assert await ended_in_vain(b, stream)
        await mesh.at_rest()


async def test_a_stop_string_across_the_hand_over(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        whole = mesh.whole("a")
        await a.ending(whole)
        text = json.loads(b'"' + a.text[whole] + b'"')
        stream = mesh.split("a", "b", stop=[text[:3]])
        assert (await a.ending(stream)).reason == "handoff"
        ending = await b.ending(stream)
        assert isinstance(ending, Finished)
        assert ending.reason == "stop"
        assert 1 < ending.completion_tokens < 8
        assert a.text[stream] + b.text[stream] == b""
        # One that does not come: what the first node held back is told by the second.
        stream = mesh.split("a", "b", stop=[text[:2] + "never"])
        assert (await b.ending(stream)).reason == "length"
        assert json.loads(b'"' + a.text[stream] + b.text[stream] + b'"') == text
        await mesh.at_rest()


NONSENSE: list[tuple[str, dict[str, Any]]] = [
    ("no transfer", {"transfer": None}),
    ("short transfer id", {"transfer": Transfer(b"x", "b", "127.0.0.1:1")}),
    ("unknown peer", {"transfer": Transfer(b"u" * 16, "nobody", "127.0.0.1:1")}),
    ("no address", {"transfer": Transfer(b"n" * 16, "b", "")}),
    ("nonsense address", {"transfer": Transfer(b"w" * 16, "b", "a..b \0:99999999999")}),
    ("remote address", {"transfer": Transfer(b"r" * 16, "b", "192.0.2.1:1")}),
    ("endless peer", {"transfer": Transfer(b"e" * 16, "b" * 100_000, "127.0.0.1:1")}),
    ("negative forced id", {"forced_ids": [-1]}),
    ("enormous forced id", {"forced_ids": [2**60]}),
    ("unknown forced id", {"forced_ids": [100_000]}),
    ("too many forced ids", {"forced_ids": [5] * 300_000}),
    ("no tokens wanted", {"max_tokens": 0}),
    ("fewer than none", {"max_tokens": -5}),
    ("no such seed", {"seed": -1}),
    ("no such temperature", {"temperature": math.nan}),
    ("no such top_p", {"top_p": 0.0}),
    ("empty stop string", {"stop": [""]}),
    ("endless stop string", {"stop": ["s" * 100_000]}),
    ("endless tenant", {"tenant": "t" * 1_000_000}),
    ("no chain", {"chain": [b"short"]}),
    ("endless chain", {"chain": [bytes(16)] * 70_000}),
    ("no model", {"model": "other"}),
    ("no prompt", {"input": TextInput("")}),
    ("no template", {"input": ChatInput([ChatTurn("user", "hi")])}),
    ("endless prompt", {"input": TextInput("long " * 100_000)}),
    ("no such token", {"input": TokensInput([5, -7])}),
    ("no time", {"deadline_remaining_ms": 0}),
    ("less than no time", {"deadline_remaining_ms": -(2**40)}),
]


async def test_nonsense_costs_no_more_than_its_own_request(
    tiny_store: Store, tmp_path: Path
) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a, sent = mesh.routers["a"], list[tuple[str, int]]()
        for number, (what, changes) in enumerate(NONSENSE):
            for leg in ("prefill", "decode", "both"):
                stream = mesh.stream()
                fields = dict(changes)
                if leg != "both":
                    name = f"{number}{leg}".encode().ljust(16)
                    fields = {"transfer": Transfer(name, "b", "127.0.0.1:1")} | fields
                    if what in ("no address", "remote address"):
                        name = leg.encode().ljust(16)
                        address = fields["transfer"].address
                        fields["transfer"] = Transfer(name + b"", "b", address)
                elif "transfer" in fields:
                    continue
                a.send(a_submit(stream, leg, **fields))
                sent.append((f"{what} ({leg})", stream))
                if leg == "both":  # the others may wait for a peer that never comes: together
                    await a.ending(stream)
        for what, stream in sent:
            ending = await a.ending(stream)
            assert isinstance(ending, Refused | Failed), f"{what}: {ending}"
            assert ending.code != "overloaded", what
        mesh.cancel(10**9, "a")
        assert (await a.ending(mesh.whole("a"))).reason == "length"
        await mesh.at_rest()


async def test_cancels_and_deadlines_at_any_moment(tiny_store: Store, tmp_path: Path) -> None:
    rng = random.Random(11)
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        for _ in range(60):
            prompt = TextInput("".join(rng.choices("abcdefgh ", k=rng.randint(1, 300))))
            changes: dict[str, Any] = {"input": prompt, "max_tokens": rng.randint(1, 30)}
            if rng.random() < 0.3:
                changes["deadline_remaining_ms"] = rng.randint(0, 60)
            if rng.random() < 0.3:
                changes["forced_ids"] = [5] * rng.randint(0, changes["max_tokens"] - 1)
            prefill, decode = rng.sample(["a", "b"], 2)
            stream = mesh.split(prefill, decode, **changes)
            await asyncio.sleep(rng.random() * 0.03)  # any moment will do
            for node in rng.sample(["a", "b"], rng.randint(0, 2)):
                mesh.cancel(stream, node)
        for name, router in mesh.routers.items():
            for stream in range(1, 61):
                await router.ending(stream)
            assert all(len(endings) == 1 for endings in router.endings.values()), name
        await mesh.at_rest()
        # A router that goes away leaves nothing either.
        for _ in range(5):
            mesh.split("a", "b", max_tokens=300)
        await mesh.routers["a"].close()
        await mesh.greet("a")
        await mesh.at_rest()


async def test_an_engine_killed_in_mid_stream_comes_back(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        node, offer = mesh.nodes["b"], b.hello.models[0]
        assert offer.kv_address == node.kv_address
        streams = [mesh.split("a", "b", max_tokens=400) for _ in range(4)]
        streams += [mesh.split("b", "a", max_tokens=400) for _ in range(2)]
        await b.until(lambda: len(b.tokens.get(streams[0], {})) > 5)
        pid = node.engine["pid"]
        os.kill(pid, signal.SIGKILL)
        for stream in streams[:4]:
            ending = await b.ending(stream, wait_s=5.0)
            assert isinstance(ending, Failed)
            assert (ending.code, ending.retryable) == ("engine_died", True)
        # A router that comes now hears what is served here all the same.
        late = await mesh.greet("b")
        assert late.hello.models == [offer]
        refused = await late.ending(mesh.whole("b"))
        assert isinstance(refused, Refused)
        assert (refused.code, refused.retryable) == ("not_ready", True)
        await late.until(lambda: late.load.engines[0].ready)
        assert node.engine["pid"] != pid
        assert node.kv_address == offer.kv_address
        whole, split = mesh.whole("a"), mesh.split("a", "b")
        assert (await a.ending(whole)).reason == "length"
        assert (await late.ending(split)).reason == "length"
        assert mesh.answer(split) == mesh.answer(whole)
        for stream in streams:
            mesh.cancel(stream, "a")
            await a.ending(stream)
        await mesh.at_rest()
        async with Registry.connect(mesh.url) as registry:
            found = (await registry.services("popmesh-node")).entries
        assert sorted(each.meta["name"] for each in found) == ["a", "b"]


async def test_a_decode_node_hears_at_once_that_the_prefill_engine_died(
    tiny_store: Store, tmp_path: Path
) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a", "b") as mesh:
        a, b = mesh.routers["a"], mesh.routers["b"]
        await b.ending(mesh.split("a", "b"))  # there is a link between them
        pid = mesh.nodes["a"].engine["pid"]
        os.kill(pid, signal.SIGSTOP)
        stream = mesh.split("a", "b")
        await b.until(lambda: b.accepted.get(stream))
        await a.until(lambda: a.load.engines[0].transfers_out)
        os.kill(pid, signal.SIGKILL)
        for router in (a, b):
            ending = await router.ending(stream, wait_s=5.0)
            assert isinstance(ending, Failed)
            assert (ending.code, ending.retryable) == ("engine_died", True)
        await mesh.at_rest()


async def test_an_engine_that_hangs_is_replaced(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_legs, "LET_GO_S", 0.2)
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a = mesh.routers["a"]
        stream = mesh.whole("a", max_tokens=400)
        await a.until(lambda: a.tokens.get(stream))
        pid = mesh.nodes["a"].engine["pid"]
        os.kill(pid, signal.SIGSTOP)
        mesh.cancel(stream, "a")
        assert (await a.ending(stream)).reason == "cancelled"
        await a.until(lambda: not a.load.engines[0].ready)
        await a.until(lambda: a.load.engines[0].ready)
        assert mesh.nodes["a"].engine["pid"] != pid
        await a.ending(mesh.whole("a"))
        await mesh.at_rest()


async def test_a_drain_lets_streams_finish(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a, node = mesh.routers["a"], mesh.nodes["a"]
        stream = mesh.whole("a", max_tokens=100)
        await a.until(lambda: a.tokens.get(stream))
        node.agent.drain()
        refused = await a.ending(mesh.whole("a"))
        assert isinstance(refused, Refused)
        assert (refused.code, refused.retryable) == ("draining", True)
        assert (await a.ending(stream)).reason == "length"
        assert len(mesh.answer(stream)) == 100
        assert any(isinstance(message, Draining) for message in a.said)


async def test_a_second_signal_ends_at_once(tiny_store: Store, tmp_path: Path) -> None:
    async with tiny_mesh(tiny_store, tmp_path, "a") as mesh:
        a, node = mesh.routers["a"], mesh.nodes["a"]
        stream = mesh.whole("a", max_tokens=400)
        await a.until(lambda: a.tokens.get(stream))
        node.agent.drain()
        node.agent.drain()
        ending = await a.ending(stream)
        assert isinstance(ending, Failed)
        assert (ending.code, ending.retryable) == ("draining", True)
        node.agent.drain()


async def test_a_drain_while_the_doors_open(
    tiny_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lonely_node(tiny_store, tmp_path) as (node, registry):
        whole = agent_module.link_factory

        def told_to_go(agent: Any) -> Any:
            node.agent.drain()
            return whole(agent)

        monkeypatch.setattr(agent_module, "link_factory", told_to_go)
        async with asyncio.timeout(WAIT_S):
            await node.run()
        assert node.status["state"] == "stopped"
        assert (await registry.services("popmesh-node")).entries == ()


async def test_a_drain_while_the_engine_starts(tiny_store: Store, tmp_path: Path) -> None:
    async with lonely_node(tiny_store, tmp_path) as (node, _), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(node.run())
        await node.made.wait()
        node.agent.drain()
        async with asyncio.timeout(WAIT_S):
            await running
        assert node.engine["pid"] is None
        assert not psutil.Process().children(recursive=True)


async def test_a_status_file_that_cannot_be_written(tiny_store: Store, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    async with tiny_mesh(tiny_store, gone, "a") as mesh:
        shutil.rmtree(gone)
        os.kill(psutil.Process().children()[0].pid, signal.SIGKILL)
        a = mesh.routers["a"]
        await a.until(lambda: not a.load.engines[0].ready)
        await a.until(lambda: a.load.engines[0].ready)
        assert (await a.ending(mesh.whole("a"))).reason == "length"
