"""Does an engine still turn? Asked at intervals, decided without a clock.

An engine that sleeps for ever (a stopped process, a driver that never returns) closes no socket, so
nothing else would notice before the deadlines of its requests.
"""

from __future__ import annotations

from typing import Literal

PROBE_PERIOD_S = 5.0
MAX_MISSED = 6
"""Half a minute, several of the longest steps of a slow CPU. Guess. Unanswered probes count, not
seconds: an agent that slept itself does not blame its engine."""


class EngineWatch:
    """Every ``PROBE_PERIOD_S`` the shell calls ``tick`` and does what it says."""

    def __init__(self) -> None:
        self._missed = 0

    def heard(self) -> None:
        """The engine's main loop answered a probe."""
        self._missed = 0

    def tick(self) -> Literal["probe", "hung"]:
        """Ask the engine, or give it up."""
        if self._missed >= MAX_MISSED:
            return "hung"
        self._missed += 1
        return "probe"
