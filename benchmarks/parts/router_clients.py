"""The clients of ``router_cpu.py``, and the CPU that a server spends on them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from pathlib import Path
from typing import Any

from parts.router_stand_ins import MODEL, STEP_S, TOKENS

WARM_S = 2.0

LOADS: dict[str, dict[str, Any]] = {
    "small": {"clients": 16, "tokens": 1, "stream": False, "nodes": ("n1", "n1")},
    "stream": {"clients": 32, "tokens": TOKENS, "stream": True, "nodes": ("n1", "n1")},
    "stream_split": {"clients": 32, "tokens": TOKENS, "stream": True, "nodes": ("n1", "n2")},
}


class Tally:
    """What clients received while ``counting``."""

    def __init__(self) -> None:
        self.counting = False
        self.events = 0
        self.requests = 0


async def client(port: int, load: dict[str, Any], tally: Tally) -> None:
    """Ask again and again on one connection, until cancelled."""
    ask = {"model": MODEL, "max_tokens": load["tokens"], "stream": load["stream"]}
    body = json.dumps(ask | {"messages": [{"role": "user", "content": "hello"}]}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"x-popmesh-route: prefill={load['nodes'][0]},decode={load['nodes'][1]}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        await asyncio.sleep(random.random() * STEP_S * 10)
        while True:
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer
            if load["stream"]:
                tail = b""
                while not tail.endswith(b"\r\n0\r\n\r\n"):
                    data = await reader.read(65536)
                    assert data, "the connection ended in mid-answer"
                    if tally.counting:
                        tally.events += data.count(b"data: ")
                    tail = (tail + data)[-7:]
            else:
                length = answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
                await reader.readexactly(int(length))
            tally.requests += tally.counting
    finally:
        writer.close()


async def measure(port: int, pid: int, load: dict[str, Any], seconds: float) -> dict[str, float]:
    """CPU of ``pid`` per event and per request under ``load``."""
    tally = Tally()
    async with asyncio.TaskGroup() as tasks:
        clients = [tasks.create_task(client(port, load, tally)) for _ in range(load["clients"])]
        await asyncio.sleep(WARM_S)
        tally.counting, before, start = True, cpu_s(pid), time.monotonic()
        await asyncio.sleep(seconds)
        wall, cpu, tally.counting = time.monotonic() - start, cpu_s(pid) - before, False
        for task in clients:
            task.cancel()
    out = {"wall_s": wall, "cpu_s": cpu, "requests": tally.requests, "events": tally.events}
    if load["stream"]:
        return out | {
            "events_per_s": tally.events / wall,
            "cpu_us_per_event": cpu / tally.events * 1e6,
        }
    per_request = cpu / tally.requests * 1e6
    return out | {"requests_per_s": tally.requests / wall, "cpu_us_per_request": per_request}


def cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9
