"""What a seed stands for: a small mesh, a few requests, and a few faults while they run.

Pure data; ``world`` plays it. Sizes are small on purpose: a fault hits a small run more often.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from router.routing.policy import Pin
from tests.sim.engine_shell import EngineShape
from tests.sim.model import VOCABULARY
from tests.sim.node_shell import NodeShape
from wire.messages import Role, Sampling

SITES = ("ams", "jfk", "sin")
WARM_UP_S = 2.0
"""Engines are loaded, nodes registered and routers linked by then."""

LONG_S = 120.0
"""A deadline that nothing should ever need: what lasts until then was stuck."""

CRAWL_S = 0.05
"""A step of an engine whose answers take half a second: clients come back in the middle."""

ENCORE = 99
"""Its number."""

_BOTH: tuple[Role, ...] = ("prefill", "decode")
_ROLES: tuple[tuple[tuple[Role, ...], ...], ...] = (
    (("prefill",), ("decode",), ("decode",)),
    (("prefill",), ("prefill",), ("decode",), ("decode",)),
    (_BOTH, ("prefill",), ("decode",)),
    (_BOTH, _BOTH, ("prefill",), ("decode",)),
    (_BOTH, _BOTH, _BOTH),
    (_BOTH, ("decode",), _BOTH),
    (("prefill",), ("prefill",), ("decode",), ("decode",), ("decode",)),
)


@dataclass(frozen=True, slots=True)
class Request:
    """One client's request. ``leaves``: "" reads to the end, "close" goes after ``leaves_after_s``,
    "vanish" goes without a word; "drop" and "drop_quietly" are the same but come back."""

    number: int
    at: float
    site: str
    router: int
    prompt: tuple[int, ...]
    sampling: Sampling
    timeout_s: float
    pin: Pin
    leaves: str
    leaves_after_s: float

    @property
    def request_id(self) -> str:
        return f"q{self.number}"


@dataclass(frozen=True, slots=True)
class Fault:
    """``kind`` at ``at``, healed ``duration_s`` later; ``a`` and ``b`` are hosts."""

    at: float
    kind: str
    a: str
    b: str = ""
    duration_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that is decided before a run; chance during the run comes from ``seed`` too.

    ``roomy``: nobody waits for blocks. ``patient``: the run goes on until nothing is kept for
    clients that come back. ``encore`` is asked when everything is at rest again.
    """

    seed: int
    latency_s: dict[tuple[str, str], float]
    bytes_per_s: float
    nodes: tuple[NodeShape, ...]
    router_sites: tuple[str, ...]
    requests: tuple[Request, ...]
    faults: tuple[Fault, ...]
    roomy: bool
    patient: bool = False
    encore: Request | None = None

    @property
    def healed_at(self) -> float:
        """When the last fault is over."""
        return max((fault.at + fault.duration_s for fault in self.faults), default=0.0)

    @property
    def undisturbed(self) -> bool:
        """Nothing here may keep a first attempt from going well."""
        return self.roomy and all(
            fault.kind == "mangle" and fault.detail.split()[0] in HARMLESS for fault in self.faults
        )


