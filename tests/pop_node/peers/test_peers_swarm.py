"""Who is asked for what: the swarm against random peers under a virtual clock, and its rules."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pop_node.peers import swarm as machine
from pop_node.peers.swarm import ATTEMPTS, Leave, Line, Look, Run, Swarm, Wait

CHUNK = 1000
A, B = Line("a", 0), Line("b", 0)


def swarm(num_chunks: int, seed: int = 0) -> Swarm:
    return Swarm(num_chunks, CHUNK, range(num_chunks), random.Random(seed))


def everything(num_chunks: int) -> bytes:
    return b"\x01" * num_chunks


def joined(num_chunks: int, *peers: str) -> Swarm:
    made = swarm(num_chunks)
    for peer in peers:
        made.join(peer)
        made.has(peer, everything(num_chunks), 0.0)
    return made


def run_of(made: Swarm, line: Line, now: float) -> Run:
    step = made.next(line, now)
    assert isinstance(step, Run), step
    return step


def bring(made: Swarm, line: Line, run: Run, now: float) -> None:
    for index in range(run.first, run.stop):
        made.arrived(line, index, now)


# ---- rules -------------------------------------------------------------------------------------


def test_a_peer_is_first_asked_what_it_has_and_by_one_line_only() -> None:
    made = swarm(4)
    made.join("a")
    assert made.next(A, 0.0) == Look()
    assert isinstance(made.next(Line("a", 1), 0.0), Wait)
    assert not made.hopeless(), "nobody knows yet"
    made.has("a", b"\0\0\1\0", 0.0)
    assert made.next(A, 0.0) == Run(2, 3)
    assert isinstance(made.next(Line("a", 1), 0.0), Wait)
    assert made.next(Line("a", 1), 2.0) == Look(), "more may have arrived there"


def test_different_lines_get_different_chunks() -> None:
    made = joined(100_000, "a", "b")
    runs = [run_of(made, Line(peer, number), 0.0) for peer in "ab" for number in (0, 1)]
    chunks = [index for run in runs for index in range(run.first, run.stop)]
    assert len(chunks) == len(set(chunks))


def test_nodes_that_start_together_begin_at_different_places() -> None:
    firsts = set()
    for seed in range(10):
        made = swarm(200_000, seed)
        made.join("a")
        made.has("a", everything(200_000), 0.0)
        firsts.add(run_of(made, A, 0.0).first)
    assert len(firsts) > 5


def test_an_idle_line_takes_over_the_end_of_a_run() -> None:
    made = joined(8, "a", "b")
    assert run_of(made, A, 0.0) == Run(0, 8)
    assert run_of(made, B, 0.0) == Run(4, 8)
    for index in range(3):
        assert made.arrived(A, index, 1.0)
    assert not made.arrived(A, 3, 1.0), "the rest is another line's"


def test_what_is_taken_over_follows_the_rates() -> None:
    made = joined(48, "a", "b")
    first = run_of(made, A, 0.0)
    for number, index in enumerate(range(first.first, first.stop)):
        made.arrived(A, index, (number + 1) / 4)
    run = run_of(made, A, 5.0)
    assert run.stop - run.first == 8, "two seconds at four chunks a second"
    run_of(made, B, 5.0)
    others = set(range(48)) - set(range(first.first, first.stop)) - set(range(run.first, run.stop))
    for number, index in enumerate(sorted(others)):
        made.arrived(B, index, 5.0 + (number + 1) / 12)
    assert run_of(made, B, 8.0) == Run(run.stop - 6, run.stop), "three quarters are its share"


def test_the_last_chunk_of_a_slow_line_is_asked_for_twice_and_the_first_wins() -> None:
    made = joined(2, "a", "b")
    assert run_of(made, A, 0.0) == Run(0, 2)
    assert run_of(made, B, 0.0) == Run(1, 2)
    made.arrived(B, 1, 0.1)
    assert isinstance(made.next(B, 0.1), Wait), "the other may be about to bring it"
    assert run_of(made, B, 5.0) == Run(0, 1)
    assert made.wanted(A, 0)
    made.arrived(B, 0, 5.1)
    assert not made.wanted(A, 0)
    assert made.finished
    assert made.next(A, 5.2) == Leave()


def test_a_liar_is_never_asked_again() -> None:
    made = joined(4, "a", "b")
    run = run_of(made, A, 0.0)
    made.lied(A)
    assert made.next(A, 1e9) == Leave()
    assert made.is_gone("a")
    assert run_of(made, B, 0.0) == run, "its chunks are free again"
    assert "not what the manifest names" in made.reasons()["a"]


def test_failures_pause_and_end_a_peer_and_a_chunk_forgives_them() -> None:
    made = joined(4, "a")
    now = 0.0
    for _ in range(ATTEMPTS - 1):
        run_of(made, A, now)
        made.failed(A, "stalled", now)
        step = made.next(A, now)
        assert isinstance(step, Wait)
        assert step.until > now
        now = step.until
    run = run_of(made, A, now)
    made.arrived(A, run.first, now)
    for _ in range(ATTEMPTS):
        assert not made.hopeless()
        made.failed(A, "stalled", now)
    assert made.hopeless()
    assert made.reasons() == {"a": "stalled"}


def test_a_busy_peer_is_left_alone_as_long_as_it_asks_for() -> None:
    made = joined(4, "a")
    run_of(made, A, 0.0)
    made.busy(A, 7.0, 0.0)
    assert made.next(A, 6.9) == Wait(7.0)
    assert isinstance(made.next(Line("a", 1), 0.0), Run), "another line may try"
    assert not made.hopeless()


# ---- random worlds -----------------------------------------------------------------------------


@dataclass
class Behaviour:
    """One peer: its speed, and what it does wrong."""

    chunk_s: float
    marks: bytes
    lies: frozenset[int]  # chunks that it gives wrong
    dies_at: float
    busy_until: float


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, dict[str, Behaviour], int]:
    num_chunks = draw(st.integers(1, 60))
    peers = {}
    chunk = st.integers(0, num_chunks - 1)
    for name in "abcd"[: draw(st.integers(1, 4))]:
        peers[name] = Behaviour(
            chunk_s=draw(st.sampled_from([0.01, 0.1, 1.0, 30.0])),
            marks=bytes(
                draw(
                    st.lists(
                        st.sampled_from([1, 1, 1, 0]), min_size=num_chunks, max_size=num_chunks
                    )
                )
            ),
            lies=draw(st.frozensets(chunk, max_size=2)),
            dies_at=draw(st.sampled_from([0.0, 0.5, 5.0, 1e9, 1e9])),
            busy_until=draw(st.sampled_from([0.0, 0.0, 3.0])),
        )
    peers["good"] = Behaviour(0.5, everything(num_chunks), frozenset(), 1e9, 0.0)
    return num_chunks, peers, draw(st.integers(0, 1000))


@given(worlds(), st.booleans())
def test_all_is_brought_by_the_good_and_no_lie_is_kept(
    world: tuple[int, dict[str, Behaviour], int], with_good: bool
) -> None:
    """Each line is a small process: what it does next is in a queue by time."""
    num_chunks, peers, seed = world
    if not with_good:
        del peers["good"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "LOOK_S", 1.0)  # virtual time is free, each look is a step
        play(swarm(num_chunks, seed), num_chunks, peers, with_good)


def play(made: Swarm, num_chunks: int, peers: dict[str, Behaviour], with_good: bool) -> None:
    got: set[int] = set()
    liars: set[str] = set()
    queue: list[tuple[float, int, Line, Run | None, int]] = []
    for name in peers:
        made.join(name)
        for number in (0, 1):
            heapq.heappush(queue, (0.0, len(queue), Line(name, number), None, 0))
    order = len(queue)
    for _ in range(20_000):
        if not queue or made.finished:
            break
        now, _, line, run, index = heapq.heappop(queue)
        peer = peers[line.peer]
        after: tuple[float, Run | None, int] | None
        if run is not None:  # a chunk is there, or not
            after = (now, None, 0)
            if now >= peer.dies_at:
                made.failed(line, "died", now)
            elif now < peer.busy_until:
                made.busy(line, 1.0, now)
            elif index in peer.lies:
                liars.add(line.peer)
                made.lied(line)
            elif made.wanted(line, index):
                go_on = made.arrived(line, index, now)
                got.add(index)
                if go_on:
                    assert index + 1 < run.stop
                    after = (now + peer.chunk_s, run, index + 1)
        else:
            step = made.next(line, now)
            match step:
                case Leave():
                    after = None
                case Wait(until):
                    assert until > now
                    after = (until, None, 0)
                case Look():
                    if now >= peer.dies_at:
                        made.failed(line, "died", now)
                    else:
                        made.has(line.peer, peer.marks, now)
                    after = (now, None, 0)
                case Run(first, stop):
                    assert line.peer not in liars, "a liar is not asked again"
                    assert all(peer.marks[first:stop])
                    assert not set(range(first, stop)) & got
                    after = (now + peer.chunk_s, step, first)
        if after is not None:
            order += 1
            heapq.heappush(queue, (after[0], order, line, after[1], after[2]))
        if made.hopeless() and not made.finished:
            assert not with_good
            break
    assert made.num_left == num_chunks - len(got)
    if with_good:
        assert made.finished
        assert got == set(range(num_chunks))
