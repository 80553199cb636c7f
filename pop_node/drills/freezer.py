"""Stops a process for a while: the helper behind the freezing drills.

``python -m pop_node.drills.freezer PID SECONDS`` says "ready", waits for a line, stops PID and lets
it go on after SECONDS, or ends when PID does. A process of its own, because an agent that stopped
itself could not wake itself. It holds the process, not its number: a number that is given to
another process meanwhile is never stopped.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys


def freeze(pid: int, seconds: float) -> None:
    """See the module. Raises ``ProcessLookupError`` when there is no such process."""
    process = os.pidfd_open(pid)
    print("ready", flush=True)
    if not sys.stdin.readline():
        return  # whoever started us is gone
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    try:
        signal.pidfd_send_signal(process, signal.SIGSTOP)
        select.select([process], [], [], seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGCONT)


if __name__ == "__main__":
    try:
        freeze(int(sys.argv[1]), float(sys.argv[2]))
    except ProcessLookupError:
        sys.exit(1)
