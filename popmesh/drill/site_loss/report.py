"""What a site-loss drill hands over: one JSON document. ``schema`` grows when a field changes its
meaning.

Times ending in ``_at_s`` are on the drill's clock, others are lengths in seconds.
"""

from __future__ import annotations

import msgspec

from popmesh.drill.report import AskRow, FaultRow, Rest, StreamRow
from popmesh.drill.statistics import Quantiles

SCHEMA = 1


class Stretch(msgspec.Struct):
    """The mesh before the loss, during it, while the site comes back, and after.

    ``verdicts`` and waits are of the answers that began in it; ``texts_per_s`` counts every text
    that came in it. ``nodes_ready`` and ``kv_tokens`` (room in the caches of those nodes) are those
    at its end, as the first router has it.
    """

    name: str
    start_at_s: float
    end_at_s: float
    answers: int
    verdicts: dict[str, int]
    texts_per_s: float
    ttft: Quantiles
    gaps: Quantiles
    nodes_ready: int
    kv_tokens: int


class SiteLossReport(msgspec.Struct):
    """The whole of a drill. ``problems`` is empty when it was passed.

    From the blow: ``noticed_s`` until no router had a link to the site; ``spill_s`` until the last
    request began that was still sent there first, of ``spilled`` such requests. From the moment at
    which the site's processes could start again: ``whole_s`` until every router saw every model
    there ready, ``answered_s`` until the first answer came from there. None: it did not happen.
    """

    schema: int
    started: str
    mesh: str
    routers: list[str]
    model: str
    site: str
    nodes: list[str]
    seed: int
    streams: int
    exact: bool
    deadline_s: float
    away_s: float
    duration_s: float
    passed: bool
    problems: list[str]
    struck_at_s: float
    back_at_s: float
    noticed_s: float | None
    spill_s: float
    spilled: int
    whole_s: float | None
    answered_s: float | None
    verdicts: dict[str, int]
    pauses: Quantiles
    stretches: list[Stretch]
    recoveries: dict[str, int]
    rest: Rest
    faults: list[FaultRow]
    asks: list[AskRow]
    answers: list[StreamRow]
