"""``python -m pop_node.engine FD``: be an engine on the inherited socket ``FD``."""

import time

_STARTED_AT = time.monotonic()  # before the heavy imports, which are a phase of the start

import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402

from pop_node.engine.process import serve  # noqa: E402

if __name__ == "__main__":
    code = serve(socket.socket(fileno=int(sys.argv[1])), _STARTED_AT)
    sys.stderr.flush()
    os._exit(code)  # the copying thread may sit in a copy: there is nothing to tidy up in here
