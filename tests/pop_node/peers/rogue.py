"""A stand-in for a peer that misbehaves: it speaks the givers' protocol over a real socket.

What it does wrong is set by attributes; every request is noted.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec

from pop_node.peers.inventory import Inventory, Stocked
from pop_node.store.manifest import read_manifest


class Rogue:
    """Has the bundle in ``bundle`` and gives it, except for what its attributes say."""

    def __init__(self, name: str, bundle: Path) -> None:
        self.name = name
        self.bundle = bundle
        self.manifest = read_manifest(bundle)
        self.marks = b"\x01" * len(self.manifest.data.chunks)
        self.spoil: dict[str, bytes] = {}  # other content of a file; of "", of what it says it has
        self.stall_after = -1  # bytes of data per answer, then silence until the test ends
        self.cut_after = -1  # bytes of data per answer, then the connection is reset
        self.pause_s = 0.0  # before each piece of 1 KiB of data
        self.status = 0  # of every answer about data
        self.drip_s = 0.0  # before each byte of everything else
        self.extra = b""  # more than was asked for
        self.bringing: list[str] = []
        self.requests: list[str] = []
        self.taken_bytes = 0
        self.address = ""
        self.released = threading.Event()

    def inventory(self) -> bytes:
        if "" in self.spoil:
            return self.spoil[""]
        data = self.manifest.data
        stocked = Stocked(
            bundle=self.manifest.bundle,
            identity=self.manifest.identity,
            dtype=self.manifest.dtype,
            names=["tiny"],
            nbytes=data.nbytes,
            chunks=len(data.chunks),
            arrived=sum(self.marks),
        )
        return msgspec.json.encode(Inventory(self.name, [stocked], [], self.bringing))

    def content(self, name: str) -> bytes:
        return self.spoil.get(name) or (self.bundle / name).read_bytes()


@contextmanager
def misbehaving(name: str, bundle: Path) -> Iterator[Rogue]:
    """The server runs for the length of the block."""
    rogue = Rogue(name, bundle)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.removeprefix("/bundles").lstrip("/")
            rogue.requests.append(f"{path.rpartition('/')[2]} {self.headers.get('Range', '')}")
            if not path:
                self._whole(rogue.inventory())
            elif path.endswith("/arrived"):
                self._whole(rogue.marks)
            elif path.endswith("/weights.bin"):
                self._data()
            else:
                self._whole(rogue.content(path.rpartition("/")[2]))

        def _whole(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if rogue.drip_s:
                with suppress(OSError):
                    for byte in body:
                        if rogue.released.wait(rogue.drip_s):
                            return
                        self.wfile.write(bytes([byte]))
                return
            self.wfile.write(body)

        def _data(self) -> None:
            if rogue.status:
                self.send_error(rogue.status)
                return
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
            assert span
            data = rogue.content("weights.bin")[int(span[1]) : int(span[2]) + 1] + rogue.extra
            self.send_response(206)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with suppress(OSError):
                for at in range(0, len(data), 1024):
                    if 0 <= rogue.stall_after <= at:
                        rogue.released.wait()
                    if 0 <= rogue.cut_after <= at:
                        self.connection.shutdown(socket.SHUT_RDWR)
                        self.close_connection = True
                        return
                    if rogue.pause_s and rogue.released.wait(rogue.pause_s):
                        return
                    self.wfile.write(data[at : at + 1024])
                    rogue.taken_bytes += len(data[at : at + 1024])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # takers hang up: fine
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    rogue.address = f"127.0.0.1:{server.server_address[1]}"
    try:
        yield rogue
    finally:
        rogue.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
