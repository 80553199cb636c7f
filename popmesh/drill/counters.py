"""Counters of routers over a drill, across their restarts. Pure.

Source of the format: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

Sample = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its labels, in their order."""


def parse_metrics(text: str) -> dict[Sample, float]:
    """Every sample; lines that are none are skipped."""
    found: dict[Sample, float] = {}
    for line in text.splitlines():
        matched = _SAMPLE.fullmatch(line)
        if matched is None:
            continue
        name, labels, value = matched.groups()
        values = tuple(label[1] for label in _LABEL.findall(labels or ""))
        try:
            found[name, values] = float(value)
        except ValueError:
            continue
    return found


class Growth:
    """How much counters grew since the first look, summed over routers. A counter that went down
    was started again at 0."""

    def __init__(self) -> None:
        self._last: dict[str, Mapping[Sample, float]] = {}
        self._grown: dict[Sample, float] = {}

    def look(self, router: str, samples: Mapping[Sample, float]) -> None:
        """One router's metrics now."""
        before = self._last.get(router)
        self._last[router] = samples
        if before is None:
            return
        for sample, value in samples.items():
            old = before.get(sample, 0.0)
            self._grown[sample] = (
                self._grown.get(sample, 0.0) + value - (old if value >= old else 0)
            )

    def of(self, name: str) -> dict[str, float]:
        """What grew of one metric, by its first label ("" if it has none)."""
        return {
            labels[0] if labels else "": value
            for (metric, labels), value in sorted(self._grown.items())
            if metric == name and value
        }
