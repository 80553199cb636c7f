"""Which models are brought to the disk next, and when one is tried again. Pure.

    absent --Fetch--> fetching --Fetched--> here
       '<-- FetchFailed, PutOff -'

Few at once: those that are asked for first, then in the order in which they were added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pop_node.residency import events as ev
from pop_node.residency.state import ModelState

MAX_FETCHES = 2
MAX_PREFETCHES = 1
"""Fetches at once, and those of them that nobody waits for: a few share a line without any of them
being late, and one that is waited for is not behind the others. Guesses."""

RETRY_FIRST_S = 5.0
RETRY_MAX_S = 300.0
"""Between a fetch or a model that failed and the next try; doubles. Guesses: a peer that restarts
is back in seconds, a full disk is looked after by a person."""


class FetchQueue:
    """Of all ``models`` of a node."""

    def __init__(self, models: Mapping[str, ModelState]) -> None:
        self._models = models
        self._queue: list[str] = []

    def add(self, names: Iterable[str]) -> None:
        """These are to be fetched; whether they may yet is ``begin``'s to say."""
        self._queue += [name for name in names if name not in self._queue]

    def begin(self, now: float) -> list[ev.Effect]:
        """Begin what may begin: those that are asked for first."""
        effects: list[ev.Effect] = []
        self._queue.sort(key=lambda name: not self._models[name].is_asked_for(now))
        for name in list(self._queue):
            running = [m for m in self._models.values() if m.disk == "fetching"]
            asked = self._models[name].is_asked_for(now)
            if len(running) >= (MAX_FETCHES if asked else MAX_PREFETCHES):
                break
            self._queue.remove(name)
            if self._models[name].disk == "absent":
                self._models[name].disk = "fetching"
                effects.append(ev.Fetch(name))
        return effects

    def retries(self) -> list[ModelState]:
        """Models whose fetch failed and is not due yet: again at their ``retry_at``. The next sees
        first if it was mended on the disk."""
        return [
            model
            for model in self._models.values()
            if model.disk == "absent" and model.failures and not model.barred
            if model.name not in self._queue
        ]


def backoff_s(failures: int) -> float:
    """Before the next try after so many earlier failures."""
    return min(RETRY_FIRST_S * 2.0 ** min(failures, 16), RETRY_MAX_S)
