"""Children that never outlive their launcher, however it ends.

The launcher names itself in the environment; a child asks the kernel for SIGTERM when that process
dies (even by SIGKILL), then checks that it has not died already.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "POPMESH_LAUNCHER_PID"
_PR_SET_PDEATHSIG = 1  # Linux, prctl(2)


def die_with_launcher() -> None:
    """Call first thing in a child's main thread; does nothing when no launcher is named.

    The name is taken out of the environment: processes that the child starts are its own.
    """
    launcher = os.environ.pop(LAUNCHER_PID, None)
    if launcher is None:
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(launcher):
        raise SystemExit("the launcher is gone")
