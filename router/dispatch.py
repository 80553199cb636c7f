"""What all requests of one router share: the view, the links, the counters, the sources of
chance."""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from router.links.node_links import LinkPool
from router.request.admission import Admission, RetryBudget
from router.request.record import RequestLog, RequestRecord
from router.router_metrics import RouterMetrics
from router.routing.costs import EXPECTED_OUTPUT_TOKENS, Work
from router.routing.policy import Plan, RouteRequest, choose
from router.routing.prefix_index import TokenRatio
from router.routing.view import View
from router.routing.view_builder import ViewBuilder
from wire.messages import Input
from wire.prefix import SPAN_BYTES, canonical_bytes, chain_root, prefix_chain

MAX_CHAIN_SPANS = 4096
"""Prefix chain values computed per request: 1 MiB of text, more than any context takes; the rest of
a longer prompt is only not looked up."""


class Abandonable(Protocol):
    """A request that is being carried out, as far as a router that stops must know it."""

    def abandon(self) -> None:
        """End it at once, without a word to its client."""


@dataclass(slots=True)
class Dispatch:
    """One router's shared state. ``cache_key`` separates the prefix chains of meshes;
    ``starting_cold`` are nodes that hold a drill for this router, whatever they say yet."""

    builder: ViewBuilder
    pool: LinkPool
    admission: Admission
    cache_key: bytes
    rng: random.Random
    metrics: RouterMetrics
    retry_budget: RetryBudget = field(default_factory=RetryBudget)
    ratio: TokenRatio = field(default_factory=TokenRatio)
    log: RequestLog = field(default_factory=RequestLog)
    running: set[Abandonable] = field(default_factory=set)
    starting_cold: set[str] = field(default_factory=set)
    _streams: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    def next_stream(self) -> int:
        """A stream number never used before by this process."""
        return next(self._streams)

    def transfer_id(self) -> bytes:
        """16 unguessable bytes."""
        return secrets.token_bytes(16)

    def choose(self, request: RouteRequest, fallbacks: int = 0) -> Plan:
        """A plan from the newest view; raises as ``policy.choose`` does."""
        now = asyncio.get_running_loop().time()
        return choose(request, self.builder.snapshot(), now, self.rng, fallbacks)

    def measure(
        self, model: str, tenant: str, prompt: Input, max_tokens: int | None
    ) -> tuple[Work, list[bytes], int]:
        """The request in tokens as far as the router can tell, its prefix chain, and its bytes."""
        view = self.builder.snapshot()
        data = canonical_bytes(prompt)
        chain: list[bytes] = []
        identity = _identity(view, model)
        if identity is not None:
            root = _chain_root(self.cache_key, tenant, identity)
            chain = prefix_chain(root, data[: MAX_CHAIN_SPANS * SPAN_BYTES])
        work = Work(
            model=model,
            prompt_tokens=self.ratio.estimate(model, len(data)),
            output_tokens=min(max_tokens or EXPECTED_OUTPUT_TOKENS, EXPECTED_OUTPUT_TOKENS),
            cached=self.builder.prefixes.cached_tokens(model, chain),
        )
        return work, chain, len(data)

    def first_token(self, record: RequestRecord) -> None:
        """Count a first token."""
        if record.ttft_ms is not None:
            self.metrics.ttft.observe(record.ttft_ms / 1e3)

    def finished(self, record: RequestRecord) -> None:
        """Count a request's end and what it used."""
        self.metrics.requests.add(record.outcome)
        for attempt in record.attempts:
            for load in attempt.loads.values():
                if load.waited_ms is not None:
                    self.metrics.load_wait.observe(load.waited_ms / 1e3)
        if record.usage is not None:
            self.metrics.tokens.add("prompt", amount=record.usage.prompt_tokens)
            self.metrics.tokens.add("cached", amount=record.usage.cached_tokens)
            self.metrics.tokens.add("completion", amount=record.usage.completion_tokens)


def _identity(view: View, model: str) -> str | None:
    """Identity under which prompts of ``model`` are chained: the pinned one, else the first
    offered."""
    configured = view.topology.models.get(model)
    if configured is not None and configured.digest is not None:
        return configured.digest
    for name in view.offered.get(model, ()):
        return view.nodes[name].offers[model].identity
    return None


@lru_cache(maxsize=1024)
def _chain_root(cache_key: bytes, tenant: str, identity: str) -> bytes:
    return chain_root(cache_key, tenant, identity)
