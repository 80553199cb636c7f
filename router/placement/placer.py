"""Carries placement out: counts what is asked, shows the machine the mesh, says ``Warm``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from router.links.node_links import LinkPool
from router.metrics import Gauge, Labels, Metric
from router.placement.demand import DemandSites
from router.placement.machine import PlacementMachine
from router.placement.words import Asked, Decision, Looked, SayWarm
from router.router_metrics import RouterMetrics
from router.routing.policy import Pin, RouteRequest
from router.routing.view_builder import ViewBuilder
from topology.model import Topology

log = logging.getLogger(__name__)


class Placer:
    """One router's placement. ``run`` is its task."""

    def __init__(
        self, topology: Topology, builder: ViewBuilder, pool: LinkPool, metrics: RouterMetrics
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sites = DemandSites(topology)
        self._machine = PlacementMachine(topology)
        self._builder = builder
        self._pool = pool
        self._metrics = metrics
        self._woken = asyncio.Event()

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """As of the last look."""
        return self._machine.decisions

    def asked(self, request: RouteRequest) -> None:
        """A request came, whatever becomes of it. One that names its nodes is no demand."""
        if request.pin != Pin():
            return
        work = request.work
        site = self._sites.site_of(request.client, work.model, request.regions)
        if site is None:
            return
        now = self._loop.time()
        event = Asked(work.model, site, work.prompt_tokens, work.output_tokens)
        before = self._machine.next_deadline()
        self._perform(self._machine.handle(event, now), now)
        if self._machine.next_deadline() != before:
            self._woken.set()

    async def run(self) -> None:
        """Look when the machine wants to, until cancelled."""
        while True:
            try:
                async with asyncio.timeout_at(self._machine.next_deadline()):
                    await self._woken.wait()
            except TimeoutError:
                now = self._loop.time()
                looked = Looked(self._builder.snapshot())
                self._perform(self._machine.handle(looked, now), now)
            self._woken.clear()

    def _perform(self, words: Iterable[SayWarm], now: float) -> None:
        for word in words:
            link, message = self._pool.get(word.node), word.message
            if link is not None and link.warm(message):
                if word.is_news:
                    log.info("%s is to have %s in memory", word.node, message.model)
                self._builder.set_wanted(word.node, message.model, now)
                self._metrics.placement_warms.add()

    def gauges(self) -> list[Metric]:
        """What is asked and what follows, by model and region."""

        def demand() -> dict[Labels, float]:
            return {(d.model, d.region): d.per_min for d in self.decisions}

        def nodes() -> dict[Labels, float]:
            return {(d.model, d.region): float(len(d.nodes)) for d in self.decisions}

        labels = ("model", "region")
        return [
            Gauge(
                "popmesh_placement_requests_per_minute",
                "What a region asks of a model: requests, each forgotten with a mean of 60 s.",
                demand,
                labels,
            ),
            Gauge(
                "popmesh_placement_nodes",
                "Nodes of the region that keep the model in memory because of that.",
                nodes,
                labels,
            ),
        ]
