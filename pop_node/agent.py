"""The node's agent: networking, registration and supervision; never imports torch.

Composes the pure lifecycle with its shells: one ``ModelHost`` per model, the listener for routers,
the registry keeper, the load pushes. Everything that decides lives elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import assert_never

from pop_node import lifecycle
from pop_node.agent_config import SERVICE, AgentConfig, check_listeners
from pop_node.authorization import Authorization
from pop_node.drills.cold_start import ColdStarts
from pop_node.drills.drills import Drills
from pop_node.drills.rebirth import Rebirth, take_reborn
from pop_node.engine.spawn import Standby, launch_engine
from pop_node.hosting.host_maker import HostMaker, Told
from pop_node.legs.refusal import refusal
from pop_node.load_push import LoadPush
from pop_node.registration import keeper
from pop_node.residency.cold_start_host import ResidentColdStarts
from pop_node.residency.residents import Around, Residents
from pop_node.residency.supply import Supply
from pop_node.router_link import RouterLink, link_factory
from pop_node.status_file import write_status
from registry.client import Registry
from registry.keeper import Keeper
from wire.address import format_address
from wire.errors import ConfigError, OverloadError, RequestError
from wire.messages import (
    COLD_START,
    MAX_VERSION,
    MIN_VERSION,
    Attach,
    CacheDelta,
    Draining,
    Drill,
    Hello,
    Load,
    ModelOffer,
    Offers,
    Retarget,
    Submit,
    Warm,
)
from wire.messages import Role as WireRole

__all__ = ["SERVICE", "Agent", "AgentConfig", "serve"]

log = logging.getLogger(__name__)

DRAIN_TIMEOUT_S = 30.0
TEXT_THREADS = 2

OFFERS_VERSION = 3
"""First version of the mesh wire that knows ``Offers``."""


class Agent:
    """One running node; built and run by ``serve``."""

    def __init__(self, config: AgentConfig, registry: Registry, tasks: asyncio.TaskGroup) -> None:
        """Raises ``ConfigError`` for models that cannot be served."""
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
        self._push = LoadPush(self._load, self._deltas, self._links)
        self._supply = Supply(config, registry, lambda: self._residents.standing.num_legs > 0)
        self._told_offers: list[ModelOffer] = []
        self._residents = self._make_residents()
        self._lifecycle = lifecycle.NodeLifecycle((), later=self._residents.awaited)
        self._drills = Drills(config.drills, self._engine_pids, tasks)
        self._cold_starts = ColdStarts(
            ResidentColdStarts(self._node.name, self._residents, self._is_serving),
            tasks,
            self._supply.store.put_aside,
            self._start_anew,
            take_reborn(os.environ),
        )
        self.rebirth: Rebirth | None = None
        self.on_doors_open: Callable[[str], None] | None = None

    def _make_residents(self) -> Residents:
        standby = Standby() if self._node.memory_gb is not None else None
        told = Told(
            ready=self._engine_ready,
            exited=self._engine_exited,
            load_changed=self._push.soon,
            legs=self._legs_changed,
        )
        maker = HostMaker(
            self._config,
            self._incarnation,
            self._executor,
            standby.take if standby is not None else launch_engine,
            lambda: self._lifecycle.state == "starting",
            told,
        )
        around = Around(
            want=lambda model: self._apply(lifecycle.Want(model)),
            unwant=lambda model: self._apply(lifecycle.Unwant(model)),
            changed=self._models_changed,
            offers_changed=self._offers_changed,
        )
        return Residents(self._config, self._supply, maker, standby, self._tasks, around)

    # ---- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until drained; must run inside the task group it was given."""
        push = self._tasks.create_task(self._push.run())
        try:
            await self._supply.start(self._tasks)
            self._residents.start()
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
        await self._residents.close()
        for link in list(self._links):
            link.close()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._write_status()

    def drain(self) -> None:
        """Accept no new work, finish what runs, then stop; again to stop at once."""
        self.rebirth = None
        timeout_s = DRAIN_TIMEOUT_S if self._lifecycle.state == "serving" else 0.0
        if self._lifecycle.state == "draining":
            self._apply(lifecycle.StreamsLeft(0))
        self._apply(lifecycle.DrainRequested(timeout_s))
        self._residents.drain()
        self._apply(lifecycle.StreamsLeft(self._residents.standing.num_legs))

    def _start_anew(self, rebirth: Rebirth) -> None:
        """Drain, then have this process do what it is told."""
        self.drain()
        self.rebirth = rebirth

    def _apply(self, event: lifecycle.Event) -> None:
        loop = asyncio.get_running_loop()
        for effect in self._lifecycle.handle(event, loop.time()):
            match effect:
                case lifecycle.StartEngine(model):
                    self._tasks.create_task(self._start_engine(model))
                case lifecycle.EndEngine(model):
                    self._residents.hosts[model].end_engine()
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

    async def _start_engine(self, model: str) -> None:
        await self._residents.start_engine(model)
        self._write_status()

    def _engine_ready(self, model: str) -> None:
        self._apply(lifecycle.EngineReady(model))
        self._residents.engine_ready(model)

    def _engine_exited(self, model: str) -> None:
        self._apply(lifecycle.EngineExited(model))
        self._residents.engine_exited(model)

    def _models_changed(self) -> None:
        self._push.soon()
        self._write_status()

    def _offers_changed(self) -> None:
        """Tell routers, if it is so."""
        offers = self._residents.standing.offers()
        if offers != self._told_offers:
            self._told_offers = offers
            for link in self._links:
                if link.version >= OFFERS_VERSION:
                    link.say(Offers(offers))

    def _arm_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        at = self._lifecycle.next_deadline()
        if at is not None:
            self._timer = loop.call_at(at, self._apply, lifecycle.Tick())

    async def _open_doors(self) -> None:
        """Listen for routers and register: every engine that was waited for produced a token.

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
        name = f"{self._config.topology.mesh}:{node.name}"
        self._keeper = keeper(self._registry, name, SERVICE, (host, port), self._meta())
        self._tasks.create_task(self._keeper.run())
        self._write_status()
        log.info("node %s at %s serves routers on %s", node.name, node.site, self._mesh_address)
        if self.on_doors_open is not None:
            self.on_doors_open(self._mesh_address)

    async def _announce_drain(self) -> None:
        for link in self._links:
            link.say(Draining(self._residents.standing.num_legs))
        if self._keeper is not None:
            await self._keeper.set_meta(self._meta())

    def _meta(self) -> dict[str, str]:
        return {
            "mesh": self._config.topology.mesh,
            "name": self._node.name,
            "site": self._node.site,
            "incarnation": self._incarnation,
            "drain": "0" if self._is_serving() else "1",
        }

    def _is_serving(self) -> bool:
        return self._lifecycle.state == "serving"

    def _legs_changed(self, model: str) -> None:
        self._residents.legs_changed(model)
        if self._lifecycle.state == "draining":
            self._apply(lifecycle.StreamsLeft(self._residents.standing.num_legs))

    def _load(self) -> Load:
        hosts = self._residents.hosts.values()
        return Load(
            engines=self._residents.standing.loads(),
            links=[rate for host in hosts for rate in host.link_rates()],
            draining=self._lifecycle.state == "draining",
            memory_bytes=self._residents.standing.memory_bytes,
            memory_used_bytes=self._residents.standing.memory_used_bytes,
            giving=self._supply.giving(),
        )

    def _deltas(self) -> list[CacheDelta]:
        hosts = self._residents.hosts.values()
        deltas = [host.facts.directory.take_delta() for host in hosts]
        return [delta for delta in deltas if delta is not None]

    # ---- for router links ----------------------------------------------------------------------

    def hello(self) -> Hello:
        """Who this node is and what it serves."""
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
            models=self._residents.standing.offers(),
        )

    def authorize_router(self, hello: Hello, ssl_object: ssl.SSLObject | None) -> None:
        """Raises ``PeerError`` when this peer may not be a router here."""
        self._authorization.check_router(hello, ssl_object)

    def router_joined(self, link: RouterLink) -> None:
        """A router is connected: tell it how things stand."""
        self._links.add(link)
        link.say(self._load())
        for host in self._residents.hosts.values():
            link.say(host.facts.directory.whole())
        if self._lifecycle.state == "draining":
            link.say(Draining(self._residents.standing.num_legs))

    def router_left(self, link: RouterLink) -> None:
        """A router is gone: its streams are cancelled."""
        self._links.discard(link)
        self._residents.parking.router_left(link)
        for host in self._residents.hosts.values():
            host.router_left(link)

    def submit(self, link: RouterLink, submit: Submit) -> None:
        """Hand a submit to its model, or refuse it."""
        if not self._is_serving():
            error = OverloadError("the node is draining", code="draining")
        elif submit.model not in self._node.models:
            error = OverloadError(
                f"node {self._node.name} does not serve {submit.model!r}", code="not_ready"
            )
        else:
            self._residents.submit(link, submit)
            return
        link.say(refusal(submit.stream, error))

    def warm(self, message: Warm) -> None:
        """A router wants a model in memory."""
        if self._is_serving():
            self._residents.warm(message)

    def cancel(self, link: RouterLink, stream: int) -> None:
        """Stop a stream, whichever model it belongs to."""
        if not self._residents.parking.cancel(link, stream):
            for host in self._residents.hosts.values():
                host.cancel(link, stream)

    def retarget(self, link: RouterLink, message: Retarget) -> None:
        """Hand a stream's KV to another node, whichever model it belongs to."""
        if not self._residents.parking.retarget(link, message):
            for host in self._residents.hosts.values():
                host.retarget(link, message)

    def attach(self, link: RouterLink, question: Attach) -> None:
        """Give up an answer to the router that asks for it."""
        hosts = self._residents.hosts.values()
        if not any(host.attach(link, question) for host in hosts):
            error = RequestError("no such answer is known here", code="stream_unknown")
            link.say(refusal(question.stream, error))

    def drill(self, link: RouterLink, drill: Drill) -> None:
        """Harm this node, if it was started for that, or start a model cold."""
        if drill.fault == COLD_START:
            self._cold_starts.start(drill, link.version, link.say)
        else:
            self._drills.start(drill, link.say)

    def _engine_pids(self) -> dict[str, int | None]:
        return {name: self._residents.standing.engine_pid(name) for name in self._node.models}

    def _write_status(self) -> None:
        path = self._config.status_file
        if path is not None:
            write_status(path, self._lifecycle.state, self._mesh_address, self._residents)


async def serve(config: AgentConfig, ready: Callable[[str], None] | None = None) -> Rebirth | None:
    """Run one node until SIGTERM or SIGINT; ``ready`` gets its mesh address when doors open.

    Returns what its process is to become then, if a drill wants it to start anew.

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
    return agent.rebirth
