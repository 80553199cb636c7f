"""Which peer is asked for which chunks: pure decisions, no clock, socket, thread or randomness.

Several *lines* (connections to peers) take *runs* of chunks that follow each other; a run is about
``RUN_S`` of what its line was seen to bring, and begins at a random place, so that nodes that fetch
the same bundle at the same time soon have different parts to give to each other. A line without
anything left to ask for takes over the end of the run that would last longest, in proportion to
both rates; of a run with one chunk left it asks for the same chunk, and who brings it first wins.

Lines are told to wait, never to hurry: each asks ``next`` when it is idle and says what came of it.
Of a peer that lied nothing more is asked; one that fails is asked again after a pause, ``ATTEMPTS``
times in a row.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

RUN_S = 2.0
"""Guess: the round trip between two runs is lost in it, and little has to be taken over."""

RUN_BYTES = 64 * 1024 * 1024
"""Longest run: what a slow end of a fast line may cost."""

FIRST_RUN_BYTES = 16 * 1024 * 1024
"""Of a line of which nothing is known."""

ATTEMPTS = 3
"""Failures of a peer in a row, without a chunk in between, after which it counts as gone."""

BACKOFF_S = 0.25
"""After the first failure; doubles with each."""

LOOK_S = 1.0
"""How often a peer whose bundle is still arriving is asked what it has, and a line asks again that
has nothing to do. Guess: a few chunks arrive in it."""

OVERTAKE = 2.0
"""A chunk under way is asked for a second time if the other line should take so many times as long
as this one: less would waste bandwidth on guesses."""

UNKNOWN_S = 1.0
"""Guess: what a chunk takes on a line that never brought one; with it nothing is asked for twice
before the first answer may be here."""

RATE_WEIGHT = 0.3
"""Of the newest chunk in a line's rate: about the last five chunks count."""

_MISSING, _TAKEN, _DONE = 0, 1, 2
_WANTED = bytes([1, 1, 0]) + bytes(253)


@dataclass(frozen=True, slots=True)
class Line:
    """A connection to a peer: the ``number``-th."""

    peer: str
    number: int


@dataclass(frozen=True, slots=True)
class Run:
    """Ask for chunks ``[first, stop)``."""

    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Look:
    """Ask the peer which chunks it has."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to ask for before ``until``, unless something changes."""

    until: float


@dataclass(frozen=True, slots=True)
class Leave:
    """Nothing more is wanted from this peer."""


Step = Run | Look | Wait | Leave


@dataclass(slots=True)
class _Peer:
    marks: bytes | None = None  # not asked yet
    looked_at: float = float("-inf")
    looking: bool = False
    failures: int = 0
    gone: str = ""  # why nothing more is asked of it
    paused_until: float = float("-inf")


@dataclass(slots=True)
class _LineState:
    run: Run | None = None  # what is left of it, the chunk under way first
    since: float = 0.0  # when the chunk under way began
    rate_bytes_per_s: float = 0.0
    paused_until: float = float("-inf")


