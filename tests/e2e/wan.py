"""Hosts that are network namespaces, and a program that is the WAN between them.

Every host has a TUN device; this program reads the packets that its kernel wants to send, loses
some, delays the rest, and writes them to the device of the host they are for. So TCP is the real
one: handshakes, retransmission, congestion control. A namespace lives as long as somebody holds it
open, so nothing is left behind, however this ends.

Source: tun(4), network_namespaces(7), netdevice(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import json
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
IFF_UP, IFF_RUNNING = 0x1, 0x40
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8914

NETWORK = "198.18.0."
"""For tests of network devices (RFC 2544): no machine's own network."""

BUFFER_S = 0.2
"""Longest queue in front of a link, in seconds at its rate; what comes then is lost."""

DENIALS = (errno.EPERM, errno.EACCES, errno.ENOENT, errno.ENODEV)
"""No permission for a namespace or a device, or no /dev/net/tun: all else is a fault of ours."""

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Weather:
    """Of every path between two hosts: one-way delay, share of packets lost, bytes/s each way."""

    one_way_s: float
    loss: float
    rate_bytes_per_s: float


@dataclass(frozen=True)
class Host:
    """One namespace: its address on the WAN, and the file that stands for it."""

    address: str
    namespace: str

    def popen(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process there; it dies with this one, if it is one of the mesh's own."""
        environment = os.environ | {"POPMESH_LAUNCHER_PID": str(os.getpid())}
        with log.open("ab") as output:
            return subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env=environment,
                preexec_fn=lambda: enter(self.namespace),
            )

    def inside(self, work: Callable[[], T]) -> T:
        """Run ``work`` in a thread whose new sockets are that host's; raises what it raises."""
        with ThreadPoolExecutor(1, initializer=enter, initargs=(self.namespace,)) as thread:
            return thread.submit(work).result()


def enter(namespace: str) -> None:
    """Move this thread into a network namespace; raises ``OSError``."""
    fd = os.open(namespace, os.O_RDONLY)
    try:
        if libc.setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


class Unavailable(Exception):
    """Why there can be no namespaces here."""


@contextmanager
def wan(hosts: int, weather: Weather, seed: int) -> Iterator[list[Host]]:
    """Hosts on one WAN; raises ``Unavailable``."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    figures = [weather.one_way_s, weather.loss, weather.rate_bytes_per_s]
    command = [sys.executable, __file__, str(hosts), str(seed), *map(str, figures)]
    program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert program.stdin is not None
    assert program.stdout is not None
    try:
        line = program.stdout.readline()
        if not line:
            raise RuntimeError(f"the WAN ended with {program.wait(20)}")
        said = json.loads(line)
        if isinstance(said, str):
            raise Unavailable(said)
        yield [Host(**each) for each in said]
        assert program.poll() is None, "the WAN ended"
    finally:
        program.stdin.close()  # its sign to end
        program.stdout.close()
        try:
            program.wait(20)
        finally:
            program.kill()


# ---- the program -------------------------------------------------------------------------------


class Network:
    """The devices of all hosts and what is on its way between them."""

    def __init__(self, hosts: int, weather: Weather, rng: random.Random) -> None:
        self._weather = weather
        self._rng = rng
        self._flying: list[tuple[float, int, int, bytes]] = []  # (arrival, order, device, packet)
        self._order = 0
        self._free_at: dict[tuple[int, int], float] = {}  # by (from, to) device
        self.hosts: list[Host] = []
        self._device_of: dict[bytes, int] = {}  # by packed address
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        for number in range(1, hosts + 1):
            if libc.unshare(CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "unshare")
            namespace = os.open("/proc/self/ns/net", os.O_RDONLY)  # keeps it alive
            address = f"{NETWORK}{number}"
            device = _open_device(address)
            self._device_of[socket.inet_aton(address)] = device
            self.hosts.append(Host(address, f"/proc/{os.getpid()}/fd/{namespace}"))
            libc.setns(home, CLONE_NEWNET)

    def run(self) -> None:
        """Carry packets until standard input ends."""
        watched = [*self._device_of.values(), sys.stdin.fileno()]
        while True:
            now = time.monotonic()
            while self._flying and self._flying[0][0] <= now:
                _, _, device, packet = heapq.heappop(self._flying)
                try:
                    os.write(device, packet)
                except OSError:  # its queue is full: one more that is lost
                    continue
            wait = max(0.0, self._flying[0][0] - time.monotonic()) if self._flying else 1.0
            ready, _, _ = select.select(watched, [], [], wait)
            now = time.monotonic()
            for fd in ready:
                if fd == sys.stdin.fileno():
                    return
                self._read(fd, now)

    def _read(self, device: int, now: float) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                packet = os.read(device, 2048)
            except BlockingIOError:
                return
            to = self._device_of.get(packet[16:20])  # destination of an IPv4 header
            if packet[0] >> 4 != 4 or to is None or self._rng.random() < self._weather.loss:
                continue
            start = max(self._free_at.get((device, to), 0.0), now)
            if start - now > BUFFER_S:
                continue
            sent = start + len(packet) / self._weather.rate_bytes_per_s
            self._free_at[device, to] = sent
            self._order += 1
            arrival = sent + self._weather.one_way_s
            heapq.heappush(self._flying, (arrival, self._order, to, packet))


def _open_device(address: str) -> int:
    """A TUN device in this namespace, up, with its address and a route to the others."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", b"wan0", IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.255.0")):
            packed = struct.pack("16sHH4s8x", b"wan0", socket.AF_INET, 0, socket.inet_aton(value))
            fcntl.ioctl(control, request, packed)
        for name in (b"lo", b"wan0"):
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH14x", name, IFF_UP | IFF_RUNNING))
    return device


def main() -> None:
    hosts, seed = int(sys.argv[1]), int(sys.argv[2])
    weather = Weather(*map(float, sys.argv[3:6]))
    try:
        network = Network(hosts, weather, random.Random(seed))
    except OSError as exc:
        if exc.errno not in DENIALS:
            raise
        print(json.dumps(f"no network namespaces or TUN devices here: {exc}"))
        return
    print(json.dumps([host.__dict__ for host in network.hosts]), flush=True)
    network.run()


if __name__ == "__main__":
    main()
