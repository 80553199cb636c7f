"""How one sequence is guessed at: what its text foretells, and how often that came true. Pure."""

from __future__ import annotations

import math
from array import array

from pop_node.engine.scheduling.lookup import Lookup

MAX_DRAFT = 8
"""Longest draft. Guess: where nine of ten guesses are right, five of eight are kept."""

FADE = 0.9
"""Weight of what a sequence's guesses were like, per draft. Guess: ten drafts to change one's mind,
since a text that copies stops doing so at once."""

PRIOR_WEIGHT = 2.0
"""What the engine's experience counts for in a sequence, in guesses. Guess."""

MAX_CHANCE = 0.99
"""Nothing is certain. Guess."""

FIRST_PAUSE, LONGEST_PAUSE = 16, 256
"""Steps until one guess is tried again where guessing does not pay; doubled by each that is wrong.
Guess: a row in sixteen steps at first, and next to none in the end."""


class Drafter:
    """What is known of one sequence: where its text was before, and how well that foretold it."""

    __slots__ = ("_hits", "_lookup", "_pause", "_rest", "_tries")

    def __init__(self) -> None:
        self._lookup = Lookup()
        self._hits = self._tries = 0.0  # fading
        self._pause = self._rest = 0

    def length(self, threshold: float, engine_chance: float) -> int:
        """How many tokens to guess now; once per step."""
        chance = self._chance(engine_chance)
        if chance > threshold:
            return min(MAX_DRAFT, int(math.log(threshold) / math.log(chance)))
        if self._rest == 0:
            return 1
        self._rest -= 1
        return 0

    def worth(self, count: int, engine_chance: float) -> float:
        """How many of ``count`` guesses should be right."""
        chance = self._chance(engine_chance)
        return chance * (1.0 - chance**count) / (1.0 - chance)

    def _chance(self, engine_chance: float) -> float:
        """How often a guess is right, if all before it were."""
        tries = self._tries + PRIOR_WEIGHT
        return min(MAX_CHANCE, (self._hits + PRIOR_WEIGHT * engine_chance) / tries)

    def guess(self, ids: array[int], count: int) -> tuple[int, ...]:
        """See ``Lookup.guess``."""
        return self._lookup.guess(ids, count)

    def judge(self, drafted: int, accepted: int) -> None:
        """A draft was verified."""
        self._hits = FADE * self._hits + accepted
        self._tries = FADE * self._tries + min(drafted, accepted + 1)
        self._pause = 0 if accepted else min(max(FIRST_PAUSE, 2 * self._pause), LONGEST_PAUSE)
        self._rest = self._pause
