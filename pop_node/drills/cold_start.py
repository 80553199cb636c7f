"""The cold-start drill on its node: take the model down, drop its pages, look, start it, report.

Harmless, so any node takes it: what runs ends first, the router has seen to it that others serve,
and the model is started again whatever goes wrong. How a model is taken down and started is the
node's business (``ColdStartHost``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from pop_node.drills.libraries import library_files
from pop_node.drills.pages import drop_pages, mapped_files
from pop_node.drills.rebirth import Rebirth, Reborn, cold_of
from pop_node.drills.report import SCHEMA, Cold, ColdStartReport, Options, Phase, Source
from pop_node.engine.start_clock import Span, made_at
from wire.errors import ConfigError, MeshError, PeerError
from wire.messages import MAX_COLD_START_MS, Drill, DrillReport, DrillStarted

log = logging.getLogger(__name__)

VERSION = 3
"""Of the mesh wire, from which on a router can hear a report."""

MAX_ERROR_CHARS = 2000


class ColdStartHost(Protocol):
    """What the drill needs of its node."""

    @property
    def name(self) -> str:
        """The node's name."""

    def problem(self, model: str) -> str:
        """Why this model cannot be taken down now (not served here, draining, starting), or
        nothing."""

    def bundle_path(self, model: str) -> Path:
        """The directory of its bundle. Raises ``ConfigError`` when it is not on the disk."""

    def engine_pid(self, model: str) -> int | None:
        """The process that has the model in memory, if one does."""

    async def take_down(self, model: str) -> None:
        """Say "not ready", let its legs end (a bounded time), then end its process; a process that
        stands by with everything imported is ended as well. Nobody starts it before ``start``."""

    async def start(self, model: str, source: Source) -> Sequence[Span]:
        """Start it in a new process and wait until it has produced a token; its phases since that
        process was made, or since the fetch before it began.

        "peer" and "origin": it is no longer on the disk and is brought from there alone, which is a
        phase "fetch". Raises ``MeshError`` when it does not come up; it is tried on then, as after
        any crash.
        """


Say = Callable[[DrillStarted | DrillReport], None]
PutAside = Callable[[str], contextlib.AbstractContextManager[None]]


