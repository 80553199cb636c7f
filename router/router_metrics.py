"""The router's metrics: every definition, once. Formulas stand in the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.metrics import Counter, Histogram, Metric

LOAD_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0, 180.0, 600.0)
"""From a small model on a fast drive to a large one over a network; 20 s is what a start may
take."""


@dataclass(slots=True)
class RouterMetrics:
    """Counters that code adds to; gauges are attached by the application."""

    requests: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_requests_total",
            "Requests ended, by outcome: stop, length, client_gone or an error code.",
            ("outcome",),
        )
    )
    refused: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_refused_total",
            "Requests refused before any node saw them, by error code.",
            ("code",),
        )
    )
    tokens: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_tokens_total",
            "Tokens of complete answers: prompt, cached (part of prompt) and completion.",
            ("kind",),
        )
    )
    retries: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_retries_total", "Attempts given up in favour of another route."
        )
    )
    recoveries: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_router_recoveries_total",
            "Attempts that took over from a broken one, by kind: retarget, salvage, resume, "
            "recompute.",
            ("kind",),
        )
    )
    resumed: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_resumed_total",
            "Answers asked for with Last-Event-ID, by where they were found: here, elsewhere "
            "(at nodes that another router used), recomputed (nobody knew it), unknown.",
            ("found",),
        )
    )
    ignored_geo: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_ignored_geo_headers_total",
            "Client geography headers from untrusted networks, ignored.",
        )
    )
    placement_warms: Counter = field(
        default_factory=lambda: Counter(
            "popmesh_placement_warms_total",
            "Times a node was told to have a model in memory because a region asks for it.",
        )
    )
    ttft: Histogram = field(
        default_factory=lambda: Histogram(
            "popmesh_ttft_seconds",
            "Request read to first token received, at the router.",
        )
    )
    load_wait: Histogram = field(
        default_factory=lambda: Histogram(
            "popmesh_load_wait_seconds",
            "Submit sent to a node without the model in memory -> the leg begins, per leg.",
            LOAD_BUCKETS_S,
        )
    )

    def all(self) -> list[Metric]:
        """Every metric."""
        return [
            self.requests,
            self.refused,
            self.tokens,
            self.retries,
            self.recoveries,
            self.resumed,
            self.ignored_geo,
            self.placement_warms,
            self.ttft,
            self.load_wait,
        ]
