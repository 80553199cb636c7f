"""The chaos drill from beginning to end: references, a calm wave, faults under load, rest, report.

A shell. What decides is elsewhere: ``plan`` (who is harmed when), ``check`` (was an answer right),
``ledger`` (was the drill passed).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from popmesh.drill import plan
from popmesh.drill.crowd import Crowd, CrowdConfig
from popmesh.drill.drivers import LocalDriver, RouterDriver
from popmesh.drill.faults import Fault, Stage
from popmesh.drill.ledger import Answers, Ledger, outages, problems
from popmesh.drill.local import LocalMesh
from popmesh.drill.look import LOOK_S, Lookout, Route
from popmesh.drill.observation import Observation
from popmesh.drill.report import SCHEMA, Report, Rest, moment
from popmesh.drill.statistics import quantiles
from popmesh.drill.stream import Caller
from popmesh.drill.strikes import Striker
from popmesh.render.words import counted
from wire.errors import ConfigError, PeerError


@dataclass(frozen=True, slots=True)
class Config(CrowdConfig):
    """What the operator asked for; times in seconds. ``local``: the mesh runs on this machine."""

    faults: tuple[Fault, ...]
    duration_s: float
    every_s: float
    kills: int | None
    max_down: int
    local: LocalMesh | None


class Chaos:
    """One drill; ``say`` tells a person how it goes. Used inside a running loop, once."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._crowd = Crowd(config, say)
        self._calm = Answers()
        self._ledger = Ledger()
        self._striker: Striker | None = None
        self._spared: dict[str, str] = {}

    async def run(self) -> Report:
        """All of it; raises ``MeshError`` when the drill cannot be held."""
        config = self._config
        started = moment()
        async with self._crowd.connected(config.local, self._stream_at) as (caller, lookout):
            name, mesh = await lookout.first()
            nodes = [node.name for node in mesh.nodes if self._config.model in node.models]
            self._spared = await self._refusals(lookout, nodes)
            self._announce(name, len(mesh.nodes))
            self._calm = await self._crowd.ask_undisturbed(caller)
            before = await lookout.rest()
            if before.busy:
                raise PeerError(f"the mesh does not come to rest: {'; '.join(before.busy)}")
            await lookout.count()
            await self._under_faults(caller, lookout)
            after = await lookout.rest()
            await lookout.count()
        return self._report(started, name, before, after, lookout.recoveries())

    async def _refusals(self, lookout: Lookout, nodes: list[str]) -> dict[str, str]:
        """Nodes that take no part, and why; raises ``ConfigError`` when that is all of them."""
        config = self._config
        wanted = [fault.name for fault in config.faults if fault.target == "node"]
        if not wanted:
            return {}
        refusals = await RouterDriver(lookout.clients, config.model).refusals(nodes)
        if len(refusals) == len(nodes):
            raise ConfigError(
                f"no node takes {', '.join(wanted)}: {'; '.join(refusals.values())}",
                suggestion="start those that may be harmed with --drills",
            )
        return refusals

    def _announce(self, name: str, num_nodes: int) -> None:
        config = self._config
        often = f"for {config.duration_s:.0f} s"
        if config.kills is not None:
            often = f"until {config.kills} faults were done, at most {config.duration_s:.0f} s"
        self._say(
            f"Mesh {name}: {counted(num_nodes, 'node')}, {counted(len(config.urls), 'router')}. "
            f"{config.streams} clients ask {config.model} while these faults are done {often} "
            f"(seed {config.seed}):"
        )
        for fault in config.faults:
            lasts = f", {fault.duration_s:.0f} s each" if fault.duration_s else ""
            self._say(f"  {fault.name}: {fault.summary}{lasts}")
        self._say(f"At most {config.max_down} out at a time, never the last node of a role.")
        for why in self._spared.values():
            self._say(f"Spared: {why}")

    # ---- with faults ---------------------------------------------------------------------------

    async def _under_faults(self, caller: Caller, lookout: Lookout) -> None:
        config = self._config
        settings = plan.Settings(
            faults=config.faults,
            every_s=config.every_s,
            max_down=config.max_down,
            kills=config.kills,
            ttft_s=self._calm.ttft().p50_s,
            links=config.local.links() if config.local is not None else (),
            spared=frozenset(self._spared),
        )
        rng = random.Random(f"faults {config.seed}")
        striker = self._striker = Striker(
            plan.Conductor(settings, rng, self._crowd.now()),
            RouterDriver(lookout.clients, config.model),
            LocalDriver(config.local) if config.local is not None else None,
            self._ledger,
            self._crowd.now,
            self._say,
        )
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(striker, lookout))
            for number in range(config.streams):
                tasks.create_task(self._crowd.keep_asking(number, caller, lookout, self._answered))
            await striker.run(config.duration_s)
            watching.cancel()
            self._crowd.is_closing = True
            self._say("No more faults. The last answers end.")

    async def _watch(self, striker: Striker, lookout: Lookout) -> None:
        while True:
            striker.notice(await lookout.mesh())
            await lookout.count()
            await asyncio.sleep(LOOK_S)

    def _answered(self, seen: Observation, routes: Sequence[Route]) -> None:
        self._ledger.over(seen)

    def _stream_at(self, seen: Observation, stage: Stage) -> None:
        if self._striker is not None and not self._crowd.is_closing:
            self._striker.notice(plan.StreamAt(stage, seen.nodes))

    # ---- afterwards ----------------------------------------------------------------------------

    def _report(
        self, started: str, name: str, before: Rest, after: Rest, recoveries: dict[str, int]
    ) -> Report:
        config, ledger, calm = self._config, self._ledger, self._calm
        answers = ledger.judged(self._crowd.references, self._crowd.now())
        wrong = problems(answers, ledger.faults, before, after, config.exact)
        return Report(
            schema=SCHEMA,
            started=started,
            mesh=name,
            routers=list(config.urls),
            model=config.model,
            seed=config.seed,
            streams=config.streams,
            faults_asked=[fault.name for fault in config.faults],
            exact=config.exact,
            deadline_s=config.deadline_s,
            duration_s=round(self._crowd.now(), 3),
            passed=not wrong,
            problems=wrong,
            verdicts=dict(answers.verdicts),
            calm_verdicts=dict(calm.verdicts),
            tokens=answers.tokens,
            resumed=answers.resumed,
            recoveries=recoveries,
            gaps=answers.gaps(),
            calm_gaps=calm.gaps(),
            ttft=answers.ttft(),
            calm_ttft=calm.ttft(),
            pauses=quantiles(pause.length_s for pause in answers.pauses),
            outages=outages(ledger.faults),
            before=before,
            after=after,
            faults=ledger.faults,
            asks=self._crowd.rows(),
            answers=answers.rows,
        )
