"""What a link carries: a bare sender of a file, and a bare taker; no protocol, sendfile(2).

    python benchmarks/parts/peer_fetch_wire.py PORT FILE              sends for ever
    python benchmarks/parts/peer_fetch_wire.py --take BYTES ADDRESS…  prints JSON: bytes, seconds

Each sender gives an equal share of ``BYTES``, over ``LINES`` connections as a taker has to a peer.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

LINES = 2


def send_for_ever(port: int, path: Path) -> None:
    """Whoever connects says where to begin and how far to go, and gets it."""

    def send(taker: socket.socket) -> None:
        with taker, path.open("rb") as file:
            begin, end = map(int, taker.recv(64).split())
            while begin < end:
                begin += os.sendfile(taker.fileno(), file.fileno(), begin, end - begin)
            taker.recv(1)

    server = socket.create_server(("127.0.0.1", port))
    while True:
        threading.Thread(target=send, args=(server.accept()[0],), daemon=True).start()


def take(addresses: list[str], nbytes: int) -> dict[str, float]:
    """All of them at once."""
    share = nbytes // (len(addresses) * LINES)

    def take_one(address: str, begin: int) -> None:
        host, port = address.split(":")
        buffer, left = bytearray(1 << 20), share
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(f"{begin} {begin + share}".encode())
            while left:
                got = sock.recv_into(buffer)
                if not got:
                    raise ConnectionError(f"{address} stopped sending")
                left -= got
            sock.sendall(b".")

    threads = [
        threading.Thread(target=take_one, args=(address, number * share))
        for number, address in enumerate(addresses * LINES)
    ]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"bytes": share * len(threads), "seconds": time.monotonic() - begin}


if __name__ == "__main__":
    if sys.argv[1] == "--take":
        print(json.dumps(take(sys.argv[3:], int(sys.argv[2]))))
    else:
        send_for_ever(int(sys.argv[1]), Path(sys.argv[2]))
