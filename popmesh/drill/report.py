"""What a drill hands over: one JSON document. ``schema`` grows when a field changes its meaning.

Times are seconds on the drill's clock, which begins with its first request.
"""

from __future__ import annotations

import datetime
from pathlib import Path

import msgspec

from popmesh.drill.local import Footprint
from popmesh.drill.observation import Observation
from popmesh.drill.statistics import Quantiles
from popmesh.drill.workload import Ask

SCHEMA = 1

MAX_GAPS_LISTED = 32
"""Gaps listed per answer: the longest."""

MAX_ROWS = 20_000
"""Answers listed; beyond it right ones are only counted. Some 300 bytes each."""


class GapRow(msgspec.Struct, frozen=True):
    """A wait for text that a reader notices."""

    start_s: float
    length_s: float


class FaultRow(msgspec.Struct):
    """One order; ``after_s`` None: not recovered, ``done`` False: refused, and harmless.

    ``longest_pause_s`` is over the ``touched`` answers.
    """

    number: int
    fault: str
    victim: str
    stage: str
    at_s: float
    after_s: float | None = None
    done: bool = True
    problem: str = ""
    touched: int = 0
    longest_pause_s: float = 0.0


class StreamRow(msgspec.Struct, frozen=True):
    """What one client saw of one answer; ``pause_s`` None: no fault touched it."""

    client: int
    ask: int
    request_id: str
    nodes: list[str]
    started_s: float
    first_s: float | None
    ended_s: float
    tokens: int | None
    attempts: int
    resumed: int
    verdict: str
    detail: str
    pause_s: float | None
    gaps: list[GapRow]


class AskRow(msgspec.Struct, frozen=True):
    """One of the requests that clients repeat."""

    number: int
    kind: str
    prompt_bytes: int
    max_tokens: int
    temperature: float
    ignore_eos: bool
    tokens: int


class Rest(msgspec.Struct, frozen=True):
    """The mesh without requests; ``busy`` is what was not at rest all the same, in words."""

    busy: list[str]
    processes: dict[str, Footprint]


class Report(msgspec.Struct):
    """The whole of a drill. ``problems`` is empty when it was passed."""

    schema: int
    started: str
    mesh: str
    routers: list[str]
    model: str
    seed: int
    streams: int
    faults_asked: list[str]
    exact: bool
    deadline_s: float
    duration_s: float
    passed: bool
    problems: list[str]
    verdicts: dict[str, int]
    calm_verdicts: dict[str, int]
    tokens: int
    resumed: int
    recoveries: dict[str, int]
    gaps: Quantiles
    calm_gaps: Quantiles
    ttft: Quantiles
    calm_ttft: Quantiles
    pauses: Quantiles
    outages: Quantiles
    before: Rest
    after: Rest
    faults: list[FaultRow]
    asks: list[AskRow]
    answers: list[StreamRow]


def moment() -> str:
    """Now, as reports say when they began."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def ask_row(ask: Ask, reference: Observation) -> AskRow:
    """A request with how long its answer is."""
    return AskRow(
        number=ask.number,
        kind=ask.kind,
        prompt_bytes=len(ask.prompt.encode()),
        max_tokens=ask.max_tokens,
        temperature=ask.temperature,
        ignore_eos=ask.ignore_eos,
        tokens=reference.completion_tokens or 0,
    )


def write_json(report: msgspec.Struct, path: Path) -> None:
    """Write the document; raises ``OSError``."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
