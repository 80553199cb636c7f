"""Who carries an order out: a router of the mesh, or this machine itself.

A driver returns once the harm is done or under way, and raises ``MeshError`` when it was not.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from popmesh.client import MeshClient
from popmesh.drill.faults import Order
from popmesh.drill.local import LocalMesh
from popmesh.links.control import both_ways, cut, disturb, heal
from popmesh.links.plan import LinkFault, read_link_plan
from wire.errors import ConfigError, MeshError, PeerError, RequestError
from wire.messages import NO_FAULT

STRIKE_S = 10.0
"""Longest time for an order to be taken. Guess: a round trip or two through a busy router."""

SLOW_SHARE = 0.01
LOSS_SHARE = 0.05
"""Of a link's rate that is left, of its packets that are lost."""


class FaultDriver(Protocol):
    """Does harm."""

    async def strike(self, order: Order) -> None:
        """Carry out one order; raises ``MeshError``."""


class RouterDriver:
    """Faults of nodes, through ``POST /popmesh/drill`` of whichever router takes it."""

    def __init__(self, clients: Sequence[MeshClient], model: str) -> None:
        self._clients = clients
        self._model = model

    async def strike(self, order: Order) -> None:
        """Carry out one order; raises ``MeshError``."""
        await self._tell(order.victim, order.fault.name, order.fault.duration_s)

    async def refusals(self, nodes: Iterable[str]) -> dict[str, str]:
        """Those of ``nodes`` that take no part in drills, with their words; raises ``MeshError``
        where it cannot be learnt, or this person may not ask."""
        names = list(nodes)
        words = await asyncio.gather(*map(self._refusal, names))
        return {name: said for name, said in zip(names, words, strict=True) if said}

    async def _refusal(self, node: str) -> str:
        """Why it takes no part, or nothing."""
        try:
            async with asyncio.timeout(STRIKE_S):
                await self._tell(node, NO_FAULT, 0.0)
        except RequestError as exc:
            if exc.code != "drill_refused":
                raise
            return exc.message
        except TimeoutError as exc:
            raise PeerError(f"{node} does not say whether it takes part in drills") from exc
        return ""

    async def _tell(self, node: str, fault: str, duration_s: float) -> None:
        """Tell one router; another one where that one does not answer."""
        problem: MeshError = ConfigError("no router is known")
        for client in self._clients:
            try:
                await client.drill(node, fault, self._model, duration_s)
                return
            except RequestError:
                raise
            except MeshError as exc:
                problem = exc
        raise PeerError(str(problem)) from problem


class LocalDriver:
    """Faults of routers and links of a mesh that ``popmesh up`` runs on this machine."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh

    async def strike(self, order: Order) -> None:
        """Send the signal, or change the plan; a broken link is healed when its time is over."""
        if order.fault.target == "router":
            self._kill(order.victim)
            return
        shaper = self._mesh.read().shaper
        if shaper is None:
            raise ConfigError("links are not emulated", suggestion="leave --no-emulate-links out")
        plan = Path(shaper.plan)
        a, _, b = order.victim.partition("~")
        if order.fault.name == "cut":
            await asyncio.to_thread(cut, plan, a, b)
            return
        await asyncio.to_thread(disturb, plan, *link_faults(plan, order.fault.name, a, b))

    async def repair(self, order: Order) -> None:
        """Heal the link of an order whose time is over."""
        shaper = self._mesh.read().shaper
        if shaper is not None:
            a, _, b = order.victim.partition("~")
            await asyncio.to_thread(heal, Path(shaper.plan), a, b)

    def _kill(self, url: str) -> None:
        pid = self._mesh.router_pids().get(url)
        if pid is None:
            raise ConfigError(f"the ready file knows no router at {url}")
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError as exc:
            raise PeerError(f"cannot kill the router at {url}: {exc.strerror}") from exc


def link_faults(plan: Path, name: str, a: str, b: str) -> tuple[LinkFault, ...]:
    """The plan's form of a fault between two sites; one-way hits what ``a`` sends to ``b``."""
    match name:
        case "partition":
            return both_ways(a, b, down=True)
        case "one-way":
            return (LinkFault(a, b, down=True),)
        case "slow":
            link = read_link_plan(plan).by_pair()[frozenset((a, b))]
            return both_ways(a, b, bandwidth_mbps=link.bandwidth_mbps * SLOW_SHARE)
        case "loss":
            return both_ways(a, b, loss=LOSS_SHARE)
        case _:
            raise ConfigError(f"no link fault is called {name!r}")
