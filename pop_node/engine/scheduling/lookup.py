"""What may come next, found in the sequence itself: the tokens after an earlier place that ended
like the sequence ends now.

Answers copy names, quotes, code and lists from their prompt and from themselves, and a model that
has begun to copy mostly goes on. No second model is asked. Pure.

Source: Saxena, "Prompt lookup decoding" (2023); Leviathan et al., "Fast inference from transformers
via speculative decoding" (ICML 2023) for drafts and their verification.
"""

from __future__ import annotations

from array import array

NGRAM = 2
"""Tokens that must be equal. Measured on fourteen answers of SmolLM2-135M, greedy and at
temperature 0.8: two find 911 right tokens by 2,580 guesses, three 790 by 1,578, four 686 by 1,242.
A wrong row is cheap, and a sequence whose guesses are mostly wrong is stopped (``drafter``)."""

_TOKEN_BITS = 32


class Lookup:
    """An index of one sequence that grows with it: each token is entered once, in O(1)."""

    __slots__ = ("_after", "_entered")

    def __init__(self) -> None:
        self._after: dict[int, int] = {}  # the NGRAM tokens before a place -> the newest such place
        self._entered = NGRAM - 1

    def guess(self, ids: array[int], count: int) -> tuple[int, ...]:
        """``count`` tokens that may follow ``ids``; () when their end never occurred before.

        ``ids`` is what it was at the last call, with more behind it. Where the earlier place is
        near the end the guess runs into itself: a repetition goes on.
        """
        length = len(ids)
        if length <= NGRAM:
            return ()
        for place in range(self._entered + 1, length):
            self._after[_key(ids, place)] = place
        self._entered = length - 1
        place = self._after.get(_key(ids, length), 0)
        if not place:
            return ()
        period = length - place
        return tuple(ids[place + at % period] for at in range(count))


def _key(ids: array[int], place: int) -> int:
    """The ``NGRAM`` tokens before ``place`` as one number."""
    key = 0
    for token in ids[place - NGRAM : place]:
        key = key << _TOKEN_BITS | token
    return key
