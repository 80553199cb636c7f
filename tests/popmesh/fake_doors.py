"""Stands in for the routers of a mesh in drill tests: real HTTP, nothing behind it.

One ``FakeMesh`` is what all its doors know together: answers are a pure function of the request,
nodes are names with an incarnation, a drill takes a node away for a moment. Tests make it fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MODEL = "fake"


def words(body: dict[str, Any]) -> list[str]:
    """The tokens of the answer to a body."""
    return [f" {body['seed'] % 1000}.{index}" for index in range(body["max_tokens"])]


def pinned(header: str) -> tuple[str, str]:
    """Prefill and decode node that a request insists on."""
    said = dict(part.split("=") for part in header.split(","))
    return said["prefill"], said["decode"]


def not_found() -> web.Response:
    """A refusal."""
    error = {"message": "no such node", "code": "not_found"}
    return web.json_response({"error": error}, status=404)


@dataclass
class FakeMesh:
    """Behaviour that tests change while it runs."""

    token_s: float = 0.002
    away_s: float = 0.6
    nodes: dict[str, int] = field(default_factory=lambda: {"p1": 1, "p2": 1, "d1": 1, "d2": 1})
    away: set[str] = field(default_factory=set)
    drills: list[dict[str, Any]] = field(default_factory=list)
    known: dict[str, list[str]] = field(default_factory=dict)
    resumed: list[tuple[str, str]] = field(default_factory=list)
    refusing: set[str] = field(default_factory=set)
    drop_token_under_fault: bool = False
    break_after: int | None = None
    hold_blocks: bool = False
    sites: dict[str, str] = field(default_factory=dict)
    links_drop: bool = False
    gone_for_good: set[str] = field(default_factory=set)
    sent_to: list[tuple[str, str]] = field(default_factory=list)
    requests: int = 0
    recoveries: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    cold_start: Callable[[dict[str, Any]], web.Response] = field(default=lambda _: not_found())

    # ---- HTTP ----------------------------------------------------------------------------------

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            self.sent_to.append(pinned(request.headers["x-popmesh-route"]))
            return web.json_response({"usage": {"completion_tokens": 2}})
        texts = words(body)
        last = request.headers.get("last-event-id", "")
        begin = 0
        if last:
            request_id, _, upto = last.rpartition(":")
            self.resumed.append((str(request.url.port), last))
            if request_id not in self.known:
                error = {"message": "unknown", "code": "stream_unknown"}
                return web.json_response({"error": error}, status=404)
            begin = int(upto)
        else:
            self.requests += 1
            request_id = f"req{self.requests}"
            self.known[request_id] = texts
        if self.away and self.drop_token_under_fault:
            texts = [*texts[:-1], ""]
        response = web.StreamResponse(
            headers={
                "x-popmesh-request-id": request_id,
                "x-popmesh-prefill": "p1",
                "x-popmesh-decode": "d1",
            }
        )
        await response.prepare(request)
        chat = "messages" in body
        for index, text in enumerate(texts[begin:], begin):
            await asyncio.sleep(self.token_s)
            choice = {"delta": {"content": text}} if chat else {"text": text}
            said = json.dumps({"choices": [choice]})
            await response.write(f"id: {request_id}:{index + 1}\ndata: {said}\n\n".encode())
            if self.break_after == index + 1:
                self.break_after = None
                assert request.transport is not None
                request.transport.abort()
                return response
        choice = {"delta": {}} if chat else {"text": ""}
        end = json.dumps({"choices": [choice | {"finish_reason": "length"}]})
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": len(texts)}})
        await response.write(f"data: {end}\n\ndata: {usage}\n\ndata: [DONE]\n\n".encode())
        return response

    async def drill(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["fault"] == "cold-start":
            self.drills.append(body)
            return self.cold_start(body)
        if body["node"] in self.refusing:
            said = f"{body['node']}: not started with --drills"
            error = {"message": said, "code": "drill_refused"}
            return web.json_response({"error": error}, status=409)
        if body["fault"] == "none":
            return web.json_response({"started": True}, status=202)
        self.drills.append(body)
        self.away.add(body["node"])
        away_s = body["duration_s"] if body["fault"] == "lose-agent" else self.away_s
        task = asyncio.create_task(self._return(body["node"], body["fault"], away_s))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return web.json_response({"started": True}, status=202)

    async def _return(self, node: str, fault: str, away_s: float) -> None:
        await asyncio.sleep(away_s)
        if node in self.gone_for_good:
            return
        self.nodes[node] += fault in ("kill-agent", "lose-agent")
        self.recoveries += 1
        self.away.discard(node)

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "mesh": "fakemesh",
                "in_flight": 0,
                "routable": [MODEL],
                "nodes": [self.node(name) for name in self.nodes],
            }
        )

    def node(self, name: str) -> dict[str, Any]:
        """What a router says of a node."""
        engine = {
            "model": MODEL,
            "ready": name not in self.away,
            **dict.fromkeys(("running", "waiting", "transfers_in", "transfers_out", "streams"), 0),
            "total_blocks": 10,
            "free_blocks": 7 - self.hold_blocks,
            "cached_blocks": 3,
        }
        return {
            "name": name,
            "site": self.sites.get(name, "ams"),
            "roles": ["prefill" if name.startswith("p") else "decode"],
            "link": "connecting" if name in self.away and self.links_drop else "up",
            "draining": False,
            "incarnation": str(self.nodes[name]),
            "models": [{"name": MODEL}],
            "engines": [engine],
        }

    async def metrics(self, request: web.Request) -> web.Response:
        text = (
            "# TYPE popmesh_router_recoveries_total counter\n"
            f'popmesh_router_recoveries_total{{kind="recompute"}} {self.recoveries}\n'
            "popmesh_reservations 0\n"
        )
        return web.Response(text=text)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    async def record(self, request: web.Request) -> web.Response:
        route = {
            **dict.fromkeys(("prefill_site", "decode_site"), "x"),
            "prefill": "p1",
            "decode": "d1",
            "cost_s": 0.1,
            "reasons": [],
        }
        attempts = [{"number": 1, "route": route, "outcome": "length"}]
        said = {"request_id": request.match_info["id"], "model": MODEL, "outcome": "length"}
        return web.json_response(said | {"attempts": attempts * (2 if self.drills else 1)})

    def application(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.answer)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/popmesh/status", self.status)
        app.router.add_get("/popmesh/requests/{id}", self.record)
        app.router.add_post("/popmesh/drill", self.drill)
        return app


@contextlib.asynccontextmanager
async def doors(mesh: FakeMesh, count: int = 1) -> AsyncIterator[list[str]]:
    """The base URLs of ``count`` routers of ``mesh``."""
    async with contextlib.AsyncExitStack() as stack:
        urls = []
        for _ in range(count):
            runner = web.AppRunner(mesh.application())
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        yield urls
