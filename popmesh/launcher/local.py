"""Runs a planned mesh on this machine until its context ends.

Order up: registry, shaper, then nodes and routers together. Ready means that a pinned request
produced tokens through every node and model. Order down: routers and nodes (they deregister), then
the shaper, then the registry.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from popmesh.cache_key import make_cache_key
from popmesh.client import MeshClient
from popmesh.launcher.plan import Child, LaunchPlan, Probe
from popmesh.launcher.processes import ChildProcess
from popmesh.launcher.ready import (
    NodeStatus,
    describe,
    read_status,
    told_mistake,
    write_ready_file,
)
from popmesh.launcher.supervisor import CONFIG_EXIT_CODE, GaveUp
from popmesh.links.plan import LinkMap, write_json
from topology.dump import dump_topology
from topology.model import Address
from wire.errors import ConfigError, MeshError, PeerError

log = logging.getLogger("popmesh.launcher")

POLL_S = 0.1
"""How often files and ports of starting children are looked at: they have no way to call back."""

WATCH_S = 0.5
"""How often status files are looked at once the mesh is ready: a restart shows within it."""

START_TIMEOUT_S = 600.0
"""Longest wait for a mesh to become ready. Guess: a large model from a slow disk."""

PROBE_QUIET_S = 5.0
"""Of failing probes nothing is said so long. Guess: a busy machine's nodes are seen within it."""

PROBE_RETRY_S = 0.3
PROBE_TIMEOUT_S = 30.0
"""One probe: two tokens of a tiny prompt. It is tried again until the start times out."""

Report = Callable[[str, int, int], None]
"""``report(phase, done, total)``: phases are ``processes``, ``nodes`` and ``probes``."""


