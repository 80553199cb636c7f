"""Stands in for the ``popmesh`` command in launcher tests: the same arguments, nothing behind them.

A node writes its status file and keeps a "sleep" as its engine, in its process group; ``refuse`` in
a node's name makes it exit like a refused configuration, ``mistaken`` its engine crash for good,
``waiting`` its model be fetched again and again; a router answers every completion.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import socketserver
import subprocess
import sys
from pathlib import Path


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def node() -> None:
    if "refuse" in sys.argv[2]:
        print("Error: the model is not in the store", file=sys.stderr)
        sys.exit(2)
    engine = subprocess.Popen(["sleep", "600"])
    status = {
        "agent_pid": os.getpid(),
        "ready": True,
        "engines": [{"model": "small", "rank": 0, "pid": engine.pid, "ready": True}],
        "addresses": {"mesh": "127.0.0.1:1", "kv": {"small": "127.0.0.1:2"}},
    }
    if "mistaken" in sys.argv[2]:
        words = "ConfigError: weights 'resident' cannot be used"
        crashed = {"model": "small", "rank": 0, "pid": None, "last_words": words}
        status |= {"ready": False, "engines": [crashed]}
    if "waiting" in sys.argv[2]:
        absent = {"model": "small", "rank": 0, "pid": None, "problem": "the disk is full"}
        status |= {"ready": False, "engines": [absent]}
    path = Path(option("--status-file"))
    path.with_suffix(".new").write_text(json.dumps(status))
    path.with_suffix(".new").replace(path)
    signal.sigwait({signal.SIGTERM})


class Router(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        body = json.dumps({"usage": {"completion_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def listen(port: int, handler: type[socketserver.BaseRequestHandler]) -> None:
    socketserver.TCPServer.allow_reuse_address = True
    socketserver.ThreadingTCPServer(("127.0.0.1", port), handler).serve_forever()


if sys.argv[1] == "node":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    node()
elif sys.argv[1] == "router":
    listen(int(option("--listen").rpartition(":")[2]), Router)
elif sys.argv[1] == "registry":
    listen(int(option("--listen").rpartition(":")[2]), socketserver.BaseRequestHandler)
elif sys.argv[1] == "links":
    plan = json.loads(Path(option("--plan")).read_text())
    listen(int(plan["ports"][-1]["listen"].rpartition(":")[2]), socketserver.BaseRequestHandler)
