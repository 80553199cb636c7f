"""The chaos drill from beginning to end: references, a calm wave, faults under load, rest, report.

A shell. What decides is elsewhere: ``plan`` (who is harmed when), ``check`` (was an answer right),
``ledger`` (was the drill passed).
"""

from __future__ import annotations

import asyncio
import datetime
import random
from collections.abc import Callable
from dataclasses import dataclass

from popmesh.drill import plan
from popmesh.drill.crowd import ask_references, calm_wave, keep_asking
from popmesh.drill.drivers import LocalDriver, RouterDriver
from popmesh.drill.faults import Fault, Stage
from popmesh.drill.ledger import Answers, Ledger, outages, problems
from popmesh.drill.local import LocalMesh
from popmesh.drill.look import LOOK_S, Lookout
from popmesh.drill.observation import Observation
from popmesh.drill.report import SCHEMA, Report, Rest, ask_row
from popmesh.drill.statistics import quantiles
from popmesh.drill.stream import Caller, session
from popmesh.drill.strikes import Striker
from popmesh.drill.workload import make_asks
from wire.errors import PeerError

ASKS = 32
"""Different requests: few enough to ask them all beforehand, enough to outgrow a small cache."""

RECOVERIES = "popmesh_router_recoveries_total"


@dataclass(frozen=True, slots=True)
class Config:
    """What the operator asked for; times in seconds. ``local``: the mesh runs on this machine."""

    urls: tuple[str, ...]
    api_key: str | None
    operator_key: str | None
    model: str
    faults: tuple[Fault, ...]
    duration_s: float
    streams: int
    every_s: float
    kills: int | None
    max_down: int
    deadline_s: float
    seed: int
    exact: bool
    local: LocalMesh | None


class Chaos:
    """One drill; ``say`` tells a person how it goes. Used inside a running loop, once."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._asks = make_asks(ASKS, random.Random(f"asks {config.seed}"))
        self._references: dict[int, Observation] = {}
        self._calm = Answers()
        self._ledger = Ledger()
        self._striker: Striker | None = None
        self._closing = False

    async def run(self) -> Report:
        """All of it; raises ``MeshError`` when the drill cannot be held."""
        config = self._config
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        key = config.operator_key or config.api_key
        async with (
            session(config.api_key, config.streams) as http,
            Lookout(config.urls, key, config.model, config.local) as lookout,
        ):
            name, mesh = await lookout.first()
            self._announce(name, len(mesh.nodes))
            caller = Caller(
                http, config.urls, config.model, config.deadline_s, self._now, self._stream_at
            )
            await self._ask_references(caller)
            await self._calm_wave(caller)
            before = await lookout.rest()
            if before.busy:
                raise PeerError(f"the mesh does not come to rest: {'; '.join(before.busy)}")
            await lookout.count()
            await self._under_faults(caller, lookout)
            after = await lookout.rest()
            await lookout.count()
        return self._report(started, name, before, after, lookout.growth.of(RECOVERIES))

    def _now(self) -> float:
        return self._loop.time() - self._began

    def _announce(self, name: str, num_nodes: int) -> None:
        config = self._config
        often = f"for {config.duration_s:.0f} s"
        if config.kills is not None:
            often = f"until {config.kills} faults were done, at most {config.duration_s:.0f} s"
        self._say(
            f"Mesh {name}: {num_nodes} nodes, {len(config.urls)} routers. {config.streams} clients "
            f"ask {config.model} while these faults are done {often} (seed {config.seed}):"
        )
        for fault in config.faults:
            lasts = f", {fault.duration_s:.0f} s each" if fault.duration_s else ""
            self._say(f"  {fault.name}: {fault.summary}{lasts}")
        self._say(f"At most {config.max_down} out at a time, never the last node of a role.")

    # ---- without faults ------------------------------------------------------------------------

    async def _ask_references(self, caller: Caller) -> None:
        self._say(f"Asking {len(self._asks)} requests undisturbed, to compare with.")
        self._references = await ask_references(self._asks, caller)

    async def _calm_wave(self, caller: Caller) -> None:
        clients, seed = self._config.streams, self._config.seed
        self._say(f"Asking undisturbed, {clients} at a time.")
        self._calm = await calm_wave(self._asks, self._references, caller, clients, seed)

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
        )
        rng = random.Random(f"faults {config.seed}")
        striker = self._striker = Striker(
            plan.Conductor(settings, rng, self._now()),
            RouterDriver(lookout.clients, config.model),
            LocalDriver(config.local) if config.local is not None else None,
            self._ledger,
            self._now,
            self._say,
        )
        async with asyncio.TaskGroup() as tasks:
            watching = tasks.create_task(self._watch(striker, lookout))
            for number in range(config.streams):
                tasks.create_task(self._client(number, caller, lookout))
            await striker.run(config.duration_s)
            watching.cancel()
            self._closing = True
            self._say("No more faults. The last answers end.")

    async def _watch(self, striker: Striker, lookout: Lookout) -> None:
        while True:
            striker.notice(await lookout.mesh())
            await lookout.count()
            await asyncio.sleep(LOOK_S)

    async def _client(self, number: int, caller: Caller, lookout: Lookout) -> None:
        async def answered(seen: Observation) -> None:
            seen.attempts = len(await lookout.routes(seen.url, seen.request_id))
            self._ledger.over(seen)

        seed = self._config.seed
        await keep_asking(number, self._asks, caller, seed, answered, lambda: self._closing)

    def _stream_at(self, seen: Observation, stage: Stage) -> None:
        if self._striker is not None and not self._closing:
            self._striker.notice(plan.StreamAt(stage, seen.nodes))

    # ---- afterwards ----------------------------------------------------------------------------

    def _report(
        self, started: str, name: str, before: Rest, after: Rest, recoveries: dict[str, float]
    ) -> Report:
        config, ledger, calm = self._config, self._ledger, self._calm
        answers = ledger.judged(self._references, self._now())
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
            duration_s=round(self._now(), 3),
            passed=not wrong,
            problems=wrong,
            verdicts=dict(answers.verdicts),
            calm_verdicts=dict(calm.verdicts),
            tokens=answers.tokens,
            resumed=answers.resumed,
            recoveries={kind: int(count) for kind, count in recoveries.items()},
            gaps=answers.gaps(),
            calm_gaps=calm.gaps(),
            ttft=answers.ttft(),
            calm_ttft=calm.ttft(),
            pauses=quantiles(pause.length_s for pause in answers.pauses),
            outages=outages(ledger.faults),
            before=before,
            after=after,
            faults=ledger.faults,
            asks=[ask_row(ask, self._references[ask.number]) for ask in self._asks],
            answers=answers.rows,
        )
