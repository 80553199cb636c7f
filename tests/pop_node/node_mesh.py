"""Real agents with real engines and a tiny Llama, around a router that is spoken by hand."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pop_node.agent import Agent, AgentConfig
from pop_node.store.store import Store
from registry.client import Registry
from registry.embedded import EmbeddedRegistry
from tests.pop_node.engine.tiny_llama import VOCABULARY, write_tiny_llama
from tests.pop_node.hand_router import MODEL, WAIT_S, HandRouter, a_submit
from topology.model import Address, Model, Node, Position, Site, Topology
from wire.address import Dialer, parse_address
from wire.messages import Cancel, Hello, Retarget, Transfer

MESH = "tiny"
KV_TOKENS = 2048


def write_store(root: Path) -> Store:
    """A store with the tiny Llama and a tokenizer that has one token per byte."""
    source = write_tiny_llama(root / "source")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - 3]
    tokens = ["<unk>", "<s>", "</s>", *letters]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    store = Store(root / "store")
    store.add(str(source), MODEL, "float32", lambda phase, done, total: None)
    return store


def topology(*names: str, detection_s: float = 30.0) -> Topology:
    """One site, these nodes, loopback addresses chosen by the kernel. Engines are given up late, as
    these tests run on machines with other things to do."""
    anywhere = Address("127.0.0.1", 0)
    nodes = {
        name: Node(
            name=name,
            site="ams",
            roles=frozenset({"prefill", "decode"}),
            models=(MODEL,),
            mesh=anywhere,
            kv=anywhere,
            backend="reference",
            threads=1,
            kv_tokens=KV_TOKENS,
        )
        for name in names
    }
    sites = {"ams": Site("ams", Position(52.3, 4.8), "eu")}
    model = Model(MODEL, dtype="float32")
    return Topology(MESH, {MODEL: model}, sites, nodes, {}, detection_s=detection_s)


class RunningNode:
    """An agent in this process, its engine in one of its own."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.name = config.node.name
        self.address = ""
        self.agent: Agent
        self.made = asyncio.Event()
        self.open = asyncio.Event()

    async def run(self) -> None:
        """As ``pop_node.agent.serve`` does, without the signals of the process."""
        registry = Registry.connect(self.config.registry_url)
        async with registry, asyncio.TaskGroup() as tasks:
            self.agent = Agent(self.config, registry, tasks)
            self.agent.on_doors_open = self._opened
            self.made.set()
            await self.agent.run()

    def _opened(self, address: str) -> None:
        self.address = address
        self.open.set()

    @property
    def status(self) -> dict[str, Any]:
        """What the status file says."""
        assert self.config.status_file is not None
        status: dict[str, Any] = json.loads(self.config.status_file.read_text())
        return status

    @property
    def engine(self) -> dict[str, Any]:
        engine: dict[str, Any] = self.status["engines"][0]
        return engine

    @property
    def kv_address(self) -> str:
        address: str = self.status["addresses"]["kv"][MODEL]
        return address


