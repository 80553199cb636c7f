"""How long one request keeps trying: fruitless attempts counted, waits for a route bounded.

Pure; one object per request. *Progress* is a new output token relayed; it resets everything here.
"""

from __future__ import annotations

from wire.errors import MeshError, OverloadError

MAX_ATTEMPTS = 4
"""Tries of one request without any token. Guess: with four sites down there is no fifth, and a
prompt that kills engines must not kill them all."""

MAX_ATTEMPTS_STREAMING = 8
"""Tries without a new token once some were read: such a prompt has killed nobody, and a cut stream
is what a client minds most. Guess."""

WAIT_FIRST_S = 10.0
"""How long an accepted request without a route waits for one before its first token: a client that
sees nothing yet may as well ask another router."""

WAIT_STREAMING_S = 60.0
"""The same after the first token: a whole site restarts in this time (DESIGN §8: 20 s a node)."""

PAUSE_MIN_S = 0.1
PAUSE_MAX_S = 1.0
"""Pause between two looks for a route: doubles from the first to the second. A look costs well
under a millisecond; loads are pushed once a second."""


class Patience:
    """Times are seconds on the router's clock."""

    def __init__(self) -> None:
        self._fruitless = 0
        self._waiting_since: float | None = None
        self._pause_s = 0.0

    def progress(self) -> None:
        """A new token was relayed."""
        self._fruitless = 0
        self._waiting_since = None
        self._pause_s = 0.0

    def attempt_failed(
        self, error: MeshError, fruitful: bool, streaming: bool, now: float
    ) -> float | None:
        """Seconds until the next look for a route, or None: give up.

        A node without room is no fruitless attempt of a stream that has begun: it waits for room as
        it would wait for a route. ``fruitful``: this attempt had relayed a token.
        """
        if streaming and isinstance(error, OverloadError):
            if self._left_s(now, streaming) <= 0.0:
                return None
            pause, self._pause_s = self._pause_s, _next(self._pause_s)
            return pause
        if not fruitful:
            self._fruitless += 1
        return 0.0 if self._fruitless < _most(streaming) else None

    def no_route(self, now: float, streaming: bool) -> float | None:
        """Seconds until the next look for a route, or None: give up."""
        left = self._left_s(now, streaming)
        if left <= 0.0:
            return None
        pause = max(PAUSE_MIN_S, self._pause_s)
        self._pause_s = _next(pause)
        return min(pause, left)

    def _left_s(self, now: float, streaming: bool) -> float:
        """What is left of the wait, which begins with the first call after progress."""
        if self._waiting_since is None:
            self._waiting_since = now
        patience = WAIT_STREAMING_S if streaming else WAIT_FIRST_S
        return self._waiting_since + patience - now


def _most(streaming: bool) -> int:
    return MAX_ATTEMPTS_STREAMING if streaming else MAX_ATTEMPTS


def _next(pause_s: float) -> float:
    return min(PAUSE_MAX_S, max(PAUSE_MIN_S, 2 * pause_s))
