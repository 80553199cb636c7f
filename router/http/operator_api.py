"""What operators ask a router: status, explanations, request records, metrics, health."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web

from registry.watcher import Watcher
from router.dispatch import Dispatch
from router.giving_metrics import giving_metrics
from router.http.auth import Authenticator
from router.http.completions import ModelApi
from router.http.drill import hold_drill
from router.http.reading import RequestReader, peer_of
from router.metrics import CONTENT_TYPE, Gauge, Labels, Metric, ToldCounter, render
from router.model_metrics import model_metrics
from router.placement.placer import Placer
from router.placement.words import Decision
from router.request.record import RequestRecord
from router.routing.costs import Work
from router.routing.foresight import foresee
from router.routing.policy import MAX_ROUTES, Route, RouteRequest, choose
from router.routing.refusals import known_models
from router.routing.view import NodeView
from wire.errors import MeshError, RequestError


class OperatorApi:
    """Handlers that look at the router itself."""

    def __init__(
        self,
        name: str,
        dispatch: Dispatch,
        watcher: Watcher,
        placer: Placer,
        authenticator: Authenticator,
        models: ModelApi,
        reader: RequestReader,
    ) -> None:
        self._name = name
        self._dispatch = dispatch
        self._watcher = watcher
        self._placer = placer
        self._auth = authenticator
        self._models = models
        self._reader = reader
        self._metrics = [
            *dispatch.metrics.all(),
            *self._gauges(),
            *model_metrics(dispatch.builder),
            *giving_metrics(dispatch.builder),
            *placer.gauges(),
        ]
        self.stopping = False

    async def health(self, request: web.Request) -> web.Response:
        """``GET /health``: the process is alive."""
        return web.json_response({"status": "alive", "router": self._name})

    async def ready(self, request: web.Request) -> web.Response:
        """``GET /ready``: 200 once some model has a route, 503 before and while stopping."""
        models = [] if self.stopping else self._routable()
        body = {"ready": bool(models), "models": models, "stopping": self.stopping}
        return web.json_response(body, status=200 if models else 503)

    async def close_when_stopping(self, request: web.Request, response: web.StreamResponse) -> None:
        """While stopping, a connection ends with the answer that it waits for: a client that keeps
        asking on one that it had open would hold up the end."""
        if self.stopping:
            response.force_close()
            response.headers["Connection"] = "close"

    async def status(self, request: web.Request) -> web.Response:
        """``GET /popmesh/status``: the view, links, loads and counters."""
        self._operator(request)
        dispatch = self._dispatch
        view, now = dispatch.builder.snapshot(), asyncio.get_running_loop().time()
        book = self._models.resumer.book
        return _json(
            {
                "router": self._name,
                "mesh": view.topology.mesh,
                "site": view.router_site,
                "in_flight": dispatch.admission.in_flight,
                "running": len(dispatch.running),
                "streams_open": sum(link.num_streams for link in dispatch.pool.all()),
                "resumable": {"records": len(book), "bytes": book.num_bytes},
                "registry_age_s": self._watcher.age_s,
                "refused_registry_entries": dispatch.pool.refused_entries,
                "models": {name: list(nodes) for name, nodes in view.offered.items()},
                "routable": self._routable(),
                "nodes": [self._node(node) for node in view.nodes.values()],
                "placement": [_decision(decision, now) for decision in self._placer.decisions],
            }
        )

    async def placement(self, request: web.Request) -> web.Response:
        """``GET /popmesh/placement``: which models are kept where because of demand, and why."""
        self._operator(request)
        rules = self._dispatch.builder.snapshot().topology.placement
        now = asyncio.get_running_loop().time()
        return _json(
            {
                "warm_per_min": rules.warm_per_min,
                "cool_after_s": rules.cool_after_s,
                "decisions": [_decision(decision, now) for decision in self._placer.decisions],
            }
        )

    async def explain(self, request: web.Request) -> web.Response:
        """``POST /popmesh/explain``: the plan for a chat body; nothing is run."""
        self._operator(request)
        prepared = await self._reader.prepare(request, "chat")
        plan = self._dispatch.choose(prepared.routing, fallbacks=MAX_ROUTES - 1)
        work, view = prepared.routing.work, self._dispatch.builder.snapshot()
        now = asyncio.get_running_loop().time()
        foreseen = foresee(prepared.routing, plan.route, view, now, self._dispatch.rng)
        return _json(
            {
                "client": {
                    "lat": prepared.place.position.lat,
                    "lon": prepared.place.position.lon,
                    "source": prepared.place.source,
                },
                "prompt_tokens_estimate": work.prompt_tokens,
                "cached_tokens": dict(work.cached),
                "route": _route(plan.route),
                "fallbacks": [_route(route) for route in plan.fallbacks],
                "rejected": [{"node": name, "reason": why} for name, why in plan.rejected],
                "if_lost": [asdict(accident) for accident in foreseen],
            }
        )

    async def drill(self, request: web.Request) -> web.Response:
        """``POST /popmesh/drill``: have a node harm itself, 202 once it begins; or rehearse a cold
        start, 200 with the report once it is over."""
        self._operator(request)
        report = await hold_drill(self._dispatch, await self._reader.read_body(request))
        if report is not None:
            return _json(report)
        return web.json_response({"started": True}, status=202)

    async def request_record(self, request: web.Request) -> web.Response:
        """``GET /popmesh/requests/{id}``: what happened to a recent request."""
        self._operator(request)
        record = self._dispatch.log.get(request.match_info["id"])
        if record is None:
            raise RequestError("no such request is remembered", code="not_found")
        return _json(_record(record))

    async def metrics(self, request: web.Request) -> web.Response:
        """``GET /metrics``."""
        self._operator(request)
        return web.Response(text=render(self._metrics), headers={"Content-Type": CONTENT_TYPE})

    # ---- helpers ------------------------------------------------------------------------------

    def _operator(self, request: web.Request) -> None:
        self._auth.require_operator(request.headers.get("Authorization"), peer_of(request))

    def _routable(self) -> list[str]:
        """Models for which a small request without residency rules has a route right now."""
        view = self._dispatch.builder.snapshot()
        now = asyncio.get_running_loop().time()
        found = []
        for model in known_models(view):
            work = Work(model, prompt_tokens=1, output_tokens=1, cached={})
            try:
                choose(RouteRequest(work, view.position()), view, now, self._dispatch.rng, 0)
            except MeshError:
                continue
            found.append(model)
        return found

    def _node(self, node: NodeView) -> dict[str, Any]:
        link = self._dispatch.pool.get(node.name)
        return {
            "name": node.name,
            "site": node.site,
            "region": node.region,
            "roles": sorted(node.roles),
            "link": node.phase,
            "link_error": None if link is None else link.last_error,
            "address": "" if link is None else link.address,
            "incarnation": node.incarnation,
            "draining": node.draining,
            "rtt_ms": node.rtt_ms,
            "rtt_measured": node.rtt_measured,
            "streams": 0 if link is None else link.num_streams,
            "models": [msgspec.structs.asdict(offer) for offer in node.offers.values()],
            "engines": [msgspec.structs.asdict(engine) for engine in node.engines.values()],
            "memory_bytes": node.memory_bytes,
            "memory_used_bytes": node.memory_used_bytes,
            "giving": msgspec.structs.asdict(node.giving),
            "kv_links": [msgspec.structs.asdict(rate) for rate in node.links.values()],
        }

    def _gauges(self) -> list[Metric]:
        dispatch = self._dispatch

        def rtts() -> dict[Labels, float]:
            links = dispatch.pool.all()
            measured = [(link.node.name, link.rtt_ms) for link in links]
            return {(name,): rtt / 1e3 for name, rtt in measured if rtt is not None}

        return [
            Gauge(
                "popmesh_requests_in_flight",
                "Requests admitted and not yet answered.",
                lambda: {(): float(dispatch.admission.in_flight)},
            ),
            Gauge(
                "popmesh_link_up",
                "1 when the link to the node is greeted.",
                lambda: {(link.node.name,): float(link.up) for link in dispatch.pool.all()},
                ("node",),
            ),
            Gauge("popmesh_link_rtt_seconds", "Smoothed round trip to the node.", rtts, ("node",)),
            ToldCounter(
                "popmesh_link_reconnects_total",
                "Times the link to the node ended or could not be opened, and was tried again.",
                lambda: {(link.node.name,): link.reconnects for link in dispatch.pool.all()},
                ("node",),
            ),
            ToldCounter(
                "popmesh_link_unknown_stream_messages_total",
                "Tokens and messages of the node for streams that were over here.",
                lambda: {
                    (link.node.name,): link.unknown_stream_messages for link in dispatch.pool.all()
                },
                ("node",),
            ),
            Gauge(
                "popmesh_resumable_answers",
                "Streamed answers that could be asked for again, those being sent included.",
                lambda: {(): float(len(self._models.resumer.book))},
            ),
            Gauge(
                "popmesh_reservations",
                "Legs sent that no load report contains yet.",
                lambda: {(): float(dispatch.builder.reservations())},
            ),
        ]


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")


def _route(route: Route) -> dict[str, Any]:
    return asdict(route)


def _decision(decision: Decision, now: float) -> dict[str, Any]:
    """With the time that is left instead of the router's clock."""
    out = asdict(decision)
    until = out.pop("until")
    out["kept_s"] = max(0.0, until - now) if until else 0.0
    out["left_out"] = [{"node": name, "reason": why} for name, why in decision.left_out]
    return out


def _record(record: RequestRecord) -> dict[str, Any]:
    out = asdict(record)
    if record.transfer is not None:  # wire messages are arrays unless asked
        out["transfer"] = msgspec.structs.asdict(record.transfer)
    return out