class ColdStarts:
    """Carries cold starts out, one at a time.

    ``aside`` puts a model's bundle away while it is brought from elsewhere, and back at the end
    unless another copy is in its place; None: this node brings nothing. ``leave`` drains the node
    and has its process do what it is told then. ``reborn``: this process has come from that.
    """

    def __init__(
        self,
        host: ColdStartHost,
        tasks: asyncio.TaskGroup,
        aside: PutAside | None = None,
        leave: Callable[[Rebirth], None] | None = None,
        reborn: Reborn | None = None,
    ) -> None:
        self._host = host
        self._tasks = tasks
        self._aside = aside
        self._leave = leave
        self._reborn = reborn
        self._born_at = time.monotonic()
        self._running = ""
        self._is_down = False

    def start(self, drill: Drill, version: int, say: Say) -> None:
        """Begin, or refuse: ``DrillStarted`` is said at once, ``DrillReport`` when it is over.

        ``version`` is that of the link to the router that asks.
        """
        problem, options = "", Options()
        try:
            options = msgspec.json.decode(drill.options or "{}", type=Options)
        except msgspec.DecodeError as exc:
            problem = f"the options of the drill are not understood: {exc}"
        problem = problem or self._problem(drill, version, options)
        say(DrillStarted(drill.number, problem))
        if not problem:
            self._running = drill.model
            hold = self._go if options.whole else self._hold
            self._tasks.create_task(hold(drill, options, say))

    def _problem(self, drill: Drill, version: int, options: Options) -> str:
        if version < VERSION:
            return f"the router speaks version {version} of the mesh wire, a report needs {VERSION}"
        if not 0 < drill.duration_ms <= MAX_COLD_START_MS:
            return f"a cold start may take up to {MAX_COLD_START_MS} ms, not {drill.duration_ms}"
        if self._running:
            return f"a cold start of {self._running} is running already"
        if options.source != "disk" and self._aside is None:
            return f"this node brings no model from {options.source}"
        if options.recall:
            known = self._reborn is not None and self._reborn.number == options.recall
            return "" if known else f"no drill {options.recall} has led to this process"
        if options.whole and (self._leave is None or options.source != "disk"):
            return "a whole node starts from its disk, where somebody can start it anew"
        return self._host.problem(drill.model)

    async def _hold(self, drill: Drill, options: Options, say: Say) -> None:
        report, error = b"", ""
        log.warning("drill: cold start of %s from %s", drill.model, options.source)
        try:
            async with asyncio.timeout(drill.duration_ms / 1000):
                if options.recall:
                    done = await self._recall()
                else:
                    done = await self._cold_start(drill.model, options)
            report = msgspec.json.encode(done)
        except TimeoutError:
            error = f"{drill.model} did not answer within {drill.duration_ms / 1000:g} s"
        except (MeshError, OSError) as exc:
            error = str(exc)
        if error:
            log.error("drill: cold start of %s: %s", drill.model, error)
        say(DrillReport(drill.number, report, error[:MAX_ERROR_CHARS]))
        if self._is_down:
            await self._start_again(drill.model)
        self._running = ""

    async def _cold_start(self, model: str, options: Options) -> ColdStartReport:
        host = self._host
        bundle = host.bundle_path(model)
        bundle_bytes = _nbytes(_files(bundle))
        libraries: list[Path] = []
        if options.libraries:
            libraries = await asyncio.to_thread(_libraries, host.engine_pid(model))
        began = time.monotonic()
        put_aside = contextlib.ExitStack()
        try:
            self._is_down = True
            await host.take_down(model)
            down_at = time.monotonic()
            cold = await self._make_cold(model, bundle, libraries, options, put_aside)
            started_at = time.monotonic()
            self._is_down = options.source != "disk"  # a fetch may fail before there is a start
            spans = await host.start(model, options.source)
            self._is_down = False
            total_s = time.monotonic() - started_at
        finally:
            await asyncio.to_thread(put_aside.close)
        return ColdStartReport(
            schema=SCHEMA,
            node=host.name,
            model=model,
            source=options.source,
            bundle=bundle.name,
            bundle_bytes=bundle_bytes,
            cold=cold,
            down_s=down_at - began,
            drop_s=started_at - down_at,
            phases=[Phase(*span) for span in spans],
            total_s=total_s,
            said_s=time.monotonic() - started_at,
            load_average=os.getloadavg()[0],
        )

    # ---- the whole node ------------------------------------------------------------------------

    async def _go(self, drill: Drill, options: Options, say: Say) -> None:
        """Leave; the process that comes back will be asked how it went."""
        assert self._leave is not None, "checked before"
        began = time.monotonic()
        try:
            bundle = self._host.bundle_path(drill.model)
            files = _files(bundle)
            bundle_bytes = _nbytes(files)
        except (MeshError, OSError) as exc:
            say(DrillReport(drill.number, b"", str(exc)[:MAX_ERROR_CHARS]))
            self._running = ""
            return
        rebirth = Rebirth(
            number=drill.number,
            model=drill.model,
            bundle=bundle.name,
            bundle_bytes=bundle_bytes,
            files=[str(file) for file in files],
            libraries=options.libraries,
            command=sys.orig_argv,
            began_at=began,
        )
        log.warning("drill: this node starts anew, %s from cold", drill.model)
        self._leave(rebirth)

    async def _recall(self) -> ColdStartReport:
        """The start of this process, once the model is up. Raises ``PeerError`` when it was not
        cold."""
        reborn, host = self._reborn, self._host
        assert reborn is not None, "checked before"
        if reborn.problem:
            raise _not_cold(reborn.model, reborn.problem)
        spans = await host.start(reborn.model, "disk")  # it is being started already
        pid = host.engine_pid(reborn.model)
        engine_s = (made_at(pid) if pid is not None else time.monotonic()) - reborn.started_at
        phases = [Phase("agent", 0.0, self._born_at - reborn.started_at)]
        phases += [Phase(name, a + engine_s, b + engine_s, size) for name, a, b, size in spans]
        return ColdStartReport(
            schema=SCHEMA,
            node=host.name,
            model=reborn.model,
            source="disk",
            bundle=reborn.bundle,
            bundle_bytes=reborn.bundle_bytes,
            cold=reborn.cold,
            down_s=reborn.down_s,
            drop_s=reborn.drop_s,
            phases=phases,
            total_s=max(phase.end_s for phase in phases),
            said_s=time.monotonic() - reborn.started_at,
            load_average=os.getloadavg()[0],
        )

    # ---- one model -----------------------------------------------------------------------------

    async def _make_cold(
        self,
        model: str,
        bundle: Path,
        libraries: list[Path],
        options: Options,
        put_aside: contextlib.ExitStack,
    ) -> Cold:
        """Raises ``PeerError`` when pages of the model stay: what follows would not be cold."""
        cold_libraries = await asyncio.to_thread(drop_pages, libraries) if libraries else None
        if options.source != "disk":
            assert self._aside is not None, "checked before"
            await asyncio.to_thread(put_aside.enter_context, self._aside(model))
            return cold_of(None, cold_libraries)
        cold_model = await asyncio.to_thread(drop_pages, _files(bundle))
        if cold_model.resident:
            raise _not_cold(model, cold_model.why())
        return cold_of(cold_model, cold_libraries)

    async def _start_again(self, model: str) -> None:
        self._is_down = False
        try:
            await self._host.start(model, "disk")
        except MeshError as exc:
            log.error("%s does not come up after the drill: %s", model, exc)


def _files(bundle: Path) -> list[Path]:
    """Raises ``ConfigError`` when the bundle is gone."""
    files = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    if not files:
        raise ConfigError("there is no bundle here", where=str(bundle))
    return files


def _nbytes(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _not_cold(model: str, why: str) -> PeerError:
    return PeerError(f"{model} cannot be made cold: {why}", code="drill_failed", retryable=False)


def _libraries(engine_pid: int | None) -> list[Path]:
    """What an engine reads to start, and what this one has mapped."""
    mapped = mapped_files(engine_pid) if engine_pid is not None else []
    return sorted({*library_files(), *mapped})
