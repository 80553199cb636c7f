"""Carries out the faults of a schedule on a world, and heals them."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING

from msgspec.structs import replace

from pop_node.kv_stream.frames import Data, data_checksum
from tests.sim.clock import Process
from tests.sim.links import Path
from tests.sim.schedule import Fault

if TYPE_CHECKING:
    from tests.sim.world import World

SLOW_LATENCY_S = 0.05
"""What a link at 1 % of its rate adds to every message, besides its serialisation."""


class WireMangler:
    """Does one thing to the n-th data frame that a node sends from now on."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._armed: list[tuple[str, int]] = []
        self._before: tuple[Data, bytes | None] | None = None
        self.done = 0

    def arm(self, what: str, nth: int) -> None:
        self._armed.append((what, nth))

    def disarm(self) -> None:
        """What was not done yet will not be."""
        self._armed.clear()

    def mangle(self, data: Data, content: bytes) -> list[tuple[Data, bytes | None]]:
        """As ``kv_conn.Mangler``."""
        held, self._before = self._before, None
        frames: list[tuple[Data, bytes | None]] = [(data, b"")]
        if held is not None:
            frames.append(held)
        for at, (what, nth) in enumerate(self._armed):
            if nth > 1:
                self._armed[at] = what, nth - 1
                continue
            del self._armed[at]
            self.done += 1
            return self._one(what, data, content, frames)
        return frames

    def _one(
        self, what: str, data: Data, content: bytes, frames: list[tuple[Data, bytes | None]]
    ) -> list[tuple[Data, bytes | None]]:
        match what:
            case "corrupt":
                at = self._rng.randrange(len(content))
                flipped = content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]
                return [(data, flipped), *frames[1:]]
            case "truncate":
                return [(data, None)]
            case "repeat":
                return [(data, b""), (data, content), *frames[1:]]
            case "reorder":
                self._before = data, content
                return frames[1:]
            case "old_attempt":
                return [self._stale(replace(data, attempt=data.attempt - 1), content), *frames]
            case _:
                return [
                    self._stale(replace(data, transfer=self._rng.randbytes(16)), content),
                    *frames,
                ]

    def _stale(self, data: Data, content: bytes) -> tuple[Data, bytes]:
        """A proper frame with other KV."""
        other = self._rng.randbytes(len(content))
        checksum = data_checksum(data.transfer, data.attempt, data.piece, data.codec, other)
        return replace(data, checksum=checksum), other


def start(world: World, fault: Fault) -> None:
    """Let a fault begin, and see to its end."""
    sim = world.sim
    sim.note(None, f"fault {fault}")
    kind, a, b = fault.kind, fault.a, fault.b
    end = sim.now + fault.duration_s
    match kind:
        case "kill_agent":
            world.kill_node(a)
            sim.at(end, None, world.start_node, a)
        case "kill_engine":
            node = world.nodes[a]
            if node.process.alive and node.generation is not None:
                node.generation.engine.kill()
        case "kill_router":
            world.kill_router(a)
            sim.at(end, None, world.start_router, a)
        case "kill_all":
            world.kill_router(a)
            sim.at(end, None, world.start_router, a)
            for name in world.nodes:
                world.kill_node(name)
                sim.at(end, None, world.start_node, name)
        case "freeze_agent":
            _freeze(world, [world.nodes[a].process], end)
        case "freeze_engine" | "hang_engine":
            generation = world.nodes[a].generation
            if generation is not None:
                _freeze(world, [generation.engine.process], end)
        case "freeze_router":
            _freeze(world, [world.routers[a].process], end)
        case "partition":
            _break(world, [(a, b), (b, a)], end)
        case "one_way":
            _break(world, [(a, b)], end)
        case "half_open":
            for connection in world.connections_between(a, b):
                connection.vanish()
        case "reset":
            for connection in world.connections_between(a, b):
                connection.reset()
        case "slow":
            _slow(world, a, b, end)
        case "mangle":
            what, nth = fault.detail.split()
            world.manglers[a].arm(what, int(nth))
        case "registry_down":
            world.kill_registry()
            sim.at(end, None, world.start_registry, True)
        case "registry_lost":
            world.kill_registry()
            sim.at(end, None, world.start_registry, False)
        case "registry_slow":
            for host in [*world.nodes, *world.routers]:
                _slow(world, host, "registry", end, latency_s=4.0)
        case _:
            raise AssertionError(f"no such fault: {kind}")


def _freeze(world: World, processes: list[Process], end: float) -> None:
    for process in processes:
        if process.alive and not process.frozen:
            process.freeze()
            world.sim.at(end, None, process.thaw)


def _break(world: World, directions: list[tuple[str, str]], end: float) -> None:
    for a, b in directions:
        world.network.break_path(a, b)
        world.heal_at(end, partial(world.network.mend_path, a, b))


def _slow(world: World, a: str, b: str, end: float, latency_s: float = SLOW_LATENCY_S) -> None:
    for path in (world.network.path(a, b), world.network.path(b, a)):
        path.bytes_per_s /= 100
        path.latency_s += latency_s

        def heal(path: Path = path) -> None:
            path.bytes_per_s *= 100
            path.latency_s -= latency_s

        world.heal_at(end, heal)
