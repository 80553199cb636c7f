"""What nodes give of their bundles to others, as they last told; from the view."""

from __future__ import annotations

from collections.abc import Callable

from router.metrics import Gauge, Labels, Metric, ToldCounter
from router.routing.view_builder import ViewBuilder
from wire.messages import Giving


def giving_metrics(builder: ViewBuilder) -> list[Metric]:
    """By node. Counters begin anew when a node starts anew."""

    def of(read: Callable[[Giving], float]) -> Callable[[], dict[Labels, float]]:
        return lambda: {
            (node.name,): float(read(node.giving)) for node in builder.snapshot().nodes.values()
        }

    return [
        ToldCounter(
            "popmesh_node_given_bytes_total",
            "Bytes of bundles that other nodes took from the node since it started.",
            of(lambda giving: giving.given_bytes),
            ("node",),
        ),
        ToldCounter(
            "popmesh_node_takes_turned_away_total",
            "Requests for bundles that the node put off, because enough others took from it.",
            of(lambda giving: giving.turned_away),
            ("node",),
        ),
        Gauge(
            "popmesh_node_takers",
            "Nodes that take bundles from the node now.",
            of(lambda giving: giving.takers),
            ("node",),
        ),
        Gauge(
            "popmesh_node_giving_bytes_per_second",
            "What the node gives of its bundles, over the last seconds.",
            of(lambda giving: giving.bytes_per_s),
            ("node",),
        ),
    ]