def make_schedule(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    sites = [rng.uniform(0.001, 0.06) for _ in range(3)]
    latency = {
        (a, b): 0.0001 if a == b else (sites[i] + sites[j]) / 2
        for i, a in enumerate(SITES)
        for j, b in enumerate(SITES)
    }
    tiny = rng.random() < 0.25
    nodes = _nodes(rng, tiny)
    requests = _requests(rng, nodes, tiny)
    names = [node.name for node in nodes]
    prefills = [node.name for node in nodes if "prefill" in node.roles]
    count = rng.choice((0, 1, 1, 1, 2, 2, 3, 4))
    faults = tuple(_fault(rng, names, prefills, rng.choice(requests).at) for _ in range(count))
    if any(fault.kind == "kill_all" for fault in faults):
        nodes = tuple(replace(n, engine=replace(n.engine, step_s=CRAWL_S)) for n in nodes)
    return Schedule(
        seed,
        latency,
        rng.choice((125e6, 125e6, 20e6)),
        nodes,
        (rng.choice(SITES), rng.choice(SITES)),
        requests,
        tuple(sorted(faults, key=lambda fault: fault.at)),
        not tiny,
        rng.random() < 0.03,
        _encore(requests[0]) if rng.random() < 0.15 else None,
    )


def _encore(first: Request) -> Request:
    """The first request once more: it must go well at once, and find its prompt cached or not."""
    return replace(first, number=ENCORE, pin=Pin(), leaves="", timeout_s=LONG_S)


def _nodes(rng: random.Random, tiny: bool) -> tuple[NodeShape, ...]:
    slow, slow_prefill = rng.random() < 0.3, rng.random() < 0.4
    nodes = []
    for number, roles in enumerate(rng.choice(_ROLES)):
        engine = EngineShape(
            num_blocks=rng.randint(9, 12) if tiny else 40,
            token_budget=rng.choice((8, 16, 16)),
            max_sequences=rng.choice((4, 6)),
            start_s=rng.uniform(0.3, 0.6),
            step_s=0.02 if slow else 0.004,
            token_s=0.008 if slow_prefill else 0.001,
            measured=slow_prefill or rng.random() < 0.3,
            export_slots=rng.choice((2, 4, 8)),
            import_slots=rng.choice((2, 4, 8)),
        )
        prepare_s = rng.choice((0.0005, 0.002, 0.03))
        nodes.append(NodeShape(f"n{number}", SITES[number % 3], roles, engine, prepare_s))
    return tuple(nodes)


def _requests(
    rng: random.Random, nodes: tuple[NodeShape, ...], crowded: bool
) -> tuple[Request, ...]:
    beginnings = [[rng.randrange(VOCABULARY - 1) for _ in range(16)] for _ in range(2)]
    at = WARM_UP_S
    requests = []
    # Left alone, a node with both roles keeps its prompts; then nothing would decode beside a
    # prefill that is handed over.
    mixed = rng.random() < 0.7
    for number in range(rng.randint(4, 6) if crowded else rng.choice((1, 1, 2, 3, 4, 5))):
        shared = rng.choice(beginnings)[: rng.choice((0, 4, 9, 16))]
        rest = [rng.randrange(VOCABULARY - 1) for _ in range(rng.randint(1, 8))]
        stops = rng.choice(((), (), (), ("w3",), ("1 w", "w20 w")))
        short = rng.random() < 0.08
        leaves = rng.choices(list(_LEAVES), list(_LEAVES.values()))[0]
        requests.append(
            Request(
                number,
                at,
                rng.choice(SITES),
                rng.randrange(2),
                tuple(shared + rest),
                Sampling(rng.randint(1, 12), 0.0, 1.0, 7, list(stops), rng.random() < 0.2),
                rng.uniform(0.02, 1.5) if short else LONG_S,
                _pin(rng, nodes) if mixed else Pin(),
                leaves,
                rng.uniform(0.03, 0.4),
            )
        )
        pauses = (0.0, 0.02, rng.uniform(0.0, 0.5), rng.uniform(0.0, 3.0))
        at += rng.choice(pauses[:2] if crowded else pauses)
    return tuple(requests)


def _pin(rng: random.Random, nodes: tuple[NodeShape, ...]) -> Pin:
    """Any pair for half of the requests, but only where nodes have both roles."""
    if all(len(node.roles) == 1 for node in nodes) or rng.random() < 0.5:
        return Pin()
    prefills = [node.name for node in nodes if "prefill" in node.roles]
    decodes = [node.name for node in nodes if "decode" in node.roles]
    return Pin(rng.choice(prefills), rng.choice(decodes))


_LEAVES = {"": 75, "close": 10, "vanish": 3, "drop": 7, "drop_quietly": 5}

_KINDS = {
    "kill_agent": 16,
    "kill_engine": 12,
    "kill_router": 5,
    "kill_all": 12,
    "freeze_agent": 6,
    "freeze_engine": 5,
    "hang_engine": 1,
    "freeze_router": 3,
    "partition": 12,
    "one_way": 10,
    "half_open": 8,
    "reset": 14,
    "slow": 6,
    "mangle": 14,
    "registry_down": 4,
    "registry_slow": 2,
    "registry_lost": 2,
}

MANGLINGS = {
    "corrupt": 2,
    "truncate": 1,
    "repeat": 1,
    "reorder": 1,
    "old_attempt": 3,
    "other_transfer": 2,
}
HARMLESS = ("old_attempt", "other_transfer")
"""Frames besides the true ones, of what is over or was never there: they must leave no trace."""


def _fault(rng: random.Random, nodes: list[str], prefills: list[str], near: float) -> Fault:
    during, around = rng.uniform(-0.02, 0.3), rng.uniform(-0.5, 2.0)
    at = max(WARM_UP_S - 0.5, near + rng.choice((during, during, around)))
    kind = rng.choices(list(_KINDS), list(_KINDS.values()))[0]
    node, router = rng.choice([*nodes, *prefills]), f"r{rng.randrange(2)}"
    short, long = rng.uniform(0.05, 1.0), rng.uniform(1.0, 10.0)
    duration = rng.choice((short, long))
    match kind:
        case "kill_agent":
            return Fault(at, kind, node, duration_s=rng.uniform(0.1, 3.0))
        case "kill_engine":
            return Fault(at, kind, node)
        case "kill_router":
            return Fault(at, kind, router, duration_s=rng.uniform(0.1, 2.0))
        case "kill_all":  # nodes and a router: nobody remembers what they were saying
            return Fault(near + rng.uniform(0.1, 0.7), kind, router, duration_s=short)
        case "freeze_agent" | "freeze_engine":
            return Fault(at, kind, node, duration_s=duration)
        case "hang_engine":
            return Fault(at, kind, node, duration_s=20.0)
        case "freeze_router":
            return Fault(at, kind, router, duration_s=duration)
        case "mangle":
            what = rng.choices(list(MANGLINGS), list(MANGLINGS.values()))[0]
            detail = f"{what} {rng.randint(1, 6)}"
            return Fault(WARM_UP_S - 0.1, kind, rng.choice(prefills), detail=detail)
        case "registry_down" | "registry_lost":
            return Fault(at, kind, "registry", duration_s=rng.choice((duration, 60.0)))
        case "registry_slow":
            return Fault(at, kind, "registry", duration_s=60.0)
    a, b = rng.choice(prefills), rng.choice([*nodes, *nodes, "r0", "r1", "registry"])
    while a == b:
        b = rng.choice(nodes)
    if rng.random() < 0.5:
        a, b = b, a
    duration = rng.choice((short, long, rng.uniform(5.0, 25.0)))
    return Fault(at, kind, a, b, duration_s=0.0 if kind in ("half_open", "reset") else duration)
