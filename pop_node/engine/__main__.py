"""``python -m pop_node.engine FD [AHEAD]``: be an engine on the inherited socket ``FD``.

``AHEAD`` is what to have ready before the set-up, see ``pop_node.engine.config.Ahead``.
"""

import time

_STARTED_AT = time.monotonic()  # before the heavy imports, which are a phase of the start

import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402

from pop_node.engine.config import Ahead  # noqa: E402
from pop_node.engine.process import serve  # noqa: E402

if __name__ == "__main__":
    ahead = Ahead.from_argument(sys.argv[2]) if len(sys.argv) > 2 else None
    code = serve(socket.socket(fileno=int(sys.argv[1])), _STARTED_AT, ahead)
    sys.stderr.flush()
    os._exit(code)  # the copying thread may sit in a copy: there is nothing to tidy up in here
