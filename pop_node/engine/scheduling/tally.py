"""Which tokens a sequence holds and how often it has said them: what penalties are made of. Pure.

A function of prompt and output ids alone, forced ones included, so whoever continues an answer
penalises as it would have been.
"""

from __future__ import annotations

from array import array

NO_PENALTIES = (1.0, 0.0, 0.0)
"""Repetition, frequency and presence that do nothing."""


class Tally:
    """Grows with its sequence, each token once. ``ids`` are the tokens that are penalised,
    ``counts`` how often each is in the output; ``penalties`` as in ``NO_PENALTIES``."""

    __slots__ = ("_at", "_seen", "counts", "ids", "penalties")

    def __init__(self, repetition: float, frequency: float, presence: float) -> None:
        self.penalties = repetition, frequency, presence
        self.ids = array("i")
        self.counts = array("i")
        self._at: dict[int, int] = {}
        self._seen = 0

    def catch_up(self, ids: array[int], prompt_tokens: int) -> None:
        """Take all of ``ids`` into account, of which the first ``prompt_tokens`` are the prompt;
        what it was told before is their beginning."""
        for place in range(self._seen, len(ids)):
            is_said = place >= prompt_tokens
            if is_said or self.penalties[0] != 1.0:
                at = self._at.setdefault(ids[place], len(self.ids))
                if at == len(self.ids):
                    self.ids.append(ids[place])
                    self.counts.append(0)
                self.counts[at] += is_said
        self._seen = len(ids)
