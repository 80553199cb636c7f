"""Holds a cold-start drill: one node after the other, run after run, through one router."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pop_node.drills.report import Options, Source
from popmesh.client import MeshClient
from popmesh.drill.cold_start import history
from popmesh.drill.cold_start.report import (
    SCHEMA,
    ColdStartDrill,
    RouterSaid,
    Run,
    make_run,
)
from popmesh.drill.look import LOOK_S
from popmesh.drill.report import moment
from popmesh.drill.statistics import quantiles
from wire.errors import ConfigError, PeerError

READY_S = 60.0
"""Longest wait for the mesh to be whole before a run. Guess: the run before it has just ended."""


@dataclass(frozen=True, slots=True)
class Config:
    """What the operator asked for; ``directory`` is where earlier runs are remembered."""

    url: str
    key: str | None
    model: str
    node: str | None
    site: str | None
    source: Source
    libraries: bool
    whole: bool
    runs: int
    budget_s: float | None
    longest_s: float
    alone: bool
    directory: Path


class ColdStarts:
    """One drill; ``say`` tells a person how it goes."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say

    async def run(self) -> ColdStartDrill:
        """All of it; raises ``MeshError`` when it cannot be held."""
        config = self._config
        started = moment()
        runs: list[Run] = []
        problems: list[str] = []
        async with MeshClient(config.url, config.key) as client:
            status = await client.status()
            nodes = pick_nodes(status, config.model, config.node, config.site)
            self._announce(str(status["mesh"]), nodes)
            for number in range(1, config.runs + 1):
                for node in nodes:
                    problem = await self._once(client, number, node, runs)
                    if problem:
                        problems.append(problem)
                if problems:
                    break  # a mesh in which a start failed is not asked for another
        return self._report(started, str(status["mesh"]), nodes, runs, problems)

    def _announce(self, mesh: str, nodes: list[str]) -> None:
        config = self._config
        files = "Its files" + (", Python and its libraries" if config.libraries else "")
        cold = f"{files} are dropped from memory first."
        if config.source != "disk":
            cold = "The copy on the disk is put aside meanwhile."
        what = "start anew with" if config.whole else "take down and start"
        often = "once" if config.runs == 1 else f"{config.runs} times"
        self._say(
            f"Mesh {mesh}: {', '.join(nodes)} will {what} {config.model}, {often}, from "
            f"{config.source}. {cold}"
        )

    async def _once(
        self, client: MeshClient, number: int, node: str, runs: list[Run]
    ) -> str | None:
        """One run; returns why it failed. Raises when it could not be held."""
        config = self._config
        await self._wait_ready(client, node)
        options = msgspec.to_builtins(Options(config.source, config.libraries, config.whole))
        try:
            answer = await client.cold_start(
                node, config.model, options, config.longest_s, config.alone
            )
            said = msgspec.convert(answer, RouterSaid)
        except PeerError as exc:
            if exc.code != "drill_failed":
                raise
            self._say(f"  {number}: {exc.message}")  # it names the node
            return f"run {number}: {exc.message}"
        except msgspec.ValidationError as exc:
            raise PeerError(f"{node} reports something else: {exc}") from exc
        run = make_run(number, said)
        runs.append(run)
        self._say(f"  {number}: {node}: {run.time_s:.2f} s")
        return None

    async def _wait_ready(self, client: MeshClient, node: str) -> None:
        """Until the router would send requests there; raises ``ConfigError`` if it does not."""
        try:
            async with asyncio.timeout(READY_S):
                while True:
                    if _ready(await client.status(), node, self._config.model):
                        return
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as exc:
            raise ConfigError(
                f"{self._config.model} is not ready on {node}",
                suggestion="a drill begins with a mesh that works; see 'popmesh status'",
            ) from exc

    def _report(
        self, started: str, mesh: str, nodes: list[str], runs: list[Run], problems: list[str]
    ) -> ColdStartDrill:
        config = self._config
        times = quantiles(run.time_s for run in runs)
        if config.budget_s is not None and times.max_s > config.budget_s:
            late = sum(run.time_s > config.budget_s for run in runs)
            problems = [
                *problems,
                f"{late} of {len(runs)} runs took longer than {config.budget_s:g} s; the longest "
                f"{times.max_s:.2f} s",
            ]
        report = ColdStartDrill(
            schema=SCHEMA,
            started=started,
            mesh=mesh,
            router=config.url,
            model=config.model,
            nodes=nodes,
            source=config.source,
            libraries=config.libraries,
            whole=config.whole,
            budget_s=config.budget_s,
            passed=not problems,
            problems=problems,
            times=times,
            regressions=[],
            threshold=history.THRESHOLD,
            runs=runs,
        )
        return self._remember(report)

    def _remember(self, report: ColdStartDrill) -> ColdStartDrill:
        """Compare with earlier runs, and add these."""
        new = history.lines_of(report)
        earlier = {}
        for node, lines in new.items():
            path = history.history_file(self._config.directory, report.mesh, report.model, node)
            earlier[node] = history.read_history(path)
            history.append_history(path, lines)
        report.regressions = history.regressions(new, earlier)
        return report


def pick_nodes(status: dict[str, Any], model: str, node: str | None, site: str | None) -> list[str]:
    """The nodes to be started, of a router's status; raises ``ConfigError`` if there are none."""
    nodes = status["nodes"]
    if node is not None:
        nodes = [said for said in nodes if said["name"] == node]
        missing = f"no node is called {node!r}"
        known = sorted(said["name"] for said in status["nodes"])
    else:
        nodes = [said for said in nodes if said["site"] == site]
        missing = f"no node is at site {site!r}"
        known = sorted({said["site"] for said in status["nodes"]})
    if not nodes:
        raise ConfigError(missing, suggestion=f"known: {', '.join(known) or 'none'}")
    serving = [said["name"] for said in nodes if model in _models(said)]
    if not serving:
        served = sorted({name for said in nodes for name in _models(said)})
        raise ConfigError(
            f"{node or site} does not serve {model}",
            suggestion=f"it serves {', '.join(served) or 'nothing now'}",
        )
    return serving


def _models(said: dict[str, Any]) -> list[str]:
    return [offer["name"] for offer in said["models"]]


def _ready(status: dict[str, Any], node: str, model: str) -> bool:
    return any(
        said["name"] == node
        and said["link"] == "up"
        and any(engine["model"] == model and engine["ready"] for engine in said["engines"])
        for said in status["nodes"]
    )