class Swarm:
    """One bundle being brought. Chunks have ``chunk_bytes``, or less where they are packed, and
    the last one."""

    def __init__(
        self, num_chunks: int, chunk_bytes: int, missing: Iterable[int], rng: random.Random
    ) -> None:
        self._chunk_bytes = chunk_bytes
        self._state = bytearray([_DONE]) * num_chunks
        for index in missing:
            self._state[index] = _MISSING
        self._left = num_chunks - self._state.count(_DONE)
        self._rng = rng
        self._peers: dict[str, _Peer] = {}
        self._lines: dict[Line, _LineState] = {}

    # ---- what is so ----------------------------------------------------------------------------

    @property
    def num_left(self) -> int:
        """Chunks that are not there."""
        return self._left

    @property
    def finished(self) -> bool:
        """Every chunk is there."""
        return self._left == 0

    def hopeless(self) -> bool:
        """Nobody who may still be asked has anything that is missing, as far as they said."""
        wanted = int.from_bytes(self._state.translate(_WANTED))
        return not any(
            peer.marks is None or wanted & int.from_bytes(peer.marks)
            for peer in self._peers.values()
            if not peer.gone
        )

    def is_gone(self, peer: str) -> bool:
        """It is not asked any more."""
        return peer in self._peers and bool(self._peers[peer].gone)

    def reasons(self) -> dict[str, str]:
        """Why peers are not asked any more."""
        return {name: peer.gone for name, peer in self._peers.items() if peer.gone}

    def rates(self) -> dict[str, float]:
        """Bytes/s by peer, over all its lines, of those that brought something."""
        found: dict[str, float] = {}
        for line, state in self._lines.items():
            if state.rate_bytes_per_s:
                found[line.peer] = found.get(line.peer, 0.0) + state.rate_bytes_per_s
        return found

    # ---- what happened -------------------------------------------------------------------------

    def join(self, peer: str) -> None:
        """A peer that may have chunks."""
        self._peers.setdefault(peer, _Peer())

    def has(self, name: str, marks: bytes, now: float) -> None:
        """A peer said that it has the chunks with a 1."""
        assert len(marks) == len(self._state)
        peer = self._peers[name]
        peer.marks, peer.looked_at, peer.looking = marks, now, False

    def arrived(self, line: Line, index: int, now: float) -> bool:
        """A chunk that was right; returns whether the next one is wanted from the same run."""
        state, peer = self._lines[line], self._peers[line.peer]
        peer.failures = 0
        self._measure(state, now)
        self._done(index)
        state.since = now
        if state.run is not None:
            state.run = _rest(Run(index + 1, state.run.stop))
        self._skip_done(line)
        return state.run is not None and state.run.first == index + 1

    def lied(self, line: Line) -> None:
        """A chunk did not match its digest: this peer is not asked again for this bundle."""
        self._go(line.peer, "what it sent is not what the manifest names")

    def failed(self, line: Line, why: str, now: float) -> None:
        """The line broke, stalled, or was never there."""
        peer = self._peers[line.peer]
        self._release(line)
        peer.looking = False
        peer.failures += 1
        if peer.failures >= ATTEMPTS:
            self._go(line.peer, why)
        else:
            peer.paused_until = now + BACKOFF_S * 2 ** (peer.failures - 1)

    def busy(self, line: Line, retry_after_s: float, now: float) -> None:
        """The peer gives to enough others."""
        self._release(line)
        self._peers[line.peer].looking = False
        self._lines[line].paused_until = now + retry_after_s

    def lacks(self, line: Line, now: float) -> None:
        """The peer does not have what it was asked for: what it has is to be asked again."""
        self.failed(line, "it does not have what it says", now)
        self._peers[line.peer].marks = None

    def wanted(self, line: Line, index: int) -> bool:
        """Whether a chunk under way on this line is of use still."""
        run = self._lines[line].run
        return run is not None and run.first == index and self._state[index] != _DONE

    # ---- what to do ----------------------------------------------------------------------------

    def next(self, line: Line, now: float) -> Step:
        """What an idle line does now."""
        state = self._lines.setdefault(line, _LineState())
        self._release(line)
        peer = self._peers[line.peer]
        if peer.gone or self.finished:
            return Leave()
        until = max(peer.paused_until, state.paused_until)
        if until > now:
            return Wait(until)
        old = peer.marks is None or (0 in peer.marks and now >= peer.looked_at + LOOK_S)
        if old and not peer.looking:
            peer.looking = True
            return Look()
        if peer.marks is None:
            return Wait(now + LOOK_S)
        run = self._free_run(peer.marks, state) or self._overtake(line, peer.marks, now)
        if run is None:
            return Wait(now + LOOK_S)
        self._state[run.first : run.stop] = bytes([_TAKEN]) * (run.stop - run.first)
        state.run, state.since = run, now
        return run

    def _free_run(self, marks: bytes, state: _LineState) -> Run | None:
        nbytes = min(RUN_BYTES, state.rate_bytes_per_s * RUN_S or FIRST_RUN_BYTES)
        longest = max(1, int(nbytes // self._chunk_bytes))
        # Runs begin at multiples of one length, so that few short gaps are left between them.
        places = -(-len(self._state) // longest)
        begin = self._rng.randrange(places) * longest
        for at, end in ((begin, len(self._state)), (0, begin)):
            while (first := self._state.find(_MISSING, at, end)) >= 0:
                if marks[first]:
                    return self._extend(marks, first, first + longest)
                at = marks.find(1, first)  # the next that it has
                if at < 0:
                    break
        return None

    def _extend(self, marks: bytes, first: int, limit: int) -> Run:
        stop = first + 1
        limit = min(limit, len(self._state))
        while stop < limit and self._state[stop] == _MISSING and marks[stop]:
            stop += 1
        return Run(first, stop)

    def _overtake(self, line: Line, marks: bytes, now: float) -> Run | None:
        """Take over the end of the run that lasts longest, or its only chunk if that is quicker."""
        mine = self._lines[line]
        for other_line in self._lines:
            self._skip_done(other_line)
        candidates = [
            (self._lasts_s(other, now), number, name.peer, other)
            for number, (name, other) in enumerate(self._lines.items())
            if name != line and other.run is not None
        ]
        own_s = self._chunk_bytes / mine.rate_bytes_per_s if mine.rate_bytes_per_s else UNKNOWN_S
        for lasts_s, _, peer, other in sorted(candidates, reverse=True):
            assert other.run is not None
            first, stop = other.run.first, other.run.stop
            if stop - first > 1:
                share = _share(mine.rate_bytes_per_s, other.rate_bytes_per_s)
                begin = max(first + 1, stop - max(1, round((stop - first) * share)))
                if lasts_s > own_s and all(marks[begin:stop]):
                    other.run = Run(first, begin)
                    return Run(begin, stop)
                continue
            slow = lasts_s > OVERTAKE * own_s and now - other.since > own_s
            if slow and marks[first] and peer != line.peer and self._num_asked(first) == 1:
                return Run(first, stop)
        return None

    # ---- arithmetic ----------------------------------------------------------------------------

    def _lasts_s(self, state: _LineState, now: float) -> float:
        """How long a line's run will last; of one that never brought anything, for ever."""
        assert state.run is not None
        nbytes = (state.run.stop - state.run.first) * self._chunk_bytes
        if not state.rate_bytes_per_s:
            return float("inf")
        expected_s = nbytes / state.rate_bytes_per_s
        late_s = now - state.since - self._chunk_bytes / state.rate_bytes_per_s
        return max(expected_s, late_s)

    def _num_asked(self, index: int) -> int:
        return sum(
            state.run is not None and state.run.first <= index < state.run.stop
            for state in self._lines.values()
        )

    def _measure(self, state: _LineState, now: float) -> None:
        took_s = max(now - state.since, 1e-6)
        rate = self._chunk_bytes / took_s
        old = state.rate_bytes_per_s
        state.rate_bytes_per_s = old + RATE_WEIGHT * (rate - old) if old else rate

    def _done(self, index: int) -> None:
        if self._state[index] != _DONE:
            self._state[index] = _DONE
            self._left -= 1

    def _skip_done(self, line: Line) -> None:
        """Chunks that another line brought meanwhile are no part of this run any more."""
        state = self._lines[line]
        run = state.run
        while run is not None and self._state[run.first] == _DONE:
            run = _rest(Run(run.first + 1, run.stop))
        state.run = run

    def _release(self, line: Line) -> None:
        """What a line was asked for and did not bring is free again, unless another has it too."""
        state = self._lines[line]
        run, state.run = state.run, None
        for index in range(run.first, run.stop) if run else ():
            if self._state[index] == _TAKEN and not self._num_asked(index):
                self._state[index] = _MISSING

    def _go(self, name: str, why: str) -> None:
        self._peers[name].gone = why
        for line in self._lines:
            if line.peer == name:
                self._release(line)


def _rest(run: Run) -> Run | None:
    return run if run.first < run.stop else None


def _share(mine: float, others: float) -> float:
    """Of a run's rest, by rates in bytes/s; half where one is not known."""
    return mine / (mine + others) if mine and others else 0.5
