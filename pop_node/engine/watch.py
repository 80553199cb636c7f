"""Is an engine frozen, or stuck in a step? Decided without a clock and without IO.

An engine that sleeps for ever (a stopped process, a driver that never returns) closes no socket, so
nothing else notices before the deadlines of its requests. Two signs are looked at: that the thread
beside the main loop says ``Beat`` at all, and how long it says that the main loop has been at one
turn.
"""

from __future__ import annotations

from typing import Literal

LOOKS = 10
"""Looks in a row that hear nothing until an engine is frozen. Looks are counted, not seconds: a
timer fires once however late it is, so an agent that slept, or whose machine did, does not blame
its engine, whose beats are read before the next look. Guess: the detection time is exceeded by a
tenth at most."""

STUCK_MIN_S = 30.0
STUCK_STEPS = 4
"""A turn of the main loop is given up after so many of the longest ever seen, and never before the
first. Guesses: a step's length varies with the lengths in the batch and with what else the machine
does, hardly by four; half a minute is long beside a step (SmolLM2, 512 tokens, two busy cores: 1 s
native, 8 s reference) and short beside the deadlines of requests."""


class EngineWatch:
    """Looks after one engine, from its ``Ready`` on; the shell calls ``look`` every ``period_s``.

    A step may take far longer than ``detection_s``: beats come from a thread that only moves bytes,
    tensor operations release the interpreter while they run, and a thread that wants it gets it
    within milliseconds. Measured during those steps, on a machine with six runnable tasks for two
    cores: at most 0.27 s between beats that are due every 0.25 s. The start (imports, weights) is
    not looked at: the node's lifecycle bounds it.
    """

    def __init__(self, detection_s: float, step_s: float) -> None:
        """``step_s`` is a guess of the longest step, from the warm-up."""
        self.period_s = detection_s / LOOKS
        self._silent = 0
        self._busy_s = 0.0
        self._longest_s = step_s

    def beat(self, busy_s: float) -> None:
        """The engine lives; its main loop has been at its present turn for ``busy_s``."""
        if busy_s < self._busy_s:  # that turn came to its end
            self._longest_s = max(self._longest_s, self._busy_s)
        self._silent, self._busy_s = 0, busy_s

    def look(self) -> Literal["frozen", "stuck"] | None:
        """What is wrong with the engine, if anything."""
        self._silent += 1
        if self._silent >= LOOKS:
            return "frozen"
        if self._busy_s >= max(STUCK_MIN_S, STUCK_STEPS * self._longest_s):
            return "stuck"
        return None