class LocalMesh:
    """A mesh that is up. ``serving`` runs it; ``say`` tells a person what its start waits for."""

    def __init__(
        self,
        plan: LaunchPlan,
        log_dir: Path,
        ready_file: Path | None,
        api_key: str | None,
        say: Callable[[str], None],
    ) -> None:
        self.plan = plan
        self.log_dir = log_dir
        self._ready_file = ready_file
        self._api_key = api_key
        self._say = say
        self._said: set[str] = set()
        self._children: dict[tuple[str, str], ChildProcess] = {}
        self._failure: MeshError | None = None
        self._main: asyncio.Task[object] | None = None

    @asynccontextmanager
    async def serving(self, report: Report) -> AsyncIterator[LocalMesh]:
        """Up and ready inside the context, gone after it.

        Raises ``ConfigError`` or ``PeerError`` when a process cannot be started, with the end of
        its log; the body is cancelled for it.
        """
        self._main = asyncio.current_task()
        self._write_files()
        self._remove_ready_file()  # of an earlier run: it would promise a mesh that is not there
        async with asyncio.TaskGroup() as tasks:
            try:
                statuses = await self._start(tasks, report)
                watch = tasks.create_task(self._watch(statuses))
                yield self
                watch.cancel()
            except asyncio.CancelledError:
                if self._failure is None or self._main is None:
                    raise
                self._main.uncancel()  # the cancellation was ours, see _gave_up
                raise self._failure from None
            finally:
                await self._stop()

    # ---- up and down ---------------------------------------------------------------------------

    def _write_files(self) -> None:
        files = self.plan.files
        files.directory.mkdir(parents=True, exist_ok=True)
        self.log_dir.mkdir(parents=True, exist_ok=True)
        files.topology.write_text(dump_topology(self.plan.topology))
        make_cache_key(files.cache_key)
        if self.plan.links is None:
            return
        write_json(files.links, self.plan.links)
        for site in self.plan.topology.sites:
            write_json(files.link_map(site), LinkMap(self.plan.links.dial_map(site)))

    async def _start(self, tasks: asyncio.TaskGroup, report: Report) -> dict[str, NodeStatus]:
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._start_processes(tasks, report)
                return await self._become_ready(report)
        except TimeoutError as exc:
            raise PeerError(
                f"the mesh was not ready after {START_TIMEOUT_S:.0f} s; logs: {self.log_dir}"
            ) from exc

    async def _start_processes(self, tasks: asyncio.TaskGroup, report: Report) -> None:
        total = len(self.plan.children)
        for number, child in enumerate(self.plan.children):
            report("processes", number, total)
            path = self.log_dir / f"{child.kind}-{child.name}.log"
            process = ChildProcess(child, path, self._gave_up)
            self._children[child.kind, child.name] = process
            tasks.create_task(process.run())
            if child.kind in ("registry", "links"):
                await _wait_listening(child.listens)
                process.healthy()
        report("processes", total, total)

    async def _stop(self) -> None:
        self._remove_ready_file()
        for kinds in (("router", "node"), ("links",), ("registry",)):
            async with asyncio.TaskGroup() as stops:
                for process in self._of_kinds(kinds):
                    stops.create_task(process.stop())

    def _of_kinds(self, kinds: Sequence[str]) -> list[ChildProcess]:
        return [process for (kind, _), process in self._children.items() if kind in kinds]

    def _gave_up(self, process: ChildProcess, effect: GaveUp) -> None:
        child: Child = process.child
        text = f"{child.kind} {child.name} does not start"
        if effect.code == CONFIG_EXIT_CODE:
            error: MeshError = ConfigError(f"{text}:\n{process.log_tail()}")
        else:
            error = PeerError(
                f"{text} (exit code {effect.code}, {effect.tries} tries); the end of "
                f"{process.log_path}:\n{process.log_tail()}"
            )
        if self._failure is None and self._main is not None:
            self._failure = error
            self._main.cancel()

    # ---- ready ---------------------------------------------------------------------------------

    async def _become_ready(self, report: Report) -> dict[str, NodeStatus]:
        total, probes = len(self.plan.topology.nodes), self.plan.probes
        others = self._of_kinds(("router", "links"))
        while True:
            while len(statuses := self._statuses()) < total:
                report("nodes", len(statuses), total)
                self._check_engines()
                await asyncio.sleep(POLL_S)
            report("nodes", total, total)
            async with MeshClient(self.plan.router_url, self._api_key) as client:
                for done, probe in enumerate(probes):
                    report("probes", done, len(probes))
                    await self._probe(client, probe)
            if self._statuses() == statuses and len(self._pids()) == len(others):
                break  # nobody was restarted meanwhile
        report("probes", len(probes), len(probes))
        for process in self._of_kinds(("router", "node")):
            process.healthy()
        return self._publish(statuses)

    async def _probe(self, client: MeshClient, probe: Probe) -> None:
        """Ask until tokens come: a router needs a moment to see a node, more than that is said."""
        began = asyncio.get_running_loop().time()
        while problem := await _probe_once(client, probe):
            if asyncio.get_running_loop().time() - began >= PROBE_QUIET_S:
                self._say_once(f"node {probe.node} does not answer for {probe.model}: {problem}")
            await asyncio.sleep(PROBE_RETRY_S)

    async def _watch(self, published: dict[str, NodeStatus]) -> None:
        """Keep the ready file true: processes by their new ids, a restarted node once a token came
        through it. Nobody's absence keeps the others out."""
        published_pids = self._pids()
        while True:
            await asyncio.sleep(WATCH_S)
            pids = published_pids | self._pids()
            if pids != published_pids:
                published, published_pids = self._publish(published, pids), pids
            again = {
                name: status
                for name, status in self._statuses().items()
                if status != published.get(name)
            }
            answering = [name for name in again if await self._answers(name)]
            now = self._statuses()
            found = {name: again[name] for name in answering if now.get(name) == again[name]}
            if found:
                published = self._publish(published | found, published_pids)

    async def _answers(self, node: str) -> bool:
        """Does a token come through every model of a node?"""
        async with MeshClient(self.plan.router_url, self._api_key) as client:
            for probe in self.plan.probes:
                if probe.node == node and await _probe_once(client, probe):
                    return False
        return True

    def _pids(self) -> dict[tuple[str, str], int]:
        """The routers and the shaper that run now, by (kind, name)."""
        processes = self._of_kinds(("router", "links"))
        return {(p.child.kind, p.child.name): p.pid for p in processes if p.pid is not None}

    def _statuses(self) -> dict[str, NodeStatus]:
        """The nodes that say that they are ready."""
        return {name: status for name, status in self._told().items() if status.ready}

    def _told(self) -> dict[str, NodeStatus]:
        """What nodes say of themselves."""
        found = {}
        for name in self.plan.topology.nodes:
            status = read_status(self.plan.files.status(name), self._children["node", name].pid)
            if status is not None:
                found[name] = status
        return found

    def _check_engines(self) -> None:
        """Nobody waits in silence: says what is tried again, each thing once, and raises
        ``ConfigError`` when an engine will never start."""
        for name, status in self._told().items():
            mistake = told_mistake(status)
            if mistake is not None:
                raise ConfigError(f"node {name} cannot serve {mistake}")
            for engine in status.engines:
                if engine.problem:
                    self._say_once(f"node {name} has no {engine.model} yet: {engine.problem}")

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)

    def _remove_ready_file(self) -> None:
        if self._ready_file is not None:
            self._ready_file.unlink(missing_ok=True)

    def _publish(
        self, statuses: dict[str, NodeStatus], pids: dict[tuple[str, str], int] | None = None
    ) -> dict[str, NodeStatus]:
        if self._ready_file is not None:
            pids = self._pids() if pids is None else pids
            write_ready_file(self._ready_file, describe(self.plan, statuses, pids))
        return statuses


async def _wait_listening(address: Address) -> None:
    while True:
        try:
            _, writer = await asyncio.open_connection(address.host, address.port)
        except OSError:
            await asyncio.sleep(POLL_S)
            continue
        writer.close()
        return


async def _probe_once(client: MeshClient, probe: Probe) -> str:
    """Why no token came, or nothing."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await client.complete_pinned(probe.model, probe.prefill, probe.decode)
    except (MeshError, TimeoutError) as exc:
        if isinstance(exc, MeshError) and exc.code == "invalid_api_key":
            raise  # asking again will not help
        log.debug("probe of %s: %s", probe.node, exc)
        return str(exc) or f"nothing came in {PROBE_TIMEOUT_S:.0f} s"
    return ""
