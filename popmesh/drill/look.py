"""Looks at a running mesh through its routers, and through its ready file where it runs here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self

from popmesh.client import MeshClient
from popmesh.drill.counters import Growth, Sample, parse_metrics
from popmesh.drill.eyes import busy, mesh_seen
from popmesh.drill.local import LocalMesh
from popmesh.drill.report import Rest
from popmesh.drill.world import MeshSeen
from wire.errors import ConfigError, MeshError

Route = tuple[str, str]
"""Prefill and decode node of one attempt."""

RECOVERIES = "popmesh_router_recoveries_total"

LOOK_S = 0.25
"""Between two looks: an engine takes longer than that to come back, so no death is missed."""

ANSWER_S = 5.0
"""A router that takes longer counts as away."""

REST_S = 60.0
"""Longest wait for everything to come to rest. Guess: leases end within seconds of the last
request, and a report of it comes once a second."""


class Lookout:
    """An async context manager that holds one client for each router."""

    def __init__(
        self, urls: Sequence[str], key: str | None, model: str, local: LocalMesh | None
    ) -> None:
        self.clients = [MeshClient(url, key) for url in urls]
        self.growth = Growth()
        self._model = model
        self._local = local
        self._known = MeshSeen((), ())
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for client in self.clients:
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.aclose()

    async def first(self) -> tuple[str, MeshSeen]:
        """The mesh's name and how it is; raises ``MeshError`` unless it is whole."""
        async with asyncio.timeout(ANSWER_S * len(self.clients)):
            statuses = {client.url: await client.status() for client in self.clients}
        meshes = {str(status["mesh"]) for status in statuses.values()}
        if len(meshes) > 1:
            raise ConfigError(f"these routers serve different meshes: {', '.join(sorted(meshes))}")
        mesh = self.seen(statuses)
        away = [node.name for node in mesh.nodes if not node.ready and self._model in node.models]
        away += [router.name for router in mesh.routers if not router.ready]
        if away or not mesh.nodes:
            raise ConfigError(
                f"the mesh is not whole: {', '.join(away) or 'it has no node'}",
                suggestion="a drill begins with a mesh that works; see 'popmesh status'",
            )
        return meshes.pop(), mesh

    async def mesh(self) -> MeshSeen:
        """How it is now."""
        return self.seen(await self.statuses())

    async def routes(self, url: str, request_id: str) -> list[Route]:
        """Prefill and decode node of every attempt of an answer, as its router tells; empty if it
        does not."""
        for client in self.clients:
            if client.url == url and request_id:
                try:
                    async with asyncio.timeout(ANSWER_S):
                        record = await client.record(request_id)
                except (MeshError, TimeoutError):
                    break
                return [(one.route.prefill, one.route.decode) for one in record.attempts]
        return []

    async def count(self) -> None:
        """Take the routers' counters into ``growth``."""
        for url, samples in (await self._metrics()).items():
            self.growth.look(url, samples)

    def recoveries(self) -> dict[str, int]:
        """How often requests went on in which way, in what was counted so far."""
        return {kind: int(count) for kind, count in self.growth.of(RECOVERIES).items()}

    async def rest(self) -> Rest:
        """Wait until everything is at rest, or has had its time; then what processes hold."""
        deadline = asyncio.get_running_loop().time() + REST_S
        while True:
            found = busy(await self.statuses(), await self._metrics())
            if not found or asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(LOOK_S)
        return Rest(found, self._local.footprints() if self._local is not None else {})

    def seen(self, statuses: Mapping[str, Mapping[str, Any] | None]) -> MeshSeen:
        """The mesh as these statuses have it."""
        starts = self._local.router_pids() if self._local is not None else {}
        self._known = mesh_seen(statuses, starts, self._model, self._known)
        return self._known

    async def statuses(self) -> dict[str, dict[str, Any] | None]:
        """``/popmesh/status`` of every router by its URL; None where it does not answer."""

        async def ask(client: MeshClient) -> dict[str, Any] | None:
            try:
                async with asyncio.timeout(ANSWER_S):
                    return await client.status()
            except (MeshError, TimeoutError):
                return None

        answers = await asyncio.gather(*(ask(client) for client in self.clients))
        return {client.url: answer for client, answer in zip(self.clients, answers, strict=True)}

    async def _metrics(self) -> dict[str, dict[Sample, float]]:
        found = {}
        for client in self.clients:
            try:
                async with asyncio.timeout(ANSWER_S):
                    found[client.url] = parse_metrics(await client.metrics())
            except (MeshError, TimeoutError):
                continue
        return found
