"""The engine's end of the socket: one thread that reads it and does the staging copies.

A forward pass takes longer than a slot takes to cross a link, so everything that only moves KV is
handled here, beside the pass: grants, freed slots, imports and exports. All other commands go to
the main loop's inbox in the order they came; an ``Import`` that came before a ``Commit`` is in its
blocks before the main loop sees the ``Commit``. The thread also tells the agent that the engine
lives, however long a step takes.
"""

from __future__ import annotations

import os
import queue
import select
import socket
import threading
import time
import traceback
from typing import TYPE_CHECKING

from pop_node.engine.boundary import RECEIVE_BYTES, MessageReader, encode
from pop_node.engine.messages import (
    Add,
    AgentMessage,
    Beat,
    Commit,
    Crashed,
    Drop,
    EngineMessage,
    Import,
    Imported,
    Ready,
    Release,
    Retarget,
    SlotFree,
    Staged,
    StageFrom,
    Stop,
)

if TYPE_CHECKING:  # it needs torch, which a port does not wait for
    from pop_node.engine.staging.stager import Stager

INBOX_COMMANDS = 4096
"""Commands between two steps. Guess: every sequence of a full engine added and dropped several
times; beyond it the socket fills up, the agent is told, and no sign of life leaves either."""

BEAT_PERIOD_S = 0.25
"""Signs of life: four within the shortest detection time that a topology may ask for."""

COPY_POLL_MS = 1
"""Between looks at pieces on their way from a device; all slots in that time are 16 GB/s."""

EXIT_STOPPED = 0
EXIT_PARENT_GONE = 0
EXIT_CRASHED = 1

Inbox = Add | Drop | Retarget | StageFrom | Release | Commit | Stop


class Port:
    """Socket, inbox and copying thread of one engine process."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._send_lock = threading.Lock()
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stager: Stager | None = None
        self._inbox: queue.Queue[Inbox] = queue.Queue(INBOX_COMMANDS)
        self._beats = False
        self._turned_at: float | None = None

    def send(self, message: EngineMessage | Beat) -> None:
        """Say something to the agent, from any thread; ends the process when nobody listens."""
        frame = encode(message)
        try:
            with self._send_lock:
                self._sock.sendall(frame)
        except OSError:
            os._exit(EXIT_PARENT_GONE)

    def wake(self) -> None:
        """Tell the thread that a piece may be ready; from any thread, never blocks."""
        os.eventfd_write(self._wake_fd, 1)

    def start(self) -> None:
        """Begin to read, so that a start that takes long can be stopped and notices an agent that
        is gone. The thread ends with the process."""
        threading.Thread(target=self._run, name="port", daemon=True).start()

    def attach(self, stager: Stager) -> None:
        """The model is loaded: from now on commands are taken."""
        self._stager = stager

    def ready(self, message: Ready) -> None:
        """Tell the agent; a ``Beat`` follows every ``BEAT_PERIOD_S`` from now on."""
        self.send(message)
        self._beats = True

    def take(self, *, wait: bool) -> Inbox | None:
        """The next command of the main loop, for whose turns this is the mark; None when there is
        none and the main loop does not ``wait``."""
        self._turned_at = None
        try:
            return self._inbox.get(block=wait)
        except queue.Empty:
            return None
        finally:
            self._turned_at = time.monotonic()

    def crash(self, error: BaseException) -> None:
        """Last words, then the end of the process, whichever thread failed."""
        traceback.print_exception(error)
        self.send(Crashed(f"{type(error).__name__}: {error}"))
        os._exit(EXIT_CRASHED)

    # ---- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as exc:  # noqa: BLE001 - supervisor of this thread: tell and exit
            self.crash(exc)

    def _loop(self) -> None:
        reader = MessageReader()
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        staged: Staged | None = None
        beat_at = 0.0
        while True:
            now = time.monotonic()
            if now >= beat_at:
                beat_at = now + BEAT_PERIOD_S
                self._beat(now)
            # After a piece look for commands without waiting: there may be another piece.
            for fd, _ in poll.poll(0 if staged is not None else self._patience_ms(beat_at - now)):
                if fd == self._wake_fd:
                    os.eventfd_read(self._wake_fd)
                else:
                    self._read(reader)
            staged = self._stager.stage_one() if self._stager is not None else None
            if staged is not None:
                self.send(staged)

    def _patience_ms(self, until_beat_s: float) -> float:
        """How long to wait for something to do. A device wakes nobody when a copy is done."""
        under_way = self._stager is not None and self._stager.under_way
        return COPY_POLL_MS if under_way else until_beat_s * 1000

    def _beat(self, now: float) -> None:
        turned_at = self._turned_at
        if self._beats:
            self.send(Beat(0.0 if turned_at is None else max(0.0, now - turned_at)))

    def _read(self, reader: MessageReader) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except ConnectionResetError:  # it died before it had read what we said
            data = b""
        if not data:
            os._exit(EXIT_PARENT_GONE)
        for message in reader.feed(data):
            if self._stager is not None:
                self._take(message, self._stager)
            elif isinstance(message, Stop):
                os._exit(EXIT_STOPPED)
            else:
                raise ValueError(f"{type(message).__name__} before Ready")

    def _take(self, message: AgentMessage, stager: Stager) -> None:
        match message:
            case Import(transfer, slot):
                stager.take_in(message)
                self.send(Imported(transfer, slot))
            case SlotFree(slot):
                stager.free_slot(slot)
            case StageFrom():
                # Unknown: its Add or Retarget may still be in the inbox, so let it queue behind.
                if not stager.grant(message):
                    self._inbox.put(message)
            case Add() | Drop() | Retarget() | Release() | Commit() | Stop():
                self._inbox.put(message)
            case _:
                raise ValueError(f"{type(message).__name__} is not for an engine")
