"""A whole simulated mesh: builds it from a schedule, plays it, heals it, waits for rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from registry.state import RegistryState
from tests.sim import faults, invariants
from tests.sim.client_shell import SimClient
from tests.sim.clock import Process, Simulation
from tests.sim.links import End, Network
from tests.sim.node_shell import MESH, MODEL, SimNode
from tests.sim.registry_shell import SimRegistry
from tests.sim.router_shell import SimRouter
from tests.sim.schedule import SITES, WARM_UP_S, Request, Schedule, make_schedule
from topology.model import Address, Link, Model, Node, Position, Router, Site, Topology

REST_LIMIT_S = 60.0
"""After the last fault healed everything must be at rest by then: the longest waits are those of a
node for a silent router (20 s) and for a hung engine (30 s), one after the other. Half of the
deadline that most requests have, so that what only a deadline ends is noticed."""

SILENCE_S = 8.0
"""A half-open connection is noticed by then, on either side that says something."""

ENCORE_S = 3.0
"""A request takes a few hundred milliseconds when all is well."""

MAX_EVENTS = 200_000
"""A run takes some 2,000; far beyond it something goes round in circles."""

_POSITIONS = {"ams": Position(52.3, 4.8), "jfk": Position(40.6, -73.8), "sin": Position(1.4, 104.0)}


class World:
    """One run. ``run`` returns the violations of invariants."""

    def __init__(
        self, schedule: Schedule, *, lines: list[str] | None = None, hashed: bool = False
    ) -> None:
        self.schedule = schedule
        self.sim = Simulation(schedule.seed, lines=lines, hashed=hashed, max_events=MAX_EVENTS)
        self._sites = {node.name: node.site for node in schedule.nodes}
        self._sites |= {f"r{i}": site for i, site in enumerate(schedule.router_sites)}
        self._sites["registry"] = SITES[0]
        encore = () if schedule.encore is None else (schedule.encore,)
        self._sites |= {f"c{r.number}": r.site for r in (*schedule.requests, *encore)}
        self.network = Network(self.sim, self._path_of)
        self.topology = self._topology()
        self.manglers = {n.name: faults.WireMangler(self.sim.rng) for n in schedule.nodes}
        self.nodes: dict[str, SimNode] = {}
        self.routers: dict[str, SimRouter] = {}
        self.clients: list[SimClient] = []
        self.killed_routers: set[str] = set()
        self.harmed = False  # by somebody else than the schedule
        self._starts = 0
        self._to_heal: list[Callable[[], None]] = []
        self._registry_state: RegistryState | None = None
        self.registry: SimRegistry | None = None

    # ---- making --------------------------------------------------------------------------------

    def _path_of(self, a: str, b: str) -> tuple[float, float]:
        return self.schedule.latency_s[self._sites[a], self._sites[b]], self.schedule.bytes_per_s

    def _topology(self) -> Topology:
        schedule = self.schedule
        nowhere = Address("127.0.0.1", 0)
        return Topology(
            mesh=MESH,
            models={MODEL: Model(MODEL)},
            sites={name: Site(name, _POSITIONS[name], "x") for name in SITES},
            nodes={
                n.name: Node(n.name, n.site, frozenset(n.roles), (MODEL,), nowhere, nowhere)
                for n in schedule.nodes
            },
            routers={
                f"r{i}": Router(f"r{i}", site, nowhere)
                for i, site in enumerate(schedule.router_sites)
            },
            links={
                frozenset((a, b)): Link(a, b, 2e3 * latency, 8e-6 * schedule.bytes_per_s)
                for (a, b), latency in schedule.latency_s.items()
                if a < b
            },
        )

    def _process(self, host: str) -> Process:
        self._starts += 1
        return Process(self.sim, f"{host}#{self._starts}", host)

    # ---- processes -----------------------------------------------------------------------------

    def start_registry(self, remembers: bool = True) -> None:
        if self.registry is not None and self.registry.process.alive:
            return
        # A registry that remembers keeps its state on disk; its clock starts anew.
        state = self._registry_state if remembers else None
        process = self._process("registry")
        self.registry = SimRegistry(process, self.network, None)
        if state is not None:
            self.registry.state = state
        self._registry_state = self.registry.state

    def kill_registry(self) -> None:
        if self.registry is not None:
            self.registry.process.kill()

    def start_node(self, name: str) -> None:
        node = self.nodes.get(name)
        if node is not None and node.process.alive:
            return
        shape = next(n for n in self.schedule.nodes if n.name == name)
        process = self._process(name)
        with process.running():
            self.nodes[name] = SimNode(process, self.network, shape, self.manglers[name])

    def kill_node(self, name: str) -> None:
        self.nodes[name].kill()

    def start_router(self, name: str) -> None:
        router = self.routers.get(name)
        if router is not None and router.process.alive:
            return
        site = self._sites[name]
        process = self._process(name)
        with process.running():
            router = SimRouter(process, self.network, self.topology, site, f"{name}:1")
        self.routers[name] = router

    def kill_router(self, name: str) -> None:
        self.killed_routers.add(name)
        self.routers[name].kill()

    def connections_between(self, a: str, b: str) -> list[End]:
        """One end of every connection that is open between two hosts."""
        ends = [end for process in self._processes(a) for end in process.ends]
        return [end for end in ends if end.peer.process.host == b]

    def _processes(self, host: str) -> list[Process]:
        if host in self.nodes:
            return [self.nodes[host].process]
        if host in self.routers:
            return [self.routers[host].process]
        return [] if self.registry is None else [self.registry.process]

    # ---- playing -------------------------------------------------------------------------------

    def heal_at(self, when: float, heal: Callable[[], None]) -> None:
        """Call ``heal`` once: at ``when``, or at the end if that comes first."""
        self._to_heal.append(heal)
        self.sim.at(when, None, self._heal, heal)

    def _heal(self, heal: Callable[[], None]) -> None:
        if heal in self._to_heal:
            self._to_heal.remove(heal)
            heal()

    def _ask(self, request: Request) -> None:
        process = self._process(f"c{request.number}")
        client = SimClient(process, self.network, request, len(self.schedule.router_sites))
        self.clients.append(client)
        client.start()

    def run(self) -> list[str]:
        """Play everything; the violations of invariants, none when all is well."""
        schedule, sim = self.schedule, self.sim
        self.start_registry()
        for node in schedule.nodes:
            self.start_node(node.name)
        for number in range(len(schedule.router_sites)):
            self.start_router(f"r{number}")
        for request in schedule.requests:
            sim.at(request.at, None, self._ask, request)
        for fault in schedule.faults:
            sim.at(fault.at, None, faults.start, self, fault)
        sim.run(WARM_UP_S)
        last = max([r.at for r in schedule.requests] + [f.at for f in schedule.faults])
        while sim.now < last or any(c.state == "reading" for c in self.clients):
            sim.run(sim.now + 0.5)
        self._heal_all()
        problems = self._until_rest(invariants.unrest)
        if schedule.encore is not None and not problems:
            if any(fault.kind == "half_open" for fault in schedule.faults):
                sim.run(sim.now + SILENCE_S)
            problems += self._encore(replace(schedule.encore, at=sim.now))
        if schedule.patient:
            problems += self._until_rest(invariants.records)
        return [*invariants.outcomes(self), *(f"no rest: {p}" for p in problems)]

    def _encore(self, request: Request) -> list[str]:
        """One more request after everything healed; what is wrong with how it went."""
        before = [len(router.records) for router in self.routers.values()]
        self._ask(request)
        self.sim.run(self.sim.now + ENCORE_S)
        problems = self._until_rest(invariants.unrest)
        if self.clients[-1].state != "finished":
            problems.append(f"the encore: {self.clients[-1].state} {self.clients[-1].code}")
        for router, old in zip(self.routers.values(), before, strict=True):
            tries = [len(record.attempts) for record in router.records[old:]]
            if any(count != 1 for count in tries):
                problems.append(f"the encore took {tries} attempts")
        return problems

    def _until_rest(self, look: Callable[[World], list[str]]) -> list[str]:
        """Let time pass until ``look`` finds nothing; what it finds at the limit."""
        limit = self.sim.now + REST_LIMIT_S
        problems = look(self)
        while problems and self.sim.now < limit:
            self.sim.run(self.sim.now + 1.0)
            problems = look(self)
        return problems

    def _heal_all(self) -> None:
        for heal in list(self._to_heal):
            self._heal(heal)
        for mangler in self.manglers.values():
            mangler.disarm()
        for node in self.nodes.values():
            node.process.thaw()
            if node.generation is not None:
                node.generation.engine.process.thaw()
        for router in self.routers.values():
            router.process.thaw()
        self.start_registry()
        for name in self.nodes:
            self.start_node(name)
        for name in self.routers:
            self.start_router(name)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one seed."""

    seed: int
    violations: tuple[str, ...]
    events: int
    crc: int | None


def play(seed: int, *, lines: list[str] | None = None, hashed: bool = False) -> Outcome:
    """Run one seed. A machine that raises is a violation too."""
    world = World(make_schedule(seed), lines=lines, hashed=hashed)
    try:
        violations = world.run()
    except Exception as error:
        violations = [f"{type(error).__name__}: {error} at {world.sim.now:.6f} s"]
        if lines is not None:
            raise
    return Outcome(seed, tuple(violations), world.sim.events, world.sim.crc)
