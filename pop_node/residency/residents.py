"""The models of a node: on its disk, on their way, in memory. A thin shell.

Carries out what ``residency`` decides: engines through the node's lifecycle, bundles through its
supply. Lets submits wait for models that are not in memory. Whatever takes long runs in tasks and
threads: the event loop goes on. How models are, ``standing`` says.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from pop_node.agent_config import AgentConfig
from pop_node.engine.config import Ahead
from pop_node.engine.spawn import Standby
from pop_node.hosting.host_maker import HostMaker, Opened
from pop_node.hosting.model_host import ModelHost
from pop_node.legs.parking import PARKING_VERSION, Parking
from pop_node.legs.refusal import refusal
from pop_node.residency import events as ev
from pop_node.residency.fetching import Fetching
from pop_node.residency.reserve import Reserve
from pop_node.residency.residency import Residency
from pop_node.residency.room import memory_ahead
from pop_node.residency.standing import Standing
from pop_node.residency.supply import Supply, can_be_fetched
from pop_node.router_link import RouterLink
from pop_node.store.bundle import UnusableTextError
from pop_node.store.holding import Hold
from topology.budget import memory_budget
from wire.errors import ConfigError, MeshError, OverloadError
from wire.messages import Submit, Warm

log = logging.getLogger(__name__)

MAX_HOLD_S = 3600.0
"""Longest lease that a router is given; it renews those it still wants. Guess."""


@dataclass(frozen=True, slots=True)
class Around:
    """What the models need of their node.

    ``want`` and ``unwant`` say which engines are to be kept running, ``changed`` that routers
    should hear of the load, ``offers_changed`` of the offers.
    """

    want: Callable[[str], None]
    unwant: Callable[[str], None]
    changed: Callable[[], None]
    offers_changed: Callable[[], None]


class Residents:
    """All models of one node; used in its event loop."""

    def __init__(
        self,
        config: AgentConfig,
        supply: Supply,
        maker: HostMaker,
        standby: Standby | None,
        tasks: asyncio.TaskGroup,
        around: Around,
    ) -> None:
        """Looks at the store. A model whose text files cannot be used is left out as long as there
        is another. Raises ``ConfigError`` if there is none, for a model whose manifest is damaged,
        that is not the one pinned or nowhere to be had, and for pinned models beyond the memory."""
        node = config.node
        self._budget = memory_budget(node)
        self._supply = supply
        self._maker = maker
        self._reserve = Reserve(standby, tasks, self._ahead)
        self._tasks = tasks
        self._around = around
        self._models = node.models
        self._machine = Residency(
            node.models,
            pinned=node.pinned,
            fetchable=[name for name in node.models if can_be_fetched(config, name)],
            budget_bytes=self._budget,
        )
        self.hosts: dict[str, ModelHost] = {}
        self.parking = Parking(self._eta_s)
        self.standing = Standing(self._machine, self.hosts, self.parking, self._budget)
        self._started_at: dict[str, float] = {}
        self._holds: dict[str, Hold] = {}
        self.fetching = Fetching(
            supply, maker, tasks, self.feed, self._install, self.standing.is_asked_for
        )
        self._timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._is_closed = False
        self._left_out: dict[str, UnusableTextError] = {}
        for name in node.models:
            if supply.store.has(name) or not self._machine.state(name).fetchable:
                try:
                    opened = maker.open(name)
                except UnusableTextError as exc:
                    self._left_out[name] = exc
                    continue
                self.hosts[name] = maker.make(name, opened)
                self._machine.handle(_fetched(name, opened), 0.0)
        if self._left_out and not self.hosts:
            raise next(iter(self._left_out.values()))
        self._check_pinned(node.pinned)

    def _check_pinned(self, pinned: tuple[str, ...]) -> None:
        need = sum(self._machine.state(name).memory_bytes for name in pinned)
        if self._budget is not None and need > self._budget:
            raise ConfigError(
                f"the pinned models take {need / 1e9:.1f} GB of memory, memory_gb is "
                f"{self._budget / 1e9:g}",
                suggestion="pin fewer models, or lower kv_tokens",
            )

    # ---- life ----------------------------------------------------------------------------------

    @property
    def is_bounded(self) -> bool:
        """Whether models come and go within a memory budget."""
        return self._budget is not None

    @property
    def awaited(self) -> tuple[str, ...]:
        """Models that the doors wait for: all, or with a budget those that fit from the disk; none
        that is left out."""
        if self.is_bounded:
            return tuple(self._machine.first())
        return tuple(name for name in self._models if name not in self._left_out)

    def start(self) -> None:
        """Load what fits, fetch what is missing; look again at what is left out, later."""
        for name, why in self._left_out.items():
            log.error("%s cannot be served: %s", name, why)
            self.feed(ev.FetchFailed(name, str(why)))
        self.feed(ev.Started())
        if not any(self._machine.state(name).memory == "loading" for name in self._models):
            self._fill_standby()

    async def start_engine(self, model: str) -> None:
        """The lifecycle wants this model's engine to start, now."""
        if self._machine.state(model).memory != "loading":
            return  # not any more
        host = self.hosts[model]
        if model not in self._holds:
            try:
                self._holds[model] = Hold(host.settings.engine.model_dir)
            except ConfigError as exc:
                log.error("the bundle of %s cannot be held: %s", model, exc)
        self._started_at[model] = asyncio.get_running_loop().time()
        await host.start(self._tasks)

    def engine_ready(self, model: str) -> None:
        """Its first token is there: who waited for it is served."""
        took_s = asyncio.get_running_loop().time() - self._started_at[model]
        log.info("%s is in memory after %.2f s", model, took_s)
        self._let_go_of(model)
        self.feed(ev.Ready(model, took_s))
        if self.standing.serves(model):  # a drill may want it down by now
            for link, submit in self.parking.take(model):
                self.hosts[model].submit(link, submit)
        self._fill_standby()
        self._around.offers_changed()

    def engine_exited(self, model: str) -> None:
        """Its engine ended by itself; the lifecycle starts it again."""
        self._let_go_of(model)
        self.feed(ev.Exited(model, self.hosts[model].why_ended))
        self._look_for_bundle(model)

    def legs_changed(self, model: str) -> None:
        """A leg of this model began or is over."""
        if self.is_bounded or self._machine.state(model).barred:
            count = self.hosts[model].num_open_legs
            self.feed(ev.Legs(model, count))
            if not count:  # another model may have its place now
                self._around.changed()

    def drain(self) -> None:
        """Nobody waits for a model any more."""
        self.parking.refuse_all(OverloadError("the node is draining", code="draining"))

    async def close(self) -> None:
        """End everything; nothing starts again."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        self.drain()
        await self.fetching.close()
        for host in self.hosts.values():
            await host.stop()
        for model in list(self._holds):
            self._let_go_of(model)
        await self._reserve.close()
        await self._supply.close()

    # ---- from routers --------------------------------------------------------------------------

    def submit(self, link: RouterLink, submit: Submit) -> None:
        """Hand a submit to its model, let it wait for it, or refuse it."""
        model = submit.model
        if self.standing.serves(model):
            self.hosts[model].submit(link, submit)
            return
        error = self._admit(link, submit)
        if error is not None:
            link.say(refusal(submit.stream, error))
            return
        loop = asyncio.get_running_loop()
        self.parking.add(link, submit)
        self.feed(ev.Wanted(model, loop.time() + submit.deadline_remaining_ms / 1000))

    def _admit(self, link: RouterLink, submit: Submit) -> MeshError | None:
        """Why a submit for a model that is not in memory cannot wait for it; None when it can."""
        model, now = submit.model, asyncio.get_running_loop().time()
        if link.version < PARKING_VERSION:
            return OverloadError("the engine is starting", code="not_ready", retry_after_s=1.0)
        refused = self._machine.refusal(model, now)
        if refused is not None:
            wait_s = refused.retry_after_s
            return OverloadError(refused.why, code="not_loaded", retry_after_s=wait_s or None)
        problem = self.parking.problem(link, submit)
        if problem is not None:
            return problem
        eta_s = self._eta_s(model)
        if eta_s * 1000 > submit.deadline_remaining_ms:
            self.feed(ev.Held(model, now + eta_s))  # for whoever comes back for it
            why = f"{model} takes about {eta_s:.0f} s, longer than the request may wait"
            return OverloadError(why, code="not_loaded", retry_after_s=eta_s)
        return None

    def _eta_s(self, model: str) -> float:
        return self._machine.eta_s(model, asyncio.get_running_loop().time())

    def warm(self, message: Warm) -> None:
        """A router wants a model in memory for some time; unknown models are no business of it."""
        if message.model in self._models:
            hold_s = min(max(0.0, message.hold_ms / 1000), MAX_HOLD_S)
            self.feed(ev.Held(message.model, asyncio.get_running_loop().time() + hold_s))

    # ---- effects -------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that follows from the state of models."""
        while not condition():
            await self._news.wait()

    def feed(self, event: ev.Event) -> None:
        """Give the machine an event and carry out what it decides."""
        if self._is_closed:
            return
        loop = asyncio.get_running_loop()
        effects = self._machine.handle(event, loop.time())
        for effect in effects:
            match effect:
                case ev.Load(model):
                    self._around.want(model)
                case ev.Unload(model):
                    self._around.unwant(model)
                    self._tasks.create_task(self._unload(model))
                case ev.Fetch(model):
                    self.fetching.begin(model)
                case ev.Refuse(model, why, retry_after_s):
                    error = OverloadError(
                        why, code="not_loaded", retry_after_s=retry_after_s or None
                    )
                    self.parking.refuse(model, error)
        self._arm_timer(loop)
        if effects or not isinstance(event, ev.Legs | ev.Progress | ev.Tick | ev.Held | ev.Wanted):
            self._around.changed()
        self._news.set()
        self._news = asyncio.Event()

    def _arm_timer(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        at = self._machine.next_deadline()
        self._timer = None if at is None else loop.call_at(at, self.feed, ev.Tick())

    async def _unload(self, model: str) -> None:
        await self.hosts[model].unload()
        self._let_go_of(model)
        log.info("%s has left memory", model)
        self.feed(ev.Left(model))
        self._look_for_bundle(model)

    def _look_for_bundle(self, model: str) -> None:
        """As long as no engine has it, the bundle may be removed, by us or by others."""
        if self._supply.store.lacks(model):
            self.feed(ev.Gone(model))

    def _let_go_of(self, model: str) -> None:
        """The bundle of a model is not held by us any more: its engine does that, or nobody."""
        hold = self._holds.pop(model, None)
        if hold is not None:
            hold.close()

    async def drop_standby(self) -> None:
        """The next engine starts from nothing."""
        await self._reserve.empty()

    def _fill_standby(self) -> None:
        """Start an engine process ahead, unless all models are in memory."""
        if not all(self._machine.state(name).is_committed for name in self._models):
            self._reserve.fill_soon()

    def _ahead(self) -> Ahead:
        return self._maker.ahead(*memory_ahead(self._machine.models().values(), self._budget))

    # ---- disk ----------------------------------------------------------------------------------

    async def _install(self, model: str, opened: Opened, arriving: bool) -> None:
        """The model is on the disk now, or on its way there."""
        host = self.hosts.get(model)
        if host is not None and host.settings.identity == opened.bundle.manifest.identity:
            host.lies_in(opened.bundle.path)
        else:
            self.hosts[model] = self._maker.make(model, opened)
            if host is not None:
                await host.stop()
        said = ev.Arriving if arriving else ev.Fetched
        self.feed(said(model, opened.memory_bytes, opened.load_bytes))
        self._around.offers_changed()


def _fetched(model: str, opened: Opened) -> ev.Fetched:
    return ev.Fetched(model, opened.memory_bytes, opened.load_bytes)
