"""The port's thread says that the engine lives, whatever its main loop does."""

from __future__ import annotations

import os
import queue
import socket
from collections.abc import Iterator

import pytest

from pop_node.engine import messages as m
from pop_node.engine.boundary import MessageReader, encode
from pop_node.engine.port import INBOX_COMMANDS, Port

READY = m.Ready(1, 16, 4, 64, "reference", {}, {})
PATIENCE_S = 60.0


class NoStager:
    """A fake: nothing is staged here."""

    under_way = False

    def stage_one(self) -> None:
        return None


class Agent:
    """The other end of the socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = MessageReader()
        self._heard: queue.SimpleQueue[m.EngineMessage | m.Beat] = queue.SimpleQueue()

    def say(self, message: m.AgentMessage) -> None:
        self._sock.sendall(encode(message))

    def hear(self) -> m.EngineMessage | m.Beat:
        while self._heard.empty():
            for message in self._reader.feed(self._sock.recv(65536)):
                self._heard.put(message)
        return self._heard.get()


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Port, Agent]]:
    """A port with its thread, and its agent; this thread is the main loop."""
    monkeypatch.setattr("pop_node.engine.port.BEAT_PERIOD_S", 0.01)
    theirs, ours = socket.socketpair()
    # The thread ends with its process, and ends the process when its agent is gone: keep both ends.
    os.dup(ours.fileno())
    ours.settimeout(PATIENCE_S)
    port = Port(theirs)
    stager: object = NoStager()
    port.start()
    port.attach(stager)  # type: ignore[arg-type]
    with ours:
        yield port, Agent(ours)


def test_beats_follow_ready_and_need_no_main_loop(ends: tuple[Port, Agent]) -> None:
    port, agent = ends
    port.ready(READY)
    assert agent.hear() == READY
    assert [agent.hear() for _ in range(3)] == [m.Beat(0.0)] * 3


def test_a_beat_tells_how_long_the_main_loop_has_been_at_its_turn(
    ends: tuple[Port, Agent],
) -> None:
    port, agent = ends
    port.ready(READY)
    agent.say(m.Drop(1))
    assert port.take(wait=True) == m.Drop(1)
    busy: list[float] = []
    while not busy or busy[-1] < 0.1:  # as in a step that takes long
        heard = agent.hear()
        if isinstance(heard, m.Beat) and heard.busy_s > 0.0:
            busy.append(heard.busy_s)
    assert busy == sorted(busy)
    assert len(set(busy)) > 1


def test_a_turn_begins_with_every_look_at_the_inbox(ends: tuple[Port, Agent]) -> None:
    port, agent = ends
    port.ready(READY)
    assert port.take(wait=False) is None
    while not isinstance(heard := agent.hear(), m.Beat) or heard.busy_s < 0.1:
        pass
    last = heard.busy_s
    assert port.take(wait=False) is None
    while (heard := agent.hear()) and isinstance(heard, m.Beat) and heard.busy_s >= last:
        last = heard.busy_s
    assert isinstance(heard, m.Beat)


def test_commands_keep_their_order(ends: tuple[Port, Agent]) -> None:
    port, agent = ends
    for seq in range(INBOX_COMMANDS // 4):
        agent.say(m.Drop(seq))
    taken = [port.take(wait=True) for _ in range(INBOX_COMMANDS // 4)]
    assert taken == [m.Drop(seq) for seq in range(INBOX_COMMANDS // 4)]
