"""Stop strings: find the first one in a growing text and keep back what may become one.

Owns matching; must not know tokens. The stop string that is *complete* first ends the text, the
longest of those complete at the same character; so the result does not depend on how the text was
cut into pieces, which a continuation on another node relies on. One Knuth-Morris-Pratt automaton
per stop string: O(characters x stops) in all, and the text held back is the longest running match.
"""

from __future__ import annotations

from collections.abc import Sequence

from wire.errors import RequestError


class StopMatcher:
    """Feed text, get what is safe to show."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ``RequestError`` for an empty stop string, which would end every text at once."""
        if any(not stop for stop in stops):
            raise RequestError("a stop string is empty", code="invalid_value", param="stop")
        # Longest first: of several completed by one character, the longest is found first.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Text now known to be outside any stop string; "" once stopped."""
        if self.stopped or not self._stops:
            return "" if self.stopped else text
        pending = self._held + text
        for at in range(len(self._held), len(pending)):
            stop_length = self._advance(pending[at])
            if stop_length:
                self.stopped = True
                self._held = ""
                return pending[: at + 1 - stop_length]
        safe = len(pending) - max(self._matched)
        self._held = pending[safe:]
        return pending[:safe]

    def flush(self) -> str:
        """The text held back, when nothing more will come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> int:
        """Move every automaton by one character; length of the longest stop completed, or 0."""
        for number, stop in enumerate(self._stops):
            length = self._matched[number]
            while length and stop[length] != char:
                length = self._fallbacks[number][length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                return length
            self._matched[number] = length
        return 0


def _fallbacks(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(pattern)
    length = 0
    for at in range(1, len(pattern)):
        while length and pattern[at] != pattern[length]:
            length = table[length - 1]
        if pattern[at] == pattern[length]:
            length += 1
        table[at] = length
    return table
