"""How often each region asks for each model, forgetting the past steadily. Pure.

A request counts at the site that is nearest to its client among those that may and could ever serve
it, so demand is where residency lets it be met. With requests at times t, each weighing ``w``:

    rate(now) = sum of w * exp(-(now - t) / MEMORY_S) / MEMORY_S
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from topology.geography import nearest_sites
from topology.model import Position, Topology

MEMORY_S = 60.0
"""How long a request is remembered, as the mean of the exponential. Guess: long enough to see two
requests a minute, short enough to see that they have ended."""

LEAST_PER_MIN = 0.01
"""Rates below are none: what is left of one request after five minutes."""

MAX_PLACES = 4096
"""Clients' positions for which the nearest site is remembered: the cities of a GeoIP database that
one router sees."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Requests a minute, and prompt and output tokens a second."""

    per_min: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float


class Demand:
    """Decayed sums by model and site."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, _Sums]] = {}

    def add(
        self, model: str, site: str, prompt_tokens: int, output_tokens: int, now: float
    ) -> None:
        """A request was made."""
        sums = self._sums.setdefault(model, {}).setdefault(site, _Sums(now))
        sums.add(prompt_tokens, output_tokens, now)

    def rates(self, model: str, sites: frozenset[str], now: float) -> Rates:
        """Of these sites together."""
        asked = self._sums.get(model, {})
        sums = [asked[site].at(now) for site in asked.keys() & sites]
        requests, prompt, output = map(sum, zip(*sums, strict=True)) if sums else (0.0, 0.0, 0.0)
        return Rates(requests / MEMORY_S * 60, prompt / MEMORY_S, output / MEMORY_S)

    def by_site(self, model: str, now: float) -> dict[str, float]:
        """Requests a minute at each site that asks."""
        asked = self._sums.get(model, {})
        return {site: sums.at(now)[0] / MEMORY_S * 60 for site, sums in asked.items()}

    def forget(self, now: float) -> None:
        """Drop what has faded away."""
        least = LEAST_PER_MIN * MEMORY_S / 60
        for model, asked in list(self._sums.items()):
            left = {site: sums for site, sums in asked.items() if sums.at(now)[0] >= least}
            if left:
                self._sums[model] = left
            else:
                del self._sums[model]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """(Model, site) of all demand that is remembered."""
        return ((model, site) for model, asked in self._sums.items() for site in asked)


class _Sums:
    __slots__ = ("_at", "_output", "_prompt", "_requests")

    def __init__(self, now: float) -> None:
        self._at, self._requests, self._prompt, self._output = now, 0.0, 0.0, 0.0

    def at(self, now: float) -> tuple[float, float, float]:
        """Decayed requests, prompt tokens, output tokens."""
        kept = math.exp(-max(0.0, now - self._at) / MEMORY_S)
        return self._requests * kept, self._prompt * kept, self._output * kept

    def add(self, prompt_tokens: int, output_tokens: int, now: float) -> None:
        requests, prompt, output = self.at(now)
        self._at = max(self._at, now)
        self._requests, self._prompt = requests + 1.0, prompt + prompt_tokens
        self._output = output + output_tokens


class DemandSites:
    """Where a client's demand counts."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._serving: dict[str, frozenset[str]] = {}  # sites by model
        for node in topology.nodes.values():
            for model in node.models:
                self._serving[model] = self._serving.get(model, frozenset()) | {node.site}
        self._nearest = lru_cache(MAX_PLACES)(self._look)

    def site_of(self, client: Position, model: str, regions: frozenset[str]) -> str | None:
        """The nearest site with nodes for ``model`` where a tenant with these ``regions`` (empty:
        all) may use it; None: there is none."""
        return self._nearest(client, model, regions)

    def _look(self, client: Position, model: str, regions: frozenset[str]) -> str | None:
        configured = self._topology.models.get(model)
        allowed = [regions, frozenset() if configured is None else configured.regions]
        serving = self._serving.get(model, frozenset())
        for site, _ in nearest_sites(self._topology, client):
            if site.name in serving and all(not some or site.region in some for some in allowed):
                return site.name
        return None
