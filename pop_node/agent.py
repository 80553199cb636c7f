"""The node's agent: networking, registration and supervision; never imports torch.

Composes the pure lifecycle with its shells: one ``ModelHost`` per model, the listener for routers,
the registry keeper, the load pushes. Everything that decides lives elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import assert_never

from pop_node import lifecycle
from pop_node.authorization import Authorization
from pop_node.drills.drills import Drills
from pop_node.engine.config import EngineConfig
from pop_node.hosting.generation import HostSettings
from pop_node.hosting.model_host import ModelHost
from pop_node.legs.leg import refusal
from pop_node.load_push import LoadPush
from pop_node.router_link import RouterLink, link_factory
from pop_node.status_file import write_status
from pop_node.store.store import Bundle, Store
from pop_node.text.tokenizer import TextCodec
from registry.client import Registration, Registry
from registry.keeper import Keeper
from topology.model import Address, Node, Topology
from wire.address import Dialer, format_address
from wire.errors import ConfigError, OverloadError, RequestError
from wire.messages import (
    MAX_VERSION,
    MIN_VERSION,
    Attach,
    Draining,
    Drill,
    Hello,
    Retarget,
    Submit,
)
from wire.messages import Role as WireRole
from wire.tls import Credentials, require_tls

log = logging.getLogger(__name__)

SERVICE = "popmesh-node"
REGISTRY_TTL_S = 10.0
DEREGISTER_AFTER_S = 600.0
DRAIN_TIMEOUT_S = 30.0
TEXT_THREADS = 2


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """All that one node process is told. ``drills`` lets routers ask it to harm itself."""

    node: Node
    topology: Topology
    registry_url: str
    store: Path
    dialer: Dialer
    credentials: Credentials | None = None
    status_file: Path | None = None
    drills: bool = False


class Agent:
    """One running node; built and run by ``serve``."""

    def __init__(self, config: AgentConfig, registry: Registry, tasks: asyncio.TaskGroup) -> None:
        self._config = config
        self._node = config.node
        self._tasks = tasks
        self._authorization = Authorization(config.topology, config.credentials)
        self._incarnation = secrets.token_hex(8)
        self._executor = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="text")
        self._links: set[RouterLink] = set()
        self._stopped = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._mesh_address = ""
        self._registry = registry
        self._keeper: Keeper | None = None
        self._lifecycle = lifecycle.NodeLifecycle(self._node.models)
        self._hosts: dict[str, ModelHost] = {}
        self._push = LoadPush(self._hosts, self._links, lambda: self._lifecycle.state == "draining")
        for position, name in enumerate(self._node.models):
            self._hosts[name] = self._make_host(position, name)
        self._drills = Drills(config.drills, self._engine_pids, tasks)
        self.on_doors_open: Callable[[str], None] | None = None

    def _make_host(self, position: int, name: str) -> ModelHost:
        config, node = self._config, self._node
        model = config.topology.models[name]
        bundle = Store(config.store).get(name)
        _check_bundle(bundle, model.digest, name)
        codec = TextCodec.load(bundle.path)
        credentials = config.credentials
        settings = HostSettings(
            mesh=config.topology.mesh,
            node=node.name,
            site=node.site,
            incarnation=self._incarnation,
            model=name,
            identity=bundle.manifest.identity,
            engine=EngineConfig(
                model_dir=bundle.path,
                dtype=model.dtype,
                backend=node.backend,
                threads=node.threads,
                kv_tokens=node.kv_tokens,
                context_tokens=model.context_tokens,
                batch_invariant=node.batch_invariant,
            ),
            kv_host=node.kv.host,
            kv_port=node.kv.port + position if node.kv.port else 0,
            dialer=config.dialer,
            server_ssl=credentials.server_context() if credentials else None,
            client_ssl=credentials.client_context() if credentials else None,
            authorize_peer=self._authorization.check_node,
            detection_s=config.topology.detection_s,
        )
        return ModelHost(
            settings,
            codec,
            self._executor,
            on_ready=lambda model: self._apply(lifecycle.EngineReady(model)),
            on_exited=lambda model: self._apply(lifecycle.EngineExited(model)),
            on_load_changed=self._push.soon,
            on_legs=self._legs_changed,
        )

    # ---- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until drained; must run inside the task group it was given."""
        push = self._tasks.create_task(self._push.run())
        try:
            self._apply(lifecycle.Started())
            await self._stopped.wait()
        finally:
            self._stopped.set()
            push.cancel()
            await self._close()

    async def _close(self) -> None:
        """Deregister first, so that nobody is sent here any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._keeper is not None:
            await self._keeper.close()
        if self._server is not None:
            self._server.close()
        for host in self._hosts.values():
            await host.stop()
        for link in list(self._links):
            link.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._write_status()

    def drain(self) -> None:
        """Accept no new work, finish what runs, then stop; again to stop at once."""
        timeout_s = DRAIN_TIMEOUT_S if self._lifecycle.state == "serving" else 0.0
        if self._lifecycle.state == "draining":
            self._apply(lifecycle.StreamsLeft(0))
        self._apply(lifecycle.DrainRequested(timeout_s))
        self._apply(lifecycle.StreamsLeft(self._num_legs()))

    def _apply(self, event: lifecycle.Event) -> None:
        loop = asyncio.get_running_loop()
        for effect in self._lifecycle.handle(event, loop.time()):
            match effect:
                case lifecycle.StartEngine(model):
                    self._tasks.create_task(self._start_engine(model))
                case lifecycle.EndEngine(model):
                    self._hosts[model].end_engine()
                case lifecycle.OpenDoors():
                    self._tasks.create_task(self._open_doors())
                case lifecycle.AnnounceDrain():
                    self._tasks.create_task(self._announce_drain())
                case lifecycle.Shutdown():
                    self._stopped.set()
                case _:
                    assert_never(effect)
        self._arm_timer(loop)
        self._write_status()
        if isinstance(event, lifecycle.EngineReady):
            self._push.soon()

    async def _start_engine(self, model: str) -> None:
        await self._hosts[model].start(self._tasks)
        self._write_status()

    def _arm_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._lifecycle.next_deadline()
        if at is not None:
            self._timer = loop.call_at(at, self._apply, lifecycle.Tick())

    async def _open_doors(self) -> None:
        """Listen for routers and register: a token was produced by every engine.

        Raises ``ConfigError`` when the address is taken.
        """
        node, credentials = self._node, self._config.credentials
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                link_factory(self),
                node.mesh.host,
                node.mesh.port,
                ssl=credentials.server_context() if credentials else None,
            )
        except OSError as exc:
            raise ConfigError(f"cannot listen on {node.mesh}: {exc}") from exc
        if self._stopped.is_set():  # told to go before the doors were open
            server.close()
            return
        self._server = server
        host, port = server.sockets[0].getsockname()[:2]
        self._mesh_address = format_address(host, port)
        self._keeper = Keeper(
            self._registry,
            Registration(
                service_id=f"{self._config.topology.mesh}:{node.name}",
                service=SERVICE,
                address=host,
                port=port,
                meta=self._meta(),
                ttl_s=REGISTRY_TTL_S,
                deregister_after_s=DEREGISTER_AFTER_S,
            ),
        )
        self._tasks.create_task(self._keeper.run())
        self._write_status()
        log.info("node %s at %s serves routers on %s", node.name, node.site, self._mesh_address)
        if self.on_doors_open is not None:
            self.on_doors_open(self._mesh_address)

    async def _announce_drain(self) -> None:
        for link in self._links:
            link.say(Draining(self._num_legs()))
        if self._keeper is not None:
            await self._keeper.set_meta(self._meta())

    def _meta(self) -> dict[str, str]:
        return {
            "mesh": self._config.topology.mesh,
            "name": self._node.name,
            "site": self._node.site,
            "incarnation": self._incarnation,
            "drain": "0" if self._lifecycle.state == "serving" else "1",
        }

    def _num_legs(self) -> int:
        return sum(host.num_legs for host in self._hosts.values())

    def _legs_changed(self) -> None:
        if self._lifecycle.state == "draining":
            self._apply(lifecycle.StreamsLeft(self._num_legs()))

    # ---- for router links ----------------------------------------------------------------------

    def hello(self) -> Hello:
        """Who this node is and what it serves."""
        offers = [host.facts.offer for host in self._hosts.values()]
        roles: list[WireRole] = sorted(self._node.roles)
        return Hello(
            min_version=MIN_VERSION,
            max_version=MAX_VERSION,
            mesh=self._config.topology.mesh,
            kind="node",
            name=self._node.name,
            site=self._node.site,
            incarnation=self._incarnation,
            roles=roles,
            models=[offer for offer in offers if offer is not None],
        )

    def authorize_router(self, hello: Hello, ssl_object: ssl.SSLObject | None) -> None:
        """Raises ``PeerError`` when this peer may not be a router here."""
        self._authorization.check_router(hello, ssl_object)

    def router_joined(self, link: RouterLink) -> None:
        """A router is connected: tell it how things stand."""
        self._links.add(link)
        link.say(self._push.load())
        for host in self._hosts.values():
            link.say(host.facts.directory.whole())
        if self._lifecycle.state == "draining":
            link.say(Draining(self._num_legs()))

    def router_left(self, link: RouterLink) -> None:
        """A router is gone: its streams are cancelled."""
        self._links.discard(link)
        for host in self._hosts.values():
            host.router_left(link)

    def submit(self, link: RouterLink, submit: Submit) -> None:
        """Hand a submit to its model, or refuse it."""
        host = self._hosts.get(submit.model)
        if self._lifecycle.state != "serving":
            error = OverloadError("the node is draining", code="draining")
        elif host is None:
            error = OverloadError(
                f"node {self._node.name} does not serve {submit.model!r}", code="not_ready"
            )
        else:
            host.submit(link, submit)
            return
        link.say(refusal(submit.stream, error))

    def cancel(self, link: RouterLink, stream: int) -> None:
        """Stop a stream, whichever model it belongs to."""
        for host in self._hosts.values():
            host.cancel(link, stream)

    def retarget(self, link: RouterLink, message: Retarget) -> None:
        """Hand a stream's KV to another node, whichever model it belongs to."""
        for host in self._hosts.values():
            host.retarget(link, message)

    def attach(self, link: RouterLink, question: Attach) -> None:
        """Give up an answer to the router that asks for it."""
        if not any(host.attach(link, question) for host in self._hosts.values()):
            error = RequestError("no such answer is known here", code="stream_unknown")
            link.say(refusal(question.stream, error))

    def drill(self, link: RouterLink, drill: Drill) -> None:
        """Harm this node, if it was started for that."""
        self._drills.start(drill, link.say)

    def _engine_pids(self) -> dict[str, int | None]:
        return {name: host.engine_pid for name, host in self._hosts.items()}

    def _write_status(self) -> None:
        path = self._config.status_file
        if path is not None:
            write_status(path, self._lifecycle.state, self._mesh_address, self._hosts)


def _check_bundle(bundle: Bundle, digest: str | None, name: str) -> None:
    if digest is not None and bundle.manifest.identity != digest:
        raise ConfigError(
            f"model {name} in the store has digest {bundle.manifest.identity}, the topology pins "
            f"{digest}",
            where=str(bundle.path),
            suggestion="add the pinned model again with 'popmesh model add'",
        )


def check_listeners(node: Node, credentials: Credentials | None) -> None:
    """Off loopback both listeners need certificates; raises ``ConfigError``."""
    address: Address
    for address in (node.mesh, node.kv):
        require_tls(address.host, credentials)


async def serve(config: AgentConfig, ready: Callable[[str], None] | None = None) -> None:
    """Run one node until SIGTERM or SIGINT; ``ready`` gets its mesh address when doors open.

    Raises ``ConfigError`` for a missing model, a digest that differs from the topology's, or a
    listener off loopback without certificates.
    """
    check_listeners(config.node, config.credentials)
    loop = asyncio.get_running_loop()
    async with Registry.connect(config.registry_url) as registry, asyncio.TaskGroup() as tasks:
        agent = Agent(config, registry, tasks)
        agent.on_doors_open = ready
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, agent.drain)
        await agent.run()
