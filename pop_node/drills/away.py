"""What is left of an agent that a drill has lost: a process that waits, then ends as a crash does.

``python -m pop_node.drills.away SECONDS`` takes the place of the agent under the same process id,
so that whoever starts agents again sees none end before its time. It holds nothing: memory,
sockets and engines of the agent are gone.
"""

from __future__ import annotations

import signal
import sys
import time

CRASHED = 1

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(float(sys.argv[1]))
    sys.exit(CRASHED)
