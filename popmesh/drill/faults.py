"""The words of a drill: kinds of fault, and one order to do harm.

Pure values. Who carries an order out is ``popmesh.drill.drivers``; when and to whom is
``popmesh.drill.plan``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from wire.errors import ConfigError

Target = Literal["node", "router", "link"]

Stage = Literal["before-first-token", "kv-in-flight", "mid-stream", "any"]
"""Where the stream is that a fault aims at. "any": no stream got there in time, or the fault has no
use for one."""

STAGES: tuple[Stage, ...] = ("before-first-token", "kv-in-flight", "mid-stream")

FREEZE_S = 10.0
"""How long a frozen process stands still: twice the time in which routers give up a silent node
(5 s unless the topology says otherwise)."""

LINK_FAULT_S = 10.0
"""How long a link stays broken: the same, for the same reason."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault. ``duration_s`` 0: it ends by itself, with a restart."""

    name: str
    target: Target
    duration_s: float
    summary: str


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("kill-agent", "node", 0.0, "SIGKILL of a node's agent; its engines die with it"),
        Fault("kill-engine", "node", 0.0, "SIGKILL of an engine under a living agent"),
        Fault("freeze-agent", "node", FREEZE_S, "SIGSTOP of an agent: connected, but silent"),
        Fault("freeze-engine", "node", FREEZE_S, "SIGSTOP of an engine: accepted, never answered"),
        Fault("kill-router", "router", 0.0, "SIGKILL of a router; its clients resume elsewhere"),
        Fault("partition", "link", LINK_FAULT_S, "packets between two sites vanish, both ways"),
        Fault("one-way", "link", LINK_FAULT_S, "packets vanish in one direction only"),
        Fault("slow", "link", LINK_FAULT_S, "a link at one hundredth of its rate"),
        Fault("loss", "link", LINK_FAULT_S, "one packet in twenty is lost, both ways"),
        Fault("cut", "link", 0.0, "every connection between two sites is reset, once"),
    )
}


@dataclass(frozen=True, slots=True)
class Order:
    """Do this harm now. ``victim`` is a node, a router or a link (``SITE~SITE``)."""

    number: int
    fault: Fault
    victim: str
    stage: Stage


def parse_faults(text: str) -> tuple[Fault, ...]:
    """``kill-agent,kill-engine`` -> the faults; raises ``ConfigError`` with what there is."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in FAULTS]
    if unknown or not names:
        problem = f"no fault is called {unknown[0]!r}" if unknown else "no fault is named"
        raise ConfigError(problem, where="--faults", suggestion=f"any of {', '.join(FAULTS)}")
    return tuple(FAULTS[name] for name in dict.fromkeys(names))


def needs_local(faults: Iterable[Fault]) -> list[str]:
    """Names of the faults that only the machine of the mesh itself can do."""
    return [fault.name for fault in faults if fault.target != "node"]