class TinyMesh:
    """Agents, their registry and one hand-spoken router."""

    def __init__(self, url: str, nodes: dict[str, RunningNode], tasks: asyncio.TaskGroup) -> None:
        self.url = url
        self.nodes = nodes
        self._tasks = tasks
        self._background: list[asyncio.Task[None]] = []
        self.routers: dict[str, HandRouter] = {}
        self._all_routers: list[HandRouter] = []
        self._streams = itertools.count(1)

    async def greet(self, name: str, version: int = 2) -> HandRouter:
        """A fresh link to a node, once the node has said Hello and its load."""
        host, port = parse_address(self.nodes[name].address)
        router = HandRouter(*await asyncio.open_connection(host, port))
        self._all_routers.append(router)
        self._background.append(self._tasks.create_task(router.read()))
        self._background.append(self._tasks.create_task(router.ping()))
        router.send(Hello(1, version, MESH, "router", "hand", "ams", "i1", [], []))
        await router.until(lambda: router.hello and router.load)
        self.routers[name] = router
        return router

    def stream(self) -> int:
        return next(self._streams)

    def split(self, prefill: str, decode: str, **changes: Any) -> int:
        """Submit both legs of one request; returns its stream number."""
        stream = self.stream()
        transfer = stream.to_bytes(16, "big")
        to_decode = Transfer(transfer, decode, self.nodes[decode].kv_address)
        from_prefill = Transfer(transfer, prefill, "")
        legs = [(prefill, "prefill", to_decode), (decode, "decode", from_prefill)]
        for node, leg, plan in legs:
            self.routers[node].send(a_submit(stream, leg, transfer=plan, **changes))
        return stream

    def retarget(self, stream: int, prefill: str, decode: str, **changes: Any) -> None:
        """Give the KV of a running prefill leg to another node, as attempt 2."""
        attempt = 2
        transfer = (1000 * attempt + stream).to_bytes(16, "big")
        to_decode = Transfer(transfer, decode, self.nodes[decode].kv_address)
        from_prefill = Transfer(transfer, prefill, "")
        leg = a_submit(stream, "decode", transfer=from_prefill, attempt=attempt, **changes)
        self.routers[decode].send(leg)
        self.routers[prefill].send(Retarget(stream, attempt, to_decode))

    def whole(self, node: str, **changes: Any) -> int:
        """Submit a request to one node; returns its stream number."""
        stream = self.stream()
        self.routers[node].send(a_submit(stream, "both", **changes))
        return stream

    def cancel(self, stream: int, *nodes: str) -> None:
        for node in nodes:
            self.routers[node].send(Cancel(stream))

    def answer(self, stream: int) -> list[int]:
        """Tokens of a stream from all nodes, by index without holes."""
        tokens: dict[int, int] = {}
        for router in self.routers.values():
            got = router.tokens.get(stream, {})
            assert not tokens.keys() & got.keys(), "two nodes sent the same index"
            tokens |= got
        first = min(tokens, default=0)
        assert sorted(tokens) == list(range(first, first + len(tokens))), "an index is missing"
        return [tokens[index] for index in sorted(tokens)]

    async def at_rest(self) -> None:
        for router in self.routers.values():
            await router.at_rest()

    async def close(self) -> None:
        for router in self._all_routers:
            await router.close()
        for task in self._background:
            task.cancel()


@asynccontextmanager
async def tiny_mesh(
    store: Store,
    directory: Path,
    *names: str,
    detection_s: float = 30.0,
    plan: Topology | None = None,
    version: int = 2,
) -> AsyncIterator[TinyMesh]:
    """Nodes that serve, each with one link from the router; all drained at the end.

    ``plan``: nodes ``names`` of another topology, which may have stores of their own.
    """
    registry = EmbeddedRegistry()
    url = await registry.start()
    plan = plan or topology(*names, detection_s=detection_s)
    nodes = {
        name: RunningNode(
            AgentConfig(
                plan.nodes[name],
                plan,
                url,
                plan.nodes[name].store or store.root,
                Dialer(),
                None,
                directory / f"{name}.json",
            )
        )
        for name in names
    }
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(node.run(), name=name) for name, node in nodes.items()]
            mesh = TinyMesh(url, nodes, tasks)
            async with asyncio.timeout(WAIT_S):
                for node in nodes.values():
                    await node.open.wait()
            for name in names:
                await mesh.greet(name, version)
            try:
                yield mesh
            finally:
                await mesh.close()
            for node in nodes.values():
                node.agent.drain()
            async with asyncio.timeout(WAIT_S):
                await asyncio.gather(*running)
    finally:
        await registry.stop()


@asynccontextmanager
async def lonely_node(store: Store, directory: Path) -> AsyncIterator[tuple[RunningNode, Registry]]:
    """A node that was not started yet, and its registry."""
    server = EmbeddedRegistry()
    url = await server.start()
    plan = topology("a")
    config = AgentConfig(
        plan.nodes["a"], plan, url, store.root, Dialer(), None, directory / "a.json"
    )
    try:
        async with Registry.connect(url) as registry:
            yield RunningNode(config), registry
    finally:
        await server.stop()
