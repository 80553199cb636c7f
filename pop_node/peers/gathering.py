"""Fills a partial bundle from peers: a thread per line does what the swarm decides.

Every chunk is verified before it counts. Whatever ends this, what arrived stays.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager

from pop_node.peers.client import Dialing, PeerBusyError, PeerLacksError, PeerSource
from pop_node.peers.neighbours import Peer
from pop_node.peers.patience import Patience
from pop_node.peers.swarm import LOOK_S, Leave, Line, Look, Run, Swarm, Wait
from pop_node.store.origin import InterruptedReadError
from pop_node.store.partial import Partial
from pop_node.store.source import unwatched
from topology.rollout import PEERS_AT_ONCE

LINES_PER_PEER = 2
"""While one waits a round trip for its next run, the other one's data flows."""

BUFFER_BYTES = 128 * 1024 * 1024
"""Of chunks under way, one per line: fewer peers are asked at once for a bundle of large chunks."""

Report = Callable[[str, int], None]
"""Called as ``report(peer, nbytes)`` for every chunk, from several threads but one at a time."""


class Gathering:
    """One attempt to bring what ``partial`` lacks; ``run`` blocks its thread."""

    def __init__(
        self,
        partial: Partial,
        holders: Callable[[], Sequence[Peer]],
        hold_out: Callable[[], bool],
        least_bytes_per_s: Callable[[Sequence[Peer]], float],
        dialing: Dialing,
        report: Report,
        rng: random.Random,
    ) -> None:
        """``holders``: peers that have all or some of the bundle as far as is known now, the
        quickest first. ``hold_out``: whether to wait for more when none of them has what is
        missing. ``least_bytes_per_s``: if these bring less, others are asked; 0: they need only
        bring something. All are asked about once in ``LOOK_S``."""
        self._partial = partial
        self._data = partial.manifest.data
        self._holders = holders
        self._hold_out = hold_out
        self._least_bytes_per_s = least_bytes_per_s
        self._dialing = dialing
        self._report = report
        missing = partial.missing_chunks(unwatched)
        self._longest = max(1, self._data.longest_chunk)
        self._swarm = Swarm(len(self._data.chunks), self._longest, missing, rng)
        self._changed = threading.Condition()  # guards all below and the swarm
        self._working: dict[str, int] = {}  # threads by peer
        self._sources: dict[Line, PeerSource] = {}
        self._error: BaseException | None = None
        self._over = False

    def run(self) -> bool:
        """Whether everything is there; False if no peer brings the rest (soon enough), or it was
        aborted.

        Raises ``OSError`` from the disk.
        """
        patience = Patience(self._swarm.num_left, time.monotonic())
        threads: list[threading.Thread] = []
        try:
            while not self._is_over():
                holders = self._holders()
                with self._changed:
                    threads += self._engage(holders)
                hold_out = self._hold_out()
                least_per_s = self._least_bytes_per_s(holders) / self._data.chunk_bytes
                with self._changed:
                    now, left = time.monotonic(), self._swarm.num_left
                    impatient = patience.is_over(left, least_per_s, now)
                    if (self._swarm.hopeless() or impatient) and not hold_out:
                        break
                    self._changed.wait_for(self._is_over, LOOK_S)
        finally:
            self.abort()
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error
        return self._swarm.finished

    def abort(self) -> None:
        """From any thread: ``run`` returns soon, whoever is being read."""
        with self._changed:
            self._over = True
            for source in self._sources.values():
                source.abort()
            self._changed.notify_all()

    def rates(self) -> dict[str, float]:
        """Bytes/s by peer."""
        with self._changed:
            return self._swarm.rates()

    def reasons(self) -> dict[str, str]:
        """Why peers were left."""
        with self._changed:
            return self._swarm.reasons()

    def _is_over(self) -> bool:
        return self._over or self._swarm.finished or self._error is not None

    def _engage(self, holders: Sequence[Peer]) -> list[threading.Thread]:
        """Have lines to the first peers that may still be asked."""
        started = []
        most = min(PEERS_AT_ONCE, BUFFER_BYTES // (LINES_PER_PEER * self._longest))
        for peer in holders:
            if len(self._working) >= most or self._over:
                break
            if peer.name in self._working or self._swarm.is_gone(peer.name):
                continue
            self._swarm.join(peer.name)
            self._working[peer.name] = LINES_PER_PEER
            for number in range(LINES_PER_PEER):
                line = Line(peer.name, number)
                source = PeerSource(peer, self._partial.manifest.bundle, self._dialing)
                self._sources[line] = source
                thread = threading.Thread(
                    target=self._work, args=(line, source), name=f"bring-{peer.name}-{number}"
                )
                thread.start()
                started.append(thread)
        return started

    # ---- a line's thread -----------------------------------------------------------------------

    def _work(self, line: Line, source: PeerSource) -> None:
        try:
            while True:
                with self._changed:
                    step = Leave() if self._is_over() else self._swarm.next(line, time.monotonic())
                    if isinstance(step, Wait):
                        self._changed.wait(max(0.0, step.until - time.monotonic()))
                match step:
                    case Leave():
                        return
                    case Look():
                        self._look(line, source)
                    case Run():
                        self._pull(line, source, step)
        except BaseException as exc:  # noqa: BLE001 - handed to the thread that waits in ``run``
            with self._changed:
                self._error = self._error or exc
        finally:
            with self._changed:
                source.close()
                del self._sources[line]
                self._working[line.peer] -= 1
                if not self._working[line.peer]:
                    del self._working[line.peer]
                self._changed.notify_all()

    def _look(self, line: Line, source: PeerSource) -> None:
        with self._setbacks(line):
            marks = source.marks(len(self._data.chunks))
            with self._changed:
                self._swarm.has(line.peer, marks, time.monotonic())
                self._changed.notify_all()

    def _pull(self, line: Line, source: PeerSource, run: Run) -> None:
        start, stop = self._data.span(run.first)[0], sum(self._data.span(run.stop - 1))
        index, at = run.first, 0
        longest = max(self._data.span(i)[1] for i in range(run.first, run.stop))
        buffer = memoryview(bytearray(longest))
        chunk = buffer[: self._data.span(index)[1]]
        with (
            self._setbacks(line),
            closing(source.stream(self._data.name, start, stop)) as pieces,
        ):
            for piece in pieces:
                rest = memoryview(piece)
                while rest:  # small copies only: a long one would hold up every other thread
                    part, rest = rest[: len(chunk) - at], rest[len(chunk) - at :]
                    chunk[at : at + len(part)] = part
                    at += len(part)
                    if at == len(chunk):
                        if not self._keep(line, index, chunk):
                            return
                        index, at = index + 1, 0
                        if index < run.stop:
                            chunk = buffer[: self._data.span(index)[1]]
                with self._changed:
                    if index < run.stop and not self._swarm.wanted(line, index):
                        return

    def _keep(self, line: Line, index: int, chunk: memoryview) -> bool:
        """Verify and write a chunk; whether the line should go on with the next."""
        right = self._partial.put_chunk(index, chunk)
        with self._changed:
            if not right:
                self._swarm.lied(line)
                self._hang_up(line.peer)
                return False
            left = self._swarm.num_left
            go_on = self._swarm.arrived(line, index, time.monotonic())
            if self._swarm.num_left < left:  # else another line was quicker
                self._report(line.peer, len(chunk))
            self._changed.notify_all()
            return go_on and not self._is_over()

    def _hang_up(self, peer: str) -> None:
        for line, source in self._sources.items():
            if line.peer == peer:
                source.abort()

    @contextmanager
    def _setbacks(self, line: Line) -> Iterator[None]:
        """What peers do wrong, told to the swarm."""
        try:
            yield
        except InterruptedReadError as exc:
            with self._changed:
                self._swarm.failed(line, str(exc), time.monotonic())
        except PeerBusyError as exc:
            with self._changed:
                self._swarm.busy(line, exc.retry_after_s, time.monotonic())
        except PeerLacksError:
            with self._changed:
                self._swarm.lacks(line, time.monotonic())
