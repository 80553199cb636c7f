"""The fault sweep: one disaggregated request, its n-th delivery fails, for n = 1, 2, 3, ...

A delivery is a message that arrives over the network or at an engine. The n-th one breaks its
connection, kills who would have received it or who sent it, or, for KV data, arrives damaged.
"""

from __future__ import annotations

from typing import Any, Literal

from router.routing.policy import Pin
from tests.sim.engine_shell import EngineShape, SimEngine
from tests.sim.kv_conn import Body
from tests.sim.links import End
from tests.sim.model import answer
from tests.sim.node_shell import NodeShape
from tests.sim.schedule import SITES, WARM_UP_S, Request, Schedule
from tests.sim.world import World
from wire.messages import Ping, Pong, Role, Sampling

Harm = Literal["break", "kill_receiver", "kill_sender", "corrupt"]
HARMS: tuple[Harm, ...] = ("break", "kill_receiver", "kill_sender", "corrupt")
RESTART_S = 1.0


def sweep_schedule() -> Schedule:
    """Two prefill and two decode nodes on three sites; one request of six blocks."""
    engine = EngineShape(num_blocks=24, token_budget=8)
    roles: tuple[Role, ...] = ("prefill", "prefill", "decode", "decode")
    nodes = tuple(
        NodeShape(f"n{i}", SITES[i % 3], (role,), engine, 0.002) for i, role in enumerate(roles)
    )
    prompt = tuple(range(3, 25))
    assert len(answer(prompt, 6, ignore_eos=True)) == 6
    sampling = Sampling(6, 0.0, 1.0, 7, [], True)
    request = Request(0, WARM_UP_S, SITES[0], 0, prompt, sampling, 120.0, Pin(), "", 0.0)
    latency = {(a, b): 0.0001 if a == b else 0.02 for a in SITES for b in SITES}
    return Schedule(1, latency, 125e6, nodes, (SITES[0], SITES[1]), (request,), (), roomy=True)


class SweepWorld(World):
    """Fails delivery number ``nth`` since the request began; ``struck`` says what that was."""

    def __init__(self, nth: int, harm: Harm, *, lines: list[str] | None = None) -> None:
        super().__init__(sweep_schedule(), lines=lines)
        self._left = nth
        self._harm = harm
        self.struck: str | None = None
        self.sim.at(WARM_UP_S - 1e-6, None, self._begin)

    def _begin(self) -> None:
        self.sim.on_delivery = self._delivery

    def _delivery(self, where: Any, message: Any) -> bool:
        if isinstance(message, Ping | Pong) or self.struck is not None:
            return True
        if self._harm == "corrupt" and not isinstance(message, Body):
            return True
        self._left -= 1
        if self._left or all(c.state != "reading" for c in self.clients):
            return True
        what = type(message).__name__
        self.struck = f"{self._harm} at {what} in {where.process.name} at {self.sim.now:.6f}"
        self.sim.note(where.process, f"strike {self.struck}")
        self.harmed = True
        if self._harm == "break" and "c0" in (where.process.host, _other(where)):
            self.killed_routers.add("r0")  # to the client it is the same
        if isinstance(where, SimEngine):
            where.kill()
            return False
        return self._strike(where, message)

    def _strike(self, end: End, message: Any) -> bool:
        match self._harm:
            case "break":
                end.reset()
            case "corrupt":
                content = message.take()
                message.content = bytes([content[0] ^ 1]) + content[1:]
                return True
            case "kill_receiver":
                self._kill(end.peer.process.host)
            case "kill_sender":
                self._kill(end.process.host)
                end.reset()
        return False

    def _kill(self, host: str) -> None:
        restart_at = self.sim.now + RESTART_S
        if host in self.nodes:
            self.kill_node(host)
            self.sim.at(restart_at, None, self.start_node, host)
        elif host in self.routers:
            self.kill_router(host)
            self.sim.at(restart_at, None, self.start_router, host)
        elif host == "registry":
            self.kill_registry()
            self.sim.at(restart_at, None, self.start_registry)
        else:
            for client in self.clients:
                client.die()


def _other(where: Any) -> str:
    return where.peer.process.host if isinstance(where, End) else ""


def strike(nth: int, harm: Harm, *, lines: list[str] | None = None) -> tuple[str | None, list[str]]:
    """What was struck (None: the run was over before) and the violations."""
    world = SweepWorld(nth, harm, lines=lines)
    violations = world.run()
    return world.struck, violations
