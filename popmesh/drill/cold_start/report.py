"""What a cold-start drill hands over: one JSON document. ``schema`` grows when a field changes its
meaning.

Times of a run are seconds since the model's new process was started, see
``pop_node.drills.report``.
"""

from __future__ import annotations

import msgspec

from pop_node.drills.report import Cold, ColdStartReport, Phase, Source
from popmesh.drill.statistics import Quantiles

SCHEMA = 1

MOVING = ("read", "verify", "decode", "pack", "to_device")
"""Phases that the model's bytes go through, overlapping: their length grows with the model."""


class RouterSaid(ColdStartReport):
    """What a router answers: the node's report, when the router would have sent requests there
    again (None: not within its patience), and how long the drill took for whoever asked."""

    seen_ready_s: float | None
    wall_s: float


class Run(msgspec.Struct):
    """One cold start. ``time_s`` is what the budget is about: until a router that plans a request
    would take this node again."""

    number: int
    node: str
    time_s: float
    ready_s: float
    seen_ready_s: float | None
    down_s: float
    drop_s: float
    bundle: str
    bundle_bytes: int
    load_average: float
    cold: Cold
    phases: list[Phase]

    def length_s(self, name: str) -> float | None:
        """How long a phase took; None if there was none."""
        lengths = [phase.end_s - phase.start_s for phase in self.phases if phase.name == name]
        return sum(lengths) if lengths else None

    def bytes_s(self) -> float:
        """From the first byte read to the last one in its place; 0 if nobody said."""
        moving = [phase for phase in self.phases if phase.name in MOVING]
        if not moving:
            return 0.0
        return max(phase.end_s for phase in moving) - min(phase.start_s for phase in moving)

    def bytes_per_s(self) -> float | None:
        """What was read, over ``bytes_s``; None if that is not known."""
        read = sum(phase.nbytes for phase in self.phases if phase.name == "read")
        return read / self.bytes_s() if read and self.bytes_s() else None


class Regression(msgspec.Struct, frozen=True):
    """A node whose median was slower than that of ``earlier`` drill runs beyond the threshold;
    ``phase`` is the one that grew most."""

    node: str
    now_s: float
    earlier_s: float
    earlier: int
    phase: str
    phase_now_s: float
    phase_earlier_s: float

    def words(self) -> str:
        """One line."""
        ratio = self.now_s / self.earlier_s
        text = (
            f"{self.node}: {self.now_s:.2f} s, {ratio:.2f} times the median of "
            f"{self.earlier} earlier runs ({self.earlier_s:.2f} s)"
        )
        if not self.phase:
            return text
        grown = f"{self.phase_now_s:.2f} s, before {self.phase_earlier_s:.2f} s"
        return f"{text}; most of it in {self.phase}: {grown}"


class ColdStartDrill(msgspec.Struct, rename={"source": "from"}):
    """The whole of a drill. ``problems`` is empty when it was passed: every run came up, and within
    the budget if there is one. A regression is flagged, and no reason to fail."""

    schema: int
    started: str
    mesh: str
    router: str
    model: str
    nodes: list[str]
    source: Source
    libraries: bool
    whole: bool
    budget_s: float | None
    passed: bool
    problems: list[str]
    times: Quantiles
    regressions: list[Regression]
    threshold: str
    runs: list[Run]


def make_run(number: int, said: RouterSaid) -> Run:
    """A run from what the router answered; when the router saw it is the last of its phases."""
    seen_s = said.seen_ready_s
    told_s = min(said.total_s, max((phase.end_s for phase in said.phases), default=0.0))
    phases = [*said.phases, Phase("ready", told_s, said.total_s)]
    if seen_s is not None and seen_s > said.total_s:
        phases.append(Phase("in the plan", said.total_s, seen_s))
    return Run(
        number=number,
        node=said.node,
        time_s=max(said.total_s, seen_s or 0.0),
        ready_s=said.total_s,
        seen_ready_s=seen_s,
        down_s=said.down_s,
        drop_s=said.drop_s,
        bundle=said.bundle,
        bundle_bytes=said.bundle_bytes,
        load_average=said.load_average,
        cold=said.cold,
        phases=phases,
    )
