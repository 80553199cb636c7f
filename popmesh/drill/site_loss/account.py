"""Answers of a site-loss drill in figures: where they were sent, and stretch by stretch. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from popmesh.drill.check import judge
from popmesh.drill.look import Route
from popmesh.drill.observation import Observation
from popmesh.drill.site_loss.report import Stretch
from popmesh.drill.site_loss.watch import Capacity
from popmesh.drill.statistics import quantiles


@dataclass(frozen=True, slots=True)
class Spill:
    """Requests that began after the blow and were sent to the site first all the same."""

    count: int
    last_s: float


def spill(
    seen: Iterable[Observation],
    routes: Mapping[str, Sequence[Route]],
    nodes: Sequence[str],
    struck_at: float,
    back_at: float,
) -> Spill:
    """``routes`` are those of every attempt by request id; ``last_s`` counts from the blow, 0 when
    there was no such request."""
    late = [
        one.started_s - struck_at
        for one in seen
        if struck_at <= one.started_s < back_at
        and any(name in nodes for route in routes.get(one.request_id, ())[:1] for name in route)
    ]
    return Spill(len(late), max(late, default=0.0))


def stretch(
    name: str,
    start_at: float,
    end_at: float,
    seen: Iterable[Observation],
    references: Mapping[int, Observation],
    left: Capacity,
) -> Stretch:
    """One part of the drill."""
    everything = list(seen)
    began = [one for one in everything if start_at <= one.started_s < end_at]
    verdicts: Counter[str] = Counter(
        judge(one, references[one.ask.number], ()).kind for one in began
    )
    gaps = [one.gaps() for one in began]
    texts = sum(start_at <= at < end_at for one in everything for at in one.arrivals)
    return Stretch(
        name=name,
        start_at_s=round(start_at, 4),
        end_at_s=round(end_at, 4),
        answers=len(began),
        verdicts=dict(verdicts),
        texts_per_s=texts / (end_at - start_at) if end_at > start_at else 0.0,
        ttft=quantiles(waits[0][1] for waits in gaps if waits),
        gaps=quantiles(length_s for waits in gaps for _, length_s in waits[1:]),
        nodes_ready=left.nodes_ready,
        kv_tokens=left.kv_tokens,
    )
