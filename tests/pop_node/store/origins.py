"""Web servers of bundles, well-behaved and not: real sockets on loopback."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Site:
    """Serves ``root``. Behaviour is set by attributes, and every request is noted."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ranges = True
        self.cut_after = -1  # bytes of weights.bin per answer; the connection then closes
        self.status: dict[str, int] = {}
        self.spoil: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.url = ""


@contextmanager
def serving(root: Path) -> Iterator[Site]:
    site = Site(root)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            site.requests.append((name, self.headers.get("Range", "")))
            if name in site.status or not (site.root / name).is_file():
                self.send_error(site.status.get(name, 404))
                return
            data = site.spoil.get(name) or (site.root / name).read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted and site.ranges:
                start, stop = int(wanted[1]), int(wanted[2]) + 1
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                data = data[start:stop]
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if name == "weights.bin" and site.cut_after >= 0:
                self.wfile.write(data[: site.cut_after])
                self.close_connection = True
                return
            try:
                self.wfile.write(data)
            except ConnectionError:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_address[1]}/bundle"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
