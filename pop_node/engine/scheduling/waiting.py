"""Sequences that hold no blocks: those that were never admitted, and those that gave way.

Plain books, in the order in which the scheduler admits: whoever gave way comes first, each kind by
age.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import chain

from pop_node.engine.scheduling.sequence import Sequence


def age(sequence: Sequence) -> int:
    """What orders sequences: when they came."""
    return sequence.arrival


class Waiting:
    """``tokens`` counts what is to be computed; ``decode_legs`` those that cost no compute yet."""

    def __init__(self) -> None:
        self.tokens = 0
        self.decode_legs = 0
        self._new: dict[int, Sequence] = {}  # by age, as dicts keep insertion order
        self._preempted: list[Sequence] = []  # by age

    def __len__(self) -> int:
        return len(self._new) + len(self._preempted)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._preempted, self._new.values())

    @property
    def num_new(self) -> int:
        """Sequences that were never admitted."""
        return len(self._new)

    def is_new(self, sequence: Sequence) -> bool:
        """Was it never admitted?"""
        return sequence.seq in self._new

    def add(self, sequence: Sequence) -> None:
        """A new sequence, younger than all."""
        self._new[sequence.seq] = sequence
        if sequence.kv_source == "transfer":
            self.decode_legs += 1
        else:
            self.tokens += sequence.remaining

    def put_back(self, sequence: Sequence) -> None:
        """One that gave way and will be computed again."""
        self.tokens += sequence.remaining
        insort(self._preempted, sequence, key=age)

    def remove(self, sequence: Sequence) -> None:
        """It ends, or is admitted; what is to be computed is as when it was queued."""
        if sequence.kv_source == "compute":
            self.tokens -= sequence.remaining
        self.leave(sequence)

    def leave(self, sequence: Sequence) -> None:
        """As ``remove``, for one whose tokens are booked already."""
        if self._new.pop(sequence.seq, None) is None:
            self._preempted.pop(bisect_left(self._preempted, sequence.arrival, key=age))
        elif sequence.kv_source == "transfer":
            self.decode_legs -= 1

    def check(self) -> None:
        """Raise ``AssertionError`` if the books disagree."""
        for kind in (list(self._new.values()), self._preempted):
            ages = [age(sequence) for sequence in kind]
            assert ages == sorted(ages), "a queue is out of order"
        assert self.tokens == sum(s.remaining for s in self if s.kv_source == "compute")
        assert self.decode_legs == sum(s.kv_source == "transfer" for s in self._new.values())
