"""The site-loss drill from beginning to end: calm, the blow, the site away, its return, report.

Every node of the site dies at once, as by SIGKILL, and stays away for the drill's time
(``wire.messages.LOSE_AGENT``). Routers at the site are not harmed: a client whose router is lost
goes to another one, which ``popmesh drill chaos`` rehearses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from popmesh.drill.crowd import Crowd, CrowdConfig
from popmesh.drill.drivers import RouterDriver
from popmesh.drill.faults import Fault, Order
from popmesh.drill.ledger import Ledger, problems
from popmesh.drill.look import LOOK_S, Lookout, Route
from popmesh.drill.observation import Observation
from popmesh.drill.report import Rest, moment
from popmesh.drill.site_loss.account import spill, stretch
from popmesh.drill.site_loss.report import SCHEMA, SiteLossReport
from popmesh.drill.site_loss.watch import Capacity, SiteWatch
from popmesh.drill.statistics import quantiles
from popmesh.drill.stream import Caller
from popmesh.drill.world import RECOVERY_S, MeshSeen, NodeSeen, may_lose
from wire.errors import ConfigError, MeshError
from wire.messages import LOSE_AGENT

STEADY_S = 10.0
"""Length of the stretches before the blow and after the return. Guess: each client gets several
answers in it."""


@dataclass(frozen=True, slots=True)
class Config(CrowdConfig):
    """What the operator asked for; times in seconds. ``alone``: though nobody else could answer."""

    site: str
    away_s: float
    alone: bool


class SiteLoss:
    """One drill; ``say`` tells a person how it goes. Used inside a running loop, once."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._crowd = Crowd(config, say)
        self._ledger = Ledger()
        self._routes: dict[str, list[Route]] = {}
        self._watch = SiteWatch(config.model, ())
        self._answered_at: float | None = None
        self._marks: list[tuple[str, float, float, Capacity]] = []

    async def run(self) -> SiteLossReport:
        """All of it; raises ``MeshError`` when the drill cannot be held."""
        config = self._config
        started = moment()
        async with self._crowd.connected(None, lambda seen, stage: None) as (caller, lookout):
            name, mesh = await lookout.first()
            nodes = self._pick(mesh)
            await self._check_willing(lookout, nodes)
            self._watch = SiteWatch(config.model, nodes)
            self._announce(name, mesh, nodes)
            await self._crowd.ask_undisturbed(caller)
            await lookout.count()
            struck_at = await self._under_load(caller, lookout)
            rest = await lookout.rest()
            await lookout.count()
        return self._report(started, name, nodes, struck_at, rest, lookout.recoveries())

    def _pick(self, mesh: MeshSeen) -> list[str]:
        """The site's nodes with the model; raises ``ConfigError`` unless they may be lost."""
        config = self._config
        nodes = [node.name for node in mesh.nodes if node.site == config.site]
        if not nodes:
            sites = sorted({node.site for node in mesh.nodes})
            raise ConfigError(
                f"no node is at site {config.site!r}", suggestion=f"known: {', '.join(sites)}"
            )
        known = {node.name: node for node in mesh.nodes}
        if not config.alone and not may_lose(frozenset(nodes), known, frozenset(), len(nodes)):
            raise ConfigError(
                f"without {config.site} nobody could answer for some model that it serves",
                suggestion="pass --alone if that does not matter",
            )
        return nodes

    async def _check_willing(self, lookout: Lookout, nodes: list[str]) -> None:
        """Raises ``ConfigError`` unless all of them take part."""
        refusals = await RouterDriver(lookout.clients, self._config.model).refusals(nodes)
        if refusals:
            raise ConfigError(
                "; ".join(refusals.values()), suggestion="a site is lost only as a whole"
            )

    def _announce(self, mesh: str, seen: MeshSeen, nodes: list[str]) -> None:
        config = self._config
        self._say(
            f"Mesh {mesh}: site {config.site} is lost for {config.away_s:g} s, that is "
            f"{', '.join(nodes)} of {len(seen.nodes)} nodes, while {config.streams} clients ask "
            f"{config.model} (seed {config.seed}). Routers are not harmed."
        )

    # ---- under load ----------------------------------------------------------------------------

    async def _under_load(self, caller: Caller, lookout: Lookout) -> float:
        """Returns when the blow fell."""
        async with asyncio.TaskGroup() as tasks:
            looking = tasks.create_task(self._look(lookout))
            for number in range(self._config.streams):
                tasks.create_task(self._crowd.keep_asking(number, caller, lookout, self._answered))
            try:
                struck_at = await self._events(lookout)
            finally:
                self._crowd.is_closing = True
            looking.cancel()
            self._say("The last answers end.")
        return struck_at

    async def _events(self, lookout: Lookout) -> float:
        """Before, the blow, away, coming back, after."""
        config = self._config
        calm_at = self._crowd.now()
        await asyncio.sleep(STEADY_S)
        struck_at = await self._strike(lookout)
        self._mark("before", calm_at, struck_at)
        back_at = struck_at + config.away_s
        await asyncio.sleep(max(back_at - self._crowd.now(), 0.0))
        self._mark("lost", struck_at, back_at)
        self._say(f"{self._crowd.now():7.1f} s  {config.site} may start again")
        await self._wait_whole(lookout, back_at)
        whole_at = self._crowd.now()
        self._mark("coming back", back_at, whole_at)
        await asyncio.sleep(STEADY_S)
        self._mark("after", whole_at, self._crowd.now())
        return struck_at

    def _mark(self, name: str, start_at: float, end_at: float) -> None:
        self._marks.append((name, start_at, end_at, self._watch.capacity))

    async def _strike(self, lookout: Lookout) -> float:
        """All nodes at once; returns when the first order was given. Raises ``MeshError``."""
        config = self._config
        driver = RouterDriver(lookout.clients, config.model)
        fault = Fault(LOSE_AGENT, "node", config.away_s, "dies and stays away")
        self._watch.struck(await lookout.mesh())
        struck_at = self._crowd.now()
        async with asyncio.TaskGroup() as tasks:
            for number, node in enumerate(self._watch.nodes, 1):
                order = Order(number, fault, node, "any")
                self._ledger.ordered(order, self._crowd.now())
                tasks.create_task(driver.strike(order))
        self._say(f"{struck_at:7.1f} s  {config.site} is lost")
        return struck_at

    async def _wait_whole(self, lookout: Lookout, back_at: float) -> None:
        """Until the site's nodes are ready again, and one answered; or their time is over."""
        deadline = back_at + RECOVERY_S
        missing = set(self._watch.nodes)
        while self._crowd.now() < deadline and (missing or self._answered_at is None):
            mesh = await lookout.mesh()
            for node in sorted(missing & self._watch.reborn(mesh)):
                missing.discard(node)
                after_s = self._crowd.now() - self._ledger.faults[0].at_s
                self._ledger.recovered(list(self._watch.nodes).index(node) + 1, after_s)
                self._say(f"{self._crowd.now():7.1f} s  {node} is ready again")
            if self._answered_at is None:
                await self._probe(lookout, mesh)
            if missing or self._answered_at is None:
                await asyncio.sleep(LOOK_S)
        for node in sorted(missing):
            number = list(self._watch.nodes).index(node) + 1
            self._ledger.missing(number, f"{node} was not ready {RECOVERY_S:.0f} s after its time")

    async def _probe(self, lookout: Lookout, mesh: MeshSeen) -> None:
        """Have a node of the site answer, together with another one where it has only one role."""
        ready = [node for node in mesh.nodes if node.ready]
        back = self._watch.reborn(mesh)
        for one in (node for node in ready if node.name in back):
            prefill, decode = _with_role(one, "prefill", ready), _with_role(one, "decode", ready)
            if prefill is None or decode is None:
                continue
            try:
                await lookout.clients[0].complete_pinned(self._config.model, prefill, decode)
            except MeshError:
                continue
            self._answered_at = self._crowd.now()
            return

    async def _look(self, lookout: Lookout) -> None:
        while True:
            statuses = await lookout.statuses()
            self._watch.look(statuses, lookout.seen(statuses), self._crowd.now())
            await lookout.count()
            await asyncio.sleep(LOOK_S)

    def _answered(self, seen: Observation, routes: list[Route]) -> None:
        self._routes[seen.request_id] = routes
        self._ledger.over(seen)

    # ---- afterwards ----------------------------------------------------------------------------

    def _report(
        self,
        started: str,
        mesh: str,
        nodes: list[str],
        struck_at: float,
        rest: Rest,
        recoveries: dict[str, int],
    ) -> SiteLossReport:
        config, watch = self._config, self._watch
        answers = self._ledger.judged(self._crowd.references, self._crowd.now())
        back_at = struck_at + config.away_s
        late = spill(self._ledger.seen, self._routes, nodes, struck_at, back_at)
        wrong = problems(answers, self._ledger.faults, rest, rest, config.exact)
        if watch.noticed_at is None:
            wrong.append("no router noticed that the site was lost")
        if self._answered_at is None:
            wrong.append("no answer came from the site after its return")
        return SiteLossReport(
            schema=SCHEMA,
            started=started,
            mesh=mesh,
            routers=list(config.urls),
            model=config.model,
            site=config.site,
            nodes=nodes,
            seed=config.seed,
            streams=config.streams,
            exact=config.exact,
            deadline_s=config.deadline_s,
            away_s=config.away_s,
            duration_s=round(self._crowd.now(), 3),
            passed=not wrong,
            problems=wrong,
            struck_at_s=round(struck_at, 4),
            back_at_s=round(back_at, 4),
            noticed_s=_since(watch.noticed_at, struck_at),
            spill_s=round(late.last_s, 4),
            spilled=late.count,
            whole_s=_since(watch.whole_at, back_at),
            answered_s=_since(self._answered_at, back_at),
            verdicts=dict(answers.verdicts),
            pauses=quantiles(pause.length_s for pause in answers.pauses),
            stretches=[
                stretch(name, start, end, self._ledger.seen, self._crowd.references, left)
                for name, start, end, left in self._marks
            ],
            recoveries=recoveries,
            rest=rest,
            faults=self._ledger.faults,
            asks=self._crowd.rows(),
            answers=answers.rows,
        )


def _with_role(one: NodeSeen, role: str, ready: Sequence[NodeSeen]) -> str | None:
    """``one`` if it has the role, else somebody who does."""
    return next((node.name for node in (one, *ready) if role in node.roles), None)


def _since(at: float | None, start_at: float) -> float | None:
    return None if at is None else round(at - start_at, 4)
