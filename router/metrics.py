"""Counters, gauges and histograms in the Prometheus text format.

Small on purpose: a value is a number under a tuple of label values; the number of label
combinations of a metric is bounded. Source of the format: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable

MAX_SERIES = 1000
"""Label combinations per metric; further ones are counted under ``other``. Guess: 64 nodes times a
few outcomes fit several times."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Labels = tuple[str, ...]


class Counter:
    """A number that only grows, per label combination."""

    kind = "counter"

    def __init__(self, name: str, help_text: str, labels: Labels = ()) -> None:
        self.name, self.help_text, self.labels = name, help_text, labels
        self._values: dict[Labels, float] = {} if labels else {(): 0.0}

    def add(self, *values: str, amount: float = 1.0) -> None:
        """Count ``amount`` under these label values."""
        held = self._values.get(values)
        if held is None and len(self._values) >= MAX_SERIES:
            values = ("other",) * len(self.labels)
            held = self._values.get(values)
        self._values[values] = (held or 0.0) + amount

    def value(self, *values: str) -> float:
        """The count under these label values."""
        return self._values.get(values, 0.0)

    def lines(self) -> Iterable[str]:
        """Samples."""
        for values, number in sorted(self._values.items()):
            yield f"{self.name}{_braces(self.labels, values)} {number:.17g}"


class Gauge:
    """Numbers read when somebody asks: ``read`` returns values by label combination."""

    kind = "gauge"

    def __init__(
        self,
        name: str,
        help_text: str,
        read: Callable[[], dict[Labels, float]],
        labels: Labels = (),
    ) -> None:
        self.name, self.help_text, self.labels = name, help_text, labels
        self._read = read

    def lines(self) -> Iterable[str]:
        """Samples, at most ``MAX_SERIES``."""
        for values, number in sorted(self._read().items())[:MAX_SERIES]:
            yield f"{self.name}{_braces(self.labels, values)} {number:.17g}"


class ToldCounter(Gauge):
    """Numbers that only grow, counted and told by others: read like a gauge."""

    kind = "counter"


class Histogram:
    """Observations in cumulative buckets, in seconds."""

    kind = "histogram"

    def __init__(
        self, name: str, help_text: str, bounds: tuple[float, ...] = LATENCY_BUCKETS_S
    ) -> None:
        self.name, self.help_text = name, help_text
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def lines(self) -> Iterable[str]:
        """Samples."""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            shown = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'{self.name}_bucket{{le="{shown}"}} {total}'
        yield f"{self.name}_sum {self._sum:.17g}"
        yield f"{self.name}_count {total}"


Metric = Counter | Gauge | Histogram


def render(metrics: Iterable[Metric]) -> str:
    """The whole exposition."""
    out: list[str] = []
    for metric in metrics:
        out.append(f"# HELP {metric.name} {metric.help_text}")
        out.append(f"# TYPE {metric.name} {metric.kind}")
        out.extend(metric.lines())
    return "\n".join(out) + "\n"


def _braces(labels: Labels, values: Labels) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{_escape(value)}"' for name, value in zip(labels, values, strict=True))
    return "{" + ",".join(pairs) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
