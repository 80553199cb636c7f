"""Start of an engine process: the parts in their order, then the loop.

Importing torch is most of a start, so what needs none of it is done beside that: waiting for the
set-up and reading the model (``beginning``). Everything that fails before the loop is told to the
agent as ``Crashed`` like a failure in it.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time

from pop_node.engine.beginning import Beginning, goes_to_device
from pop_node.engine.config import Ahead
from pop_node.engine.port import EXIT_PARENT_GONE, EXIT_STOPPED, Port
from pop_node.engine.start_clock import StartClock, made_at
from pop_node.store.spare_memory import SpareMemory

IMPORT_SWITCH_S = 0.0005
"""How long imports keep the interpreter while readers wait for it, a tenth of what is usual: each
reader needs it a few times per chunk, for microseconds."""


AGENTS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Left to the agent. They reach its engines as well: from a terminal, and from service managers
that signal a whole control group (systemd's default). Answers that run shall end first."""


def serve(sock: socket.socket, started_at: float, ahead: Ahead | None = None) -> int:
    """Be the engine at the other end of ``sock``; returns the exit code.

    ``started_at`` is when the process began to import, on the monotonic clock; ``ahead`` is what it
    has ready when the set-up comes.
    """
    for number in AGENTS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    gc.disable()  # imports make little garbage and much that would be walked again and again
    process_at = made_at(os.getpid())
    clock = StartClock(process_at)
    clock.add("process_start", process_at, started_at)
    port = Port(sock)
    usual_switch_s = sys.getswitchinterval()
    sys.setswitchinterval(IMPORT_SWITCH_S)
    try:
        spare: SpareMemory | None = None
        if ahead is not None and not goes_to_device(ahead.backend):
            spare = SpareMemory(ahead.memory_bytes, ahead.touched_bytes)
        beginning = Beginning(sock, port, clock, spare)
        from pop_node.engine.building import Kernels, build

        imported_at = time.monotonic()
        clock.add("imports", started_at, imported_at)
        kernels = Kernels(clock)
        if ahead is not None:
            kernels.load_ahead(ahead)
        readied_at = time.monotonic()
        set_up = beginning.set_up()
        if set_up is None:
            return EXIT_PARENT_GONE
        clock.add("standby", readied_at, max(readied_at, set_up.came_at))
        loop, ready = build(port, set_up, kernels, clock)
        sys.setswitchinterval(usual_switch_s)
        gc.freeze()  # the model lives as long as the process: do not walk it again
        gc.enable()
        port.ready(ready)
        loop.run()
    except Exception as exc:  # noqa: BLE001 - supervisor: tell the agent and exit
        port.crash(exc)
    return EXIT_STOPPED
